"""The client against a fake front socket: every fault it promises to survive, and every error."""

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera_daemon.client import (
    BadRequest,
    Cancelled,
    ChimeraError,
    Client,
    ClientClosed,
    Conflict,
    DaemonUnreachable,
    Declined,
    EngineLost,
    Hints,
    Overloaded,
    ProtocolError,
    Reply,
    RequestTimeout,
    Stream,
    StreamInterrupted,
    TooLarge,
    UnknownModel,
    VersionMismatch,
    WorkflowClosed,
    connect,
    connect_sync,
)
from chimera_daemon.client.calls import Pending
from chimera_daemon.client.errors import _BY_CODE
from chimera_daemon.messages import (
    Cancel,
    Chunk,
    CloseWorkflow,
    ErrorCode,
    Feedback,
    GetStatus,
    Ping,
    Pong,
    Result,
    Submit,
    Tries,
    Usage,
)
from chimera_daemon.wire import encode
from fake_front import RECEIPT, FakeFront, Received, run, until

ROOT = Path(__file__).resolve().parent.parent
ASK = [{"role": "user", "content": "2 + 2 = ?"}]


def echo(received: Received) -> None:
    received.result(f"stage {received.submit.stage}")


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python in a process of its own, from these sources whether installed or not."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def read(stream: Stream) -> list[str]:
    return [text async for text in stream]


# Plain requests.


def test_stages_are_numbered_and_answered() -> None:
    async def body(front: FakeFront) -> None:
        front.on_submit = echo
        async with connect(front.address) as client:
            async with client.workflow(kind="math") as workflow:
                first = await workflow.generate(ASK, max_tokens=7, temperature=0.5, top_p=0.9)
                second = await workflow.generate(ASK, model="small", hints=Hints(output_tokens=4))
                await workflow.close(success=True)
            assert client.pending == 0
        assert (first.text, second.text) == ("stage 0", "stage 1")
        assert first.model == "small"
        assert first.engine == "small-0"
        assert first.usage == Usage(3, 2)
        assert first.finish_reason == "stop"
        assert first.receipt == RECEIPT
        assert first.logprob == -0.5
        assert (first.stage, second.stage) == (0, 1)
        assert 0 < first.latency_s < 10
        one, two = [r for r in front.received if isinstance(r.message, Submit)]
        assert one.submit.kind == "math"
        assert one.submit.max_tokens == 7
        assert json.loads(one.payload) == {
            "messages": ASK,
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
        }
        assert two.submit.model == "small"
        assert two.submit.hints == Hints(output_tokens=4)
        assert one.submit.workflow_id == two.submit.workflow_id
        assert one.submit.request_id != two.submit.request_id
        assert len(one.client) == 32
        close = [r.message for r in front.received if isinstance(r.message, CloseWorkflow)][-1]
        assert close == CloseWorkflow(workflow_id=one.submit.workflow_id, success=1.0)

    run(body)


def test_many_requests_at_once() -> None:
    async def body(front: FakeFront) -> None:
        front.on_submit = echo
        async with connect(front.address) as client, client.workflow() as workflow:
            replies = await asyncio.gather(*(workflow.generate(ASK) for _ in range(500)))
            assert [r.text for r in replies] == [f"stage {n}" for n in range(500)]
            calls = [workflow.submit(ASK) for _ in range(100)]
            assert [(await call).text for call in calls] == [f"stage {500 + n}" for n in range(100)]
            assert all(call.done() for call in calls)

    run(body)


def test_a_stage_can_be_repeated_by_number() -> None:
    async def body(front: FakeFront) -> None:
        front.on_submit = echo
        async with connect(front.address) as client, client.workflow() as workflow:
            texts = [(await workflow.generate(ASK, stage=n)).text for n in (None, 0, 5, None)]
        assert texts == ["stage 0", "stage 0", "stage 5", "stage 6"]

    run(body)


def test_status() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client:
            assert await client.status() == {"engines": []}
            assert client.connected
            assert client.max_payload_bytes == 1 << 20

    run(body)


