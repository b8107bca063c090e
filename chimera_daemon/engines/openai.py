"""Any OpenAI-compatible server as an engine: connections, slots, health; what is said is elsewhere.

Owns the HTTP session and the attempts on it. One attempt is one request on one connection, which is
closed to abort it. An attempt is sent twice only where the server had closed an idle connection
that was used again: everything else is for the daemon to run elsewhere.
"""

import asyncio
import contextlib
import difflib
import heapq
import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from chimera_daemon.config import EngineConfig, PositiveSeconds
from chimera_daemon.engines.backend import BackendInfo, EngineStartError, Events
from chimera_daemon.engines.openai_forms import (
    MAX_ANSWER_BYTES,
    EventStream,
    RemoteError,
    Request,
    Target,
    pause_of,
    refusal,
    too_large,
    translate,
)
from chimera_daemon.engines.payload import PayloadError
from chimera_daemon.engines.rate import Rate
from chimera_daemon.messages import (
    EngineChunk,
    EngineFailed,
    EngineFinished,
    EngineStats,
    Profile,
    Run,
)

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger("chimera.engine")

DEFAULT_CONTEXT_TOKENS = 32_768
MAX_HEALTH_FAILURES = 2  # in a row, then no new work
MAX_CONNECT_FAILURES = 3  # of attempts in a row, likewise
_FIRST_LOOK_S = 1.0  # that `start` waits for the server
_LOOK_AGAIN_S = 1.0  # at most, while the server is away
_DRAIN_S = 1.0  # for the last bytes after the end of a stream, so that its connection serves again
# Below the 5 s after which uvicorn (vLLM, SGLang) closes an idle connection.
_KEEP_ALIVE_S = 4.0
_MAX_ERROR_BYTES = 64 << 10
_MAX_LIST_BYTES = 4 << 20
_MAX_NAMES = 8  # of served models, in a message
_MAX_MESSAGE = 4096
_MIN_SECRET = 8  # shorter ones may be any word of a message

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[ -~]*")
_OWN_HEADERS = {"connection", "content-length", "content-type", "transfer-encoding"}
_NOT_INSTALLED = (
    "aiohttp is not installed, which remote engines need: pip install 'chimera-daemon[gateway]'"
)


class RemoteOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """``args`` of a remote engine."""

    model: str | None = None  # its name there; None: the same as here
    api_key_file: str | None = None  # sent as a bearer token
    headers: dict[str, str] = {}
    slots: Annotated[int, Meta(ge=1, le=100_000)] = 16  # requests, and so connections, at once
    context_tokens: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None  # None: as it says
    # A model of some 8B parameters on one GPU; the daemon corrects it by what it sees.
    profile: Profile = Profile(0.02, 0.0002, 0.00005)
    connect_timeout_s: PositiveSeconds = 5.0
    first_byte_timeout_s: PositiveSeconds = 600.0  # without a stream: for the whole answer
    idle_timeout_s: PositiveSeconds = 60.0  # between bytes of an answer
    health_s: PositiveSeconds = 5.0  # between looks at the server
    priority: bool = False  # pass it on (vLLM with `--scheduling-policy priority`)
    verify_tls: bool = True
    # Output limit of our text form; OpenAI's reasoning models take the second name only.
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"


class _Attempt:
    """One attempt between `submit` and its answer."""

    __slots__ = ("answer", "body", "done", "path", "reused", "run", "task")

    def __init__(self, run: Run, request: Request) -> None:
        self.run = run
        self.path = request.path
        self.body = request.body
        self.answer = request.answer
        self.task: asyncio.Task[None] | None = None
        self.reused = False  # its connection had served before
        self.done = False  # answered or cancelled: nothing more may be emitted


