"""Do a task again after a failure, if any other model is worth it.

    python examples/two_tries.py tcp://127.0.0.1:5570

Start a daemon first with `chimera up`. The check here is exact; in your agent it may be a test
suite, a compiler, or a judge.
"""

import asyncio
import sys

from chimera_daemon.client import ChimeraError, Client, Declined, Workflow, connect

TASKS = [(17, 23), (12, 34), (45, 67)]


async def attempt(workflow: Workflow, a: int, b: int) -> bool:
    """One try: a workflow of one stage."""
    async with workflow:
        question = {"role": "user", "content": f"What is {a} * {b}?"}
        answer = await workflow.generate([question], max_tokens=64, retries=3)
        success = str(a * b) in answer.text
        await workflow.close(success=success)
        print(f"{a} * {b}: {answer.text!r} by {answer.model}, {'right' if success else 'wrong'}")
        return success


async def solve(client: Client, a: int, b: int) -> bool:
    """With `tries=2` the policy knows that a quick model may have the first try."""
    first = client.workflow(kind="math", tries=2)
    if await attempt(first, a, b):
        return True
    try:
        return await attempt(first.again(), a, b)
    except Declined as declined:
        print(f"{a} * {b}: given up, {declined}")
        return False


async def main(address: str) -> None:
    async with connect(address) as client:
        outcomes = await asyncio.gather(*(solve(client, a, b) for a, b in TASKS))
        print(f"{sum(outcomes)} of {len(outcomes)} correct")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        asyncio.run(main(sys.argv[1]))
    except ChimeraError as error:
        sys.exit(f"{error.code}: {error}")