def test_import_is_light() -> None:
    code = (
        "import sys, chimera_daemon.client\n"
        "heavy = {'torch', 'vllm', 'transformers', 'numpy', 'uvloop', 'aiohttp', 'http'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert python("-c", code).stdout.strip() == "[]"


def test_a_further_try_is_a_workflow_of_its_own_and_names_the_models_that_failed() -> None:
    sent: list[tuple[str, str | None, Tries | None, bool]] = []

    def answer(received: Received) -> None:
        submit = received.submit
        sent.append((submit.workflow_id, submit.kind, submit.tries, submit.optional))
        if len(sent) == 4:
            received.failure("declined")
        else:
            received.result("no")

    async def body(front: FakeFront) -> None:
        front.on_submit = answer
        sent.clear()
        async with connect(front.address) as client:
            async with client.workflow("k", tries=2) as first:
                await first.generate(ASK)
                await first.generate(ASK, optional=True)
            async with first.again() as second:
                assert second.id != first.id
                async with second.stream(ASK, optional=False) as stream:
                    assert [text async for text in stream] == ["no"]
            async with second.again("w-3") as third:
                with pytest.raises(Declined) as caught:
                    await third.generate(ASK)
                assert not caught.value.retryable
                await third.generate(ASK)
        ids, kinds, tries, optional = (list(column) for column in zip(*sent, strict=True))
        assert ids == [first.id, first.id, second.id, "w-3", "w-3"]
        assert set(kinds) == {"k"}
        assert tries == [Tries((), 1)] * 2 + [Tries(("small",), 0)] * 3
        assert optional == [False, True, False, True, False]

    run(body)


# Errors.


@pytest.mark.parametrize("code", sorted(_BY_CODE))
def test_every_error_code_has_its_class(code: ErrorCode) -> None:
    async def body(front: FakeFront) -> None:
        front.on_submit = lambda r: r.failure(code, retryable=True, retry_after_s=0.25)
        async with connect(front.address) as client, client.workflow() as workflow:
            with pytest.raises(ChimeraError) as caught:
                await workflow.generate(ASK)
        assert type(caught.value) is _BY_CODE[code]
        assert caught.value.code == code
        assert caught.value.retryable
        assert caught.value.retry_after_s == 0.25

    run(body)


def test_error_codes_are_complete() -> None:
    assert set(_BY_CODE) == set(ErrorCode.__args__)


def test_bad_addresses() -> None:
    async def body(_: FakeFront) -> None:
        for address in ("localhost:5570", "http://localhost:1", "tcp://127.0.0.1:99999", "ipc://"):
            with pytest.raises(ValueError, match="not usable"):
                async with connect(address):
                    pass

    run(body)


def test_unreachable_address_says_what_to_do() -> None:
    async def body(front: FakeFront) -> None:
        front.stop()
        with pytest.raises(DaemonUnreachable, match="chimera up") as caught:
            async with connect(front.address, timeout_s=0.05):
                pass
        assert front.address in str(caught.value)
        assert isinstance(caught.value, ConnectionError)

    run(body)


def test_something_else_at_the_address() -> None:
    async def body(front: FakeFront) -> None:
        front.answer_pings = False
        async with connect_in_background(front) as attempt:
            await front.next(Ping)
            with pytest.raises(DaemonUnreachable, match="no Chimera daemon"):
                await attempt

    class connect_in_background:
        def __init__(self, front: FakeFront) -> None:
            self.front = front

        async def __aenter__(self) -> "asyncio.Task[None]":
            async def attempt() -> None:
                async with connect(self.front.address, timeout_s=0.3):
                    pass

            self.task = asyncio.ensure_future(attempt())
            return self.task

        async def __aexit__(self, *_: object) -> None:
            self.task.cancel()

    run(body)


def test_another_version() -> None:
    async def body(front: FakeFront) -> None:
        front.version = 99
        with pytest.raises(VersionMismatch, match="99"):
            async with connect(front.address):
                pass

    run(body)


def test_another_version_after_a_restart() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            waiting = asyncio.ensure_future(workflow.generate(ASK))
            await front.next(Submit)
            front.version = 99
            await front.restart("two")
            with pytest.raises(VersionMismatch):
                await waiting
            with pytest.raises(VersionMismatch):
                await workflow.generate(ASK)

    run(body)


def test_too_large_is_refused_before_it_is_sent() -> None:
    async def body(front: FakeFront) -> None:
        front.max_payload_bytes = 100
        front.on_submit = echo
        async with connect(front.address) as client, client.workflow() as workflow:
            with pytest.raises(TooLarge, match="100"):
                await workflow.generate([{"role": "user", "content": "x" * 200}])
            huge = Hints(confidence={f"model-{n}": 0.5 for n in range(10_000)})
            with pytest.raises(BadRequest):
                await workflow.generate([], hints=huge)
            with pytest.raises(BadRequest):
                await workflow.generate([], max_tokens=0)
            assert client.pending == 0
            await front.pings(2)
        assert front.count(Submit) == 0

    run(body)


def test_pending_requests_are_bounded() -> None:
    async def body(front: FakeFront) -> None:
        async with (
            connect(front.address, max_pending=3) as client,
            client.workflow() as workflow,
        ):
            calls = [workflow.submit(ASK) for _ in range(3)]
            with pytest.raises(Overloaded):
                workflow.submit(ASK)
            calls[0].cancel()
            workflow.submit(ASK).cancel()

    run(body)


def test_stages_after_close() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            await workflow.close(success=0.5)
            await workflow.close()
            with pytest.raises(WorkflowClosed):
                await workflow.generate(ASK)
            with pytest.raises(WorkflowClosed):
                workflow.stream(ASK)
        closes = [r.message for r in front.received if isinstance(r.message, CloseWorkflow)]
        assert {c.success for c in closes} == {0.5}  # one of them, or one a heartbeat

    run(body)


def test_arguments_are_checked() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client:
            with pytest.raises(ValueError, match="64"):
                client.workflow(kind="k" * 65)
            with pytest.raises(ValueError, match="128"):
                client.workflow(workflow_id="w" * 129)
            with pytest.raises(ValueError, match="128"):
                client.workflow(workflow_id="")
            for tries in (0, 101):
                with pytest.raises(ValueError, match="1 to 100 times"):
                    client.workflow(tries=tries)
            with pytest.raises(ValueError, match="success"):
                await client.workflow().close(success=2.0)
            with pytest.raises(ValueError, match="positive"):
                Client(front.address, max_pending=0)

    run(body)


def test_closed_client() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client:
            workflow = client.workflow()
            waiting = asyncio.ensure_future(workflow.generate(ASK))
            await front.next(Submit)
            await client.close()
            await client.close()
            with pytest.raises(ClientClosed):
                await waiting
            with pytest.raises(ClientClosed):
                await workflow.generate(ASK)
            with pytest.raises(ClientClosed):
                await client.status()
        await front.next(Cancel)

    run(body)


def test_an_unreadable_message_of_ours_fails_what_is_pending() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            waiting = asyncio.ensure_future(workflow.generate(ASK))
            (await front.next(Submit)).failure("bad_request", request_id="")
            with pytest.raises(BadRequest):
                await waiting
            await front.next(Cancel)

    run(body)


# Retries.


def test_retries_wait_and_use_a_new_request_id() -> None:
    async def body(front: FakeFront) -> None:
        answers: Iterator[Callable[[Received], None]] = iter(
            [
                lambda r: r.failure("overloaded", retry_after_s=0.01),
                lambda r: r.failure("engine_lost", retryable=True, retry_after_s=0.01),
                echo,
            ]
        )
        front.on_submit = lambda r: next(answers)(r)
        async with connect(front.address) as client, client.workflow() as workflow:
            reply = await workflow.generate(ASK, retries=2, timeout_s=10)
            assert reply.text == "stage 0"
            assert workflow.stage == 1
        submits = [r.submit for r in front.received if isinstance(r.message, Submit)]
        assert len({s.request_id for s in submits}) == 3
        assert {s.stage for s in submits} == {0}

    run(body)


def test_retries_are_bounded_and_only_for_what_is_retryable() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            front.on_submit = lambda r: r.failure("overloaded", retry_after_s=0.001)
            with pytest.raises(Overloaded):
                await workflow.generate(ASK, retries=2)
            assert front.count(Submit) == 3
            front.on_submit = lambda r: r.failure("unknown_model")
            with pytest.raises(UnknownModel):
                await workflow.generate(ASK, retries=2)
            front.on_submit = lambda r: r.failure("overloaded", retry_after_s=100.0)
            with pytest.raises(Overloaded):  # the time is up before the next attempt
                await workflow.generate(ASK, retries=2, timeout_s=1.0)
            assert front.count(Submit) == 5

    run(body)


# Cancel and timeouts.


def test_cancelling_the_task_cancels_the_request() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            waiting = asyncio.ensure_future(workflow.generate(ASK))
            submitted = await front.next(Submit)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            cancel = (await front.next(Cancel)).message
            assert cancel == Cancel(request_id=submitted.submit.request_id)
            assert client.pending == 0
            submitted.result("too late")
            front.on_submit = echo
            assert (await workflow.generate(ASK)).text == "stage 1"

    run(body)


def test_cancelling_a_call() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            call = workflow.submit(ASK)
            waiting = asyncio.ensure_future(_result(call))
            await front.next(Submit)
            call.cancel()
            call.cancel()
            with pytest.raises(Cancelled):
                await waiting
            await front.next(Cancel)
            await front.pings(2)
        assert front.count(Cancel) == 1

    async def _result(call: Awaitable[Reply]) -> Reply:
        return await call

    run(body)


def test_timeout_cancels() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            with pytest.raises(RequestTimeout) as caught:
                await workflow.generate(ASK, timeout_s=0.05)
            assert isinstance(caught.value, TimeoutError)
            await front.next(Cancel)
            with pytest.raises(RequestTimeout):
                await read(workflow.stream(ASK, timeout_s=0.05))
            await front.next(Cancel)
            assert client.pending == 0
            front.on_submit = echo
            assert await workflow.generate(ASK, timeout_s=10)

    run(body)


def test_feedback_names_the_stage() -> None:
    async def body(front: FakeFront) -> None:
        front.on_submit = echo
        async with connect(front.address) as client, client.workflow(workflow_id="w") as workflow:
            replies = [await workflow.generate(ASK, stage=n) for n in (0, 7)]
            await workflow.feedback(replies[1], True)
            await workflow.feedback(3, 0.25)
            stream = workflow.stream(ASK)
            await read(stream)
            await workflow.feedback(stream.reply, False)
            for wrong in (-0.1, 1.5, float("nan")):
                with pytest.raises(ValueError, match="from 0 to 1"):
                    await workflow.feedback(0, wrong)
            for wrong in (-1, 100_001):
                with pytest.raises(ValueError, match="numbered from 0"):
                    await workflow.feedback(wrong, 1.0)
        sent = [r.message for r in front.received if isinstance(r.message, Feedback)]
        assert sent == [Feedback("w", 7, 1.0), Feedback("w", 3, 0.25), Feedback("w", 8, 0.0)]

    run(body)


@pytest.mark.parametrize("daemon_id", [None, "another"])
def test_feedback_while_the_daemon_is_away(daemon_id: str | None) -> None:
    """The last verdict on a stage is sent when it is back, unless it remembers nothing."""

    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow(workflow_id="w") as workflow:
            front.stop()
            await until(lambda: not client.connected)
            await workflow.feedback(0, 0.0)
            await workflow.feedback(0, 1.0)
            await front.restart(daemon_id)
            await until(lambda: client.connected)
            await front.pings(3)
            sent = [r.message for r in front.received if isinstance(r.message, Feedback)]
            assert sent == ([Feedback("w", 0, 1.0)] if daemon_id is None else [])

    run(body)


def test_cancel_while_the_daemon_is_away_is_sent_later() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            call = workflow.submit(ASK)
            submitted = await front.next(Submit)
            front.stop()
            await until(lambda: not client.connected)
            call.cancel()
            await front.start()
            cancel = (await front.next(Cancel)).message
            assert cancel == Cancel(request_id=submitted.submit.request_id)
        assert front.count(Submit) == 1

    run(body)


# Reconnect.


@pytest.mark.parametrize("daemon_id", [None, "two"])
def test_pending_requests_are_sent_again(daemon_id: str | None) -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            waiting = [asyncio.ensure_future(workflow.generate(ASK)) for _ in range(20)]
            before = [await front.next(Submit) for _ in range(20)]
            await front.restart(daemon_id)
            after = [await front.next(Submit) for _ in range(20)]
            assert [(r.message, r.payload) for r in before] == [
                (r.message, r.payload) for r in after
            ]
            assert before[0].client == after[0].client
            for received in after:
                echo(received)
            assert [(await w).text for w in waiting] == [f"stage {n}" for n in range(20)]

    run(body)


def test_requests_made_while_the_daemon_is_away() -> None:
    async def body(front: FakeFront) -> None:
        front.on_submit = echo
        async with connect(front.address) as client, client.workflow() as workflow:
            front.stop()
            await until(lambda: not client.connected)
            waiting = asyncio.ensure_future(workflow.generate(ASK))
            status = asyncio.ensure_future(client.status(timeout_s=10))
            await until(lambda: client.pending == 1)
            await front.start()
            assert (await waiting).text == "stage 0"
            assert await status == {"engines": []}
        assert front.count(Submit) == 1

    run(body)


def test_a_dropped_result_comes_after_resubmission_and_duplicates_are_dropped() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            waiting = asyncio.ensure_future(workflow.generate(ASK))
            await front.next(Submit)  # its answer is lost with the connection
            await front.restart()
            again = await front.next(Submit)
            again.result("four")
            again.result("five")
            again.failure("conflict")
            assert (await waiting).text == "four"
            front.on_submit = echo
            assert (await workflow.generate(ASK)).text == "stage 1"
            assert client.pending == 0

    run(body)


def test_a_daemon_that_stops_answering_pings_is_taken_for_away() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            waiting = asyncio.ensure_future(workflow.generate(ASK))
            await front.next(Submit)
            front.answer_pings = False
            await until(lambda: not client.connected)
            front.answer_pings = True
            (await front.next(Submit)).result("four")
            assert (await waiting).text == "four"

    run(body)


def test_a_new_daemon_without_a_broken_connection() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            waiting = asyncio.ensure_future(workflow.generate(ASK))
            await front.next(Submit)
            front.daemon_id = "two"
            (await front.next(Submit)).result("four")
            assert (await waiting).text == "four"

    run(body)


def test_a_daemon_that_is_away_too_long() -> None:
    async def body(front: FakeFront) -> None:
        front.on_submit = lambda _: None
        async with connect(front.address, give_up_s=0.1) as client:
            workflow = client.workflow()
            waiting = asyncio.ensure_future(workflow.generate(ASK))
            await front.next(Submit)
            front.stop()
            with pytest.raises(DaemonUnreachable):
                await waiting
            with pytest.raises(DaemonUnreachable):
                await workflow.generate(ASK)
            with pytest.raises(DaemonUnreachable):
                await workflow.close()
            await front.start()
            front.on_submit = echo
            await until(lambda: client.connected)
            assert (await client.workflow().generate(ASK)).text == "stage 0"

    run(body)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_when_everything_happens(seed: int) -> None:
    """Agents at work while the front answers, stalls, repeats itself, breaks and forgets."""

    async def body(front: FakeFront) -> None:
        chance = random.Random(seed)

        def moody(received: Received) -> None:
            text, mood = f"{received.submit.workflow_id} {received.submit.stage}", chance.random()
            if mood < 0.25:
                return  # an answer that is lost with the connection
            if received.submit.stream:
                cut = chance.randrange(len(text))
                received.chunk(0, text[:cut])
                if chance.random() < 0.5:
                    received.chunk(cut, text[cut:])
            received.result(text)
            if mood > 0.75:
                received.result("a second answer")

        async def agent(client: Client, name: str) -> None:
            async with client.workflow(workflow_id=name) as workflow:
                for stage in range(10):
                    if stage % 2:
                        stream = workflow.stream(ASK, restart=True)
                        got, restarted = "", 0
                        async for text in stream:
                            got = text if stream.restarted != restarted else got + text
                            restarted = stream.restarted
                        assert got == stream.reply.text
                    else:
                        got = (await workflow.generate(ASK)).text
                    assert got == f"{name} {stage}"
                await workflow.close(success=True, timeout_s=60)

        async def trouble() -> None:
            for n in itertools.count(2):
                await front.pings(chance.randrange(1, 4))
                await front.restart(str(n) if chance.random() < 0.5 else None)

        front.on_submit = moody
        async with connect(front.address) as client:
            fault = asyncio.ensure_future(trouble())
            try:
                await asyncio.gather(*(agent(client, f"w{n}") for n in range(20)))
            finally:
                fault.cancel()
            assert client.pending == 0
        closed = {
            r.message.workflow_id for r in front.received if isinstance(r.message, CloseWorkflow)
        }
        assert closed == {f"w{n}" for n in range(20)}

    run(body, timeout_s=60)


# Closing workflows.


def test_a_lost_acknowledgement_of_a_close() -> None:
    async def body(front: FakeFront) -> None:
        front.answer_closes = False
        async with connect(front.address) as client:
            workflow = client.workflow(workflow_id="w1")
            closing = asyncio.ensure_future(workflow.close(success=False))
            await front.next(CloseWorkflow)
            await front.next(CloseWorkflow)  # again without a new connection
            await front.restart("two")
            front.answer_closes = True
            await closing
            last = (await front.next(CloseWorkflow)).message
            assert last == CloseWorkflow(workflow_id="w1", success=0.0)

    run(body)


def test_a_close_that_is_never_acknowledged() -> None:
    async def body(front: FakeFront) -> None:
        front.answer_closes = False
        async with connect(front.address) as client:
            with pytest.raises(RequestTimeout):
                await client.workflow().close(timeout_s=0.05)

    run(body)


def test_leaving_the_block_closes() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client:
            async with client.workflow(workflow_id="left"):
                pass
            close = (await front.next(CloseWorkflow)).message
            assert close == CloseWorkflow(workflow_id="left")
            with pytest.raises(RuntimeError, match="mine"):
                async with client.workflow(workflow_id="raised"):
                    raise RuntimeError("mine")
            close = (await front.next(CloseWorkflow)).message
            assert close == CloseWorkflow(workflow_id="raised")

    run(body)


def test_closing_twice_under_one_id() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client:
            one, two = client.workflow(workflow_id="same"), client.workflow(workflow_id="same")
            await asyncio.gather(one.close(), two.close())

    run(body)


# Garbage.


def test_garbage_from_the_daemon() -> None:
    garbage = [
        [b""],
        [b"\xff\xff"],
        [b"\x93\x01\x02\x03"],
        [msgspec.msgpack.encode({"type": "no such type"})],
        [msgspec.msgpack.encode({"type": "pong"})],
        [b"\x81\xa4type\xa2\xff\xfe"],
        [b"\x91" * 5000],
        [encode(Pong("x", float("nan"), -1))],
        [encode(Result("unknown", "m", "e", Usage(1, 1), "stop", RECEIPT))],
        [encode(Cancel(request_id="r1"))],
    ]

    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            waiting = asyncio.ensure_future(workflow.generate(ASK))
            submitted = await front.next(Submit)
            for frames in garbage[:-1]:
                submitted.raw(*frames)
            submitted.result("four")
            assert (await waiting).text == "four"
            for frames in garbage:
                submitted.raw(*frames)
            front.on_submit = echo
            assert (await workflow.generate(ASK)).text == "stage 1"

    run(body)


def test_an_unreadable_answer_fails_its_request() -> None:
    async def body(front: FakeFront) -> None:
        def no_payload(r: Received) -> None:
            r.raw(
                encode(Result(r.submit.request_id, "m", "e", Usage(1, 1), "stop", RECEIPT)),
            )

        def bad_payload(r: Received) -> None:
            header = Result(r.submit.request_id, "m", "e", Usage(1, 1), "stop", RECEIPT)
            r.raw(encode(header), b'{"text": 3')

        def bad_header(r: Received) -> None:
            rid = r.submit.request_id
            r.raw(
                msgspec.msgpack.encode({"type": "failure", "request_id": rid, "code": "brand_new"})
            )

        async with connect(front.address) as client, client.workflow() as workflow:
            for answer in (no_payload, bad_payload, bad_header):
                front.on_submit = answer
                with pytest.raises(ProtocolError):
                    await workflow.generate(ASK)
            front.on_submit = None
            status = asyncio.ensure_future(client.status())
            asked = await front.next(GetStatus)
            assert isinstance(asked.message, GetStatus)
            assert await status == {"engines": []}

    run(body)


# Streams.


def test_stream() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            async with workflow.stream(ASK, max_tokens=9) as stream:
                with pytest.raises(RuntimeError):
                    _ = stream.reply
                submitted = await front.next(Submit)
                assert submitted.submit.stream
                pieces: list[str] = []
                for n, word in enumerate(["a ", "b ", "c "]):
                    submitted.chunk(2 * n, word)
                submitted.result("a b c d")
                async for text in stream:
                    pieces.append(text)
            assert "".join(pieces) == "a b c d" == stream.reply.text
            assert stream.reply.usage.output_tokens == 4
            assert stream.restarted == 0
            await front.pings(2)
        assert front.count(Cancel) == 0

    run(body)


def test_stream_delivers_before_the_end() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            stream = workflow.stream(ASK)
            pieces = aiter(stream)
            submitted = await front.next(Submit)
            submitted.chunk(0, "äö")
            assert await anext(pieces) == "äö"
            submitted.chunk(2, "ü")
            assert await anext(pieces) == "ü"
            waiting = asyncio.ensure_future(anext(pieces))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="one reader"):
                await anext(aiter(stream))
            with pytest.raises(Cancelled):  # by the second reader's mistake
                await waiting

    run(body)


