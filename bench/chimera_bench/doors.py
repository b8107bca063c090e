"""Front doors as processes: Chimera's own, other routers, and backends with nothing before them.

Each context manager starts one, waits until it answers, and ends it with all its children. Knows
how each is configured; asks no more of it than one request.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chimera_bench import process_costs, static_backend, static_engines
from chimera_bench.loads import MAX_TOKENS, MESSAGES
from chimera_daemon.client import ChimeraError, connect_sync
from chimera_daemon.config import ConfigError

READY_S = 120.0
_STOP_S = 30.0
_ASK_S = 5.0
_LOG_CHARACTERS = 2000
_HOST = "127.0.0.1"
ECHO_SLOTS = 1024


class Door(NamedTuple):
    """Something that answers stages; ``pid`` 0: nothing is between client and backend."""

    address: str  # HOST:PORT, or of ZeroMQ
    pid: int
    version: str = ""
    hosts: tuple[int, ...] = ()  # engine hosts that are not its children


# Backends alone.


@contextlib.contextmanager
def static_http() -> Iterator[Door]:
    """The HTTP backend that all HTTP doors but one lead to."""
    command = [sys.executable, "-m", static_backend.__name__]
    with _ended(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise ConfigError("the static backend ended at once; why is written above")
        yield Door(f"{_HOST}:{port}", 0)


@contextlib.contextmanager
def static_zmq(*, stamps: bool = False) -> Iterator[Door]:
    """A bare ZeroMQ socket that answers as a daemon would; ``stamps`` as in `static_engines`."""
    with tempfile.TemporaryDirectory(prefix="chimera-") as folder:
        path = Path(folder) / "front"
        command = [sys.executable, "-m", static_backend.__name__, "--zmq", f"ipc://{path}"]
        with _ended(subprocess.Popen(command + ["--stamps"] * stamps)) as process:
            _until(path.exists, process, "the bare ZeroMQ socket", None)
            yield Door(f"ipc://{path}", 0)


# Chimera.


class Engine(NamedTuple):
    """A table of `engines`; ``args`` as TOML, without braces."""

    name: str
    kind: str = "echo"
    path: str | None = None
    args: str = f"slots = {ECHO_SLOTS}, reply_tokens = [{MAX_TOKENS}, {MAX_TOKENS}]"


ECHOES = (Engine("small"), Engine("large"))
STATICS = ("small", "large")


def remote(backend: Door, slots: int) -> Engine:
    """A proxy to the static backend."""
    url = f"http://{backend.address}/v1"
    return Engine(static_backend.MODEL, "openai", url, f"slots = {slots}")


@contextlib.contextmanager
def chimera(
    engines: Sequence[Engine],
    *,
    statics: Sequence[str] = (),
    stamps: bool = False,
    gateways: int = 0,
    workers: int = 1,
    settings: Mapping[str, str] | None = None,
) -> Iterator[tuple[Door, Door]]:
    """`chimera up` on private addresses: its ZeroMQ door, and its HTTP door with ``gateways``.

    ``engines`` are its own; ``statics`` are names of those that one process beside it has, and
    ``stamps`` as there. ``settings`` are further lines of the configuration, values as TOML.
    """
    with tempfile.TemporaryDirectory(prefix="chimera-") as folder:
        front = Path(folder) / "front"
        listen = f"{_HOST}:{free_port()}"
        lines = [f'front = "ipc://{front}"', f'back = "ipc://{folder}/back"']
        lines += [f'log_dir = "{folder}"', f"workers = {workers}"]
        lines += [f"{name} = {value}" for name, value in (settings or {}).items()]
        lines += ["[gateway]", f"processes = {gateways}", f'listen = "{listen}"']
        for engine in engines:
            lines += ["[[engines]]", f'name = "{engine.name}"', f'model = "{engine.name}"']
            lines += [f'kind = "{engine.kind}"', f"args = {{ {engine.args} }}"]
            lines += [] if engine.path is None else [f'path = "{engine.path}"']
        config = Path(folder) / "bench.toml"
        config.write_text("\n".join(lines))
        command = [sys.executable, "-m", "chimera_daemon", "--log-level", "warning", "up"]
        with contextlib.ExitStack() as stack:
            process, log = stack.enter_context(_logged([*command, str(config)], Path(folder)))
            _until(front.exists, process, "the daemon", log)
            hosts: tuple[int, ...] = ()
            if statics:
                started = _static_engines(f"ipc://{folder}/back", statics, stamps)
                hosts = (stack.enter_context(started),)
            count = len(engines) + len(statics)
            _until(lambda: _joined(front, count), process, "an engine", log)
            if gateways:
                _until(lambda: _answers(listen, "auto") is not None, process, "the gateway", log)
            over_zmq = Door(f"ipc://{front}", process.pid, hosts=hosts)
            yield over_zmq, Door(listen, process.pid, hosts=hosts)


@contextlib.contextmanager
def _static_engines(back: str, names: Sequence[str], stamps: bool) -> Iterator[int]:
    """A process with these engines; its id."""
    command = [sys.executable, "-m", static_engines.__name__, "--connect", back, *names]
    with _ended(subprocess.Popen(command + ["--stamps"] * stamps)) as process:
        yield process.pid


# Others.


@contextlib.contextmanager
def vllm_router(binary: str, backend: Door) -> Iterator[Door]:
    """vLLM's router with one worker behind it."""
    port = free_port()
    command = [binary, "--worker-urls", f"http://{backend.address}", "--host", _HOST]
    command += ["--port", str(port), "--policy", "round_robin", "--log-level", "error"]
    command += ["--prometheus-port", str(free_port()), "--prometheus-host", _HOST]
    with _peer(command, port, _version(binary, "vllm-router")) as door:
        yield door


