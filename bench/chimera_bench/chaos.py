"""Kills an engine host under load, and says what became of the work and of the engine."""

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from chimera_bench.cluster import Cluster
from chimera_bench.workload import LOST_CODES, Record
from chimera_daemon.client import Client

_POLL_S = 0.1


class Strike(Struct):
    """One kill. Times in seconds after it; None where it was not seen."""

    engine: str
    pid: int
    running: int  # attempts at work there when it was killed
    noticed_s: float | None = None  # until the daemon had taken it off its list
    back_s: float | None = None  # until it was registered again
    new_pid: int = 0


class Accounts(Struct, frozen=True):
    """What became of every stage, by the client's count and by the daemon's."""

    submitted: int  # by the client
    answered: int  # at the client
    errors: int  # explicit ones, at the client
    not_retryable: int  # of these
    lost: int  # neither answer nor explicit error
    answered_twice: int  # completed at the daemon beyond the answers at the client
    completed: int  # at the daemon, from here on
    failed: int
    rejected: int
    requeued: int
    late_answers: int  # of lost attempts, dropped

    @property
    def sound(self) -> bool:
        """Nothing lost, nothing answered twice, every error one that may be tried again."""
        return not (self.lost or self.answered_twice or self.not_retryable)


def accounts(records: Sequence[Record], counters: Mapping[str, int]) -> Accounts:
    """``counters`` are the core's, of a daemon that has served nothing but these records."""
    submitted = sum(r.submitted for r in records)
    answered = sum(len(r.stages) for r in records)
    explicit = [r for r in records if r.error is not None and r.error not in LOST_CODES]
    completed = counters.get("completed", 0)
    return Accounts(
        submitted=submitted,
        answered=answered,
        errors=len(explicit),
        not_retryable=sum(not r.retryable for r in explicit),
        lost=submitted - answered - len(explicit),
        answered_twice=max(0, completed - answered),
        completed=completed,
        failed=counters.get("failed", 0),
        rejected=counters.get("rejected", 0),
        requeued=counters.get("requeued", 0),
        late_answers=counters.get("late_answers", 0),
    )


async def strike(client: Client, cluster: Cluster, due: asyncio.Event) -> Strike:
    """When ``due``: SIGKILL the engine host with the most attempts, wait until it serves again.

    Waits for at most the configuration's ``ready_s``.
    """
    await due.wait()
    status = await client.status()
    target = max(status["core"]["engines"], key=lambda row: row["running"])
    name = target["engine"]
    done = Strike(name, cluster.pid(status, name), target["running"])
    if not done.pid:
        raise RuntimeError(f"engine {name} is not one that this demo started")
    os.kill(done.pid, signal.SIGKILL)
    loop = asyncio.get_running_loop()
    killed_s = loop.time()
    while loop.time() - killed_s < cluster.config.ready_s:
        status = await client.status()
        cluster.note(status)
        after_s = loop.time() - killed_s
        gone = name in cluster.missing(status)
        new_pid = cluster.pid(status, name)
        if done.noticed_s is None and (gone or new_pid != done.pid):
            done.noticed_s = after_s
        if not gone and new_pid not in (0, done.pid):
            done.back_s, done.new_pid = after_s, new_pid
            break
        await asyncio.sleep(_POLL_S)
    return done


def describe(done: Strike | None, seen: Accounts, counters: Mapping[str, Any]) -> str:
    """The chaos report, a few lines."""
    lines: list[str] = []
    if done is not None:
        noticed = "not noticed" if done.noticed_s is None else f"noticed {done.noticed_s:.1f} s"
        back = "NOT BACK" if done.back_s is None else f"serving again {done.back_s:.1f} s"
        lines.append(
            f"engine {done.engine} (pid {done.pid}, {done.running} attempts at work) was killed "
            f"with SIGKILL; {noticed} later, {back} later (pid {done.new_pid})"
        )
    lines.append(
        f"stages: {seen.submitted} submitted, {seen.answered} answered, {seen.errors} ended with "
        f"an explicit error ({seen.not_retryable} of them not retryable), {seen.lost} lost, "
        f"{seen.answered_twice} answered twice"
    )
    lines.append(
        f"daemon: {seen.completed} completed, {seen.requeued} requeued, {seen.failed} failed, "
        f"{seen.rejected} rejected, {seen.late_answers} late answers dropped"
    )
    failed = {k: v for k, v in counters.items() if k.startswith(("failed_", "rejected_"))}
    lines += [f"  {name}: {value}" for name, value in sorted(failed.items())]
    return "\n".join(lines)
