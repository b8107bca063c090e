"""The price that keeps a target for the 95th percentile of workflow latency.

Owns the price and which workflows it has judged; the core drives it and tells the time. It knows no
engine and no queue. A workflow takes from the arrival of its first stage to its last answer.
"""

from collections import OrderedDict
from collections.abc import Container
from math import exp, log
from typing import Any

from chimera_daemon.state import Workflow

_SHARE_OVER = 0.05  # of workflows, that may take longer than the target
# Of log price, per workflow. With three times as much it swings, since workflows that came at one
# price come over the target together; with half of it, it follows the load half as fast.
_STEP = 0.1
_COLD = 10  # workflows until the first step, 1, has halved: the first price is a guess
# Below, success hardly rises, and queues grow so long that it takes their time to get back. Above,
# no gain in success is worth an idle latency: workflows are as fast as they get.
_LOWEST, _HIGHEST = 0.003, 1.0


class LearnedPrice:
    """Stochastic approximation (Robbins and Monro 1951) of the price at which 5 % are over.

    Each workflow is judged once, when it ends or when it has taken as long as the target, whichever
    comes first: so the late ones are known when they are late, not when they end, and none has to
    be closed by its client. One without any answer, since all was declined or its client has gone,
    tells nothing. One over the target raises log price by .95 steps, any other one lowers it by
    .05. Steps shrink as 1/n, but only down to a size that goes on following the load.
    """

    def __init__(self, start: float, target_s: float) -> None:
        self._target_s = target_s
        self.price = min(max(start, _LOWEST), _HIGHEST)
        self._begun: OrderedDict[str, tuple[float, Workflow]] = OrderedDict()  # not yet judged
        self._at_rest = set[str]()  # judged when no stage of theirs was live
        self._within = 0
        self._over = 0

    def begin(self, workflow: Workflow, now: float) -> None:
        """Its first stage has come."""
        self._begun[workflow.workflow_id] = now, workflow

    def go_on(self, workflow: Workflow) -> None:
        """A stage has come to a workflow that had none: it had not ended after all."""
        if workflow.workflow_id in self._at_rest:
            self._at_rest.remove(workflow.workflow_id)
            self._within -= 1
            self._over += 1
            self._move(1.0)

    def end(self, workflow: Workflow) -> None:
        """It is forgotten."""
        self._at_rest.discard(workflow.workflow_id)
        if self._begun.pop(workflow.workflow_id, None) is not None and workflow.outcomes:
            self._judge(over=False)

    def pass_time(self, now: float) -> None:
        """Judge those that have taken as long as the target, before anything else happens."""
        begun = self._begun
        while begun:
            began_s, workflow = next(iter(begun.values()))
            if now - began_s <= self._target_s:
                return
            del begun[workflow.workflow_id]
            if workflow.live:
                self._judge(over=True)
            elif workflow.outcomes:
                self._at_rest.add(workflow.workflow_id)
                self._judge(over=False)

    def check(self, known: Container[str]) -> None:
        """Assert the invariants; ``known`` are the ids of workflows that have not ended."""
        assert all(name in known for name in self._begun)
        assert all(name in known and name not in self._begun for name in self._at_rest)
        assert _LOWEST <= self.price <= _HIGHEST

    def snapshot(self) -> dict[str, Any]:
        """For `chimera status`."""
        return {
            "now": self.price,
            "p95_target_s": self._target_s,
            "within": self._within,
            "over": self._over,
        }

    def _judge(self, *, over: bool) -> None:
        self._over += over
        self._within += not over
        self._move(over - _SHARE_OVER)

    def _move(self, steps: float) -> None:
        size = max(_COLD / (_COLD + self._within + self._over), _STEP)
        moved = exp(log(self.price) + size * steps)
        self.price = min(max(moved, _LOWEST), _HIGHEST)
