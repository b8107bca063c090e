"""Puts a daemon and its supervisor together and runs them until a signal says stop."""

import asyncio
import logging
import signal
import sys

import uvloop

from chimera_daemon.config import Config
from chimera_daemon.daemon import Daemon, DaemonError
from chimera_daemon.status import render
from chimera_daemon.supervisor import Supervisor

log = logging.getLogger("chimera.daemon")

EXIT_OK = 0
EXIT_NOT_STARTED = 3
EXIT_NO_ENGINE_LEFT = 4


def serve(config: Config, *, keep_engines: bool = False) -> int:
    """Run the daemon and the engines of its configuration; return the exit code.

    SIGTERM or SIGINT: drain, then stop; once more: stop at once. SIGHUP: print the state to
    standard error. With ``keep_engines`` the hosts stay for the next daemon on these addresses.
    """
    return uvloop.run(_serve(config, keep_engines))


async def _serve(config: Config, keep_engines: bool) -> int:
    supervisor = Supervisor(config)
    daemon = Daemon(config, watcher=supervisor)
    try:
        await daemon.start()
    except DaemonError as error:
        print(f"chimera: {error}", file=sys.stderr)
        return EXIT_NOT_STARTED
    supervisor.lost = daemon.engine_lost
    supervisor.start()
    stop, at_once = asyncio.Event(), asyncio.Event()
    _on_signals(stop, at_once, daemon)

    await _until_stopped(stop, config, supervisor)
    log.info("draining, for at most %g s", config.drain_s)
    drained = asyncio.ensure_future(daemon.drain())
    await asyncio.wait(
        (drained, asyncio.ensure_future(at_once.wait())), return_when=asyncio.FIRST_COMPLETED
    )
    drained.cancel()
    await supervisor.stop(keep_engines=keep_engines)
    daemon.close()
    log.info("stopped")
    return EXIT_OK if stop.is_set() else EXIT_NO_ENGINE_LEFT


def _on_signals(stop: asyncio.Event, at_once: asyncio.Event, daemon: Daemon) -> None:
    def on_stop() -> None:
        if stop.is_set():
            at_once.set()
        stop.set()

    def on_hangup() -> None:
        print(render(daemon.status()), file=sys.stderr, flush=True)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, on_stop)
    loop.add_signal_handler(signal.SIGINT, on_stop)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)


async def _until_stopped(stop: asyncio.Event, config: Config, supervisor: Supervisor) -> None:
    """Until a signal, or until no engine of the configuration is left that could ever serve."""
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), 1.0)
        except TimeoutError:
            if config.engines and len(supervisor.gave_up) == len(config.engines):
                log.error("no engine could be started; stopping")
                return
