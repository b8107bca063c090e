"""Every file of `examples/` and every curl command of docs/openai.md, as their readers run them."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.testbed import ROOT, Testbed

REAL = (pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400))
EXAMPLES = sorted((ROOT / "examples").iterdir())
GUIDE = (ROOT / "docs/openai.md").read_text()
RUN_S = 60.0
# What each says if all goes well; whether a tiny model is right is another matter.
SAYS = {
    "async_agents.py": r"45 \* 67: .* by testbed-[sl] in .* s\n.*\d of 3 correct\n",
    "curl.sh": r'"id":"auto".*\ndata: \[DONE\]\n.*"closed":true.*"code":"model_not_found"',
    "langgraph_agent.py": r"planner: start 7, .*\n  solver: 7\+5=.* right\n",
    "openai_chat.py": r"testbed-[sl]: start 7, add 5, add 3\n.*answer .*\nsuccess: (True|False)\n",
    "openai_stream_async.py": r"1: 7\+5=12\n.*answer 12   \[testbed-[sl], 12 tokens\]\n",
    "sync_stream.py": r"\n\[testbed-[sl], \d+ tokens, .* s\]\n",
    "tools.py": r"testbed-[sl] calls calculate\(\{'operation': .*\}\) -> .*\ntestbed-[sl] says ",
    "two_tries.py": r"45 \* 67: .*\d of 3 correct\n",
}


def run(example: Path, address: str) -> subprocess.CompletedProcess[str]:
    for module in ("langgraph", "langchain_openai", "openai"):
        if f"from {module}" in example.read_text():
            pytest.importorskip(module)
    program = ["bash"] if example.suffix == ".sh" else [sys.executable, "-W", "error"]
    return subprocess.run(
        [*program, str(example), address], capture_output=True, text=True, timeout=RUN_S
    )


@pytest.mark.parametrize(
    "example", [pytest.param(path, marks=REAL, id=path.name) for path in EXAMPLES]
)
def test_an_example_runs_as_written(testbed: Testbed, example: Path) -> None:
    text = example.read_text()
    assert f"examples/{example.name} " in text, "it does not say how to run it"
    done = run(example, testbed.url if "5700/v1" in text else testbed.front)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(SAYS[example.name], done.stdout, re.DOTALL), done.stdout


@pytest.mark.parametrize(
    "example",
    [path for path in EXAMPLES if "5700/v1" in path.read_text()],
    ids=lambda path: path.name,
)
def test_without_a_gateway_an_example_says_so_in_one_line(example: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        done = run(example, url)
    assert done.returncode != 0
    if example.suffix == ".py":
        assert done.stderr == f"{url}: Connection error.\n"
    else:
        assert re.fullmatch(r"curl: .*\n", done.stderr)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_commands_of_the_guide(testbed: Testbed) -> None:
    """In their order: later ones close the workflow of earlier ones."""
    commands = re.findall(r"^```sh\n(curl .*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        here = command.replace("http://127.0.0.1:5700", testbed.root)
        assert testbed.root in here
        script = f'curl() {{ command curl -sS --fail-with-body "$@"; }}\n{here}'
        done = subprocess.run(
            ["bash", "-eu", "-c", script], capture_output=True, text=True, timeout=RUN_S
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        check_answer(done.stdout)


def check_answer(text: str) -> None:
    """JSON, a whole stream of it, or a page of metrics; after headers, if they were asked for."""
    if text.startswith("HTTP/"):
        head, _, text = text.partition("\n\n")
        assert "x-chimera-workflow-id" in head
    if text.startswith("# HELP"):
        assert "\nchimera_stages_completed_total{" in text
        return
    if not text.startswith("data: "):
        assert "error" not in json.loads(text)
        return
    *events, last, rest = text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    for event in events:
        if not event.startswith(":"):
            assert json.loads(event.removeprefix("data: "))["object"].endswith(".chunk")
