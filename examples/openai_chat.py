"""Solve a task in two calls with the OpenAI client: one workflow, and its outcome at the end.

    python examples/openai_chat.py http://127.0.0.1:5700/v1

Start the system first with `chimera up`; it needs `pip install openai`.
"""

import sys
import uuid

from openai import OpenAI, OpenAIError

TASK = "Start with 7, then add 5, then add 3. What is the result?"


def main(url: str) -> None:
    headers = {"x-chimera-workflow-id": f"task-{uuid.uuid4().hex}", "x-chimera-kind": "math"}
    client = OpenAI(base_url=url, api_key="unused", default_headers=headers)
    messages = [{"role": "user", "content": f"Plan. {TASK}"}]
    plan = ask(client, messages)
    messages += [{"role": "assistant", "content": plan}]
    messages += [{"role": "user", "content": "Solve by the plan."}]
    answer = ask(client, messages)

    success = answer.endswith("answer 15")
    path = f"/workflows/{headers['x-chimera-workflow-id']}/outcome"
    client.post(path, body={"success": success}, cast_to=dict)
    print(f"success: {success}")


def ask(client: OpenAI, messages: list[dict[str, str]]) -> str:
    """One stage of the workflow: `auto` lets Chimera choose the model."""
    reply = client.chat.completions.create(
        model="auto", messages=messages, max_tokens=128, temperature=0
    )
    text = reply.choices[0].message.content
    print(f"{reply.model}: {text}")
    return text


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:5700/v1"
    try:
        main(url)
    except OpenAIError as error:
        sys.exit(f"{url}: {error}")
