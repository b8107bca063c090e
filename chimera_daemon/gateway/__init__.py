"""`chimera gateway`: OpenAI's HTTP API in front of a daemon, in a process of its own.

Owns the life of that process: signals and exit codes. aiohttp is imported when a gateway starts,
so that everything else of Chimera runs without it.
"""

import asyncio
import gc
import logging
import signal

import uvloop

from chimera_daemon.config import GatewayConfig

log = logging.getLogger("chimera.gateway")

EXIT_OK = 0
EXIT_NOT_STARTED = 3  # the configuration must change first: a restart will not help


def run_gateway(config: GatewayConfig, connect: str, *, reuse_port: bool) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    The first signal lets requests under way end, the second one does not. ``connect`` is the
    daemon's front address, ``reuse_port`` says that several gateways share one port. Must be called
    on the main thread.
    """
    try:
        from chimera_daemon.gateway.server import Gateway, GatewayError
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        log.error("the gateway needs aiohttp: pip install 'chimera-daemon[gateway]'")
        return EXIT_NOT_STARTED

    async def serve() -> int:
        loop = asyncio.get_running_loop()
        stop, at_once = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (at_once if stop.is_set() else stop).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        gateway = Gateway(config, connect, reuse_port=reuse_port)
        try:
            await gateway.start()
        except GatewayError as error:
            log.error("%s", error)
            return EXIT_NOT_STARTED
        await stop.wait()
        closing = asyncio.ensure_future(gateway.close())
        impatient = asyncio.ensure_future(at_once.wait())
        await asyncio.wait((closing, impatient), return_when=asyncio.FIRST_COMPLETED)
        impatient.cancel()
        if not closing.done():
            gateway.cut()
        await closing
        return EXIT_OK

    # Requests come and go by reference count; cycles are rare, so look for them rarely.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    return uvloop.run(serve())