class RemoteBackend:
    """See the head of this file. ``engine.path`` is the base URL."""

    def __init__(self, engine: EngineConfig) -> None:
        self._engine = engine
        self._session: aiohttp.ClientSession | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()
        self._attempts: dict[int, _Attempt] = {}
        self._waiting: list[tuple[int, int, _Attempt]] = []  # heap by priority, then arrival
        self._running: set[_Attempt] = set()
        self._arrivals = 0
        self._output_tokens = 0
        self._rate = Rate()
        self._started = False
        self._down = "it has not answered yet"  # why there is no new work; empty: there may be
        self._health_failures = MAX_HEALTH_FAILURES - 1  # at first, one is enough
        self._connect_failures = 0

    # Life.

    async def start(self, events: Events) -> BackendInfo:
        """Returns soon, suspended if the server cannot be used yet; raises `EngineStartError`."""
        self._events = events
        self._options = options = _read_options(self._engine)
        self._url = _read_url(self._engine)
        headers, self._secrets = _read_headers(self._engine, options)
        self._remote_model = options.model or self._engine.model
        self._context_tokens = options.context_tokens or DEFAULT_CONTEXT_TOKENS
        self._learn(None)
        self._session = self._open_session(headers)
        self._watcher = asyncio.ensure_future(self._watch())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_LOOK_S):
                await self._looked.wait()
        self._started = True
        if self._down:
            events.suspend(self._reason())
        return self._info

    async def close(self) -> None:
        """Cancel everything and close all connections."""
        self._waiting.clear()
        for attempt in self._attempts.values():
            attempt.done = True
        self._attempts.clear()
        tasks = [attempt.task for attempt in self._running if attempt.task is not None]
        if self._watcher is not None:
            tasks.append(self._watcher)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def _open_session(self, headers: dict[str, str]) -> "aiohttp.ClientSession":
        try:
            import aiohttp
        except ImportError as error:
            raise EngineStartError(f"engine `{self._engine.name}`: {_NOT_INSTALLED}") from error
        options = self._options
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=options.slots + 1,  # and the look at its health
                keepalive_timeout=_KEEP_ALIVE_S,
                ssl=options.verify_tls,
            ),
            headers={"Accept-Encoding": "identity"} | headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=options.connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[trace],
        )

    # Attempts.

    def submit(self, attempt: Run, payload: bytes) -> None:
        """Send it, or let it wait for a slot."""
        try:
            request = translate(attempt, payload, self._target)
        except PayloadError as error:
            failed = EngineFailed(attempt.attempt_id, "bad_request", str(error)[:_MAX_MESSAGE])
            self._events.emit(failed)
            return
        state = _Attempt(attempt, request)
        self._attempts[attempt.attempt_id] = state
        self._arrivals += 1
        heapq.heappush(self._waiting, (attempt.priority, self._arrivals, state))
        self._fill()

    def cancel(self, attempt_id: int) -> None:
        """Closing its connection makes the server stop."""
        attempt = self._attempts.pop(attempt_id, None)
        if attempt is None:
            return
        attempt.done = True
        if attempt.task is not None:
            attempt.task.cancel()
            return
        # Few wait here: the daemon sends no more than it was told of slots.
        self._waiting = [entry for entry in self._waiting if entry[2] is not attempt]
        heapq.heapify(self._waiting)

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._options.slots:
            attempt = heapq.heappop(self._waiting)[2]
            self._running.add(attempt)
            attempt.task = task = asyncio.ensure_future(self._run(attempt))

            # Not at the end of the task itself: cancelled before it began, it would have none.
            def ended(_: object, attempt: _Attempt = attempt) -> None:
                self._running.discard(attempt)
                self._fill()

            task.add_done_callback(ended)

    async def _run(self, attempt: _Attempt) -> None:
        import aiohttp

        try:
            await self._exchange(attempt)
        except RemoteError as error:
            self._fail(attempt, error)
        except (aiohttp.ClientError, OSError) as error:
            message = f"the connection broke: {_describe(error)}"
            self._fail(attempt, RemoteError("engine_error", message, True))
        except Exception as error:
            log.exception("%s: attempt %d failed", self._engine.name, attempt.run.attempt_id)
            self._fail(attempt, RemoteError("engine_error", _describe(error), True))

    async def _exchange(self, attempt: _Attempt) -> None:
        async with asyncio.timeout(self._options.first_byte_timeout_s) as deadline:
            response = await self._post(attempt)
            try:
                if response.status != 200:
                    pause_s = pause_of(response.headers.get("Retry-After"), time.time())
                    raise refusal(response.status, await self._read_error(response), pause_s)
                if attempt.run.stream:
                    await self._relay(attempt, response, deadline)
                else:
                    data = await self._read(response, MAX_ANSWER_BYTES, deadline)
                    self._finish(attempt, attempt.answer.read_whole(data))
            finally:
                response.close()  # nothing if it was read to its end

    async def _post(self, attempt: _Attempt) -> "aiohttp.ClientResponse":
        """Returns when the answer begins; the connection that carries it may be the second."""
        import aiohttp

        assert self._session is not None, "start() comes first"
        again = False
        while True:
            attempt.reused = False
            try:
                response = await self._session.post(
                    self._url + attempt.path,
                    data=attempt.body,
                    headers={"Content-Type": "application/json"},
                    allow_redirects=False,
                    trace_request_ctx=attempt,
                )
            except (aiohttp.ServerConnectionError, aiohttp.ClientOSError) as error:
                if attempt.reused and not again:
                    again = True
                    continue
                self._count_connect_failure(error)
                raise
            self._connect_failures = 0
            return response

    async def _relay(
        self,
        attempt: _Attempt,
        response: "aiohttp.ClientResponse",
        deadline: asyncio.Timeout,
    ) -> None:
        events = EventStream(MAX_ANSWER_BYTES)
        clock = asyncio.get_running_loop().time
        idle_s = self._options.idle_timeout_s
        async for block in response.content.iter_any():
            deadline.reschedule(clock() + idle_s)
            if self._take(attempt, events.feed(block)):
                deadline.reschedule(clock() + _DRAIN_S)
                with contextlib.suppress(Exception):
                    await response.content.read(_MAX_ERROR_BYTES)
                return
        if not self._take(attempt, events.close()):
            self._finish(attempt, attempt.answer.end_of_stream(done=False))

    def _take(self, attempt: _Attempt, events: list[bytes]) -> bool:
        """Relay these events; True when the stream has ended with them."""
        answer = attempt.answer
        for data in events:
            if data == b"[DONE]":
                self._finish(attempt, answer.end_of_stream(done=True))
                return True
            offset, tokens = answer.sent, answer.tokens
            payload = answer.read_chunk(data)
            self._output_tokens += answer.tokens - tokens
            if attempt.done:  # cancelled from inside `emit`
                return True
            if payload is not None:
                self._events.emit(EngineChunk(attempt.run.attempt_id, offset), payload)
        return False

    async def _read(
        self, response: "aiohttp.ClientResponse", most: int, deadline: asyncio.Timeout
    ) -> bytes:
        parts: list[bytes] = []
        size = 0
        clock = asyncio.get_running_loop().time
        async for block in response.content.iter_any():
            deadline.reschedule(clock() + self._options.idle_timeout_s)
            parts.append(block)
            size += len(block)
            if size > most:
                raise too_large()
        return b"".join(parts)

    async def _read_error(self, response: "aiohttp.ClientResponse") -> bytes:
        """As much of it as arrives soon: the status alone says enough."""
        parts: list[bytes] = []
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self._options.connect_timeout_s):
                async for block in response.content.iter_any():
                    parts.append(block)
                    if sum(map(len, parts)) > _MAX_ERROR_BYTES:
                        break
        return b"".join(parts)

    def _finish(self, attempt: _Attempt, payload: bytes) -> None:
        answer = attempt.answer
        if not self._end(attempt):
            return
        self._output_tokens += max(0, answer.usage.output_tokens - answer.tokens)
        finished = EngineFinished(attempt.run.attempt_id, answer.usage, answer.finish_reason)
        self._events.emit(finished, payload)

    def _fail(self, attempt: _Attempt, error: RemoteError) -> None:
        if not self._end(attempt):
            return
        code, message = error.code, error.message
        if error.retryable and attempt.answer.sent:
            code, message = "engine_lost", f"in the middle of its answer: {message}"
        message = self._clean(message)
        self._events.emit(
            EngineFailed(
                attempt.run.attempt_id, code, message, error.retryable, error.retry_after_s
            )
        )

    def _end(self, attempt: _Attempt) -> bool:
        """False if it has ended before."""
        if attempt.done:
            return False
        attempt.done = True
        del self._attempts[attempt.run.attempt_id]
        return True

    def _clean(self, message: str) -> str:
        """A server may quote what it was sent."""
        for secret in self._secrets:
            message = message.replace(secret, "***")
        return message[:_MAX_MESSAGE]

    # Health.

    async def _watch(self) -> None:
        while True:
            try:
                self._welcome(await self._look())
            except Exception as error:  # whatever it is, the next look may do better
                self._health_failures += 1
                if self._health_failures >= MAX_HEALTH_FAILURES:
                    self._suspend(_describe(error))
            self._looked.set()
            pause_s = self._options.health_s
            await asyncio.sleep(min(pause_s, _LOOK_AGAIN_S) if self._down else pause_s)

    async def _look(self) -> int | None:
        """Ask what is served: its context, if the server says."""
        assert self._session is not None, "start() comes first"
        patience_s = self._options.connect_timeout_s + self._options.health_s
        async with (
            asyncio.timeout(patience_s) as deadline,
            self._session.get(self._url + "/models", allow_redirects=False) as response,
        ):
            if response.status in (404, 405, 429, 501):  # it lives, and does not tell
                return None
            if response.status != 200:
                raise refusal(response.status, await self._read_error(response))
            data = await self._read(response, _MAX_LIST_BYTES, deadline)
        return _context_of(data, self._remote_model)

    def _welcome(self, context_tokens: int | None) -> None:
        before = self._info
        self._health_failures = 0
        self._learn(context_tokens)
        if not self._down and self._info == before:
            return
        if not self._down:
            self._suspend("its context has changed")  # the daemon learns of it by a registration
        self._down = ""
        self._connect_failures = 0
        if self._started:
            self._events.resume(self._info)

    def _learn(self, context_tokens: int | None) -> None:
        options = self._options
        if context_tokens is not None and options.context_tokens is None:
            self._context_tokens = context_tokens
        self._info = BackendInfo(options.slots, self._context_tokens, options.profile)
        self._target = Target(
            model=self._engine.model,
            remote_model=self._remote_model,
            context_tokens=self._context_tokens,
            limit_field=options.limit_field,
            priority=options.priority,
        )

    def _suspend(self, reason: str) -> None:
        if reason == self._down:
            return
        self._down = reason
        if self._started:
            self._events.suspend(self._reason())

    def _reason(self) -> str:
        return self._clean(f"{self._url}: {self._down}")

    def _count_connect_failure(self, error: Exception) -> None:
        self._connect_failures += 1
        if self._connect_failures >= MAX_CONNECT_FAILURES and not self._down:
            count = self._connect_failures
            self._suspend(f"{count} requests in a row failed: {_describe(error)}")

    # Heartbeat.

    def stats(self) -> EngineStats:
        """What this host has sent; other clients of the server are not seen."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            tokens_per_s=self._rate.read(time.monotonic(), self._output_tokens),
            output_tokens=self._output_tokens,
        )

    def progress(self) -> dict[int, int]:
        """Of a stream; without one there is no output until the end."""
        return {a.run.attempt_id: a.answer.tokens for a in self._running if not a.done}


def _describe(error: Exception) -> str:
    if isinstance(error, RemoteError):
        return error.message
    words = str(error) or ("nothing came in time" if isinstance(error, TimeoutError) else "")
    return f"{type(error).__name__}: {words}"


async def _note_reuse(_session: object, context: Any, _parameters: object) -> None:
    attempt = context.trace_request_ctx
    if isinstance(attempt, _Attempt):
        attempt.reused = True


# What is configured.


def _read_options(engine: EngineConfig) -> RemoteOptions:
    known = RemoteOptions.__struct_fields__
    for key in engine.args:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise EngineStartError(
                f"engine `{engine.name}`: `args` has an unknown key `{key}`; "
                f"did you mean `{near}`? Known are {', '.join(known)}"
            )
    try:
        return msgspec.convert(engine.args, RemoteOptions)
    except msgspec.ValidationError as error:
        raise EngineStartError(f"engine `{engine.name}`: `args`: {error}") from error


def _read_url(engine: EngineConfig) -> str:
    """The base URL without a slash at its end."""
    wrong = f"engine `{engine.name}`: `path` must be the base URL, such as http://host:8000/v1"
    try:
        parts = urlsplit(engine.path or "")
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:
        raise EngineStartError(f"{wrong}: {error}") from error
    if parts.username is not None or parts.password is not None:
        raise EngineStartError(f"{wrong}, without a user or a key: put it into `api_key_file`")
    if not usable or parts.query or parts.fragment or re.search(r"[\s\x00-\x1f]", parts.geturl()):
        raise EngineStartError(f"{wrong}, and nothing after it; it is {engine.path!r}")
    url = parts.geturl().rstrip("/")
    for form in ("/chat/completions", "/completions", "/models"):
        if url.endswith(form):
            raise EngineStartError(f"{wrong}: leave `{form}` away")
    return url


def _read_headers(
    engine: EngineConfig, options: RemoteOptions
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Headers of every request, and what of them must not be shown."""
    where = f"engine `{engine.name}`: `headers`"
    for name, value in options.headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise EngineStartError(f"{where}: `{name}` or its value cannot be in an HTTP header")
        if name.lower() in _OWN_HEADERS:
            raise EngineStartError(f"{where}: `{name}` is not for you to set; leave it away")
    headers = dict(options.headers)
    secrets = [value for value in headers.values() if len(value) >= _MIN_SECRET]
    if options.api_key_file is not None:
        if any(name.lower() == "authorization" for name in headers):
            raise EngineStartError(f"{where}: give `Authorization` or `api_key_file`, not both")
        key = _read_key(engine.name, Path(options.api_key_file).expanduser())
        headers["Authorization"] = f"Bearer {key}"
        secrets.append(key)
    return headers, tuple(secrets)


def _read_key(engine: str, path: Path) -> str:
    where = f"engine `{engine}`: `api_key_file` {path.absolute()}"
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise EngineStartError(f"{where} cannot be read: {reason}") from None
    if not re.fullmatch(r"[!-~]+", key):
        raise EngineStartError(f"{where} must hold the key alone, on one line")
    return key


class _Model(Struct):
    id: str
    max_model_len: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None


class _Models(Struct):
    data: list[_Model]


_decode_models = msgspec.json.Decoder(_Models).decode


def _context_of(data: bytes, name: str) -> int | None:
    """Look a model up in the answer to ``GET /models``; raises `RemoteError`."""
    try:
        models = _decode_models(data).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"its list of models is garbage: {error}"
        raise RemoteError("engine_error", message, True) from None
    found = next((model for model in models if model.id == name), None)
    if found is None:
        there = ", ".join(model.id for model in models[:_MAX_NAMES]) or "nothing"
        more = f" and {len(models) - _MAX_NAMES} more" if len(models) > _MAX_NAMES else ""
        message = f"it does not serve `{name}` but {there}{more}; set `model` in `args`"
        raise RemoteError("engine_error", message, False)
    return found.max_model_len
