"""A workflow as its client sees it: the stages of one task, and the tries of a task that failed.

Knows the client that sends for it, nothing of sockets.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from chimera_daemon.client.calls import Call, Reply, Stream
from chimera_daemon.client.errors import ChimeraError, WorkflowClosed
from chimera_daemon.messages import Hints, Tries

if TYPE_CHECKING:
    from chimera_daemon.client.aio import Client

_log = logging.getLogger("chimera.client")

Message = Mapping[str, Any]

ASK_TIMEOUT_S = 5.0  # for an acknowledgement

# Between retries of an error that is retryable, where the daemon gives no time.
_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0

_encode_json = msgspec.json.Encoder().encode


class Workflow:
    """One try of an agent's task: a chain of stages, numbered as they are asked for.

    Made by `Client.workflow`, on the same loop.

    Leaving its block closes it without an outcome unless `close` was called.
    """

    def __init__(
        self, client: "Client", workflow_id: str | None, kind: str | None, tries: Tries | None
    ) -> None:
        if workflow_id is None:
            workflow_id = client.new_workflow_id()
        if not 1 <= len(workflow_id) <= 128:
            raise ValueError("a workflow id has 1 to 128 characters")
        if kind is not None and len(kind) > 64:
            raise ValueError("a workflow kind has at most 64 characters")
        self.id = workflow_id
        self.kind = kind
        self.stage = 0  # number of the next stage
        self.closed = False
        self.tries = tries
        self.models: set[str] = set()  # that answered stages of it
        self._client = client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.closed:
            return
        if exc is not None:
            self.closed = True
            self._client.close_workflow_soon(self.id)
            return
        try:
            await self.close()
        except ChimeraError as error:
            _log.warning("workflow %s: its end was not acknowledged: %s", self.id, error)

    async def generate(
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
        """Run the next stage and wait for its answer.

        ``messages`` are OpenAI chat messages; ``sampling`` is passed to the engine (``top_p``,
        ``stop``, ...). ``model`` pins the stage to a model, None lets the policy choose.
        ``stage`` is only needed to repeat one that failed: None takes the next number.
        ``timeout_s`` bounds the whole call, retries included; then the request is cancelled and
        `RequestTimeout` raised. ``optional``: rather than run what is not worth its cost as things
        are, raise `Declined`; None: only for the first stage of a further try. ``retries``: how
        often an error that is ``retryable`` is tried again, after ``retry_after_s`` if the daemon
        gave it, else 0.1 s, doubling up to 5 s. Cancelling the task cancels the request. Raises a
        subclass of `ChimeraError`.
        """
        stage = self._number(stage)
        deadline = None if timeout_s is None else self._client.loop.time() + timeout_s
        backoff_s = _BACKOFF_S
        while True:
            try:
                return await self.submit(
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
            except ChimeraError as error:
                if retries <= 0 or not error.retryable:
                    raise
                pause_s = backoff_s if error.retry_after_s is None else error.retry_after_s
                if deadline is not None:
                    timeout_s = deadline - self._client.loop.time() - pause_s
                    if timeout_s <= 0:
                        raise
            retries -= 1
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            await asyncio.sleep(pause_s)

    def submit(
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
    ) -> Call:
        """As `generate` without waiting: returns a `Call` to await or cancel. For many at once."""
        stage = self._number(stage)
        call = self._client.submit(
            _payload(messages, max_tokens, temperature, sampling),
            workflow_id=self.id,
            stage=stage,
            kind=self.kind,
            model=model,
            max_tokens=max_tokens,
            hints=hints,
            restart=restart,
            tries=self.tries,
            optional=self._may_decline(stage) if optional is None else optional,
            timeout_s=timeout_s,
        )
        call.models = self.models
        return call

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
    ) -> Stream:
        """Run the next stage and read its text as it is written; see `Stream`.

        ``restart``: if the engine is lost after text was delivered, begin again from nothing
        instead of failing. ``timeout_s`` bounds the whole stream. The rest is as for `generate`.
        """
        stage = self._number(stage)
        stream = self._client.stream(
            _payload(messages, max_tokens, temperature, sampling),
            workflow_id=self.id,
            stage=stage,
            kind=self.kind,
            model=model,
            max_tokens=max_tokens,
            hints=hints,
            restart=restart,
            tries=self.tries,
            optional=self._may_decline(stage) if optional is None else optional,
            timeout_s=timeout_s,
        )
        stream.models = self.models
        return stream

    def again(self, workflow_id: str | None = None) -> "Workflow":
        """The next try of the same task: a new workflow, to begin it with once this one failed.

        Models that did a part of this try or an earlier one are taken to fail again, and others to
        find the task harder. If no model is worth it as things are, the first stage is `Declined`.
        """
        earlier, left = (self.tries.failed, self.tries.left) if self.tries else ((), 0)
        failed = (*earlier, *sorted(self.models.difference(earlier)))
        tries = Tries(failed, max(0, left - 1))
        return Workflow(self._client, workflow_id, self.kind, tries)

    def _may_decline(self, stage: int) -> bool:
        return stage == 0 and self.tries is not None and bool(self.tries.failed)

    async def feedback(self, answer: Reply | int, verdict: float | bool) -> None:
        """Tell the predictor whether an answer was right, as soon as you know.

        ``answer`` is the `Reply` or the stage's number, ``verdict`` a bool or a degree in [0, 1].
        It helps to choose the model of the stages that follow. Sent without waiting for anything;
        one for a workflow that the daemon does not know any more is ignored there.
        """
        if not 0.0 <= verdict <= 1.0:
            raise ValueError("a verdict is a bool or a number from 0 to 1")
        stage = answer.stage if isinstance(answer, Reply) else answer
        if not 0 <= stage <= 100_000:
            raise ValueError("a stage is numbered from 0 to 100,000")
        self._client.feedback(self.id, stage, float(verdict))

    async def close(
        self, success: float | bool | None = None, timeout_s: float = ASK_TIMEOUT_S
    ) -> None:
        """End the workflow and report its outcome: a bool, a degree in [0, 1], or None if unknown.

        Returns when the daemon has acknowledged it; raises `RequestTimeout` otherwise. Stages still
        at work are cancelled by the daemon. Calling it again does nothing.
        """
        if success is not None and not 0.0 <= success <= 1.0:
            raise ValueError("success is a bool or a number from 0 to 1")
        if self.closed:
            return
        self.closed = True
        outcome = None if success is None else float(success)
        await self._client.close_workflow(self.id, outcome, timeout_s)

    def _number(self, stage: int | None) -> int:
        if self.closed:
            raise WorkflowClosed(f"workflow {self.id} is closed")
        if stage is None:
            stage = self.stage
        self.stage = max(self.stage, stage + 1)
        return stage


def _payload(
    messages: Sequence[Message], max_tokens: int, temperature: float, sampling: dict[str, Any]
) -> bytes:
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature}
    return _encode_json({**body, **sampling} if sampling else body)
