"""The congestion board: shared memory in which each process says what it does and predicts.

Owns the layout of the file (`docs/board.md`) and how it is written and read. Knows no engine and no
daemon: the tuples below name the six values of a line, and summing over writers is the reader's.
A line has one writer, and a writer's place is a lock that the kernel gives back when its process
ends: nothing here waits, counts of the dead cannot leak, and six values cost a few stores.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from mmap import mmap
from typing import Literal, NamedTuple
from zlib import crc32

VERSION = 1

BEAT_S = 0.1  # how often a writer should beat
DEAD_S = 0.5  # a heartbeat older than this counts only while its process lives,
STALLED_S = 5.0  # and older than this not at all

WRITERS = 128
LINES = 320  # per writer
MAX_NAME_BYTES = 128
MAX_KEY_BYTES = 176

Role = Literal["engine", "worker", "gateway"]
Values = tuple[int, int, int, int, int, int]

# What the values of a line are, by the role of its writer and the beginning of its key.
ENGINE_VALUES = ("running", "waiting", "kv_use_ppm", "tokens_per_s", "output_tokens", "attempts")
WORKER_ENGINE_VALUES = ("in_flight", "tokens_due")
WORKER_MODEL_VALUES = ("waiting", "tokens_waiting", "running")
GATEWAY_VALUES = ("connections", "in_flight", "streams", "requests", "failures", "unread_bytes")
ENGINE_KEY = "engine:"  # and the engine's id: a worker's line about an engine
MODEL_KEY = "model:"  # and the model's name: a worker's line about a model
GATEWAY_KEY = "gateway"

_ROLES: dict[int, Role] = {1: "engine", 2: "worker", 3: "gateway"}
_ROLE_NUMBERS = {role: number for number, role in _ROLES.items()}

# Sizes in bytes. A word has 8, a line (of cache, and of values) 64.
_LINE = 64
_SLOT = 192
_KEY = 192
_TABLE = _LINE
_AREAS = 28_672  # the table, and on to a whole page
_AREA = LINES * (_LINE + _KEY)  # of one writer: its lines, then their keys
SIZE = _AREAS + WRITERS * _AREA

_HEADER = struct.Struct("@7Q")  # magic, version, size, writers, lines, key size, board id
_MAGIC = int.from_bytes(b"CHIMERAB", "little")
# Words of a writer's slot. The generation is even while the slot is in use.
_GENERATION, _CHECK, _BEAT, _COUNT = 0, 5, 6, 7
_IDENTITY = struct.Struct("@5Q")  # generation, role, pid, start time, bytes of the name
_NAME_AT = _LINE
_NAME_BYTES = struct.Struct(f"{MAX_NAME_BYTES}s")
_KEY_HEAD = struct.Struct("@2Q")  # generation; CRC-32 above the length of the text
_LINE_WORDS = struct.Struct("@8Q")
_VALUES = struct.Struct("@7Q")  # six values, check

_RETRIES = 16  # of a line that is being written; each takes about the time of one write
_JUST_MADE_S = 60.0  # a file that has no size yet
_PREFIX = "chimera-board-"
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class BoardError(Exception):
    """The board cannot be used; work goes on without it. The text says what to change."""


class BoardFull(BoardError):
    """No place for another writer or line, or no memory behind it."""


class Row(NamedTuple):
    """One line of a living writer."""

    role: Role
    name: str
    pid: int
    key: str
    values: Values


class Line:
    """Six values that one writer keeps up to date. Made by `Writer.line`; for one thread."""

    __slots__ = ("_generation", "_sequence", "_words", "key")

    def __init__(self, key: str, words: "memoryview[int]", generation: int) -> None:
        self.key = key
        self._words = words
        self._generation = generation
        # A writer that was killed may have left it odd.
        self._sequence = (words[0] + 1) & ~1

    def set(
        self, v0: int = 0, v1: int = 0, v2: int = 0, v3: int = 0, v4: int = 0, v5: int = 0
    ) -> None:
        """All six at once: a reader sees these or the ones before, never some of each.

        Raises `ValueError` for a value outside 0 ... 2**63 - 1, and `BoardError` once the writer
        is closed.
        """
        if (v0 | v1 | v2 | v3 | v4 | v5) >> 63:
            raise ValueError(f"`{self.key}`: a value of the board must be in 0 ... 2**63 - 1")
        words = self._words
        # Kept first: were a signal to end this in the middle, no number may come twice.
        self._sequence = sequence = self._sequence + 2
        check = crc32(_LINE_WORDS.pack(sequence, v0, v1, v2, v3, v4, v5, self._generation))
        try:
            words[0] = sequence - 1
            _VALUES.pack_into(words, 8, v0, v1, v2, v3, v4, v5, check)
            words[0] = sequence
        except ValueError as error:
            raise BoardError(f"`{self.key}`: the writer of this line is closed") from error

    def release(self) -> None:
        """Let go of the memory: `Writer.close` does it."""
        self._words.release()


class Writer:
    """A process's place on the board. Made by `Board.writer`; for one thread of one process."""

    def __init__(self, board: "Board", slot: int, role: Role, name: str) -> None:
        self.role: Role = role
        self.name = name
        self.closed = False
        self._board = board
        self._slot = slot
        self._lines: dict[str, Line] = {}
        self._words = board.slot_words(slot)
        self._now_ns = board.now_ns
        # Odd while nobody may read: also what a writer leaves that was killed in the middle.
        self._generation = (self._words[_GENERATION] | 1) + 1
        self._sign_on(name.encode())

    def line(self, key: str) -> Line:
        """The line of this key; a new one begins with zeros. There is no way back: a key stays.

        Raises `BoardFull` beyond `LINES` keys or where memory ends, `BoardError` for a bad key.
        """
        self._check_open()
        line = self._lines.get(key)
        if line is None:
            text = _text(key, MAX_KEY_BYTES, "key")
            index = len(self._lines)
            if index == LINES:
                raise BoardFull(
                    f"`{self.name}` has {LINES} lines already, the most there are: "
                    "close this writer and claim another with the keys still in use"
                )
            words = self._board.new_line(self._slot, index, self._generation, text)
            line = Line(key, words, self._generation)
            line.set()
            self._lines[key] = line
            self._words[_COUNT] = index + 1
        return line

    def beat(self) -> None:
        """Say that this process goes on: every `BEAT_S`, from the loop that does the work."""
        self._check_open()
        self._words[_BEAT] = self._now_ns()

    def close(self) -> None:
        """Leave the board at once. Idempotent."""
        if not self.closed:
            self.closed = True
            for line in self._lines.values():
                line.release()
            self._words[_GENERATION] = self._generation + 1
            self._words.release()
            self._board.give_back(self._slot)

    def _check_open(self) -> None:
        if self.closed:
            raise BoardError(f"the writer `{self.name}` is closed")

    def _sign_on(self, name: bytes) -> None:
        words, pid = self._words, os.getpid()
        told = (_ROLE_NUMBERS[self.role], pid, start_time(pid), len(name))
        padded = name.ljust(MAX_NAME_BYTES, b"\0")
        words[_GENERATION] = self._generation - 1
        for index, value in enumerate(told, _GENERATION + 1):
            words[index] = value
        _NAME_BYTES.pack_into(words, _NAME_AT, padded)
        words[_CHECK] = crc32(padded, crc32(_IDENTITY.pack(self._generation, *told)))
        words[_COUNT] = 0
        words[_BEAT] = self._now_ns()
        words[_GENERATION] = self._generation


