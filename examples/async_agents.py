"""Several agents at once: each plans, solves, and reports whether it succeeded.

    python examples/async_agents.py tcp://127.0.0.1:5570

Start a daemon first with `chimera up`.
"""

import asyncio
import sys

from chimera_daemon.client import ChimeraError, Client, connect

TASKS = [(17, 23), (12, 34), (45, 67)]


async def solve(client: Client, a: int, b: int) -> bool:
    """One workflow of two stages; its outcome is what the predictors learn from."""
    async with client.workflow(kind="math") as workflow:
        task = {"role": "user", "content": f"What is {a} * {b}?"}
        plan = await workflow.generate(
            [task, {"role": "user", "content": "First write down the steps, not the answer."}],
            max_tokens=64,
            retries=3,
        )
        answer = await workflow.generate(
            [task, {"role": "assistant", "content": plan.text}],
            max_tokens=64,
            timeout_s=60.0,
            retries=3,
        )
        success = str(a * b) in answer.text
        await workflow.close(success=success)
        print(f"{a} * {b}: {answer.text!r} by {answer.model} in {answer.latency_s:.2f} s")
        print(f"  placed there because: {answer.receipt.reason}")
        return success


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
