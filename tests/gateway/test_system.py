"""What the gateway says about the system, and the words of a client about its workflows."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from chimera_daemon import __version__
from chimera_daemon.board import GATEWAY_KEY, Board
from tests.daemon.harness import run, until
from tests.gateway.harness import CHAT, Door, chat, request


def test_models_are_listed_and_found_by_name(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            await door.world.join("f", "org/large")
            answer = await door.ask("/v1/models")
            assert answer.json["object"] == "list"
            assert [m["id"] for m in answer.json["data"]] == ["auto", "m", "org/large"]
            assert all(m["object"] == "model" for m in answer.json["data"])
            for path in ("org/large", "org%2Flarge", "auto"):
                one = await door.ask(f"/v1/models/{path}")
                assert one.json["id"] == path.replace("%2F", "/")
            missing = await door.ask("/v1/models/none")
            assert missing.status == 404
            assert missing.error["code"] == "model_not_found"
            assert "org/large" in missing.error["message"]

    run(test())


def test_health_follows_daemon_and_engines(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path, daemon={"engine_timeout_s": 0.3}) as door:
            answer = await door.ask("/health")
            assert (answer.status, answer.json) == (200, {"status": "ok", "models": ["m"]})
            host, _ = door.world.hosts["e"]
            host.stop()
            await until(lambda: not door.world.daemon._engines, "the engine to leave")
            assert "no engine" in await unhealthy(door)
            door.world.daemon.close()
            await until(lambda: not door.gateway.client.connected, "the daemon to be missed")
            assert "daemon" in await unhealthy(door)
            assert (await door.ask("/v1/models")).status == 503
            assert (await door.ask("/metrics")).status == 200  # of the gateways, if nothing else
            await door.restart_daemon()
            await until(lambda: door.gateway.client.connected, "the next daemon")
            await door.world.join("f", "m")
            while (await door.ask("/health")).status != 200:
                await asyncio.sleep(0.05)

    run(test())


async def unhealthy(door: Door) -> str:
    """Why the gateway cannot serve; what it knows may be a second old."""
    while (answer := await door.ask("/health")).status == 200:
        await asyncio.sleep(0.05)
    assert answer.status == 503
    assert answer.json["status"] == "unavailable"
    return answer.json["reason"]


def test_version(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            assert (await door.ask("/version")).json == {"version": __version__}

    run(test())


def test_metrics_are_prometheus_text(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            await door.ask(body=chat())
            answer = await door.ask("/metrics")
            assert answer.status == 200
            assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert b"# TYPE chimera_" in answer.body

    run(test())


def test_head_and_options(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            head = await door.ask("/health", method="HEAD")
            assert (head.status, head.body) == (200, b"")
            options = await door.ask(CHAT, method="OPTIONS")
            assert (options.status, options.headers["allow"]) == (204, "POST, OPTIONS")

    run(test())


def test_an_outcome_reaches_the_predictor_and_ends_the_workflow(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            predictor = door.world.daemon._prior
            outcomes: list[Any] = []
            verdicts: list[Any] = []
            predictor.observe_workflow = outcomes.append  # type: ignore[method-assign]
            predictor.observe_feedback = lambda *given: verdicts.append(given)  # type: ignore[method-assign]
            for number, success in enumerate((True, False, 0.25, None)):
                workflow_id = f"w{number}"
                answer = await door.ask(body=chat(), x_chimera_workflow_id=workflow_id)
                stage = int(answer.headers["x-chimera-stage"])
                said = await door.ask(
                    f"/v1/workflows/{workflow_id}/feedback",
                    json.dumps({"stage": stage, "verdict": number / 4}).encode(),
                )
                assert said.status == 202
                ended = await door.ask(
                    f"/v1/workflows/{workflow_id}/outcome",
                    json.dumps({"success": success}).encode(),
                )
                assert ended.status == 200
            assert [o.workflow_id for o in outcomes] == ["w0", "w1", "w2", "w3"]
            assert [o.success for o in outcomes] == [1.0, 0.0, 0.25, None]
            assert verdicts == [(f"w{n}", 0, n / 4) for n in range(4)]
            assert len(door.gateway.relay.stages) == 0

    run(test())


def test_an_outcome_that_nobody_takes_in_is_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path, give_up_s=0.2) as door:
            door.world.daemon.close()
            await until(lambda: not door.gateway.client.connected)
            answer = await door.ask("/v1/workflows/w/outcome", b'{"success": true}')
            assert answer.status == 503
            assert answer.error["code"] == "unreachable"
            assert answer.headers["x-should-retry"] == "true"
            await door.restart_daemon()

    run(test())


def test_counts_are_on_the_board_while_the_gateway_lives(tmp_path: Path) -> None:
    async def test() -> None:
        with Board.create() as board:
            settings: dict[str, Any] = {"step_s": 0.005, "reply_tokens": (2000, 2000)}
            async with Door(tmp_path, board=board.path, **settings) as door:
                assert (await door.ask(body=chat(model="none"))).status == 404
                line = await door.line()
                line.say(request(chat(stream=True)))

                def values() -> list[tuple[int, ...]]:
                    rows = [row for row in board.read() if row.key == GATEWAY_KEY]
                    assert all(row.pid == os.getpid() for row in rows)
                    return [tuple(row.values) for row in rows]

                await until(lambda: values() == [(2, 1, 1, 2, 1, 0)], "the counts of a stream")
                line.cut()
                await until(lambda: values() == [(1, 0, 0, 2, 2, 0)], "the counts without it")
            assert [row for row in board.read() if row.role == "gateway"] == []

    run(test())


def test_a_board_that_is_not_there_does_no_harm(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            for path in (str(tmp_path / "none"), str(tmp_path), "", "\0"):
                door.gateway._counts.follow(path)
                assert (await door.ask(body=chat())).status == 200
                assert (await door.ask("/metrics")).status == 200

    run(test())
