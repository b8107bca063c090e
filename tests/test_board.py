"""The congestion board: what is written is read, whole or not at all, and only of the living."""

import fcntl
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path

import pytest

from board_writer import KEYS, TOKENS, values
from chimera_daemon import board as module
from chimera_daemon.board import (
    DEAD_S,
    LINES,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    SIZE,
    STALLED_S,
    VERSION,
    WRITERS,
    Board,
    BoardError,
    BoardFull,
    board_path,
    remove_stale,
)

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 30.0


class Clock:
    """Nanoseconds, as far on as the test says."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000_000

    def __call__(self) -> int:
        return self.now_ns

    def go_on(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "board")


@pytest.fixture
def board(path: str, clock: Clock) -> Iterator[Board]:
    with Board.create(path, clock=clock) as board:
        yield board


@pytest.fixture
def reader(board: Board, clock: Clock) -> Iterator[Board]:
    with Board.open(board.path, clock=clock) as reader:
        yield reader


def poke(path: str, at: int, word: int) -> None:
    """Write a word of the file behind everybody's back."""
    with open(path, "r+b") as file, mmap(file.fileno(), 0) as memory:
        memory[at : at + 8] = struct.pack("=Q", word)


def peek(path: str, at: int) -> int:
    with open(path, "rb") as file:
        file.seek(at)
        return struct.unpack("=Q", file.read(8))[0]


SLOT_0 = 64  # generation, role, pid, start time, length of the name, check, heartbeat, lines
LINE_0 = 28_672  # sequence, six values, check
KEY_0 = LINE_0 + LINES * 64  # generation, check and length, text


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, "not within the limit"


# Writing and reading.


def test_what_is_written_is_read_by_others_and_by_itself(board: Board, reader: Board) -> None:
    host = board.writer("engine", "large-0")
    host.line("large-0").set(1, 2, 3, 4, 5, 6)
    worker = reader.writer("worker", "worker-1")
    worker.line("engine:large-0").set(7, 2**63 - 1)
    rows = [
        ("engine", "large-0", os.getpid(), "large-0", (1, 2, 3, 4, 5, 6)),
        ("worker", "worker-1", os.getpid(), "engine:large-0", (7, 2**63 - 1, 0, 0, 0, 0)),
    ]
    assert board.read() == reader.read() == rows
    host.line("large-0").set(9)
    assert board.read()[0].values == reader.read()[0].values == (9, 0, 0, 0, 0, 0)
    assert board.read()[1:] == rows[1:]


def test_a_line_is_there_from_the_first_and_once(board: Board, reader: Board) -> None:
    writer = board.writer("gateway", "gateway")
    assert reader.read() == []
    line = writer.line("gateway")
    assert [row.values for row in reader.read()] == [(0,) * 6]
    assert writer.line("gateway") is line
    writer.line("other")
    assert [row.key for row in reader.read()] == ["gateway", "other"]


