"""Requests for text through the gateway, the daemon and an echo engine."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import run, until
from tests.gateway.harness import CHAT, JSON, Door, chat


def spy(door: Door) -> list[dict[str, Any]]:
    """What the gateway hands to the client of the daemon: payload and settings of each request."""
    seen: list[dict[str, Any]] = []
    request = door.gateway.client.request

    def noting(payload: bytes, **settings: Any) -> Any:
        seen.append({"payload": payload} | settings)
        return request(payload, **settings)

    door.gateway.client.request = noting  # type: ignore[method-assign]
    return seen


def test_a_chat_gets_the_engines_answer_and_headers_say_where_it_ran(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            answer = await door.ask(body=chat(max_tokens=4), x_request_id="mine 1")
            assert answer.status == 200
            assert answer.json["object"] == "chat.completion"
            assert answer.json["model"] == "m"
            assert answer.json["usage"]["completion_tokens"] == 4
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["x-chimera-model"] == "m"
            assert answer.headers["x-chimera-engine"] == "e"
            assert answer.headers["x-chimera-receipt-id"]
            assert answer.headers["x-chimera-workflow-id"]
            assert answer.headers["x-chimera-stage"] == "0"
            assert answer.headers["x-request-id"] == "mine 1"
            assert door.gateway.relay.requests == 1
            assert door.gateway.relay.failures == 0

    run(test())


def test_completions_have_their_own_form(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            body = json.dumps({"prompt": ["a", "b"], "max_tokens": 3}).encode()
            answer = await door.ask("/v1/completions", body)
            assert answer.status == 200
            assert answer.json["object"] == "text_completion"
            assert len(answer.json["choices"]) == 2

    run(test())


@pytest.mark.parametrize("step_s", [0.0, 0.003])
def test_a_stream_is_relayed_chunk_by_chunk(tmp_path: Path, step_s: float) -> None:
    async def test() -> None:
        async with Door(tmp_path, step_s=step_s) as door:
            answer = await door.ask(body=chat(max_tokens=8, stream=True))
            assert answer.status == 200
            assert answer.headers["x-chimera-workflow-id"]
            assert answer.headers["x-chimera-receipt-id"]
            *chunks, done = answer.events
            assert done == "[DONE]"
            objects = [json.loads(chunk) for chunk in chunks]
            assert {o["object"] for o in objects} == {"chat.completion.chunk"}
            text = "".join(o["choices"][0]["delta"].get("content") or "" for o in objects)
            assert len(text.split(" ")) == 8
            assert objects[-1]["choices"][0]["finish_reason"] == "length"
            assert b"\n\n: chimera model=m engine=e\n\ndata: [DONE]\n\n" in answer.body

    run(test())


def test_a_slow_stream_is_not_held_back(tmp_path: Path) -> None:
    """The first chunks are there before the last is made."""

    async def test() -> None:
        async with (
            Door(tmp_path, step_s=0.02, reply_tokens=(400, 400)) as door,
            door.session.post(CHAT, data=chat(stream=True), headers=JSON) as response,
        ):
            assert (await response.content.readuntil(b"\n\n")).startswith(b"data: ")
            assert door.gateway.relay.streams == 1
            assert door.world.stages["running"] == 1

    run(test())


@pytest.mark.parametrize("model", ["auto", "", None])
def test_chimera_chooses_the_model(tmp_path: Path, model: str | None) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            answer = await door.ask(body=chat(model=model))
            assert answer.headers["x-chimera-model"] == "m"

    run(test())


def test_a_name_pins_the_model_and_one_that_nobody_serves_is_not_found(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            await door.world.join("f", "other/large")
            for _ in range(3):
                answer = await door.ask(body=chat(model="other/large"))
                assert answer.headers["x-chimera-model"] == "other/large"
                assert answer.headers["x-chimera-engine"] == "f"
            for stream in (False, True):
                answer = await door.ask(body=chat(model="gpt-9", stream=stream))
                assert answer.status == 404
                assert answer.error["code"] == "model_not_found"
                assert answer.error["param"] == "model"
                assert "m, other/large" in answer.error["message"]
                assert answer.headers["x-should-retry"] == "false"

    run(test())


def test_a_request_without_an_id_is_a_workflow_of_its_own(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            seen = spy(door)
            ids = {(await door.ask(body=chat())).headers["x-chimera-workflow-id"] for _ in range(3)}
            assert len(ids) == 3
            assert {s["workflow_id"] for s in seen} == ids
            assert all(s["last"] and s["stage"] == 0 for s in seen)
            await until(lambda: door.world.core.snapshot()["workflows"] == 0, "ended workflows")

    run(test())


def test_stages_of_a_workflow_are_counted_unless_the_client_does(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            seen = spy(door)
            for headers in ({}, {}, {"x_chimera_stage": "7"}, {}, {"x_chimera_kind": "code"}):
                answer = await door.ask(body=chat(), x_session_id="s 1", **headers)
                assert answer.headers["x-chimera-workflow-id"] == "s 1"
            assert [s["stage"] for s in seen] == [0, 1, 7, 8, 9]
            assert [s["kind"] for s in seen] == [None, None, None, None, "code"]
            assert len({s["workflow_id"] for s in seen}) == 1
            assert not any(s["last"] for s in seen)

    run(test())


def test_what_the_client_knows_goes_to_the_scheduler_and_not_to_the_engine(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            seen = spy(door)
            extension = {
                "workflow_id": "w",
                "kind": "math",
                "stage": 3,
                "hints": {"output_tokens": 5},
                "tries": {"failed": ["m"], "left": 1},
                "confidence": {"m": 0.75},
            }
            body = chat("ü", seed=1e-7, chimera=extension, max_tokens=5, n=2)
            answer = await door.ask(body=body)
            assert answer.status == 200
            (request,) = seen
            assert json.loads(request["payload"]) == json.loads(
                chat("ü", seed=1e-7, max_tokens=5, n=2)
            )
            assert b"1e-07" in request["payload"]
            assert request["workflow_id"] == "w"
            assert (request["kind"], request["stage"]) == ("math", 3)
            assert request["hints"].output_tokens == 5
            assert request["hints"].confidence == {"m": 0.75}
            assert request["tries"].failed == ("m",)
            assert request["max_tokens"] == 10  # of both choices

    run(test())


def test_a_body_without_our_extension_is_passed_on_as_it_came(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door:
            seen = spy(door)
            body = b' {"messages" : [{"role":"user","content":"a\\u00fcb"}], "guided": [1.50]}\n'
            assert (await door.ask(body=body)).status == 200
            assert seen[0]["payload"] == body

    run(test())


def test_an_optional_stage_that_is_not_worth_it_is_declined(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path, daemon={"price": 100.0}, step_s=0.05) as door:
            extension = {"optional": True, "confidence": {"m": 0.0}}
            answer = await door.ask(body=chat(chimera=extension))
            assert answer.status == 409
            assert answer.error["code"] == "declined"
            assert answer.headers["x-should-retry"] == "false"

    run(test())
