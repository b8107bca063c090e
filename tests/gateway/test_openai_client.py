"""The `openai` package as people use it: only its base URL says that this is Chimera."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import run
from tests.gateway.harness import Door

openai = pytest.importorskip("openai")

ASK: Any = [{"role": "user", "content": "2 + 2 = ?"}]


@asynccontextmanager
async def clients(door: Door) -> AsyncIterator[Any]:
    client = openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)
    async with client:
        yield client


def test_chats_streams_completions_and_models(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door, clients(door) as client:
            names = [model.id async for model in client.models.list()]
            assert names == ["auto", "m"]
            chat = await client.chat.completions.create(model="auto", messages=ASK, max_tokens=4)
            assert chat.model == "m"
            assert len(chat.choices[0].message.content.split(" ")) == 4
            raw = await client.chat.completions.with_raw_response.create(
                model="m", messages=ASK, extra_headers={"x-chimera-workflow-id": "w"}
            )
            assert raw.headers["x-chimera-workflow-id"] == "w"
            assert raw.headers["x-chimera-engine"] == "e"
            stream = await client.chat.completions.create(
                model="auto",
                messages=ASK,
                max_tokens=6,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"chimera": {"kind": "math", "stage": 2}},
            )
            parts = [part async for part in stream]
            text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
            assert len(text.split(" ")) == 6
            assert parts[-1].usage.completion_tokens == 6
            text = await client.completions.create(model="m", prompt="2 + 2", max_tokens=3)
            assert len(text.choices[0].text.split()) == 3

    run(test())


def test_errors_are_its_own_classes(tmp_path: Path) -> None:
    async def test() -> None:
        async with Door(tmp_path) as door, clients(door) as client:
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(model="gpt-9", messages=ASK)
            assert missing.value.code == "model_not_found"
            assert missing.value.param == "model"
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("gpt-9")
            with pytest.raises(openai.BadRequestError) as bad:
                await client.chat.completions.create(model="m", messages=ASK, max_tokens="many")
            assert bad.value.param == "max_tokens"
            await door.ask("/v1/workflows/w/outcome", b'{"success": true}')
            await client.chat.completions.create(model="m", messages=ASK)

    run(test())


def test_an_error_in_the_middle_of_a_stream_is_raised(tmp_path: Path) -> None:
    async def test() -> None:
        settings: dict[str, Any] = {"step_s": 0.01, "reply_tokens": (10_000, 10_000)}
        async with (
            Door(tmp_path, daemon={"engine_timeout_s": 0.3}, **settings) as door,
            clients(door) as client,
        ):
            stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)
            await anext(aiter(stream))
            await door.world.kill("e")
            with pytest.raises(openai.APIError, match="."):
                async for _ in stream:
                    pass
            await door.world.join("f", "m")

    run(test())
