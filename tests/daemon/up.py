"""`chimera up` as a process of its own, and looks at the processes that it starts."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from chimera_daemon.client import connect
from tests.daemon.harness import WAIT_S, RawClient, run, until

ROOT = Path(__file__).parents[2]
SLOW = "step_s = 0.02, reply_tokens = [1000, 1000]"
FAST = "step_s = 0.002, reply_tokens = [5, 20], slots = 4"
_CHILD = re.compile(r" (worker --index \d+|gateway|engine) --spec ")


class Up:
    """A daemon of a TOML file as a process, its log, and the engines it was seen with."""

    def __init__(
        self,
        folder: Path,
        engines: dict[str, str],
        *,
        workers: int = 1,
        gateways: int = 0,
        listen: str = "127.0.0.1:5700",
        **settings: object,
    ) -> None:
        self.folder = folder
        self.front = f"ipc://{folder}/f"
        settings = {
            "workers": workers,
            "front": self.front,
            "back": f"ipc://{folder}/b",
            "heartbeat_s": 0.05,
            "log_dir": str(folder / "logs"),
        } | settings
        lines = [f"{key} = {_toml(value)}" for key, value in settings.items()]
        lines += ["[gateway]", f"processes = {gateways}", f'listen = "{listen}"']
        self.url = f"http://{listen}"
        for name, args in engines.items():
            lines += ["[[engines]]", f'name = "{name}"', 'model = "m"', 'kind = "echo"']
            lines += [f"args = {{ {args} }}"]
        self.workers = workers
        self.config = folder / "up.toml"
        self.config.write_text("\n".join(lines))
        self.log = folder / "up.log"
        self.seen: set[int] = set()
        self.process: subprocess.Popen[bytes]
        self._raws: list[RawClient] = []

    def start(self, *options: str) -> None:
        command = [sys.executable, "-m", "chimera_daemon", "up", str(self.config), *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def ended(self) -> int:
        await until(lambda: self.process.poll() is not None, "the end of the daemon")
        return self.process.returncode

    def raw(self) -> RawClient:
        self._raws.append(RawClient(self.front, None))
        return self._raws[-1]

    async def statuses(self) -> list[dict[str, Any]]:
        """The state of each worker that answers."""
        async with connect(self.front, timeout_s=WAIT_S) as client:
            status = await client.status()
        statuses = [status] if "core" in status else status["workers"]
        self.seen |= {row["pid"] for row in statuses[0]["supervised"] if row["pid"]}
        self.seen |= self.children().keys()
        return statuses

    async def status(self) -> dict[str, Any]:
        """The state of the first worker."""
        return (await self.statuses())[0]

    async def ready(self) -> dict[str, int]:
        """Wait until all workers have all engines; the process ids of those."""
        end = asyncio.get_running_loop().time() + WAIT_S
        while True:
            statuses = await self.statuses()
            rows = statuses[0]["supervised"]
            here = [len(status["core"]["engines"]) for status in statuses]
            if all(r["state"] == "ready" for r in rows) and here == [len(rows)] * self.workers:
                return {r["engine"]: r["pid"] for r in rows}
            assert asyncio.get_running_loop().time() < end, (statuses, self.log.read_text())
            await asyncio.sleep(0.05)

    def children(self, kind: str = "") -> dict[int, str]:
        """Living processes that it has started: engine, gateway, worker --index 1..."""
        found: dict[int, str] = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                command = (folder / "cmdline").read_text().replace("\0", " ")
                what = _CHILD.search(command)
                if what and int(parent) == self.process.pid and state not in "ZX":
                    found[int(folder.name)] = what[1]
        return {pid: what for pid, what in found.items() if what.startswith(kind)}

    def clean(self) -> None:
        """End whatever a failed test has left."""
        for pid in {self.process.pid, *self.seen}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.process.wait()
        for raw in self._raws:
            raw.close()


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def with_up(up: Up, test: Callable[[Up], Awaitable[None]], *options: str) -> None:
    async def whole() -> None:
        up.start(*options)
        try:
            await test(up)
        finally:
            up.clean()

    run(whole())
