"""`chimera up` with two real vLLM engines of the testbed and a gateway, and looks into it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec

from chimera_bench import testbed
from chimera_bench.cluster import to_toml
from chimera_daemon import config
from chimera_daemon.client.sync import SyncClient
from chimera_predictors.records import WorkflowLog

ROOT = Path(__file__).parents[2]
FILES = Path(testbed.__file__).parent
ENGINES = ("s", "l")
START_S = 240.0
WAIT_S = 20.0
_STOP_S = 60.0
_replace = msgspec.structs.replace

# Tools need a parser in vLLM; this one leaves the form of forced calls to guided decoding. These
# models were never shown JSON and would fill it with blanks for ever.
ARGS = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 128 << 20,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "xlam",
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


class Testbed:
    """One cluster: its addresses, its processes, and what it says of itself."""

    __test__ = False

    def __init__(self, folder: Path, sockets: Path) -> None:
        self.front = f"ipc://{sockets}/front"
        self.root = f"http://127.0.0.1:{_free_port()}"
        self.url = f"{self.root}/v1"
        self._log = folder / "up.log"
        self._traces = folder / "traces"
        self._toml = folder / "up.toml"
        self._toml.write_text(to_toml(self._config(folder, sockets)))
        self._process: subprocess.Popen[bytes] | None = None
        self._pids: set[int] = set()
        self.client: SyncClient  # set once the daemon answers

    def _config(self, folder: Path, sockets: Path) -> config.Config:
        whole = config.load(FILES / "testbed.toml")
        engines = [e for e in whole.engines if e.name in ENGINES]
        return _replace(
            whole,
            front=self.front,
            back=f"ipc://{sockets}/back",
            log_dir=str(folder),
            gateway=_replace(whole.gateway, listen=self.root.removeprefix("http://")),
            predictor=_replace(whole.predictor, record=str(self._traces)),
            engines=tuple(_replace(e, args=e.args | ARGS) for e in engines),
            models=tuple(m for m in whole.models if m.name in {e.model for e in engines}),
        )

    # Life.

    def start(self) -> None:
        """Start the process; nothing in it is ready yet."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "chimera_daemon", "up", str(self._toml)],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def until_ready(self) -> None:
        """Wait for the gateway to be healthy and for both models."""
        self.until(self._is_ready, "the engines", START_S, every_s=0.25)

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"it ended:\n{self.log()}"
        with suppress(ConnectionError):
            status, text = self.get("/health")
            return status == 200 and len(json.loads(text)["models"]) == len(ENGINES)
        return False

    def stop(self) -> int:
        """Drain and end everything; the exit code."""
        assert self._process is not None
        self._pids |= {row["pid"] for row in self.status()["supervised"] if row["pid"]}
        self._process.terminate()
        return self._process.wait(_STOP_S)

    def kill(self) -> None:
        """End what is left, in any state: `up` ends its engines if it still can."""
        assert self._process is not None
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        for pid in {self._process.pid, *self._pids}:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._process.wait()

    # Looks.

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of one of the gateway's pages."""
        with closing(HTTPConnection(self.root.removeprefix("http://"), timeout=WAIT_S)) as http:
            http.request("GET", path)
            answer = http.getresponse()
            return answer.status, answer.read().decode()

    def status(self) -> dict[str, Any]:
        """The daemon's snapshot."""
        return self.client.status()

    def counter(self, name: str) -> int:
        """One of the core's counters."""
        return self.status()["core"]["counters"].get(name, 0)

    def workflows(self) -> int:
        """Number of those that have not ended."""
        return self.status()["core"]["workflows"]

    def output_tokens(self) -> int:
        """What the engines have generated so far."""
        return sum(row["reported"]["output_tokens"] for row in self.status()["core"]["engines"])

    def metric(self, name: str) -> float:
        """Sum of one metric of the gateway over its labels."""
        _, text = self.get("/metrics")
        lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        assert lines, f"no {name} in\n{text}"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def traces(self, workflow_id: str) -> list[WorkflowLog]:
        """What was recorded under this id, once there is something."""

        def found() -> list[WorkflowLog]:
            lines = [x for f in self._traces.glob("*.jsonl") for x in f.read_bytes().splitlines()]
            logs = [msgspec.json.decode(line, type=WorkflowLog) for line in lines]
            # The recorder makes ids unique over restarts by what follows the @.
            return [log for log in logs if log.workflow_id.rpartition("@")[0] == workflow_id]

        self.until(lambda: bool(found()), f"the trace of {workflow_id}")
        return found()

    def until_idle(self) -> None:
        """Wait until nothing is in flight anywhere: no stage, no attempt, no request, no stream."""
        self.until(lambda: not any(self._in_flight().values()), "all counts to be zero")

    def _in_flight(self) -> dict[str, int]:
        status = self.status()
        counts = dict(status["core"]["stages"])
        for row in status["core"]["engines"]:
            counts[f"{row['engine']} running"] = row["running"]
        for row in status["board"]["rows"]:
            if row["role"] == "engine":
                counts[f"{row['key']} holds"] = row["values"][5]
            elif row["role"] == "gateway":
                counts["requests"], counts["streams"] = row["values"][1:3]
        return counts

    def until(
        self,
        condition: Callable[[], bool],
        what: str,
        within_s: float = WAIT_S,
        every_s: float = 0.02,
    ) -> None:
        """Wait for a condition."""
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}\n{self.log()}"
            time.sleep(every_s)

    def log(self) -> str:
        """The end of what `chimera up` has said."""
        return "\n".join(self._log.read_text().splitlines()[-20:])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