def test_stream_overlap_gap_and_unreadable_chunk() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            stream = workflow.stream(ASK)
            submitted = await front.next(Submit)
            submitted.chunk(0, "abc")
            submitted.chunk(0, "abc")
            submitted.chunk(1, "bcde")
            submitted.chunk(9, "jk")  # f..i are missing
            submitted.raw(encode(_chunk(submitted, 5)), b"not json")
            submitted.raw(encode(_chunk(submitted, 5)))
            submitted.chunk(11, "l")
            submitted.result("abcdefghijkl")
            assert "".join(await read(stream)) == "abcdefghijkl"
            assert stream.restarted == 0

    def _chunk(received: Received, offset: int) -> Chunk:
        return Chunk(received.submit.request_id, 1, offset)

    run(body)


def test_stream_across_a_reconnect_to_the_same_daemon() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            stream = workflow.stream(ASK)
            pieces = aiter(stream)
            (await front.next(Submit)).chunk(0, "one ")
            got = [await anext(pieces)]
            await front.restart()  # "two " is lost on the way
            again = await front.next(Submit)
            again.chunk(8, "three ")
            again.result("one two three four")
            got += [text async for text in pieces]
            assert "".join(got) == "one two three four"
            assert stream.restarted == 0

    run(body)


@pytest.mark.parametrize("how", ["daemon", "attempt", "result"])
@pytest.mark.parametrize("restart", [False, True])
def test_stream_that_starts_again_after_text(how: str, restart: bool) -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            stream = workflow.stream(ASK, restart=restart)
            pieces = aiter(stream)
            submitted = await front.next(Submit)
            assert submitted.submit.restart is restart
            submitted.chunk(0, "first ", attempt_id=5)
            assert await anext(pieces) == "first "
            submitted.chunk(6, "perhaps read", attempt_id=5)
            if how == "daemon":
                await front.restart("two")
                if restart:
                    submitted = await front.next(Submit)
                    submitted.chunk(0, "second ", attempt_id=1)
            elif how == "attempt":
                submitted.chunk(0, "second ", attempt_id=6)
                submitted.chunk(16, "late", attempt_id=5)
            if restart or how != "daemon":
                submitted.result("second try")
            if restart:
                got, restarted = "first ", 0
                async for text in pieces:
                    got = text if stream.restarted != restarted else got + text
                    restarted = stream.restarted
                assert got == "second try" == stream.reply.text
                assert restarted == 1
                return
            with pytest.raises(StreamInterrupted) as caught:
                async for _ in pieces:
                    pass
            assert caught.value.retryable
            with pytest.raises(StreamInterrupted):
                _ = stream.reply
            assert client.pending == 0
            if how != "result":
                await front.next(Cancel)

    run(body)


