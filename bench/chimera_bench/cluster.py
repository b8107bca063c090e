"""A daemon and its engines as processes of a benchmark: started, watched, and surely ended.

Engines start once; every daemon after the first adopts them (`up --keep-engines`). Sockets are
private files, logs lie under the output folder. Knows processes, not workloads.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from chimera_daemon.client import ChimeraError, Client, connect
from chimera_daemon.config import Config

_POLL_S = 0.25
_STOP_S = 15.0  # from SIGTERM to SIGKILL
_PR_SET_PDEATHSIG = 1

OnState = Callable[[dict[str, Any]], None]


class ClusterError(RuntimeError):
    """A daemon or an engine did not start, or ended by itself; the message has the log's end."""


class Cluster:
    """Use it as a context manager: leaving it ends every process that it started."""

    def __init__(self, config: Config, log_dir: Path) -> None:
        self._sockets = Path(tempfile.mkdtemp(prefix="chimera-"))
        self.config = msgspec.structs.replace(
            config,
            front=f"ipc://{self._sockets}/front",
            back=f"ipc://{self._sockets}/back",
            log_dir=str(log_dir.resolve()),
            # Who is to have it is told so at the start of its daemon.
            predictor=msgspec.structs.replace(config.predictor, bundle=None),
            gateway=msgspec.structs.replace(config.gateway, processes=0),
        )
        self._log_dir = log_dir
        log_dir.mkdir(parents=True, exist_ok=True)
        self._toml = log_dir / "config.toml"
        self._toml.write_text(to_toml(self.config), encoding="utf-8")
        self._daemon: asyncio.subprocess.Process | None = None
        self._daemon_log = log_dir / "daemon.log"
        self._pids: set[int] = set()  # of engine hosts seen so far

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @asynccontextmanager
    async def daemon(
        self,
        policy: str,
        on_state: OnState = lambda status: None,
        *,
        options: Sequence[str] = (),
        log_name: str | None = None,
    ) -> AsyncGenerator[Client, None]:
        """Run a daemon with this policy until the block ends; its engines are ready inside.

        Raises `ClusterError`. ``on_state`` sees every snapshot while the engines start;
        ``options`` go to `chimera up` as they are.
        """
        name = re.sub(r"[^\w.]+", "-", log_name or policy).strip("-")
        self._daemon_log = self._log_dir / f"daemon-{name}.log"
        with self._daemon_log.open("ab") as log:
            self._daemon = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "chimera_daemon", "up", str(self._toml)),
                *("--policy", policy, "--keep-engines", *options),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C at the terminal is for the benchmark alone
                preexec_fn=_die_with_parent,
            )
        try:
            async with AsyncExitStack() as stack:
                client = await self._connected(stack)
                try:
                    await self._until_ready(client, on_state)
                    yield client
                finally:
                    with contextlib.suppress(ChimeraError):
                        self.note(await client.status())
        finally:
            await self._stop_daemon()

    def note(self, status: dict[str, Any]) -> None:
        """Remember the engine hosts of a snapshot, to end them at last."""
        self._pids.update(row["pid"] for row in status["supervised"] if row["pid"])

    def pid(self, status: dict[str, Any], engine: str) -> int:
        """Process of an engine host in a snapshot; 0 if there is none."""
        return next((r["pid"] for r in status["supervised"] if r["engine"] == engine), 0)

    def missing(self, status: dict[str, Any]) -> list[str]:
        """Engines of the configuration that are not serving."""
        here = {row["engine"] for row in status["core"]["engines"]}
        return [engine.name for engine in self.config.engines if engine.name not in here]

    async def _connected(self, stack: AsyncExitStack) -> Client:
        """Waits as long as the daemon's process lives; it starts within a second or two."""
        while True:
            try:
                return await stack.enter_async_context(connect(self.config.front, timeout_s=1.0))
            except ChimeraError:
                self._raise_if_ended()

    async def _until_ready(self, client: Client, on_state: OnState) -> None:
        deadline = time.monotonic() + self.config.ready_s
        while True:
            status = await client.status()
            self.note(status)
            on_state(status)
            if not self.missing(status):
                return
            for row in status["supervised"]:
                if row["state"] == "gave up":
                    raise ClusterError(f"engine {row['engine']} does not start\n{self._tail()}")
            if time.monotonic() > deadline:
                names = ", ".join(self.missing(status))
                raise ClusterError(f"not ready after {self.config.ready_s:g} s: {names}")
            self._raise_if_ended()
            await asyncio.sleep(_POLL_S)

    def _raise_if_ended(self) -> None:
        process = self._daemon
        if process is None or process.returncode is not None:
            code = None if process is None else process.returncode
            raise ClusterError(f"the daemon ended with code {code}\n{self._tail()}")

    def _tail(self) -> str:
        lines = self._daemon_log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"the end of {self._daemon_log}:\n  " + "\n  ".join(lines[-12:])

    async def _stop_daemon(self) -> None:
        process, self._daemon = self._daemon, None
        if process is None or process.returncode is not None:
            return
        _signal(process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), self.config.drain_s + 5.0)
        finally:
            if process.returncode is None:
                _signal(process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End everything, politely first. Blocks for at most some seconds; works in any state."""
        pids = {pid for pid in self._pids if _is_host(pid)}
        if self._daemon is not None and self._daemon.returncode is None:
            _signal(self._daemon.pid, signal.SIGKILL)
        try:
            for pid in pids:
                _signal(pid, signal.SIGTERM)
            deadline = time.monotonic() + _STOP_S
            while any(_is_host(pid) for pid in pids) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            for pid in pids:
                _kill_group(pid)
            shutil.rmtree(self._sockets, ignore_errors=True)


def _die_with_parent() -> None:
    """In the child: SIGTERM when the benchmark dies. Hosts without a daemon then end themselves."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_host(pid: int) -> bool:
    """Whether this is (still) an engine host: numbers of processes are used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, IndexError):
        return False
    return stat[0] not in "ZX" and b"chimera_daemon" in command and b"engine" in command


def _kill_group(pid: int) -> None:
    """Every host leads a group of its own; what it leaves behind goes too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def to_toml(config: Config) -> str:
    """The configuration as TOML; `chimera_daemon.config.parse` reads it back unchanged."""
    table = msgspec.to_builtins(config)
    return "".join(f"{key} = {_toml(value)}\n" for key, value in table.items() if value is not None)


def _toml(value: Any) -> str:
    match value:
        case dict():
            items = (f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
            return "{" + ", ".join(items) + "}"
        case list() | tuple():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case bool():
            return "true" if value else "false"
        case _:
            return repr(value)
