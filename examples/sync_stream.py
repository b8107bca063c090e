"""Read an answer while it is written, without asyncio.

    python examples/sync_stream.py tcp://127.0.0.1:5570

Start a daemon first with `chimera up`.
"""

import sys

from chimera_daemon.client import ChimeraError, connect_sync


def main(address: str) -> None:
    with connect_sync(address) as client, client.workflow(kind="math") as workflow:
        messages = [{"role": "user", "content": "What is 17 * 23? Show the steps."}]
        with workflow.stream(messages, max_tokens=128, timeout_s=60.0) as stream:
            for text in stream:
                print(text, end="", flush=True)
        reply = stream.reply
        print(f"\n[{reply.model}, {reply.usage.output_tokens} tokens, {reply.latency_s:.2f} s]")
        workflow.close(success="391" in reply.text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1])
    except ChimeraError as error:
        sys.exit(f"{error.code}: {error}")