def test_stream_that_starts_again_before_text_is_seamless() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            stream = workflow.stream(ASK)
            (await front.next(Submit)).chunk(0, "unread")
            await front.restart("two")
            again = await front.next(Submit)
            again.chunk(0, "fresh ")
            again.result("fresh start")
            assert "".join(await read(stream)) == "fresh start"
            assert stream.restarted == 0

    run(body)


def test_stream_failure_comes_after_its_text() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            stream = workflow.stream(ASK)
            submitted = await front.next(Submit)
            submitted.chunk(0, "so far")
            submitted.failure("engine_lost", retryable=True)
            pieces = aiter(stream)
            assert await anext(pieces) == "so far"
            with pytest.raises(EngineLost):
                await anext(pieces)

    run(body)


def test_leaving_a_stream_early_cancels() -> None:
    async def body(front: FakeFront) -> None:
        async with connect(front.address) as client, client.workflow() as workflow:
            async with workflow.stream(ASK) as stream:
                (await front.next(Submit)).chunk(0, "enough")
                async for _ in stream:
                    break
            await front.next(Cancel)
            with pytest.raises(Cancelled):
                _ = stream.reply
            # Without the block: the abandoned iterator is closed by the loop.
            stream = workflow.stream(ASK)
            (await front.next(Submit)).chunk(0, "enough")
            async for _ in stream:
                break
            await front.next(Cancel)
            # By cancelling the reader.
            reader = asyncio.ensure_future(read(workflow.stream(ASK)))
            await front.next(Submit)
            reader.cancel()
            await front.next(Cancel)
            with pytest.raises(asyncio.CancelledError):
                await reader
            # By word.
            stream = workflow.stream(ASK)
            reader = asyncio.ensure_future(read(stream))
            await front.next(Submit)
            stream.cancel()
            with pytest.raises(Cancelled):
                await reader
            assert client.pending == 0

    run(body)


