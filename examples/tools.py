"""Let a model call a tool: the arguments always have the form that the tool asks for.

    python examples/tools.py http://127.0.0.1:5700/v1

Start the system first with `chimera up`; it needs `pip install openai`. The testbed's tiny models
do not know tools: their arguments have the right form, but little sense.
"""

import json
import sys

from openai import OpenAI, OpenAIError

CALCULATE = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "One step of arithmetic with two numbers.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "operation": {"type": "string", "enum": ["add", "sub", "mul"]},
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "b": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["operation", "a", "b"],
            "additionalProperties": False,
        },
    },
}


def calculate(operation: str, a: int, b: int) -> int:
    return {"add": a + b, "sub": a - b, "mul": a * b}[operation]


def main(url: str) -> None:
    client = OpenAI(base_url=url, api_key="unused")
    messages = [{"role": "user", "content": "What is 7 + 5?"}]
    reply = client.chat.completions.create(
        model="auto",
        messages=messages,
        max_tokens=128,
        tools=[CALCULATE],
        tool_choice={"type": "function", "function": {"name": "calculate"}},
    )
    message = reply.choices[0].message
    messages.append(message.model_dump(include={"role", "content", "tool_calls"}))
    for call in message.tool_calls or []:
        arguments = json.loads(call.function.arguments)
        result = str(calculate(**arguments))
        print(f"{reply.model} calls {call.function.name}({arguments}) -> {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

    reply = client.chat.completions.create(model="auto", messages=messages, max_tokens=128)
    print(f"{reply.model} says {reply.choices[0].message.content!r}")


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:5700/v1"
    try:
        main(url)
    except OpenAIError as error:
        sys.exit(f"{url}: {error}")
