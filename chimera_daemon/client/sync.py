"""The client for plain threads: the asyncio client on a loop in one background thread.

Owns that thread and nothing else. May be used from any number of threads.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from chimera_daemon.client.aio import (
    CONNECT_TIMEOUT_S,
    GIVE_UP_S,
    MAX_PENDING,
    Client,
)
from chimera_daemon.client.calls import Reply, Stream
from chimera_daemon.client.errors import ClientClosed
from chimera_daemon.client.workflow import ASK_TIMEOUT_S, Message, Workflow
from chimera_daemon.messages import Hints

T = TypeVar("T")


class _Background:
    """A loop in a background thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # nothing is handed to a loop that is stopping
        self._stopped = False
        started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]
        started = concurrent.futures.Future()

        async def serve() -> None:
            stop = asyncio.Event()
            started.set_result((asyncio.get_running_loop(), stop))
            await stop.wait()

        # A daemon thread: a program that forgot to close its client can still end.
        self._thread = threading.Thread(
            target=lambda: asyncio.run(serve()), name="chimera-client", daemon=True
        )
        self._thread.start()
        self._loop, self._stop = started.result()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end on the loop; an interrupt of the waiting thread cancels the work."""
        with self._lock:
            if self._stopped:
                work.close()
                raise ClientClosed("the client is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ClientClosed("the client was closed") from None
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Stop the loop, cancelling what runs on it, and wait for the thread."""
        with self._lock:
            self._stopped = True
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


class SyncStream:
    """As `Stream`, for a plain ``for`` loop; see there for the rules, `restarted` included."""

    def __init__(self, background: _Background, stream: Stream) -> None:
        self._background = background
        self._stream = stream
        self.restarted = 0

    @property
    def reply(self) -> Reply:
        """The whole answer, once the stream has ended; raises its error; before, `RuntimeError`."""
        return self._stream.reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Give the request up. Idempotent."""

        async def cancel() -> None:
            self._stream.cancel()

        with suppress(ClientClosed):  # which cancelled it
            self._background.run(cancel())

    def __iter__(self) -> Iterator[str]:
        pieces = self._stream.__aiter__()

        async def step() -> tuple[str | None, int]:
            piece = await anext(pieces, None)
            return piece, self._stream.restarted

        try:
            while True:
                piece, self.restarted = self._background.run(step())
                if piece is None:
                    return
                yield piece
        finally:
            with suppress(ClientClosed):
                self._background.run(pieces.aclose())


class SyncWorkflow:
    """As `Workflow`, blocking."""

    def __init__(self, background: _Background, workflow: Workflow) -> None:
        self._background = background
        self._workflow = workflow

    @property
    def id(self) -> str:
        """The workflow's id."""
        return self._workflow.id

    @property
    def stage(self) -> int:
        """Number of the next stage."""
        return self._workflow.stage

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._background.run(self._workflow.__aexit__(exc_type, exc, traceback))

    def generate(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        model: str | None = None,
        stage: int | None = None,
        hints: Hints | None = None,
        timeout_s: float | None = None,
        restart: bool = False,
        optional: bool | None = None,
        retries: int = 0,
        **sampling: Any,
    ) -> Reply:
        """As `Workflow.generate`; an interrupt (Ctrl-C) cancels the request."""
        return self._background.run(
            self._workflow.generate(
                messages,
                max_tokens=max_tokens,
                temperature=temperature,
                model=model,
                stage=stage,
                hints=hints,
                timeout_s=timeout_s,
                restart=restart,
                optional=optional,
                retries=retries,
                **sampling,
            )
        )

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        model: str | None = None,
        stage: int | None = None,
        hints: Hints | None = None,
        timeout_s: float | None = None,
        restart: bool = False,
        optional: bool | None = None,
        **sampling: Any,
    ) -> SyncStream:
        """As `Workflow.stream`."""

        async def start() -> Stream:
            return self._workflow.stream(
                messages,
                max_tokens=max_tokens,
                temperature=temperature,
                model=model,
                stage=stage,
                hints=hints,
                timeout_s=timeout_s,
                restart=restart,
                optional=optional,
                **sampling,
            )

        return SyncStream(self._background, self._background.run(start()))

    def again(self, workflow_id: str | None = None) -> "SyncWorkflow":
        """As `Workflow.again`."""

        async def start() -> Workflow:
            return self._workflow.again(workflow_id)

        return SyncWorkflow(self._background, self._background.run(start()))

    def feedback(self, answer: Reply | int, verdict: float | bool) -> None:
        """As `Workflow.feedback`."""
        self._background.run(self._workflow.feedback(answer, verdict))

    def close(self, success: float | bool | None = None, timeout_s: float = ASK_TIMEOUT_S) -> None:
        """As `Workflow.close`."""
        self._background.run(self._workflow.close(success, timeout_s))


class SyncClient:
    """As `Client`, blocking, for any number of threads. Make one with `connect_sync`."""

    def __init__(self, background: _Background, client: Client) -> None:
        self._background = background
        self._client = client

    def workflow(
        self, kind: str | None = None, workflow_id: str | None = None, *, tries: int = 1
    ) -> SyncWorkflow:
        """As `Client.workflow`; use it as ``with client.workflow(...) as workflow``."""

        async def start() -> Workflow:
            return self._client.workflow(kind, workflow_id, tries=tries)

        return SyncWorkflow(self._background, self._background.run(start()))

    def status(self, timeout_s: float = ASK_TIMEOUT_S) -> dict[str, Any]:
        """As `Client.status`."""
        return self._background.run(self._client.status(timeout_s))


@contextmanager
def connect_sync(
    address: str,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    give_up_s: float = GIVE_UP_S,
    max_pending: int = MAX_PENDING,
) -> Generator[SyncClient, None, None]:
    """As `connect`, blocking: ``with connect_sync(address) as client``."""

    async def start() -> Client:
        client = Client(address, give_up_s=give_up_s, max_pending=max_pending)
        try:
            await client.wait_ready(timeout_s)
        except BaseException:
            client.shut()
            raise
        return client

    background = _Background()
    try:
        client = background.run(start())
        try:
            yield SyncClient(background, client)
        finally:
            background.run(client.close())
    finally:
        background.stop()