# Plain threads.


class Thread:
    """The fake front on a loop of its own thread, for blocking clients."""

    def __init__(self, on_submit: Callable[[Received], None] | None) -> None:
        self._on_submit = on_submit
        self._ready = threading.Event()

    def __enter__(self) -> "Thread":
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with FakeFront() as self.front:
            self.front.on_submit = self._on_submit
            self._ready.set()
            await self._stop.wait()

    def next(self, kind: type[object]) -> Received:
        return asyncio.run_coroutine_threadsafe(self.front.next(kind), self.loop).result(10)


def test_sync_client() -> None:
    with Thread(echo) as daemon, connect_sync(daemon.front.address) as client:
        with client.workflow(kind="math", workflow_id="w") as workflow:
            assert workflow.id == "w"
            assert workflow.generate(ASK).text == "stage 0"
            stream = workflow.stream(ASK)
            assert "".join(stream) == "stage 1" == stream.reply.text
            assert workflow.stage == 2
            workflow.close(success=True)
        assert client.status() == {"engines": []}
        with client.workflow(), client.workflow():
            pass


def test_sync_client_from_several_threads() -> None:
    with Thread(echo) as daemon, connect_sync(daemon.front.address) as client:
        failures: list[object] = []

        def agent() -> None:
            try:
                with client.workflow() as workflow:
                    for n in range(20):
                        assert workflow.generate(ASK).text == f"stage {n}"
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=agent) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert failures == []