class _Seen:
    """What a reader remembers of a writer; as long as the generation stays, the keys do."""

    __slots__ = ("generation", "name", "pid", "role", "rows", "sequences", "started")

    def __init__(self, generation: int, role: Role, pid: int, started: int, name: str) -> None:
        self.generation = generation
        self.role: Role = role
        self.pid = pid
        self.started = started
        self.name = name
        self.rows: list[Row | None] = []  # None: not one good reading yet
        self.sequences: list[int] = []  # of the readings in `rows`


class Board:
    """The board as one process maps it. A context manager; for one thread."""

    def __init__(self, path: str, file: int, *, owner: bool, clock: Callable[[], int]) -> None:
        """``file`` is an open descriptor of a whole board. Use `create` or `open`."""
        self.path = path
        self.board_id = _LINE_WORDS.unpack(os.pread(file, _LINE, 0))[6]
        self.unsettled = 0  # readings given up, for which the last good one was taken
        self.now_ns = clock
        self._owner = owner
        self._file = file
        self._map = mmap(file, SIZE)
        self._words = memoryview(self._map).cast("Q")
        self._writers: dict[int, Writer] = {}
        self._seen: dict[int, _Seen] = {}
        self.closed = False

    @classmethod
    def create(
        cls, path: str | None = None, *, clock: Callable[[], int] = time.monotonic_ns
    ) -> "Board":
        """A new, empty board, for this user alone; without a path under a random name.

        It is this object's: closing it removes the file. ``clock`` in nanoseconds, of all
        processes the same. Raises `BoardError` if the file is there or cannot be made.
        """
        _check_system()
        path = path or board_path(secrets.token_hex(8))
        with _explained(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)
        try:
            with _explained(path):
                # Locked before it has a size: `remove_stale` takes it for somebody's from then on.
                _try_lock(file, 0, _LINE)
                os.ftruncate(file, SIZE)
                # All that readers touch: without memory behind it they would get SIGBUS.
                os.posix_fallocate(file, 0, _AREAS)
                os.pwrite(file, _header(secrets.randbits(63)), 0)
                return cls(path, file, owner=True, clock=clock)
        except BaseException:
            os.unlink(path)
            os.close(file)
            raise

    @classmethod
    def open(cls, path: str, *, clock: Callable[[], int] = time.monotonic_ns) -> "Board":
        """The board at this path. Raises `BoardError` for all that is no board of ours."""
        _check_system()
        with _explained(path):
            file = os.open(path, os.O_RDWR | _OPEN)
        try:
            with _explained(path):
                _check_file(path, file)
                return cls(path, file, owner=False, clock=clock)
        except BaseException:
            os.close(file)
            raise

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def writer(self, role: Role, name: str) -> Writer:
        """Claim a place, for this process and as long as it lives; names need not be unique.

        Raises `BoardFull` if there is none, `BoardError` for a bad role or name.
        """
        self._check_open()
        if role not in _ROLE_NUMBERS:
            raise BoardError(f"`{role}` is no role: take one of {', '.join(_ROLE_NUMBERS)}")
        _text(name, MAX_NAME_BYTES, "name")
        with _explained(self.path):
            slot = self._claim()
        self._writers[slot] = writer = Writer(self, slot, role, name)
        return writer

    def read(self) -> list[Row]:
        """The lines of all living writers, each as it was at one moment during this call.

        A line that cannot be read whole keeps the values read last; one never read is left out.
        """
        self._check_open()
        rows: list[Row] = []
        now_ns = self.now_ns()
        first, step = _TABLE // 8, _SLOT // 8
        generations = self._words[first : first + WRITERS * step : step].tolist()
        for slot, generation in enumerate(generations):
            if generation & 1 or not generation:
                continue
            seen = self._seen.get(slot)
            if seen is None or seen.generation != generation:
                seen = self._meet(slot, generation)
            if seen is not None and self._lives(slot, seen, now_ns):
                self._look(slot, seen)
                # Nobody else has begun there meanwhile, whose heartbeat would be taken for its own.
                if self._words[first + slot * step] != generation:
                    continue
                rows += [row for row in seen.rows if row is not None]
        return rows

    def close(self) -> None:
        """Close what this object has written, too; a board that it made is removed. Idempotent."""
        if self.closed:
            return
        for writer in list(self._writers.values()):
            writer.close()
        self.closed = True
        if self._owner:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self._words.release()
        self._map.close()
        os.close(self._file)

    # For `Writer`.

    def slot_words(self, slot: int) -> "memoryview[int]":
        """The words of a writer's slot."""
        first = (_TABLE + slot * _SLOT) // 8
        return self._words[first : first + _SLOT // 8]

    def new_line(self, slot: int, index: int, generation: int, key: bytes) -> "memoryview[int]":
        """Make memory for a line, note its key, and return its words."""
        line, text = _line_at(slot, index), _key_at(slot, index)
        with _explained(self.path):
            os.posix_fallocate(self._file, line, _LINE)
            os.posix_fallocate(self._file, text, _KEY)
        head = _KEY_HEAD.pack(generation, crc32(key) << 32 | len(key))
        self._map[text : text + _KEY] = (head + key).ljust(_KEY, b"\0")
        return self._words[line // 8 : (line + _LINE) // 8]

    def give_back(self, slot: int) -> None:
        """Let another writer have the slot."""
        del self._writers[slot]
        _unlock(self._file, _TABLE + slot * _SLOT, _SLOT)

    def _check_open(self) -> None:
        if self.closed:
            raise BoardError(f"{self.path}: this board is closed")

    def _claim(self) -> int:
        """Lock a slot that no living process has; two writers of this object share no lock."""
        for slot in range(WRITERS):
            if slot not in self._writers and _try_lock(self._file, _TABLE + slot * _SLOT, _SLOT):
                return slot
        raise BoardFull(
            f"{self.path}: all {WRITERS} places for writers are taken: run fewer processes "
            "(`workers`, `[gateway] processes`, engines) on one board"
        )

    def _meet(self, slot: int, generation: int) -> _Seen | None:
        """Read who writes there; None while that changes."""
        at = _TABLE + slot * _SLOT
        record = self._map[at : at + _SLOT]
        words = _LINE_WORDS.unpack_from(record)
        told, role, pid, started, length = words[:5]
        fits = crc32(record[_NAME_AT:], crc32(record[: _IDENTITY.size])) == words[_CHECK]
        if told != generation or not fits or role not in _ROLES or length > MAX_NAME_BYTES:
            self.unsettled += 1
            return None
        name = record[_NAME_AT : _NAME_AT + length].decode(errors="replace")
        seen = self._seen[slot] = _Seen(generation, _ROLES[role], pid, started, name)
        return seen

    def _lives(self, slot: int, seen: _Seen, now_ns: int) -> bool:
        age_s = 1e-9 * (now_ns - self._words[(_TABLE + slot * _SLOT) // 8 + _BEAT])
        if age_s <= DEAD_S:
            return True
        return age_s <= STALLED_S and seen.started == start_time(seen.pid) != 0

    def _look(self, slot: int, seen: _Seen) -> None:
        """Bring the rows up to date: read again where the sequence has moved."""
        count = min(self._words[(_TABLE + slot * _SLOT) // 8 + _COUNT], LINES)
        while len(seen.rows) < count:
            seen.rows.append(None)
            seen.sequences.append(0)
        first = _line_at(slot, 0) // 8
        for index, sequence in enumerate(self._words[first : first + 8 * count : 8].tolist()):
            if sequence != seen.sequences[index]:
                self._read_line(slot, index, seen)

    def _read_line(self, slot: int, index: int, seen: _Seen) -> None:
        at = _line_at(slot, index)
        words, first = self._words, at // 8
        for _ in range(_RETRIES):
            sequence = words[first]
            if not sequence & 1:
                line = self._map[at : at + _LINE]
                if words[first] == sequence and _is_whole(line, sequence, seen.generation):
                    row = seen.rows[index]
                    key = self._key(slot, index, seen.generation) if row is None else row.key
                    if key is not None:
                        values = _LINE_WORDS.unpack(line)[1:7]
                        seen.rows[index] = Row(seen.role, seen.name, seen.pid, key, values)
                        seen.sequences[index] = sequence
                        return
        self.unsettled += 1

    def _key(self, slot: int, index: int, generation: int) -> str | None:
        """The text of a line's key; None if what is there is not of this generation."""
        at = _key_at(slot, index)
        record = self._map[at : at + _KEY]
        told, mixed = _KEY_HEAD.unpack_from(record)
        length, check = mixed & 0xFFFF_FFFF, mixed >> 32
        text = record[_KEY_HEAD.size : _KEY_HEAD.size + length]
        if told != generation or length > MAX_KEY_BYTES or crc32(text) != check:
            return None
        return text.decode(errors="replace")


def board_path(name: str) -> str:
    """Where the board of this name lies: shared memory, or the temporary folder without it."""
    if _FILE_NAME.fullmatch(name) is None:
        raise BoardError(f"`{name}`: a board's name has 1 to 64 letters, digits, or `_ . -`")
    return os.path.join(_folder(), f"{_PREFIX}{os.geteuid()}-{name}")


def remove_stale(folder: str | None = None) -> list[str]:
    """Remove this user's boards whose maker has ended; return their paths. Raises nothing."""
    folder = folder or _folder()
    removed: list[str] = []
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if name.startswith(f"{_PREFIX}{os.geteuid()}-") and _is_stale(path):
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    removed.append(path)
    return removed


def start_time(pid: int) -> int:
    """When a process began, in clock ticks since boot: tells it from a later one with its number.

    0 if there is none, if it has ended and nobody has asked for its status yet, or without /proc.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name before it, in brackets, may hold anything. State is field 3, start field 22.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def _folder() -> str:
    shared = "/dev/shm"
    return shared if os.access(shared, os.W_OK | os.X_OK) else tempfile.gettempdir()


def _line_at(slot: int, index: int) -> int:
    return _AREAS + slot * _AREA + index * _LINE


def _key_at(slot: int, index: int) -> int:
    return _AREAS + slot * _AREA + LINES * _LINE + index * _KEY


def _is_whole(line: bytes, sequence: int, generation: int) -> bool:
    """Nothing of an earlier or later writing, nor of an earlier writer, is among the words.

    The sequence, read before and after, is enough where stores and loads keep their order (x86-64).
    Elsewhere Python has no fence to offer, and the check finds what the sequence cannot.
    """
    words = _LINE_WORDS.unpack(line)
    return words[0] == sequence and words[7] == crc32(
        generation.to_bytes(8, sys.byteorder), crc32(line[:56])
    )


def _text(text: str, most: int, what: str) -> bytes:
    with contextlib.suppress(UnicodeEncodeError):
        encoded = text.encode()
        if 0 < len(encoded) <= most:
            return encoded
    raise BoardError(f"a {what} on the board has 1 to {most} bytes of UTF-8, not {text[:64]!r}")


def _header(board_id: int) -> bytes:
    words = _HEADER.pack(_MAGIC, VERSION, SIZE, WRITERS, LINES, _KEY, board_id)
    return words + struct.pack("@Q", crc32(words))


def _check_system() -> None:
    if not hasattr(fcntl, "F_OFD_SETLK"):
        raise BoardError("the congestion board needs Linux (locks of open file descriptions)")


def _check_file(path: str, file: int) -> None:
    status = os.fstat(file)
    header = os.pread(file, _LINE, 0) if stat.S_ISREG(status.st_mode) else b""
    if len(header) < _LINE or _LINE_WORDS.unpack(header)[0] != _MAGIC:
        raise BoardError(f"{path} is not a congestion board: pass the path that the daemon tells")
    if status.st_uid != os.geteuid():
        raise BoardError(f"{path} belongs to another user: run all of Chimera as one user")
    told = _LINE_WORDS.unpack(header)
    if told[1] != VERSION:
        raise BoardError(
            f"{path} has layout version {told[1]}, this program needs {VERSION}: "
            "run daemon, engine hosts and gateways of one release"
        )
    if header != _header(told[6]) or status.st_size != SIZE:
        raise BoardError(f"{path} is damaged ({status.st_size} bytes): restart the daemon")


def _is_stale(path: str) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | _OPEN)
    except OSError:
        return False
    try:
        status = os.fstat(file)
        # The size first: whoever gave it one had locked it before.
        just_made = status.st_size == 0 and time.time() - status.st_mtime < _JUST_MADE_S
        ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        return ours and not just_made and not _is_locked(file, 0, _LINE)
    except OSError:
        return False
    finally:
        os.close(file)


def _try_lock(file: int, start: int, length: int) -> bool:
    """Lock these bytes for as long as the file is open anywhere; False if another has them."""
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, start, length))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _unlock(file: int, start: int, length: int) -> None:
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, start, length))


def _is_locked(file: int, start: int, length: int) -> bool:
    found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, start, length))
    return _FLOCK.unpack(found)[0] != fcntl.F_UNLCK


def _flock(kind: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


@contextlib.contextmanager
def _explained(path: str) -> Generator[None, None, None]:
    """Turns what the system says into a `BoardError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise BoardFull(
                f"{path}: no memory left behind the board: give the machine or container more "
                "shared memory (with Docker: --shm-size)"
            ) from error
        raise BoardError(f"{path}: {error.strerror or error}") from error