_LITELLM = """
model_list:
  - model_name: static
    litellm_params:
      model: openai/static
      api_base: http://{address}/v1
      api_key: none
litellm_settings:
  telemetry: false
  request_timeout: 60
general_settings:
  dangerously_permit_weak_or_unset_master_key: true
"""


@contextlib.contextmanager
def litellm(binary: str, backend: Door) -> Iterator[Door]:
    """LiteLLM's proxy: one worker process, no database."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="litellm-") as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(_LITELLM.format(address=backend.address))
        command = [binary, "--config", str(config), "--host", _HOST, "--port", str(port)]
        command += ["--num_workers", "1", "--telemetry", "False"]
        # Nothing is fetched at the start, and nothing is logged of requests.
        quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
        quiet |= {"LITELLM_MODE": "PRODUCTION"}
        with _peer(command, port, _version(binary, "litellm"), quiet) as door:
            yield door


PEERS = {"vllm-router": vllm_router, "litellm": litellm}


@contextlib.contextmanager
def _peer(
    command: Sequence[str], port: int, version: str, variables: Mapping[str, str] | None = None
) -> Iterator[Door]:
    address = f"{_HOST}:{port}"
    with (
        tempfile.TemporaryDirectory(prefix="peer-") as folder,
        _logged(command, Path(folder), variables) as (process, log),
    ):
        model = static_backend.MODEL
        _until(lambda: _answers(address, model) is not None, process, command[0], log)
        yield Door(address, process.pid, version)


def _version(binary: str, distribution: str) -> str:
    """By the Python that the program was installed for, if it lies beside it."""
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    try:
        done = subprocess.run(
            [str(Path(binary).with_name("python")), "-c", code],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


# All.


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probing:
        probing.bind((_HOST, 0))
        return probing.getsockname()[1]


def _joined(front: Path, engines: int) -> bool:
    """Whether so many engines have registered, with all workers of a daemon."""
    try:
        with connect_sync(f"ipc://{front}", timeout_s=_ASK_S) as client:
            status = client.status()
    except ChimeraError:
        return False
    return all(len(each["core"]["engines"]) >= engines for each in of_workers(status))


def of_workers(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The snapshots that `Client.status` gave, also where it is of a single daemon."""
    workers = status.get("workers")
    return workers if isinstance(workers, list) else [status]


def _answers(address: str, model: str) -> str | None:
    """The text that it answers with, or None while it does not answer."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=_ASK_S)
    body = json.dumps({"model": model, "messages": MESSAGES, "max_tokens": MAX_TOKENS})
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer: Any = json.loads(connection.getresponse().read())
        return answer["choices"][0]["message"]["content"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
    finally:
        connection.close()


def _until(
    ready: Callable[[], bool], process: subprocess.Popen[Any], what: str, log: Path | None
) -> None:
    end = time.monotonic() + READY_S
    while not ready():
        ended = process.poll() is not None
        if ended or time.monotonic() > end:
            why = "ended at once" if ended else f"did not answer within {READY_S:g} s"
            said = log.read_text(errors="replace")[-_LOG_CHARACTERS:].strip() if log else ""
            raise ConfigError(f"{what} {why}" + (f"; its last words:\n{said}" if said else ""))
        time.sleep(0.05)


@contextlib.contextmanager
def _logged(
    command: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[Any], Path]]:
    """Start a program whose output goes to a file, in a process group of its own."""
    log = folder / "output"
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | dict(variables or {}),
            )
    except OSError as error:
        raise ConfigError(f"cannot start {command[0]}: {error.strerror}") from error
    with _ended(process):
        yield process, log


@contextlib.contextmanager
def _ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """Leave no process behind: SIGTERM, and SIGKILL for what is still there later."""
    with process:
        try:
            yield process
        finally:
            family = process_costs.family(process.pid)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                for pid in family:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
