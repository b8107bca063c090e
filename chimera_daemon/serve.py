"""Puts a daemon and what it starts together and runs them until a signal says stop."""

import asyncio
import contextlib
import gc
import importlib.util
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any

import msgspec
import uvloop
import zmq

from chimera_daemon import wire
from chimera_daemon.announce import Announcer
from chimera_daemon.board import Board, BoardError, remove_stale
from chimera_daemon.children import Children, gateways_of, workers_of
from chimera_daemon.config import Config, ConfigError, GatewayConfig, listen_address
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

_CHILDREN_S = 5.0  # for workers and gateways to end, beyond the time to drain
_GATEWAYS_S = 30.0  # for gateways without a daemon of theirs; they have a limit that is shorter
_PROBE_S = 2.0  # for gateways of a daemon that was killed to end


def serve(
    config: Config, *, keep_engines: bool = False, worker: int = 0, board: str | None = None
) -> int:
    """Run the daemon with the workers, gateways and engines of its configuration.

    Returns the exit code. SIGTERM or SIGINT: drain, then stop; once more: stop at once. SIGHUP:
    print the state to standard error, and load the predictor's bundle again. With ``keep_engines``
    the hosts stay for the next daemon on these addresses. A ``worker`` other than the first, which
    is told the path of the ``board``, starts nothing. Raises `ConfigError` if the predictor cannot
    be had.
    """
    prior = PriorPredictor(config)
    predictor = _predictor(config, prior)
    # Requests come and go by reference count; cycles are rare, so look for them rarely.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    try:
        with contextlib.nullcontext(board) if worker else _new_board() as path:
            server = _Server(config, worker, path, prior, predictor)
            return uvloop.run(server.run(keep_engines))
    finally:
        if predictor is not None:
            predictor.close()


def serve_gateways(gateway: GatewayConfig, connect: str) -> int:
    """Run gateways as processes of their own, on one port, until a signal says stop."""
    return uvloop.run(_serve_gateways(gateway, connect))


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


@contextlib.contextmanager
def _new_board() -> Generator[str | None]:
    """Make the congestion board, and remove it at the end; None where there can be none."""
    try:
        remove_stale()
        board = Board.create()
    except (OSError, BoardError) as error:
        log.warning("there will be no congestion board: %s", error)
        yield None
        return
    try:
        yield board.path
    finally:
        board.close()


