"""What `chimera up` tells whoever started it: where to connect, and which models are ready.

Writes lines, decides nothing. What goes wrong is not said here but in the log.
"""

import time
from collections.abc import Callable, Sequence

from chimera_daemon import __version__, processes
from chimera_daemon.config import Config, EngineConfig, listen_address


class Announcer:
    """``write`` takes one text at a time, of one or several lines."""

    def __init__(self, config: Config, write: Callable[[str], None]) -> None:
        self._config = config
        self._write = write
        self._ready: set[str] = set()
        self._start_s = time.monotonic()

    def begin(self, gateways: bool) -> None:
        """Where things are. Not ``gateways``: those that were configured cannot serve."""
        config = self._config
        http = _url(config.gateway.listen) if gateways else "none: see the error above"
        if not config.gateway.processes:
            http = "none"
        rows = [
            ("OpenAI API", http + _times(config.gateway.processes if gateways else 1, "processes")),
            ("clients", processes.local_address(config.front) + _times(config.workers, "workers")),
            ("engines", _engines(config.engines) or f"none yet; they join at {config.back}"),
        ]
        lines = [f"chimera {__version__}, policy {config.policy}"]
        lines += [f"  {what:<12}{where}" for what, where in rows]
        self._write("\n".join(lines))

    def ready(self, engine: EngineConfig) -> None:
        """An engine has joined; the first of each model is news."""
        if engine.model in self._ready:
            return
        self._ready.add(engine.model)
        missing = {e.model for e in self._config.engines} - self._ready
        after = f"after {time.monotonic() - self._start_s:.1f} s"
        rest = f"waiting for {', '.join(sorted(missing))}" if missing else "all models are ready"
        self._write(f"ready: {engine.model} {after}; {rest}")


def _url(listen: str) -> str:
    host, port = listen_address(listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def _times(number: int, what: str) -> str:
    return f"  ({number} {what})" if number > 1 else ""


def _engines(engines: Sequence[EngineConfig]) -> str:
    return ", ".join(f"{e.name}: {e.model} ({e.kind})" for e in engines)
