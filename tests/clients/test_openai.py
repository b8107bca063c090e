"""The `openai` package against real vLLM engines, through gateway and daemon."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.clients.testbed import Testbed

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

QUESTION = "Solve. Start with 7, then add 5. What is the result?"
TASK: list[Any] = [{"role": "user", "content": QUESTION}]
SETTINGS: dict[str, Any] = {"messages": TASK, "max_tokens": 64, "temperature": 0, "seed": 1}
# So long that it is sure to be under way when its client goes away.
LONG: dict[str, Any] = {
    "model": "testbed-l",
    "messages": TASK,
    "n": 4,
    "max_tokens": 900,
    "extra_body": {"ignore_eos": True},
}
# Of its 3600 tokens. What engines report may be half a second old.
FAR_FROM_ITS_END = 1800
MODELS = ("testbed-s", "testbed-l")


class Step(BaseModel):
    """What the tools and the structured answers of these tests look like."""

    operation: Literal["add", "sub", "mul"]
    number: int = Field(ge=2, le=99)


STEP_TOOL = openai.pydantic_function_tool(Step, name="step")


@pytest.fixture
def client(testbed: Testbed) -> Iterator[OpenAI]:
    with OpenAI(base_url=testbed.url, api_key="unused", max_retries=0) as client:
        yield client


def run_async(testbed: Testbed, test: Callable[[AsyncOpenAI], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with AsyncOpenAI(base_url=testbed.url, api_key="unused", max_retries=0) as client:
            await test(client)

    asyncio.run(whole())


def text_of(chunks: Any) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def new_id() -> str:
    return f"test-{uuid.uuid4().hex}"


# Answers.


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, **SETTINGS)
    assert whole.object == "chat.completion"
    assert whole.model == model
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "stop"
    text = whole.choices[0].message.content
    assert text == "7+5=12\nanswer 12"

    with client.chat.completions.create(
        model=model, stream=True, stream_options={"include_usage": True}, **SETTINGS
    ) as stream:
        chunks = list(stream)
    assert text_of(chunks) == text
    assert len(chunks) > 5
    assert {c.id for c in chunks} == {chunks[0].id}
    assert {c.model for c in chunks} == {model}
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 5
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 5
    assert all(c.usage is None for c in chunks[:-1])


def test_async_answers_and_streams(testbed: Testbed) -> None:
    async def test(client: AsyncOpenAI) -> None:
        whole = await client.chat.completions.create(model="testbed-l", **SETTINGS)
        stream = await client.chat.completions.create(model="testbed-l", stream=True, **SETTINGS)
        chunks = [chunk async for chunk in stream]
        assert text_of(chunks) == whole.choices[0].message.content == "7+5=12\nanswer 12"

    run_async(testbed, test)


def test_auto_leaves_the_choice_to_chimera(client: OpenAI) -> None:
    assert client.chat.completions.create(model="auto", **SETTINGS).model in MODELS


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "step"}}])
def test_a_forced_tool_is_called_with_arguments_of_its_schema(
    client: OpenAI, model: str, choice: Any
) -> None:
    settings: dict[str, Any] = {
        "model": model,
        "tools": [STEP_TOOL],
        "tool_choice": choice,
        **SETTINGS,
    }
    settings |= {"parallel_tool_calls": False}
    reply = client.chat.completions.create(**settings)
    (call, *_) = reply.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "step"
    Step.model_validate_json(call.function.arguments)
    assert call.id

    deltas = [
        d
        for chunk in client.chat.completions.create(stream=True, **settings)
        for d in chunk.choices[0].delta.tool_calls or []
        if d.index == 0
    ]
    assert [d.function.name for d in deltas if d.function and d.function.name] == ["step"]
    arguments = "".join(d.function.arguments or "" for d in deltas if d.function)
    assert json.loads(arguments) == json.loads(call.function.arguments)


def test_the_result_of_a_tool_is_understood(client: OpenAI) -> None:
    call = {"name": "step", "arguments": '{"operation":"add","number":5}'}
    messages = [
        *TASK,
        {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "a", "content": "12"},
    ]
    reply = client.chat.completions.create(
        **SETTINGS | {"model": "auto", "messages": messages, "tools": [STEP_TOOL]}
    )
    assert reply.choices[0].message.content


def test_an_answer_has_the_form_that_was_asked_for(client: OpenAI) -> None:
    reply = client.chat.completions.parse(model="testbed-s", response_format=Step, **SETTINGS)
    assert isinstance(reply.choices[0].message.parsed, Step)


def test_log_probabilities_are_given_for_every_token(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="testbed-l", logprobs=True, top_logprobs=2, **SETTINGS
    )
    choice = reply.choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert reply.usage is not None
    assert len(tokens) == reply.usage.completion_tokens
    assert "".join(t.token for t in tokens).startswith(choice.message.content or "?")
    for token in tokens:
        assert token.logprob <= 0.0
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)


def test_several_choices(client: OpenAI) -> None:
    settings: dict[str, Any] = SETTINGS | {"temperature": 1.5, "n": 2}
    reply = client.chat.completions.create(model="testbed-s", **settings)
    assert [choice.index for choice in reply.choices] == [0, 1]
    chunks = list(client.chat.completions.create(model="testbed-s", stream=True, **settings))
    for choice in reply.choices:
        of_one = [c for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert text_of(of_one) == choice.message.content  # the seed is the same


@pytest.mark.parametrize("extra", [{"ignore_eos": True}, {"min_tokens": 40}])
def test_fields_that_only_vllm_knows_take_effect(client: OpenAI, extra: dict[str, Any]) -> None:
    short = client.chat.completions.create(model="testbed-l", **SETTINGS)
    long = client.chat.completions.create(model="testbed-l", extra_body=extra, **SETTINGS)
    assert short.usage is not None
    assert long.usage is not None
    assert short.usage.completion_tokens < 40 <= long.usage.completion_tokens <= 64
    if "ignore_eos" in extra:
        assert long.choices[0].finish_reason == "length"


def test_completions_of_text(client: OpenAI) -> None:
    prompt = "<|user|>Solve. Start with 7, then add 5. What is the result?<|end|><|assistant|>"
    settings: dict[str, Any] = {"model": "testbed-l", "max_tokens": 64, "temperature": 0}
    whole = client.completions.create(prompt=prompt, **settings)
    assert whole.object == "text_completion"
    assert whole.choices[0].text == "7+5=12\nanswer 12"
    stream = client.completions.create(prompt=prompt, stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    several = client.completions.create(prompt=[prompt, prompt], **settings)
    assert [choice.text for choice in several.choices] == [whole.choices[0].text] * 2


def test_fifty_at_once(testbed: Testbed) -> None:
    async def one(client: AsyncOpenAI, tokens: int) -> None:
        """The number of tokens shows whose answer it is."""
        settings: dict[str, Any] = SETTINGS | {
            "max_tokens": tokens,
            "extra_body": {"ignore_eos": True},
        }
        if tokens % 2:
            usage = (await client.chat.completions.create(model="auto", **settings)).usage
        else:
            settings["stream_options"] = {"include_usage": True}
            stream = await client.chat.completions.create(model="auto", stream=True, **settings)
            usage = [chunk async for chunk in stream][-1].usage
        assert usage is not None
        assert usage.completion_tokens == tokens

    async def test(client: AsyncOpenAI) -> None:
        await asyncio.gather(*(one(client, tokens) for tokens in range(1, 51)))

    before = testbed.counter("completed")
    run_async(testbed, test)
    assert testbed.counter("completed") == before + 50


# What the gateway adds.


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["auto", "testbed-l", "testbed-s"]
    assert client.models.retrieve("testbed-s").id == "testbed-s"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'; there are: auto"):
        client.models.retrieve("gpt-9")


def test_headers_say_who_answered(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="testbed-s", extra_headers={"x-request-id": "mine-1"}, **SETTINGS
    )
    assert raw.headers["x-chimera-model"] == raw.parse().model == "testbed-s"
    assert raw.headers["x-chimera-engine"] == "s"
    assert raw.headers["x-chimera-workflow-id"]
    assert raw.headers["x-chimera-receipt-id"]
    assert raw.headers["x-chimera-stage"] == "0"
    assert raw.headers["x-request-id"] == raw.parse()._request_id == "mine-1"
    raw = client.chat.completions.with_raw_response.create(model="auto", stream=True, **SETTINGS)
    assert raw.headers["x-chimera-receipt-id"]
    assert text_of(raw.parse())


def test_calls_with_one_id_are_one_workflow(client: OpenAI, testbed: Testbed) -> None:
    workflow_id = new_id()
    before = testbed.workflows()
    agent = client.with_options(
        default_headers={"x-chimera-workflow-id": workflow_id, "x-chimera-kind": "math"}
    )
    stages = []
    for _ in range(2):
        raw = agent.chat.completions.with_raw_response.create(model="auto", **SETTINGS)
        assert raw.headers["x-chimera-workflow-id"] == workflow_id
        stages.append(raw.headers["x-chimera-stage"])
        assert testbed.workflows() == before + 1
    assert stages == ["0", "1"]
    feedback = client.post(
        f"/workflows/{workflow_id}/feedback", body={"stage": 1, "verdict": 0.5}, cast_to=dict
    )
    assert feedback == {"workflow_id": workflow_id, "stage": 1, "verdict": 0.5}
    outcome = client.post(f"/workflows/{workflow_id}/outcome", body={"success": True}, cast_to=dict)
    assert outcome == {"workflow_id": workflow_id, "closed": True, "success": 1.0}
    assert testbed.workflows() == before
    (trace,) = testbed.traces(workflow_id)
    assert trace.kind == "math"
    assert trace.success == 1.0
    assert [stage.verdict for stage in trace.stages] == [None, 0.5]
    assert trace.stages[0].prompt_text is not None
    assert "Start with 7" in trace.stages[0].prompt_text

    with pytest.raises(openai.ConflictError) as raised:
        agent.chat.completions.create(model="auto", **SETTINGS)
    assert raised.value.code == "workflow_closed"


def test_the_id_may_be_in_the_body(client: OpenAI, testbed: Testbed) -> None:
    workflow_id = new_id()
    ours = {"workflow_id": workflow_id, "kind": "math", "confidence": {"testbed-l": 1.0}}
    raw = client.chat.completions.with_raw_response.create(
        model="auto", extra_body={"chimera": ours}, **SETTINGS
    )
    assert raw.headers["x-chimera-workflow-id"] == workflow_id
    raw = client.chat.completions.with_raw_response.create(
        model="auto", extra_body={"program_id": workflow_id}, **SETTINGS
    )
    assert raw.headers["x-chimera-stage"] == "1"
    client.post(f"/workflows/{workflow_id}/outcome", body={"success": None}, cast_to=dict)
    (trace,) = testbed.traces(workflow_id)
    assert trace.kind == "math"
    assert trace.success is None
    assert len(trace.stages) == 2


def test_a_request_without_an_id_leaves_no_workflow(client: OpenAI, testbed: Testbed) -> None:
    before = testbed.workflows()
    first = client.chat.completions.with_raw_response.create(model="auto", **SETTINGS)
    second = client.chat.completions.with_raw_response.create(model="auto", **SETTINGS)
    assert first.headers["x-chimera-workflow-id"] != second.headers["x-chimera-workflow-id"]
    assert testbed.workflows() == before


# Errors.


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="gpt-9", **SETTINGS)
    assert raised.value.code == "model_not_found"
    assert raised.value.param == "model"
    assert "testbed-l, testbed-s" in raised.value.message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 5000}, "max_model_len"),
        ({"messages": "hello"}, "messages"),
        ({"extra_body": {"model": 7}}, "`model`"),
        ({"extra_body": {"chimera": {"knid": "math"}}}, "knid"),
        ({"tools": [STEP_TOOL], "tool_choice": {"type": "function"}}, "tool_choice|function"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
    ],
)
def test_a_bad_request_says_what_is_wrong(
    client: OpenAI, wrong: dict[str, Any], says: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as raised:
        client.chat.completions.create(**{"model": "auto", **SETTINGS, **wrong}, stream=stream)
    assert raised.value.code == "bad_request"
    assert raised.value.type == "invalid_request_error"


def test_what_cannot_succeed_is_not_tried_again(client: OpenAI, testbed: Testbed) -> None:
    """The client by itself would repeat a request that ended in a conflict."""
    workflow_id = new_id()
    settings: dict[str, Any] = SETTINGS | {"extra_headers": {"x-chimera-workflow-id": workflow_id}}
    client.chat.completions.create(model="auto", **settings)
    client.post(f"/workflows/{workflow_id}/outcome", body={"success": True}, cast_to=dict)
    sent: list[object] = []
    hooks = {"request": [sent.append]}
    with (
        openai.DefaultHttpxClient(event_hooks=hooks) as http,
        OpenAI(
            base_url=testbed.url, api_key="unused", max_retries=3, http_client=http
        ) as persistent,
        pytest.raises(openai.ConflictError),
    ):
        persistent.chat.completions.create(model="auto", **settings)
    assert len(sent) == 1


def test_a_path_that_is_not_there(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no /v1/embeddings here"):
        client.embeddings.create(model="auto", input="text")


# Clients that go away.


def test_a_client_that_waits_no_longer_frees_its_engine(client: OpenAI, testbed: Testbed) -> None:
    before = testbed.output_tokens()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(**LONG)
    testbed.until_idle()
    assert testbed.output_tokens() < before + FAR_FROM_ITS_END


def test_closing_a_stream_frees_its_engine(client: OpenAI, testbed: Testbed) -> None:
    before = testbed.output_tokens()
    stream = client.chat.completions.create(stream=True, **LONG)
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    assert testbed.status()["core"]["stages"]["running"] == 1
    stream.close()
    testbed.until_idle()
    assert testbed.output_tokens() < before + FAR_FROM_ITS_END


def test_cancelling_a_task_frees_its_engine(testbed: Testbed) -> None:
    async def read(stream: AsyncIterator[Any], begun: asyncio.Event) -> None:
        async for _ in stream:
            begun.set()

    async def test(client: AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(stream=True, **LONG)
        begun = asyncio.Event()
        tasks = [asyncio.ensure_future(read(stream, begun))]
        await begun.wait()
        tasks.append(asyncio.ensure_future(client.chat.completions.create(**LONG)))
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)
        await stream.close()

    before = testbed.output_tokens()
    run_async(testbed, test)
    testbed.until_idle()
    assert testbed.output_tokens() < before + FAR_FROM_ITS_END
