"""Ends vLLM's own processes when their host dies without a word.

vLLM's engine core outlives a parent that was killed: it keeps its memory and waits for ever. vLLM
mixes this class into its worker (``worker_extension_cls``) and the host calls it there through
`collective_rpc`, so no part of vLLM is changed. Imported in vLLM's process; knows nothing else.
"""

import os
import select
import signal
import threading


class Lifeline:
    """Mixed into a vLLM worker; the long name keeps clear of the worker's own attributes."""

    def chimera_follow_host(self, host_pid: int) -> bool:
        """Kill this process as soon as the host has ended; False where that cannot be watched."""
        if not hasattr(os, "pidfd_open"):  # Linux only
            return False
        host = os.pidfd_open(host_pid)
        threading.Thread(target=_follow, args=(host,), name="chimera-lifeline", daemon=True).start()
        return True


def _follow(host: int) -> None:
    poll = select.poll()
    poll.register(host, select.POLLIN)
    poll.poll()
    # In a multi-process executor this is a worker, whose end makes the engine core end as well.
    os.kill(os.getpid(), signal.SIGKILL)
