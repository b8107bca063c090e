"""`chimera bench soak`: both parts with real processes, short, and what breaks a bound."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from chimera_bench import soak
from chimera_daemon.board import Row

SHORT = ("--streams", "20", "--tokens", "16", "--tokens-per-s", "800")


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    soak.add_arguments(parser)
    return parser.parse_args([*SHORT, *given])


def rows_of(folder: Path, *given: str, code: int = 0) -> list[dict[str, Any]]:
    out = folder / "rows.jsonl"
    assert soak.run(arguments(*given, "--out", str(out))) == code
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture
def _any_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds memory has not settled, and a busy machine may be late."""
    monkeypatch.setattr(soak, "GROWTH", 10.0)
    monkeypatch.setattr(soak, "FREE_S", soak._GIVE_UP_S)


@pytest.mark.usefixtures("_any_growth")
@pytest.mark.parametrize("door", ["http", "zmq"])
def test_many_streams(door: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *samples, row = rows_of(tmp_path, "--minutes", "0.05", "--disconnect", "0", "--door", door)
    assert (row["bench"], row["door"], row["errors"], row["left"]) == ("soak", door, {}, {})
    assert row["broken"] == []
    assert row["answers"] >= 20
    assert set(row["growth"]) == {"daemon", "engine", "gateway"}
    assert max(sample["counts"]["slots taken"] for sample in samples) > 0
    assert any(what.startswith("board: ") for what in samples[-1]["counts"])
    assert "all bounds kept" in capsys.readouterr().out


@pytest.mark.usefixtures("_any_growth")
def test_clients_that_go_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows_of(tmp_path, "--minutes", "0", "--disconnect", "40")
    assert (row["bench"], row["clients"], row["left_early"]) == ("disconnect", 40, 20)
    assert (row["answers"], row["errors"], row["broken"]) == (20, {}, [])
    assert (row["held"], row["left"]) == ({}, {})
    assert "20 of 40 clients went away" in capsys.readouterr().out


def test_a_broken_bound_is_said_and_gives_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "GROWTH", -1.0)  # not even memory that shrinks is good enough
    *_, row = rows_of(tmp_path, "--minutes", "0.03", "--disconnect", "0", code=1)
    assert any("memory of daemon grew by" in broken for broken in row["broken"])
    assert "BROKEN: memory of daemon grew by" in capsys.readouterr().out


def test_growth_begins_when_memory_has_settled() -> None:
    def sample(at_s: float, mib: float) -> dict[str, Any]:
        return {"at_s": at_s, "resident_mib": {"daemon": mib}}

    mibs = [10.0, 50.0, 100.0, 100.0, 300.0, 101.0, 107.0, 108.0, 900.0]
    samples = [sample(30.0 * i, mib) for i, mib in enumerate(mibs)]
    assert soak.growth(samples, 60.0) == {"daemon": pytest.approx(0.08)}
    assert soak.growth(samples, 1000.0) == {}


def test_counts_are_of_all_workers_and_of_the_board() -> None:
    def worker(running: int) -> dict[str, Any]:
        engines = [{"running": running}, {"running": 1}]
        stages = {"running": running + 1, "waiting": 2}
        return {"core": {"stages": stages, "workflows": 3, "engines": engines}}

    board = [
        Row("engine", "small", 1, "small", (1, 2, 500_000, 70, 800, 3)),
        Row("worker", "worker-0", 2, "engine:small", (4, 90, 0, 0, 0, 0)),
        Row("worker", "worker-1", 3, "engine:small", (5, 10, 0, 0, 0, 0)),
        Row("worker", "worker-0", 2, "model:m", (6, 60, 4, 0, 0, 0)),
        Row("gateway", "gateway-0", 4, "gateway", (100, 7, 8, 1000, 2, 9)),
    ]
    assert soak.counts([worker(5), worker(0)], board) == {
        "stages running": 7,
        "stages waiting": 4,
        "workflows": 6,
        "slots taken": 7,
        "board: running at engines": 1,
        "board: waiting at engines": 2,
        "board: attempts at engines": 3,
        "board: in flight": 9,
        "board: tokens due": 100,
        "board: stages waiting": 6,
        "board: tokens waiting": 60,
        "board: requests at gateways": 7,
        "board: streams at gateways": 8,
        "board: bytes unread": 9,
    }


@pytest.mark.parametrize(
    ("spent_s", "above", "said"),
    [
        (soak.FREE_S - 0.1, {}, None),
        (soak.FREE_S + 0.1, {}, "later than 2 s"),
        (30.0, {"slots taken": 3}, "still {'slots taken': 3}"),
    ],
)
def test_counts_that_are_late_or_stay(
    spent_s: float, above: dict[str, int], said: str | None
) -> None:
    broken = soak.late("at the end", spent_s, above)
    assert (said in broken[0]) if said else broken == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--streams", "0"), "at least 1"),
        (("--tokens", "-1"), "at least 1"),
        (("--minutes", "-1"), "at least 0"),
        (("--disconnect", "1"), "0, or at least 2"),
        (("--tokens-per-s", "0"), "above 0"),
        (("--door", "window"), "http"),
    ],
)
def test_bad_input(given: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(*given)
    assert said in capsys.readouterr().err