class _Server:
    """One worker; the first one also has the supervisor, the other workers and the gateways."""

    def __init__(
        self,
        config: Config,
        worker: int,
        board: str | None,
        prior: PriorPredictor,
        predictor: "LearnedPredictor | None",
    ) -> None:
        self._config, self._worker, self._board = config, worker, board
        self._predictor = predictor
        self._announcer = Announcer(config, _say)
        supervised = msgspec.structs.replace(config, engines=()) if worker else config
        self._supervisor = Supervisor(supervised, self._announcer.ready)
        self._daemon = Daemon(
            config, predictor, self._supervisor, prior, worker=worker, board=board
        )
        self._children = Children([])

    async def run(self, keep_engines: bool) -> int:
        """Until a signal, or until no engine can ever come; the exit code."""
        stop, at_once = asyncio.Event(), asyncio.Event()
        try:
            if self._worker == 0:
                _refuse_taken_addresses(self._config)
            await self._daemon.start()
        except DaemonError as error:
            print(f"chimera: {error}", file=sys.stderr)
            return EXIT_NOT_STARTED
        if self._predictor is not None:
            self._predictor.start()
        _on_signals(stop, at_once, self._hang_up)
        if self._worker == 0:
            await self._start_others()
        await self._until_stopped(stop)
        await self._stop(stop.is_set(), at_once, keep_engines)
        log.info("stopped")
        return EXIT_OK if stop.is_set() else EXIT_NO_ENGINE_LEFT

    async def _start_others(self) -> None:
        gateways = await _startable_gateways(self._config)
        workers = workers_of(self._config, self._board)
        self._children = Children([*workers, *gateways_of(gateways, self._config.front)])
        self._announcer.begin(gateways=gateways.processes > 0)
        self._children.start()
        self._supervisor.start()

    async def _until_stopped(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await asyncio.wait_for(stop.wait(), 1.0)
            except TimeoutError:
                if self._supervisor.hopeless and not self._daemon.engines_of():
                    log.error("no engine could be started; stopping")
                    return

    async def _stop(self, drain: bool, at_once: asyncio.Event, keep_engines: bool) -> None:
        daemon, children = self._daemon, self._children
        if drain:
            drain_s = self._config.drain_s
            log.info("draining, for at most %g s", drain_s)
            await children.drain()
            ended = asyncio.ensure_future(children.ended(drain_s + _CHILDREN_S))
            await _unless(at_once, daemon.drain())
            # Gateways wait for these answers.
            daemon.give_up()
            await _unless(at_once, ended)
        else:
            await children.drain()
            daemon.give_up()
        await children.finish()
        # Answers leave and engines stop while the sockets are still open.
        await _unless(at_once, self._supervisor.stop(keep_engines=keep_engines))
        if not keep_engines:
            await self._supervisor.kill()
        daemon.close()

    def _hang_up(self) -> None:
        print(render(self._daemon.status()), file=sys.stderr, flush=True)
        if self._predictor is not None:
            self._predictor.reload()
        self._children.reload()


async def _serve_gateways(gateway: GatewayConfig, connect: str) -> int:
    stop, at_once = asyncio.Event(), asyncio.Event()
    try:
        await _probe(gateway.listen)
    except OSError as error:
        print(f"chimera: cannot listen on {gateway.listen}: {error}", file=sys.stderr)
        return EXIT_NOT_STARTED
    children = Children(gateways_of(gateway, connect))
    children.start()
    _on_signals(stop, at_once, children.reload)
    given_up = asyncio.ensure_future(children.all_final())
    await _unless(stop, given_up)
    await children.drain()
    await _unless(at_once, children.ended(_GATEWAYS_S))
    await children.finish()
    return EXIT_OK if stop.is_set() else EXIT_NOT_STARTED


async def _startable_gateways(config: Config) -> GatewayConfig:
    """What is configured, or none where the log says why they cannot serve."""
    gateway = config.gateway
    if not gateway.processes:
        return gateway
    if importlib.util.find_spec("aiohttp") is None:
        why = "aiohttp is not installed: pip install 'chimera-daemon[gateway]'"
    else:
        try:
            await _probe(gateway.listen)
            return gateway
        except OSError as error:
            why = f"cannot listen on {gateway.listen}: {error}; set another `listen`"
    log.error("there will be no gateway: %s, or `processes = 0` in [gateway]", why)
    return msgspec.structs.replace(gateway, processes=0)


async def _probe(listen: str) -> None:
    """Raise `OSError` if somebody listens there: the kernel lets gateways share it unasked."""
    host, port = listen_address(listen)
    loop = asyncio.get_running_loop()
    end = loop.time() + _PROBE_S
    while True:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host, port), family=family).close()
            return
        except OSError:
            if loop.time() > end:
                raise
            await asyncio.sleep(0.1)


def _refuse_taken_addresses(config: Config) -> None:
    """Raise `DaemonError` if another worker could not listen: half of all work would wait for it.

    Of TCP only: who has the first worker's socket file has those of the others.
    """
    for key in ("front", "back"):
        address: str = getattr(config, key)
        for worker in range(1, config.workers):
            try:
                address = wire.worker_address(getattr(config, key), worker)
                _try_to_bind(address)
            except (zmq.ZMQError, ValueError) as error:
                raise DaemonError(
                    f"worker {worker} cannot listen on {address}: {error}; set `{key}` to another "
                    "address (each worker's ports are 2 further on), or fewer `workers`"
                ) from error


def _try_to_bind(address: str) -> None:
    if address.startswith("tcp://"):
        with zmq.Context() as context, context.socket(zmq.ROUTER) as probe:
            probe.bind(address)


def _say(text: str) -> None:
    """To standard output, unless only warnings are wanted."""
    if log.isEnabledFor(logging.INFO):
        print(text, flush=True)


async def _unless(event: asyncio.Event, work: Awaitable[Any]) -> None:
    """Do this work, but stop in the middle of it when the event happens."""
    tasks = (asyncio.ensure_future(work), asyncio.ensure_future(event.wait()))
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            log.error("while stopping: %r", outcome)


def _on_signals(stop: asyncio.Event, at_once: asyncio.Event, hang_up: Callable[[], None]) -> None:
    def on_stop() -> None:
        if stop.is_set():
            at_once.set()
        stop.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, on_stop)
    loop.add_signal_handler(signal.SIGINT, on_stop)
    loop.add_signal_handler(signal.SIGHUP, hang_up)
