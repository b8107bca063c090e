"""What `chimera status` draws of a snapshot."""

from typing import Any

import pytest

from chimera_daemon.config import Config
from chimera_daemon.core import Scheduler
from chimera_daemon.messages import Woke
from chimera_daemon.status import render


def status(scheduler: Scheduler) -> dict[str, Any]:
    return {
        "daemon_id": "d",
        "uptime_s": 1.0,
        "clients": 0,
        "core": scheduler.snapshot(),
        "supervised": [],
        "predictor": {},
        "connections": {},
    }


@pytest.mark.parametrize("target_s", [0.0, 30.0])
def test_a_learned_price_is_shown(target_s: float) -> None:
    scheduler = Scheduler(Config(price=0.125, p95_target_s=target_s))
    scheduler.handle(Woke(), 0.0)
    shown = render(status(scheduler))
    learned = "price 0.125, learned from 0 workflows: 0 took longer than 30 s"
    assert (learned in shown) == (target_s > 0.0)
