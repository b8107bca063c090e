"""OpenAI's two forms, as every backend must serve them; then what only a real vLLM can do."""

import json
import re
from typing import Any

import pytest

from chimera_daemon.messages import Api
from tests.engines.conftest import VLLM_WARNINGS, Rig, chat
from tests.engines.direct import Direct, run_direct
from tests.engines.fake_daemon import until
from tests.engines.tiny_model import byte_tokens

pytestmark = [pytest.mark.filterwarnings(w) for w in VLLM_WARNINGS]

FORMS: tuple[Api, ...] = ("chat", "completions")
OBJECTS = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("completions", False): "text_completion",
    ("completions", True): "text_completion",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"up": {"type": "boolean"}},
            "required": ["up"],
            "additionalProperties": False,
        },
    },
}
# A model with random weights would indent JSON for ever.
NO_WHITESPACE = {str(token): -100 for token in byte_tokens(" \n\t\r")}


def body(api: Api, text: str = "tell me", **extra: Any) -> bytes:
    """Runs to its `max_tokens`."""
    asked = {"messages": [{"role": "user", "content": text}]} if api == "chat" else {"prompt": text}
    fixed = {"ignore_eos": True, "temperature": 0.0, "max_tokens": 12}
    return json.dumps(asked | fixed | extra).encode()


@pytest.mark.parametrize("api", FORMS)
def test_whole(rig: Rig, api: Api) -> None:
    async def test(direct: Direct) -> None:
        seen = direct.submit(api, body(api))  # the header's max_tokens is 1: it does not count
        finished = await seen.finished()
        answer = seen.object
        assert not seen.chunks
        assert answer["object"] == OBJECTS[api, False]
        assert answer["model"] == rig.engine.model
        assert answer["id"]
        assert seen.text()
        (choice,) = answer["choices"]
        assert (choice["index"], choice["finish_reason"]) == (0, "length")
        assert finished.finish_reason == "length"
        assert finished.usage.output_tokens == 12
        assert finished.usage.prompt_tokens > 0
        assert answer["usage"]["completion_tokens"] == 12
        assert answer["usage"]["prompt_tokens"] == finished.usage.prompt_tokens
        assert finished.logprob is None  # it was not asked for

    run_direct(rig, test)


@pytest.mark.parametrize("api", FORMS)
def test_stream_is_the_text_in_numbered_chunks(rig: Rig, api: Api) -> None:
    async def test(direct: Direct) -> None:
        payload = body(api, max_tokens=40)
        whole = direct.submit(api, payload)
        stream = direct.submit(api, payload, stream=True)
        await whole.finished()
        finished = await stream.finished()
        assert stream.offsets == list(range(len(stream.chunks)))
        assert stream.streamed.chunks == len(stream.chunks)
        assert stream.text() == whole.text()
        assert {c["object"] for c in stream.chunks} == {OBJECTS[api, True]}
        assert {c["model"] for c in stream.chunks} == {rig.engine.model}
        assert len({c["id"] for c in stream.chunks}) == 1
        reasons = [c["choices"][0]["finish_reason"] for c in stream.chunks]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
        assert finished.usage.output_tokens == 40
        assert not rig.clocked or len(stream.chunks) > 5

    run_direct(rig, test)


@pytest.mark.parametrize("api", FORMS)
def test_usage_in_the_stream_if_asked_for(rig: Rig, api: Api) -> None:
    async def test(direct: Direct) -> None:
        payload = body(api, stream=True, stream_options={"include_usage": True})
        seen = direct.submit(api, payload, stream=True)
        finished = await seen.finished()
        last = seen.chunks[-1]
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == finished.usage.output_tokens == 12
        assert last["usage"]["prompt_tokens"] == finished.usage.prompt_tokens
        assert seen.streamed.chunks == len(seen.chunks)

    run_direct(rig, test)