def test_longest_names_and_keys_and_any_alphabet(board: Board, reader: Board) -> None:
    name, key = "é" * (MAX_NAME_BYTES // 2), "模" * (MAX_KEY_BYTES // 3) + "ab"
    board.writer("engine", name).line(key)
    (row,) = reader.read()
    assert (row.name, row.key) == (name, key)


def test_two_boards_have_nothing_in_common(board: Board, tmp_path: Path) -> None:
    with Board.create(str(tmp_path / "other")) as other:
        board.writer("worker", "w").line("model:m").set(1)
        assert other.read() == []
        assert other.board_id != board.board_id


@pytest.mark.parametrize("wrong", [-1, 2**63, 2**64, -(2**70)])
@pytest.mark.parametrize("place", range(6))
def test_a_value_out_of_range_changes_nothing(board: Board, wrong: int, place: int) -> None:
    line = board.writer("worker", "w").line("model:m")
    line.set(1, 2, 3, 4, 5, 6)
    told = [10] * 6
    told[place] = wrong
    with pytest.raises(ValueError, match=r"`model:m`.*2\*\*63 - 1"):
        line.set(*told)
    assert board.read()[0].values == (1, 2, 3, 4, 5, 6)
    with pytest.raises(TypeError):
        line.set(1.5)  # type: ignore[arg-type]
    line.set(7)
    assert board.read()[0].values == (7, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("key", ["", "k" * (MAX_KEY_BYTES + 1), "模" * 60, "\ud800"])
def test_a_bad_key_is_refused(board: Board, key: str) -> None:
    writer = board.writer("worker", "w")
    with pytest.raises(BoardError, match="a key on the board has 1 to 176 bytes of UTF-8"):
        writer.line(key)
    assert board.read() == []


@pytest.mark.parametrize("name", ["", "n" * (MAX_NAME_BYTES + 1), "\udfff"])
def test_a_bad_name_is_refused_and_takes_no_place(board: Board, name: str) -> None:
    with pytest.raises(BoardError, match="a name on the board has 1 to 128 bytes of UTF-8"):
        board.writer("worker", name)
    board.writer("worker", "w")
    assert peek(board.path, SLOT_0) == 2


def test_a_bad_role_is_refused(board: Board) -> None:
    with pytest.raises(BoardError, match="`client` is no role: take one of engine, worker"):
        board.writer("client", "c")  # type: ignore[arg-type]


def test_lines_end_and_a_new_writer_begins_again(board: Board, reader: Board) -> None:
    writer = board.writer("worker", "w")
    for number in range(LINES):
        writer.line(f"engine:{number}").set(number)
    with pytest.raises(BoardFull, match="close this writer and claim another"):
        writer.line("one more")
    rows = reader.read()
    assert [row.values[0] for row in rows] == list(range(LINES))
    assert writer.line("engine:7") is writer.line("engine:7")
    writer.close()
    board.writer("worker", "w").line("one more")
    assert [row.key for row in reader.read()] == ["one more"]


def test_writers_end_and_a_place_given_back_is_taken(board: Board, reader: Board) -> None:
    writers = [(board, reader)[i % 2].writer("gateway", f"g{i}") for i in range(WRITERS)]
    for full in (board, reader):
        with pytest.raises(BoardFull, match="all 128 places for writers are taken: run fewer"):
            full.writer("gateway", "one more")
    writers[77].close()
    writers[77].close()
    board.writer("gateway", "one more").line("gateway")
    assert [row.name for row in reader.read()] == ["one more"]
    assert os.stat(board.path).st_size == SIZE


# Closing.


def test_what_is_closed_is_gone_at_once_and_cannot_be_written(board: Board, reader: Board) -> None:
    writer = board.writer("worker", "w")
    line = writer.line("model:m")
    assert len(reader.read()) == 1
    writer.close()
    assert reader.read() == []
    with pytest.raises(BoardError, match="`model:m`: the writer of this line is closed"):
        line.set(1)
    for use in (writer.beat, lambda: writer.line("model:n")):
        with pytest.raises(BoardError, match="the writer `w` is closed"):
            use()


def test_a_place_is_used_again_without_a_trace_of_the_one_before(
    board: Board, reader: Board
) -> None:
    for number in range(5):
        writer = board.writer("worker", f"w{number}")
        keys = [f"engine:{number}.{i}" for i in range(5 - number)]
        for key in keys:
            writer.line(key).set(number)
        assert [(row.name, row.key, row.values[0]) for row in reader.read()] == [
            (f"w{number}", key, number) for key in keys
        ]
        writer.close()
    assert peek(board.path, SLOT_0 + 192) == 0


def test_a_board_is_closed_with_its_writers_and_removed_by_its_maker(path: str) -> None:
    made = Board.create(path)
    opened = Board.open(path)
    opened.writer("worker", "w").line("model:m")
    assert len(made.read()) == 1
    opened.close()
    assert made.read() == []
    assert os.path.exists(path)
    opened.close()
    for use in (opened.read, lambda: opened.writer("worker", "w")):
        with pytest.raises(BoardError, match="is closed"):
            use()
    with Board.open(path) as again:
        again.writer("worker", "w").line("model:m")
        assert len(made.read()) == 1
    made.close()
    assert not os.path.exists(path)
    made.close()


def test_opening_and_closing_leaks_no_descriptor(path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with Board.create(path) as board, Board.open(path) as reader:
            board.writer("worker", "w").line("k")
            reader.read()
            with pytest.raises(BoardError):
                Board.create(path)
    with pytest.raises(BoardError):
        Board.open(path)
    assert len(os.listdir("/proc/self/fd")) == before


# Who lives.


def test_a_process_that_lives_counts_until_it_has_stalled(
    board: Board, reader: Board, clock: Clock
) -> None:
    writer = board.writer("worker", "w")
    writer.line("model:m").set(3)
    for step_s, counts in [(DEAD_S, True), (0.1, True), (STALLED_S - DEAD_S - 0.2, True)]:
        clock.go_on(step_s)
        assert bool(reader.read()) == counts
    clock.go_on(0.2)
    assert reader.read() == []
    writer.beat()
    assert [row.values[0] for row in reader.read()] == [3]


def test_a_later_process_with_the_same_number_is_not_taken_for_the_writer(
    board: Board, reader: Board, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.start_time
    monkeypatch.setattr(module, "start_time", lambda pid: real(pid) - 1)
    board.writer("worker", "w").line("model:m")
    monkeypatch.setattr(module, "start_time", real)
    clock.go_on(DEAD_S)
    assert len(reader.read()) == 1
    clock.go_on(0.001)
    assert reader.read() == []


def test_without_proc_only_the_heartbeat_counts(
    board: Board, reader: Board, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "start_time", lambda pid: 0)
    board.writer("worker", "w").line("model:m")
    assert len(reader.read()) == 1
    clock.go_on(DEAD_S + 0.001)
    assert reader.read() == []


def test_start_times_tell_processes_apart() -> None:
    assert module.start_time(os.getpid()) > 0
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert module.start_time(child.pid) >= module.start_time(os.getpid())
        child.kill()
        # Ended, though nobody has asked for its status.
        wait_for(lambda: module.start_time(child.pid) == 0)
        child.wait()
    assert module.start_time(child.pid) == 0


# Half-done writes, as a killed writer leaves them or a machine that reorders stores shows them.


def test_a_line_in_the_middle_of_a_write_keeps_its_last_values(board: Board, reader: Board) -> None:
    line = board.writer("worker", "w").line("model:m")
    line.set(1, 1, 1, 1, 1, 1)
    reader.read()
    poke(board.path, LINE_0, peek(board.path, LINE_0) + 1)
    poke(board.path, LINE_0 + 8, 2)
    assert [row.values for row in reader.read()] == [(1,) * 6]
    assert reader.unsettled == 1
    # Who has not read it before has nothing to show.
    with Board.open(board.path, clock=board.now_ns) as late:
        assert late.read() == []
        assert late.unsettled == 1
    line.set(2, 2, 2, 2, 2, 2)
    assert [row.values for row in reader.read()] == [(2,) * 6]
    assert reader.unsettled == 1


class Interrupted:
    """In place of the struct that stores the values."""

    def pack_into(self, *_: object) -> None:
        raise KeyboardInterrupt


def test_a_write_that_was_interrupted_is_not_seen_and_no_number_comes_twice(
    board: Board, reader: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = board.writer("worker", "w").line("model:m")
    line.set(1)
    before = peek(board.path, LINE_0)
    reader.read()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_VALUES", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            line.set(2)
    assert [row.values[0] for row in reader.read()] == [1]
    line.set(3)
    assert [row.values[0] for row in reader.read()] == [3]
    assert peek(board.path, LINE_0) == before + 4


@pytest.mark.parametrize("word", range(1, 8))
def test_words_that_do_not_belong_together_are_found_by_the_check(
    board: Board, reader: Board, word: int
) -> None:
    line = board.writer("worker", "w").line("model:m")
    line.set(1, 2, 3, 4, 5, 6)
    reader.read()
    line.set(2, 3, 4, 5, 6, 7)
    poke(board.path, LINE_0 + 8 * word, word)
    assert [row.values for row in reader.read()] == [(1, 2, 3, 4, 5, 6)]
    assert reader.unsettled == 1


def test_values_of_an_earlier_writer_do_not_pass_for_a_later_ones(
    board: Board, reader: Board, clock: Clock
) -> None:
    board.writer("worker", "w").line("engine:a").set(5)
    sequence, check = peek(board.path, LINE_0), peek(board.path, LINE_0 + 56)
    for writer in list(board._writers.values()):
        writer.close()
    board.writer("worker", "w").line("engine:b")
    poke(board.path, LINE_0, sequence)
    poke(board.path, LINE_0 + 8, 5)
    poke(board.path, LINE_0 + 56, check)
    assert reader.read() == []


@pytest.mark.parametrize("at", [KEY_0, KEY_0 + 8, KEY_0 + 16])
def test_a_key_that_is_not_of_this_writer_is_not_shown(
    board: Board, reader: Board, at: int
) -> None:
    board.writer("worker", "w").line("engine:a")
    poke(board.path, at, 4)
    assert reader.read() == []
    assert reader.unsettled == 1


@pytest.mark.parametrize("word", [1, 2, 3, 4, 5, 8])
def test_a_writer_that_cannot_be_told_is_not_shown(board: Board, reader: Board, word: int) -> None:
    board.writer("worker", "w").line("engine:a")
    poke(board.path, SLOT_0 + 8 * word, 1 << 40)
    assert reader.read() == []
    assert reader.unsettled == 1


def test_a_place_is_not_read_while_it_is_claimed_and_free_if_that_was_never_ended(
    board: Board, reader: Board
) -> None:
    poke(board.path, SLOT_0, 1)
    assert reader.read() == []
    board.writer("worker", "w").line("engine:a")
    assert peek(board.path, SLOT_0) == 2
    assert len(reader.read()) == 1


def test_a_writer_that_changes_during_a_reading_is_left_out(
    board: Board, reader: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = board.writer("worker", "w")
    writer.line("engine:a").set(5)
    reader.read()
    look = Board._look

    def claim_then_look(self: Board, slot: int, seen: module._Seen) -> None:
        writer.close()
        board.writer("worker", "v").line("engine:b")
        monkeypatch.setattr(Board, "_look", look)
        look(self, slot, seen)

    monkeypatch.setattr(Board, "_look", claim_then_look)
    assert reader.read() == []
    assert [row.name for row in reader.read()] == ["v"]


def test_a_count_of_lines_out_of_range_is_bounded(board: Board, reader: Board) -> None:
    board.writer("worker", "w").line("engine:a")
    poke(board.path, SLOT_0 + 56, 1 << 62)
    assert [row.key for row in reader.read()] == ["engine:a"]


# Files.


def test_a_board_is_for_its_user_alone_and_lies_in_shared_memory() -> None:
    with Board.create() as board:
        assert stat.S_IMODE(os.stat(board.path).st_mode) == 0o600
        assert os.path.dirname(board.path) == os.path.dirname(board_path("x"))
        if os.access("/dev/shm", os.W_OK):
            assert board.path.startswith("/dev/shm/")
        assert os.stat(board.path).st_blocks * 512 < 256 << 10  # the rest has no memory yet
    assert not os.path.exists(board.path)


@pytest.mark.parametrize("name", ["", "a/b", "..\n", "x" * 65, "é"])
def test_a_bad_board_name_is_refused(name: str) -> None:
    with pytest.raises(BoardError, match="a board's name has 1 to 64 letters"):
        board_path(name)


def test_making_a_board_never_writes_to_what_is_there(path: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    os.symlink(target, path)
    with pytest.raises(BoardError, match="File exists"):
        Board.create(path)
    assert not target.exists()
    os.unlink(path)
    Path(path).write_text("mine")
    with pytest.raises(BoardError, match="File exists"):
        Board.create(path)
    assert Path(path).read_text() == "mine"


def _other_version(path: str) -> None:
    with Board.create(path + ".source"):
        Path(path).write_bytes(Path(path + ".source").read_bytes())
    poke(path, 8, VERSION + 1)


def _damaged(path: str) -> None:
    with Board.create(path + ".source"):
        Path(path).write_bytes(Path(path + ".source").read_bytes())
    poke(path, 24, 7)


def _short(path: str) -> None:
    with Board.create(path + ".source"):
        Path(path).write_bytes(Path(path + ".source").read_bytes()[:-4096])


def _link(path: str) -> None:
    os.symlink("/dev/null", path)


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda path: None, "No such file"),
        (lambda path: Path(path).write_bytes(b""), "is not a congestion board"),
        (lambda path: Path(path).write_bytes(random.Random(1).randbytes(SIZE)), "is not a cong"),
        (os.mkdir, "Is a directory"),
        (os.mkfifo, "is not a congestion board"),
        (_link, "symbolic links"),
        (_short, r"is damaged \(\d+ bytes\): restart the daemon"),
        (_damaged, "is damaged"),
        (_other_version, "has layout version 2, this program needs 1: run daemon, engine hosts"),
    ],
)
def test_what_is_no_board_is_refused(path: str, make: Callable[[str], object], advice: str) -> None:
    make(path)
    with pytest.raises(BoardError, match=advice):
        Board.open(path)


def test_a_board_of_another_user_is_refused(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(BoardError, match="belongs to another user"):
        Board.open(board.path)


def test_no_memory_is_an_error_and_not_a_signal(
    board: Board, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = board.writer("worker", "w")

    def refuse(*_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(BoardFull, match="--shm-size"):
            writer.line("engine:a")
        with pytest.raises(BoardFull, match="--shm-size"):
            Board.create(path + ".more")
    assert not os.path.exists(path + ".more")
    writer.line("engine:a").set(1)
    assert [row.values[0] for row in board.read()] == [1]


def test_a_system_without_such_locks_is_told(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fcntl, "F_OFD_SETLK")
    for use in (Board.create, Board.open):
        with pytest.raises(BoardError, match="needs Linux"):
            use(path)


def test_stale_boards_are_removed_and_no_others(tmp_path: Path) -> None:
    prefix = f"chimera-board-{os.geteuid()}-"
    living, dead, other = (str(tmp_path / (prefix + name)) for name in ("living", "dead", "other"))
    make = f"from chimera_daemon.board import Board; b = Board.create({dead!r}); print(); input()"
    command = [sys.executable, "-c", make]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child, Board.create(living):
        assert child.stdout is not None
        child.stdout.readline()
        assert remove_stale(str(tmp_path)) == []
        child.kill()
        child.wait()
        just_made = tmp_path / (prefix + "just-made")
        just_made.touch()
        forgotten = tmp_path / (prefix + "forgotten")
        forgotten.touch()
        os.utime(forgotten, (0, 0))
        os.mkdir(other)
        os.symlink(living, tmp_path / (prefix + "link"))
        (tmp_path / f"chimera-board-{os.geteuid() + 1}-x").write_bytes(b"x")
        (tmp_path / "chimera").write_bytes(b"x")
        assert remove_stale(str(tmp_path)) == [dead, str(forgotten)]
        assert just_made.exists()
        assert os.path.exists(living)
        assert remove_stale(str(tmp_path)) == []
    assert remove_stale(str(tmp_path / "nowhere")) == []


# Processes.


class Process:
    """One `board_writer.py`."""

    def __init__(self, path: str, name: str) -> None:
        self.name = name
        script = str(ROOT / "tests" / "board_writer.py")
        self._child = subprocess.Popen(
            [sys.executable, script, path, name, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def has_begun(self) -> None:
        assert self._child.stdout is not None
        assert self._child.stdout.readline() == b"begun\n"

    def stop(self) -> dict[str, int]:
        """Returns what it holds, by key; it goes on living."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(b"stop\n")
        self._child.stdin.flush()
        return dict(zip(KEYS, map(int, self._child.stdout.readline().split()), strict=True))

    def end(self, kill: bool = False) -> None:
        if kill:
            self._child.send_signal(signal.SIGKILL)
        self._child.communicate(timeout=LIMIT_S)


def whole_rows(reader: Board) -> dict[str, dict[str, int]]:
    """Tokens by name and key, of lines that were each found whole."""
    found: dict[str, dict[str, int]] = {}
    for row in reader.read():
        tokens, _, move, *_ = row.values
        assert row.values == values(tokens, move) or row.values == (0,) * 6, row
        found.setdefault(row.name, {})[row.key] = tokens
    return found


def wait_for_absence(reader: Board, name: str) -> None:
    wait_for(lambda: name not in whole_rows(reader))


@pytest.mark.parametrize("seed", [1, 2])
def test_writers_killed_at_any_moment_leave_exact_sums(seed: int) -> None:
    chance = random.Random(seed)
    running: list[Process] = []
    started = 0
    blocks = 0
    with Board.create() as board, Board.open(board.path) as reader:
        path = board.path
        try:
            for _ in range(5):
                new = [Process(path, f"writer-{started + i}") for i in range(4 - len(running))]
                running += new
                started += len(new)
                for process in new:  # they claim their places at about the same time
                    process.has_begun()
                for _ in range(chance.randint(100, 400)):
                    whole_rows(reader)
                victim = running.pop(chance.randrange(4))
                victim.end(kill=True)
                wait_for_absence(reader, victim.name)
                blocks = blocks or os.stat(path).st_blocks
            held = {process.name: process.stop() for process in running}
            assert all(sum(by_key.values()) == TOKENS for by_key in held.values())
            assert whole_rows(reader) == whole_rows(board) == held
        finally:
            for process in running:
                process.end(kill=True)
        # A place is taken again: four were never exceeded, and no memory was added.
        assert [peek(path, SLOT_0 + 192 * slot) > 0 for slot in range(5)] == [True] * 4 + [False]
        assert os.stat(path).st_blocks == blocks
        wait_for(lambda: reader.read() == [])


def test_a_killed_writer_that_nobody_has_waited_for_is_left_out(path: str, clock: Clock) -> None:
    with Board.create(path) as board, Board.open(path, clock=clock) as later:
        process = Process(path, "w")
        process.has_begun()
        os.kill(process._child.pid, signal.SIGKILL)
        try:
            wait_for(lambda: module.start_time(process._child.pid) == 0)
            clock.now_ns = time.monotonic_ns() + int(DEAD_S * 1e9)
            assert later.read() == []
            # Its place is free although its number is not.
            board.writer("worker", "next").line("engine:a")
            assert peek(path, SLOT_0 + 192) == 0
        finally:
            process.end(kill=True)


# Its description.


def test_the_reader_in_the_document_reads_the_board(board: Board, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "board.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    script = tmp_path / "reader.py"
    script.write_text(example)
    with Board.create(str(tmp_path / "real-clock")) as board:
        board.writer("engine", "e").line("small-0").set(1, 2, 3, 4, 5, 6)
        board.writer("worker", "w").line("engine:small-0").set(7, 8)
        board.writer("worker", "gone").close()
        done = subprocess.run(
            [sys.executable, str(script), board.path],
            capture_output=True,
            text=True,
            check=True,
            timeout=LIMIT_S,
        )
    pid = os.getpid()
    assert done.stdout.splitlines() == [
        f"1 e {pid} small-0 (1, 2, 3, 4, 5, 6)",
        f"2 w {pid} engine:small-0 (7, 8, 0, 0, 0, 0)",
    ]


def test_the_document_has_the_numbers_of_the_code() -> None:
    text = (ROOT / "docs" / "board.md").read_text(encoding="utf-8")
    assert f"layout version {VERSION}" in text
    names = {"WRITERS": WRITERS, "LINES": LINES, "SIZE": SIZE, "AREAS": module._AREAS}
    for name, value in names.items():
        assert f"`{name}` = {value}" in text
    assert f"older than {DEAD_S:g} s" in text
    assert f"beyond {STALLED_S:g} s" in text
    for tuple_ in (
        module.ENGINE_VALUES,
        module.WORKER_ENGINE_VALUES,
        module.WORKER_MODEL_VALUES,
        module.GATEWAY_VALUES,
    ):
        assert ", ".join(f"`{name}`" for name in tuple_) in text
