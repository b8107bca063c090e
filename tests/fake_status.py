"""Snapshots like those of `Daemon.status`, around a real core."""

from typing import Any

from chimera_daemon.durations import Durations
from core_harness import Watched, prediction

LEARNED: dict[str, Any] = {
    "bundle": "b",
    "digest": "0123456789abcdef0123",
    "loaded_at": "2026-01-01",
    "runs_on": "cpu",
    "model_counters": {"texts_known": 5},
    "models_unknown": [],
    "resting": True,
    "waiting": 2,
    "workflows": 3,
    "text_bytes": 99,
    "workflows_forgotten": 0,
    "counters": {"predictions": 7},
    "traces": {"path": "/t", "written": 4, "dropped": 0, "failed": 0, "incomplete": 1},
}
SUPERVISED = {"engine": "e", "model": "small", "state": "up", "pid": 9, "starts": 2, "failures": 0}


def busy(running: int = 1, waiting: int = 0, **config: Any) -> Watched:
    """A core with engine `e` of model `small`, this much of it in work."""
    core = Watched(**config)
    core.join("e", "small", running)
    for _ in range(running + waiting):
        core.submit(prediction("prior"))
    return core


def snapshot(core: Watched, **fields: Any) -> dict[str, Any]:
    """What the daemon around this core would say."""
    return {
        "daemon_id": "d",
        "uptime_s": 1.5,
        "clients": 3,
        "answers_kept": 0,
        "core": core.core.snapshot(),
        "supervised": [],
        "predictor": {},
        "connections": {},
        "decisions": Durations().snapshot(),
        "board": {"path": None, "rows": []},
        **fields,
    }