def test_sync_stream_left_early_and_restarted() -> None:
    def answer(received: Received) -> None:
        received.chunk(0, "some", attempt_id=1)

    with (
        Thread(answer) as daemon,
        connect_sync(daemon.front.address) as client,
        client.workflow() as workflow,
    ):
        with workflow.stream(ASK, restart=True) as stream:
            for text in stream:
                assert text == "some"
                break
        daemon.next(Cancel)
        seen: list[tuple[str, int]] = []
        stream = workflow.stream(ASK, restart=True)
        submitted = daemon.next(Submit)

        def begin_again() -> None:
            submitted.chunk(0, "other", attempt_id=2)
            submitted.result("other")

        for text in stream:
            seen.append((text, stream.restarted))
            if len(seen) == 1:
                daemon.loop.call_soon_threadsafe(begin_again)
        assert seen == [("some", 0), ("other", 1)]


def test_sync_errors() -> None:
    with pytest.raises(ValueError, match="not usable"), connect_sync("nowhere"):
        pass
    with (
        pytest.raises(DaemonUnreachable),
        connect_sync("ipc:///nonexistent/chimera", timeout_s=0.05),
    ):
        pass
    with Thread(lambda r: r.failure("conflict")) as daemon:
        with connect_sync(daemon.front.address) as client:
            workflow = client.workflow()
            with pytest.raises(Conflict):
                workflow.generate(ASK)
            daemon.front.on_submit = None
            with pytest.raises(RequestTimeout):
                workflow.generate(ASK, timeout_s=0.05)
        with pytest.raises(ClientClosed):
            workflow.generate(ASK)