@pytest.mark.parametrize("api", FORMS)
def test_the_header_decides_whether_to_stream(rig: Rig, api: Api) -> None:
    async def test(direct: Direct) -> None:
        whole = direct.submit(api, body(api, stream=True))
        stream = direct.submit(api, body(api, stream=False), stream=True)
        await whole.finished()
        await stream.finished()
        assert whole.object["object"] == OBJECTS[api, False]
        assert stream.streamed.chunks == len(stream.chunks) > 0

    run_direct(rig, test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", FORMS)
def test_several_choices(rig: Rig, api: Api, stream: bool) -> None:
    async def test(direct: Direct) -> None:
        seen = direct.submit(api, body(api, n=3, temperature=1.0, seed=5), stream=stream)
        finished = await seen.finished()
        assert finished.usage.output_tokens == 36
        objects = seen.chunks or [seen.object]
        assert {c["index"] for o in objects for c in o["choices"]} == {0, 1, 2}

    run_direct(rig, test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "choices", "prompt_tokens"),
    [("one", 1, None), (["one", "two"], 2, None), ([7, 8, 9], 1, 3), ([[7, 8], [9, 8]], 2, None)],
)
def test_prompts(
    rig: Rig, prompt: Any, choices: int, prompt_tokens: int | None, stream: bool
) -> None:
    async def test(direct: Direct) -> None:
        payload = body("completions", prompt=prompt, max_tokens=4)
        seen = direct.submit("completions", payload, stream=stream)
        finished = await seen.finished()
        objects = seen.chunks or [seen.object]
        assert {c["index"] for o in objects for c in o["choices"]} == set(range(choices))
        assert finished.usage.output_tokens == 4 * choices
        assert prompt_tokens is None or finished.usage.prompt_tokens == prompt_tokens

    run_direct(rig, test)


