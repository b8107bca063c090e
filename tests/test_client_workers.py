"""The client against a daemon of several workers: each workflow at home, each worker by itself."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from chimera_daemon.client import (
    Client,
    ClientClosed,
    DaemonUnreachable,
    Overloaded,
    ProtocolError,
    RequestTimeout,
    StreamInterrupted,
    connect,
)
from chimera_daemon.messages import Cancel, CloseWorkflow, Feedback, Submit
from chimera_daemon.wire import MAX_WORKERS, worker_address, worker_of
from fake_front import FakeFront, Received, run, until

ASK = [{"role": "user", "content": "2 + 2 = ?"}]
BODY = b"{}"


def echo(received: Received) -> None:
    received.result(f"by {received.front.worker}")


def names(worker: int, workers: int, count: int = 1) -> list[str]:
    """Ids of workflows that belong to this worker."""
    found: list[str] = []
    n = 0
    while len(found) < count:
        if worker_of(f"w{n}", workers) == worker:
            found.append(f"w{n}")
        n += 1
    return found


async def start(stack: AsyncExitStack, folder: Path, workers: int) -> list[FakeFront]:
    front = f"ipc://{folder}/front"
    return [
        await stack.enter_async_context(FakeFront(worker_address(front, n), n, workers))
        for n in range(workers)
    ]


def with_workers(
    folder: Path,
    workers: int,
    body: Callable[[list[FakeFront]], Awaitable[None]],
    timeout_s: float = 20.0,
) -> None:
    async def main(_: FakeFront) -> None:
        async with AsyncExitStack() as stack:
            await body(await start(stack, folder, workers))

    run(main, timeout_s)


def test_every_workflow_has_one_worker(tmp_path: Path) -> None:
    async def body(fronts: list[FakeFront]) -> None:
        for front in fronts:
            front.on_submit = echo
        async with connect(fronts[0].address) as client:
            assert client.workers == 3
            assert client.connected
            for worker, front in enumerate(fronts):
                for name in names(worker, 3, 5):
                    async with client.workflow(workflow_id=name) as workflow:
                        for _ in range(2):
                            assert (await workflow.generate(ASK)).text == f"by {worker}"
                        await workflow.feedback(0, verdict=True)
                        await workflow.close(success=True)
                assert front.count(Submit) == 10
                closed = {
                    r.message.workflow_id
                    for r in front.received
                    if isinstance(r.message, CloseWorkflow)
                }
                assert closed == set(names(worker, 3, 5))
                assert front.count(Feedback) == 5
            ids = [
                r.message.request_id
                for f in fronts
                for r in f.received
                if isinstance(r.message, Submit)
            ]
            assert len(set(ids)) == 30
            clients = [{r.client for r in front.received} for front in fronts]
            assert all(len(identities) == 1 for identities in clients)
            assert len(set.union(*clients)) == 3

    with_workers(tmp_path, 3, body)


def test_made_up_ids_are_spread(tmp_path: Path) -> None:
    async def body(fronts: list[FakeFront]) -> None:
        for front in fronts:
            front.on_submit = echo
        async with connect(fronts[0].address) as client:
            for _ in range(120):
                await client.workflow().submit(ASK)
        assert all(front.count(Submit) >= 15 for front in fronts)

    with_workers(tmp_path, 3, body)


def test_connect_waits_for_all(tmp_path: Path) -> None:
    async def body(fronts: list[FakeFront]) -> None:
        fronts[2].stop()
        with pytest.raises(DaemonUnreachable, match=r"front\.2 "):
            async with connect(fronts[0].address, timeout_s=0.2):
                pass
        async with asyncio.TaskGroup() as group:
            group.create_task(_return(fronts[2]))
            async with connect(fronts[0].address) as client:
                assert client.connected

    async def _return(front: FakeFront) -> None:
        await asyncio.sleep(0.05)
        await front.start()

    with_workers(tmp_path, 3, body)


def test_the_address_of_another_worker_is_refused(tmp_path: Path) -> None:
    async def body(fronts: list[FakeFront]) -> None:
        with pytest.raises(DaemonUnreachable, match="address of worker 0") as caught:
            async with connect(fronts[1].address):
                pass
        assert not caught.value.retryable

    with_workers(tmp_path, 2, body)


def test_a_stranger_at_the_port_of_a_worker(tmp_path: Path) -> None:
    async def body(fronts: list[FakeFront]) -> None:
        fronts[1].worker = 0
        with pytest.raises(DaemonUnreachable, match="worker 1 was expected"):
            async with connect(fronts[0].address):
                pass

    with_workers(tmp_path, 2, body)


@pytest.mark.parametrize("workers", [0, -1, MAX_WORKERS + 1, 1 << 40])
def test_a_count_that_cannot_be(workers: int) -> None:
    async def body(front: FakeFront) -> None:
        front.workers = workers
        with pytest.raises(ProtocolError, match="workers"):
            async with connect(front.address):
                pass

    run(body)


def test_status_of_several(tmp_path: Path) -> None:
    async def body(fronts: list[FakeFront]) -> None:
        async with connect(fronts[0].address) as client:
            assert await client.status() == {"workers": [{"engines": []}] * 3}
            fronts[1].stop()
            await until(lambda: not client.connected)
            assert await client.status() == {"workers": [{"engines": []}] * 2}
            fronts[0].stop()
            fronts[2].stop()
            with pytest.raises(RequestTimeout):
                await client.status(timeout_s=0.1)

    with_workers(tmp_path, 3, body)


def test_the_bound_is_for_all_workers(tmp_path: Path) -> None:
    async def body(fronts: list[FakeFront]) -> None:
        async with connect(fronts[0].address, max_pending=4) as client:
            for name in (*names(0, 2, 2), *names(1, 2, 2)):
                client.submit(BODY, workflow_id=name)
            assert client.pending == 4
            with pytest.raises(Overloaded):
                client.submit(BODY, workflow_id="one more")

    with_workers(tmp_path, 2, body)


def test_closing_covers_all(tmp_path: Path) -> None:
    async def body(fronts: list[FakeFront]) -> None:
        async with connect(fronts[0].address) as client:
            calls = [client.submit(BODY, workflow_id=names(n, 2)[0]) for n in (0, 1)]
            for front in fronts:
                await front.next(Submit)
        for call in calls:
            with pytest.raises(ClientClosed):
                await call
        for front in fronts:
            await front.next(Cancel)

    with_workers(tmp_path, 2, body)


def test_a_killed_worker_and_its_return(tmp_path: Path) -> None:
    """Its requests are sent again when it is back; nobody else notices."""

    async def body(fronts: list[FakeFront]) -> None:
        fronts[0].on_submit = echo
        home, other = names(1, 2)[0], names(0, 2)[0]
        async with connect(fronts[0].address) as client:
            call = client.submit(BODY, workflow_id=home)
            stream = client.relay(BODY, api="chat", workflow_id=home)
            pieces = aiter(stream)
            await fronts[1].next(Submit)
            (await fronts[1].next(Submit)).piece(0, b"delivered")
            assert await anext(pieces) == [b"delivered"]
            fronts[1].stop()
            await until(lambda: not client.connected)
            assert (await client.submit(BODY, workflow_id=other)).text == "by 0"
            later = client.submit(BODY, workflow_id=home)
            fronts[1].on_submit = echo
            await fronts[1].restart("another process")
            assert (await call).text == (await later).text == "by 1"
            with pytest.raises(StreamInterrupted):
                await anext(pieces)
            assert client.pending == 0
            assert fronts[0].count(Submit) == 1

    with_workers(tmp_path, 2, body)


def test_a_worker_that_is_away_too_long_fails_its_own(tmp_path: Path) -> None:
    async def body(fronts: list[FakeFront]) -> None:
        fronts[0].on_submit = echo
        home, other = names(1, 2)[0], names(0, 2)[0]
        async with connect(fronts[0].address, give_up_s=0.1) as client:
            call = client.submit(BODY, workflow_id=home)
            await fronts[1].next(Submit)
            fronts[1].stop()
            with pytest.raises(DaemonUnreachable, match=r"front\.1 "):
                await call
            with pytest.raises(DaemonUnreachable):
                client.submit(BODY, workflow_id=home)
            assert (await client.submit(BODY, workflow_id=other)).text == "by 0"
            await fronts[1].start()
            fronts[1].on_submit = echo
            await until(lambda: client.connected)
            assert (await client.submit(BODY, workflow_id=home)).text == "by 1"

    with_workers(tmp_path, 2, body)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3), (3, 2)])
def test_another_number_of_workers(tmp_path: Path, before: int, after: int) -> None:
    """The daemon restarts with another count: what moved is sent to its new worker."""

    async def body(fronts: list[FakeFront]) -> None:
        async with connect(fronts[0].address) as client:
            all_names = [f"w{n}" for n in range(30)]
            calls = {name: client.submit(BODY, workflow_id=name) for name in all_names}
            closing = asyncio.ensure_future(client.close_workflow("w0", 1.0))
            for front in fronts:
                front.answer_closes = False
            for worker in range(before):
                await fronts[worker].next(Submit)
            for front in fronts:
                front.stop()
            await until(lambda: not client.connected)
            for front in fronts[:after]:
                front.on_submit = echo
                front.answer_closes = True
                front.workers = after
                await front.restart("another")
            for name, call in calls.items():
                assert (await call).text == f"by {worker_of(name, after)}"
            await closing
            assert client.workers == after
            assert client.connected
            assert client.pending == 0

    async def main(_: FakeFront) -> None:
        async with AsyncExitStack() as stack:
            fronts = await start(stack, tmp_path, max(before, after))
            for front in fronts:
                front.workers = before
            await body(fronts)

    run(main)


@pytest.mark.parametrize("restart", [False, True])
def test_a_stream_that_moves_follows_the_rule_of_restarts(tmp_path: Path, restart: bool) -> None:
    async def body(fronts: list[FakeFront]) -> None:
        moving = next(n for n in names(0, 1, 100) if worker_of(n, 2) == 1)
        fronts[0].workers = 1
        async with connect(fronts[0].address) as client:
            stream = client.workflow(workflow_id=moving).stream(ASK, restart=restart)
            pieces = aiter(stream)
            (await fronts[0].next(Submit)).chunk(0, "old", attempt_id=9)
            assert await anext(pieces) == "old"
            fronts[0].workers = 2
            await fronts[0].restart("another")
            if not restart:
                with pytest.raises(StreamInterrupted):
                    await anext(pieces)
                assert client.pending == 0
                return
            submitted = await fronts[1].next(Submit)
            submitted.chunk(0, "new", attempt_id=2)
            submitted.result("new text")
            assert "".join([text async for text in pieces]) == "new text" == stream.reply.text
            assert stream.restarted == 1

    with_workers(tmp_path, 2, body)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_while_workers_die_and_their_number_changes(
    tmp_path: Path, seed: int
) -> None:
    async def body(fronts: list[FakeFront]) -> None:
        chance = random.Random(seed)

        def moody(received: Received) -> None:
            if chance.random() < 0.7:  # else it is lost with the worker
                received.result(f"{received.submit.workflow_id} {received.submit.stage}")

        async def agent(client: Client, name: str) -> None:
            async with client.workflow(workflow_id=name) as workflow:
                for stage in range(10):
                    assert (await workflow.generate(ASK)).text == f"{name} {stage}"
                await workflow.close(success=True, timeout_s=60)

        async def trouble() -> None:
            generation = 0
            while True:
                generation += 1
                there = [front for front in fronts if front.channel is not None]
                await chance.choice(there).pings(chance.randrange(1, 4))
                if chance.random() < 0.7:
                    await chance.choice(there).restart(f"{generation}")
                    continue
                workers = chance.randrange(1, 4)
                for front in fronts:
                    front.stop()
                for front in fronts[:workers]:
                    front.workers = workers
                    await front.restart(f"{generation}")

        for front in fronts:
            front.on_submit = moody
        async with connect(fronts[0].address) as client:
            fault = asyncio.ensure_future(trouble())
            try:
                await asyncio.gather(*(agent(client, f"w{n}") for n in range(20)))
            finally:
                fault.cancel()
            assert client.pending == 0

    with_workers(tmp_path, 3, body, timeout_s=60)