def test_sync_close_while_another_thread_waits() -> None:
    caught: list[BaseException] = []
    with Thread(None) as daemon:
        with connect_sync(daemon.front.address) as client:
            workflow = client.workflow()

            def wait() -> None:
                try:
                    workflow.generate(ASK)
                except BaseException as error:
                    caught.append(error)

            thread = threading.Thread(target=wait)
            thread.start()
            daemon.next(Submit)
        thread.join(10)
    assert [type(e) for e in caught] == [ClientClosed]


# Streams without a socket.


class Nobody:
    """An owner that only notes what was given up."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.dropped = 0

    def drop(self, request: Pending[Any, Any], error: ChimeraError) -> None:
        if not (isinstance(request, Stream) and request.ended):
            self.dropped += 1
            request.fail(error)


@given(
    text=st.text(max_size=40),
    chunks=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20), st.booleans())),
)
def test_no_pattern_of_lost_and_repeated_chunks_shows(
    text: str, chunks: list[tuple[int, int, bool]]
) -> None:
    """Any chunks of the same text, read between some of them: exactly that text comes out."""

    async def main() -> None:
        nobody = Nobody()
        stream = Stream(nobody, Submit("r1", "w", stream=True), (b"", b""))
        pieces, got = aiter(stream), ""
        for offset, size, read_now in chunks:
            offset = min(offset, len(text))
            before = stream.unread
            stream.on_chunk(Chunk("r1", 1, offset), text[offset : offset + size])
            assert stream.unread >= before
            if read_now and stream.unread:
                got += await anext(pieces)
        stream.finish(Reply(text, "m", "e", Usage(1, 1), "stop", RECEIPT, "r1", 0.1, 0))
        got += "".join([piece async for piece in pieces])
        assert got == text == stream.reply.text
        assert stream.restarted == nobody.dropped == 0

    asyncio.run(main())


@given(
    attempts=st.lists(st.text(min_size=1, max_size=10), min_size=1, max_size=5),
    reads=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_restarts_are_counted_only_where_text_was_delivered(
    attempts: list[str], reads: list[bool]
) -> None:
    """Every attempt streams its text and is lost, but the last: its text is what remains."""

    async def main() -> None:
        stream = Stream(Nobody(), Submit("r1", "w", stream=True, restart=True), (b"", b""))
        pieces, seen = aiter(stream), {0: ""}
        for attempt_id, text in enumerate(attempts):
            stream.on_chunk(Chunk("r1", attempt_id, 0), text)
            if reads[attempt_id]:
                piece = await anext(pieces)
                seen[stream.restarted] = seen.get(stream.restarted, "") + piece
        reply = Reply(attempts[-1] + "!", "m", "e", Usage(1, 1), "stop", RECEIPT, "r1", 0.1, 0)
        stream.finish(reply)
        async for piece in pieces:
            seen[stream.restarted] = seen.get(stream.restarted, "") + piece
        assert seen[stream.restarted] == stream.reply.text
        assert stream.restarted == sum(reads[: len(attempts) - 1])

    asyncio.run(main())


# Examples.


# Those that speak to the gateway are run by tests/clients.
EXAMPLES = [p for p in sorted(ROOT.glob("examples/*.py")) if "tcp://" in p.read_text()]


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(script: Path) -> None:
    with Thread(lambda r: r.result("17 * 23 = 391")) as daemon:
        done = python(str(script), daemon.front.address)
    assert done.returncode == 0, done.stderr
    assert "391" in done.stdout