@pytest.mark.parametrize("api", FORMS)
@pytest.mark.parametrize("name", ["auto", "another/model", "", None])
def test_any_model_name_is_served(rig: Rig, api: Api, name: str | None) -> None:
    async def test(direct: Direct) -> None:
        seen = direct.submit(api, body(api, model=name, priority=77, max_tokens=2))
        await seen.finished()
        assert seen.object["model"] == rig.engine.model

    run_direct(rig, test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", FORMS)
def test_cancel_frees_the_slots_and_is_silent(rig: Rig, api: Api, stream: bool) -> None:
    if not rig.clocked:
        pytest.skip("answers at once")

    async def test(direct: Direct) -> None:
        backend = direct.backend
        payloads = [
            body(api, str(i), max_tokens=1500, n=2, temperature=1.0)
            for i in range(rig.max_inflight)
        ]
        running = [direct.submit(api, payload, stream=stream) for payload in payloads]
        await until(lambda: max(backend.progress().values(), default=0) > 10, "progress")
        assert set(backend.progress()) <= {seen.attempt_id for seen in running}
        for seen in running:
            backend.cancel(seen.attempt_id)
        events = [seen.events for seen in running]
        await until(lambda: backend.stats().running == 0, "free slots")
        await direct.submit(api, body(api)).finished()
        assert [seen.events for seen in running] == events
        assert not any(seen.answers for seen in running)

    run_direct(rig, test)


def test_priority_is_that_of_the_header(rig: Rig) -> None:
    if not rig.clocked:
        pytest.skip("answers at once")

    async def test(direct: Direct) -> None:
        fillers = [
            direct.submit("chat", body("chat", f"f{i}", max_tokens=150 if i == 0 else 1500))
            for i in range(rig.max_inflight)
        ]
        await until(lambda: direct.backend.stats().running == rig.max_inflight, "full")
        late = direct.submit("chat", body("chat", "late", priority=-9), priority=10)
        soon = direct.submit("chat", body("chat", "soon", priority=99), priority=1)
        await soon.finished()
        assert not late.answers
        for filler in fillers[1:]:
            direct.backend.cancel(filler.attempt_id)
        await late.finished()

    run_direct(rig, test)


BAD: dict[str, tuple[Api, bytes, str]] = {
    "not json": ("chat", b"{", "JSON"),
    "empty": ("completions", b"", ""),
    "not utf-8": ("chat", b'{"messages":[{"role":"user","content":"\xff"}]}', ""),
    "a list": ("chat", b"[]", "object"),
    "nested": ("completions", b'{"prompt":' + b"[" * 100_000, ""),
    "no messages": ("chat", b"{}", "messages"),
    "wrong role": ("chat", body("chat", messages=[{"role": 3, "content": "x"}]), "role"),
    "no prompt": ("completions", b"{}", "prompt"),
    "mixed prompt": ("completions", body("completions", prompt=["x", 7]), "prompt"),
    "prompt of no use": ("completions", body("completions", prompt={"a": 1}), "prompt"),
    "max_tokens": ("chat", body("chat", max_tokens="many"), "max_tokens"),
    "no tokens": ("chat", body("chat", max_tokens=0), "max_tokens"),
    "choices": ("chat", body("chat", n=100_000), r"\$\.n|n must be"),
    "options": ("chat", body("chat", stream=True, stream_options=7), "stream_options"),
    "required tool": ("chat", body("chat", tool_choice="required"), "tool"),
    "another tool": (
        "chat",
        body("chat", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "x"}}),
        "tool",
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_body_is_refused_and_the_engine_goes_on(rig: Rig, name: str, stream: bool) -> None:
    api, payload, says = BAD[name]

    async def test(direct: Direct) -> None:
        seen = direct.submit(api, payload, stream=stream)
        assert re.search(says, await seen.refused())
        assert not seen.chunks
        await direct.submit(api, body(api)).finished()

    run_direct(rig, test)


@pytest.mark.parametrize("api", FORMS)
def test_prompt_over_the_context(rig: Rig, api: Api) -> None:
    async def test(direct: Direct) -> None:
        assert "2048" in await direct.submit(api, body(api, "x" * 30_000)).refused()
        fits = await direct.submit(api, body(api, max_tokens=2048)).finished()
        assert fits.usage.prompt_tokens + fits.usage.output_tokens == 2048

    run_direct(rig, test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_tool_call(rig: Rig, choice: Any, stream: bool) -> None:
    async def test(direct: Direct) -> None:
        payload = body(
            *("chat", "look!"),
            tools=[TOOL],
            tool_choice=choice,
            max_tokens=300,
            ignore_eos=False,
            logit_bias=NO_WHITESPACE,
        )
        seen = direct.submit("chat", payload, stream=stream)
        await seen.finished()
        objects = seen.chunks or [seen.object]
        choices = [c for o in objects for c in o["choices"]]
        said = [c.get("delta") or c.get("message") or {} for c in choices]
        calls = [call for part in said for call in part.get("tool_calls") or []]
        calls = [call for call in calls if call["index"] == 0] if stream else calls[:1]
        assert calls[0]["type"] == "function"
        assert calls[0]["id"]
        assert calls[0]["function"]["name"] == "look"
        arguments = json.loads("".join(c["function"].get("arguments") or "" for c in calls))
        assert set(arguments) == (set() if rig.engine.kind == "echo" else {"up"})
        assert choices[-1]["finish_reason"] in ("tool_calls", "stop")

    run_direct(rig, test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", FORMS)
def test_mean_logprob_if_the_daemon_wants_it(rig: Rig, api: Api, stream: bool) -> None:
    async def test(direct: Direct) -> None:
        seen = direct.submit(api, body(api), stream=stream, logprobs=True)
        logprob = (await seen.finished()).logprob
        if rig.engine.kind == "echo":
            assert logprob is None
            return
        assert logprob is not None
        assert -20 < logprob < 0  # random weights: of no token is it sure
        objects = seen.chunks or [seen.object]
        assert not any(c["logprobs"] for o in objects for c in o["choices"])
        text = await direct.submit("text", body("chat"), max_tokens=12, logprobs=True).finished()
        if api == "chat":
            assert text.logprob == pytest.approx(logprob, rel=0.01)

    run_direct(rig, test)


# Only a real vLLM.


@pytest.fixture
def real(vllm_real: Rig) -> Rig:
    return vllm_real


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_for_the_client(real: Rig, stream: bool) -> None:
    async def test(direct: Direct) -> None:
        payload = body("chat", logprobs=True, top_logprobs=2, max_tokens=3)
        seen = direct.submit("chat", payload, stream=stream)
        finished = await seen.finished()
        choices = [c for o in seen.chunks or [seen.object] for c in o["choices"]]
        content = [token for c in choices if c["logprobs"] for token in c["logprobs"]["content"]]
        assert len(content) == 3
        assert all(len(token["top_logprobs"]) == 2 for token in content)
        mean = sum(token["logprob"] for token in content) / 3
        assert finished.logprob == pytest.approx(mean, rel=0.01)

    run_direct(real, test)


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_seed(real: Rig) -> None:
    async def test(direct: Direct) -> None:
        seeds = (5, 5, 6)
        seen = [direct.submit("chat", body("chat", temperature=1.0, seed=seed)) for seed in seeds]
        for attempt in seen:
            await attempt.finished()
        texts = [attempt.text() for attempt in seen]
        assert texts[0] == texts[1] != texts[2]

    run_direct(real, test)


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stream", [False, True])
def test_structured_output(real: Rig, stream: bool) -> None:
    schema = TOOL["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}

    async def test(direct: Direct) -> None:
        payload = body(
            "chat",
            response_format=form,
            max_tokens=300,
            ignore_eos=False,
            logit_bias=NO_WHITESPACE,
        )
        seen = direct.submit("chat", payload, stream=stream)
        assert (await seen.finished()).finish_reason == "stop"
        assert set(json.loads(seen.text())) == {"up"}
        schema["type"] = "nonsense"
        payload = body("chat", response_format=form)
        schema["type"] = "object"
        message = await direct.submit("chat", payload, stream=stream).refused()
        assert "nonsense" in message

    run_direct(real, test)


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_template_of_the_configuration(real: Rig) -> None:
    async def test(direct: Direct) -> None:
        ours = await direct.submit("text", chat("hi")).finished()
        theirs = await direct.submit("chat", body("chat", "hi")).finished()
        marks = 2  # a token each
        expected = len("youser\nhi\nassistant\n") + marks
        assert ours.usage.prompt_tokens == theirs.usage.prompt_tokens == expected

    run_direct(real, test)


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_what_else_the_server_knows_passes_through(real: Rig) -> None:
    async def test(direct: Direct) -> None:
        echoed = direct.submit("completions", body("completions", "hello", echo=True))
        stopped = direct.submit(
            "chat", body("chat", stop_token_ids=byte_tokens("\0"), min_tokens=2)
        )
        beams = direct.submit("chat", body("chat", use_beam_search=True, n=2), logprobs=True)
        tokens = direct.submit("chat", body("chat", return_token_ids=True))
        await echoed.finished()
        assert echoed.text().startswith("hello")
        await stopped.finished()
        searched = await beams.finished()
        assert searched.usage.output_tokens == 24
        assert searched.logprob is None
        await tokens.finished()
        assert len(tokens.object["choices"][0]["token_ids"]) == 12

    run_direct(real, test)


@pytest.mark.vllm
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("api", "extra", "says"),
    [
        ("completions", {"suffix": "x"}, "suffix"),
        ("chat", {"structured_outputs": 7}, "wrong type"),  # vLLM's validator raises what it likes
        ("chat", {"temperature": -1.0}, "temperature"),
        ("chat", {"top_k": 1 << 63}, "`top_k` does not fit"),
        ("chat", {"top_p": "a", "top_k": "b"}, "`top_k`.*; `top_p`|`top_p`.*; `top_k`"),
        ("chat", {"messages": [{"role": 3}]}, "; and .* more"),
    ],
)
def test_what_vllm_refuses(real: Rig, api: Api, extra: dict[str, Any], says: str) -> None:
    async def test(direct: Direct) -> None:
        assert re.search(says, await direct.submit(api, body(api, **extra)).refused())

    run_direct(real, test)
