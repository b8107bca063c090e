"""Stream several answers at once with the async OpenAI client; Chimera chooses each one's model.

    python examples/openai_stream_async.py http://127.0.0.1:5700/v1

Start the system first with `chimera up`; it needs `pip install openai`.
"""

import asyncio
import sys

from openai import AsyncOpenAI, OpenAIError

TASKS = [
    "Start with 7, then add 5. What is the result?",
    "Start with 90, then divide by 3, then add 12. What is the result?",
    "Tom has 8 apples. Tom finds 6 more. A friend takes 5. How many apples are there now?",
]


async def solve(client: AsyncOpenAI, number: int, task: str) -> None:
    stream = await client.chat.completions.create(
        model="auto",
        messages=[{"role": "user", "content": f"Solve. {task}"}],
        max_tokens=128,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    line = ""
    async for chunk in stream:
        if chunk.choices:
            line += chunk.choices[0].delta.content or ""
            *whole, line = line.split("\n")
            for text in whole:
                print(f"{number}: {text}")
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
            print(f"{number}: {line}   [{chunk.model}, {tokens} tokens]")


async def main(url: str) -> None:
    async with AsyncOpenAI(base_url=url, api_key="unused") as client:
        await asyncio.gather(*(solve(client, n, task) for n, task in enumerate(TASKS, 1)))


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:5700/v1"
    try:
        asyncio.run(main(url))
    except OpenAIError as error:
        sys.exit(f"{url}: {error}")
