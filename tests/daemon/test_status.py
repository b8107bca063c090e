"""What `chimera status` draws of a snapshot."""

import re
from typing import Any

import msgspec
import pytest

from chimera_daemon.board import Row
from chimera_daemon.status import render
from core_harness import Watched
from fake_status import LEARNED, SUPERVISED, busy, snapshot

ROWS = [
    Row("engine", "e", 11, "e", (7, 1, 250_000, 1234, 99_999, 6)),
    Row("worker", "worker-0", 12, "engine:e", (3, 400, 0, 0, 0, 0)),
    Row("worker", "worker-0", 12, "model:small", (1, 100, 3, 0, 0, 0)),
    Row("worker", "worker-1", 13, "engine:e", (2, 50, 0, 0, 0, 0)),
    Row("worker", "worker-1", 13, "engine:far", (1, 60, 0, 0, 0, 0)),
    Row("gateway", "gateway-14", 14, "gateway", (5, 4, 3, 1000, 2, 77)),
]


def on_board(rows: list[Row]) -> dict[str, Any]:
    return {"path": "/dev/shm/b", "rows": [row._asdict() for row in rows]}


def cells(shown: str, first: str) -> list[str]:
    """The row of the table that begins with this cell; cells are two blanks apart."""
    (line,) = (line for line in shown.splitlines() if re.match(rf"{re.escape(first)}(  |$)", line))
    return re.split(r" {2,}", line)


@pytest.mark.parametrize("target_s", [0.0, 30.0])
def test_a_learned_price_is_shown(target_s: float) -> None:
    core = Watched(price=0.125, p95_target_s=target_s)
    shown = render(snapshot(core))
    learned = "price 0.125, learned from 0 workflows: 0 took longer than 30 s"
    assert (learned in shown) == (target_s > 0.0)
    both = [snapshot(core, worker=0), snapshot(core, worker=1)]
    assert (f"worker 1: {learned}" in render(both)) == (target_s > 0.0)


def test_one_worker() -> None:
    status = snapshot(busy(2, 3), worker=0, workers=2, supervised=[SUPERVISED], predictor=LEARNED)
    shown = render(msgspec.json.decode(msgspec.json.encode(status)))
    assert shown.startswith(
        "daemon d  up 2 s  policy chimera\nclients 3  workflows 5  stages: 2 run"
    )
    assert "board" not in shown
    engine = re.split(r" {2,}", next(x for x in shown.splitlines() if x.startswith("e  ")))
    assert engine[:4] == ["e", "small", "2", "2"]
    assert cells(shown, "small")[1:5] == ["1", "2", "2", "3"]
    assert "bundle b  digest 0123456789abcdef" in shown
    assert "RESTING" in shown
    assert "submitted 5" in shown


NEVER = "p50 0.00 ms, p99 0.00 ms"


def test_several_workers_are_drawn_together() -> None:
    counted = {"late_chunks": 2}
    workers = [
        snapshot(busy(2, 1), worker=0, connections=counted, daemon_id="d0", predictor=LEARNED),
        snapshot(busy(1, 4), worker=2, connections=counted, daemon_id="d2", predictor=LEARNED),
    ]
    workers[1]["core"]["draining"] = True
    shown = render({"workers": workers})
    assert shown == render(workers)
    assert shown.startswith("2 workers  policy chimera\nworker ")
    assert cells(shown, "0") == ["0", "d0", "2", "3", "3", "2", "1", "0", NEVER]
    assert cells(shown, "2 (draining)") == [
        "2 (draining)",
        "d2",
        "2",
        "3",
        "5",
        "1",
        "4",
        "0",
        NEVER,
    ]
    assert cells(shown, "e")[:4] == ["e", "small", "2 + 1", "2"]
    assert cells(shown, "small")[1:5] == ["1", "2 + 1", "2", "1 + 4"]
    assert "worker 0: bundle b" in shown
    assert "worker 2: bundle b" in shown
    assert "late_chunks 4" in shown
    assert "submitted 8" in shown


def test_an_engine_that_only_one_worker_knows() -> None:
    shown = render([snapshot(Watched()), snapshot(busy(1))])
    assert cells(shown, "e")[:4] == ["e", "small", "1", "1"]


def test_the_board_is_shown_once() -> None:
    without, one = snapshot(busy(1)), snapshot(busy(1), board=on_board(ROWS))
    for status in (one, [one, one], [without, one]):
        shown = render(msgspec.json.decode(msgspec.json.encode(status)))
        assert shown.count("/dev/shm/b") == 1
        assert "board /dev/shm/b  written by engine e (11), gateway gateway-14 (14), " in shown
        assert "worker worker-0 (12), worker worker-1 (13)" in shown
        beliefs = "worker-0 3, worker-1 2"
        table = shown[shown.index("engine on the board") :]
        assert cells(table, "e") == ["e", "7", "1", "25%", "1234", "6", "450", beliefs]
        assert cells(table, "far") == ["far", *["-"] * 5, "60", "worker-1 1"]
        assert cells(table, "gateway-14") == ["gateway-14", "5", "4", "3", "1000", "2", "77"]


def test_a_board_without_writers_and_a_host_without_work() -> None:
    assert "written by nobody" in render(snapshot(Watched(), board=on_board([])))
    shown = render(snapshot(Watched(), board=on_board(ROWS[:1])))
    assert cells(shown, "e") == ["e", "7", "1", "25%", "1234", "6", "0", "-"]


@pytest.mark.parametrize("nothing", [{}, [], {"workers": []}])
def test_no_worker_answers(nothing: Any) -> None:
    assert render(nothing) == "no worker of the daemon answers"
