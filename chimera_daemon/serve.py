"""Puts a daemon and its supervisor together and runs them until a signal says stop."""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import uvloop

from chimera_daemon.config import Config, ConfigError
from chimera_daemon.daemon import Daemon, DaemonError
from chimera_daemon.prior import PriorPredictor
from chimera_daemon.status import render
from chimera_daemon.supervisor import Supervisor

if TYPE_CHECKING:
    from chimera_daemon.predict import LearnedPredictor

log = logging.getLogger("chimera.daemon")

EXIT_OK = 0
EXIT_NOT_STARTED = 3
EXIT_NO_ENGINE_LEFT = 4


def serve(config: Config, *, keep_engines: bool = False) -> int:
    """Run the daemon and the engines of its configuration; return the exit code.

    SIGTERM or SIGINT: drain, then stop; once more: stop at once. SIGHUP: print the state to
    standard error, and load the predictor's bundle again. With ``keep_engines`` the hosts stay for
    the next daemon on these addresses. Raises `ConfigError` if the predictor cannot be had.
    """
    prior = PriorPredictor(config)
    predictor = _predictor(config, prior)
    # Requests come and go by reference count; cycles are rare, so look for them rarely.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    try:
        return uvloop.run(_serve(config, keep_engines, prior, predictor))
    finally:
        if predictor is not None:
            predictor.close()


def _predictor(config: Config, prior: PriorPredictor) -> "LearnedPredictor | None":
    """None where the prior will do: then nothing of the learned one is even imported."""
    if config.predictor.bundle is None and config.predictor.record is None:
        return None
    try:
        from chimera_daemon.predict import make_predictor
    except ImportError as error:
        raise ConfigError(
            f"[predictor] needs more than is installed ({error}): "
            "pip install 'chimera-daemon[predict]'"
        ) from error
    return make_predictor(config, prior)


async def _serve(
    config: Config,
    keep_engines: bool,
    prior: PriorPredictor,
    predictor: "LearnedPredictor | None",
) -> int:
    supervisor = Supervisor(config)
    daemon = Daemon(config, predictor, supervisor, prior)
    try:
        await daemon.start()
    except DaemonError as error:
        print(f"chimera: {error}", file=sys.stderr)
        return EXIT_NOT_STARTED
    if predictor is not None:
        predictor.start()
    supervisor.lost = daemon.engine_lost
    supervisor.start()
    stop, at_once = asyncio.Event(), asyncio.Event()
    _on_signals(stop, at_once, daemon, predictor)

    await _until_stopped(stop, config, supervisor, daemon)
    if stop.is_set():
        log.info("draining, for at most %g s", config.drain_s)
        await _unless(at_once, daemon.drain())
    # Answers leave and engines stop while the sockets are still open.
    daemon.give_up()
    await _unless(at_once, supervisor.stop(keep_engines=keep_engines))
    if not keep_engines:
        supervisor.kill()
    daemon.close()
    log.info("stopped")
    return EXIT_OK if stop.is_set() else EXIT_NO_ENGINE_LEFT


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do this work, but stop in the middle of it when the event happens."""
    tasks = (asyncio.ensure_future(work), asyncio.ensure_future(event.wait()))
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            log.error("while stopping: %r", outcome)


def _on_signals(
    stop: asyncio.Event,
    at_once: asyncio.Event,
    daemon: Daemon,
    predictor: "LearnedPredictor | None",
) -> None:
    def on_stop() -> None:
        if stop.is_set():
            at_once.set()
        stop.set()

    def on_hangup() -> None:
        print(render(daemon.status()), file=sys.stderr, flush=True)
        if predictor is not None:
            predictor.reload()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, on_stop)
    loop.add_signal_handler(signal.SIGINT, on_stop)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)


async def _until_stopped(
    stop: asyncio.Event, config: Config, supervisor: Supervisor, daemon: Daemon
) -> None:
    """Until a signal, or until no engine is left and none of the configuration will ever come."""
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), 1.0)
        except TimeoutError:
            hopeless = config.engines and len(supervisor.gave_up) == len(config.engines)
            if hopeless and not daemon.engines_of():
                log.error("no engine could be started; stopping")
                return
