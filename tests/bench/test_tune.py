"""`chimera tune`: goals, the search, and whole runs on small made-up traces."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chimera_bench import tune as command
from chimera_bench.sim_summary import Summary
from chimera_bench.summary import Interval
from chimera_bench.tune import Goal, Point, parse, refine
from chimera_daemon import cli
from chimera_daemon import config as configuration
from chimera_daemon.config import Config, ConfigError
from tests.bench.test_simulate import CLUSTER, write_traces
from tests.fake_traces import make_traces

FEW = ("--load", "0.8", "--workflows", "60", "--seeds", "2", "--jobs", "1")


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Options that name small traces and a small cluster."""
    traces = write_traces(tmp_path / "traces", make_traces(tasks=30))
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(CLUSTER, encoding="utf-8")
    return ["--traces", str(traces), "--cluster", str(cluster)]


def tune(given: list[str], goal: str, *options: str) -> int:
    return cli.main(["tune", *given, *FEW, "--goal", goal, *options])


def rows_of(path: Path, kind: str, half: str) -> dict[str, Any]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["setting" if kind == "policy" else "sweep"]: row for row in rows
            if row["row"] == kind and row["half"] == half}  # fmt: skip


def configured(shown: str) -> Config:
    """What a daemon reads out of the lines that a user copies."""
    return configuration.parse(shown.partition("For the daemon's configuration:\n")[2])


# Goals.


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("p95<=20", Goal("p95<=20", "p95", 20.0)),
        (" mean <= 0.5 ", Goal("mean<=0.5", "mean", 0.5)),
        ("success>=0.45", Goal("success>=0.45", "success", 0.45)),
    ],
)
def test_goals(text: str, goal: Goal) -> None:
    assert parse(text) == goal


@pytest.mark.parametrize(
    "text",
    ["", "p95", "p95<=", "p95>=20", "p95<20", "p95<=-1", "p95<=nan", "p95<=inf", "p95<=fast",
     "success<=0.5", "success>=1.5", "success>=0", "speed<=1", "the best"],
)  # fmt: skip
def test_goals_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="write 'p95<=SECONDS'"):
        parse(text)


def summary(success: float, mean_s: float, p95_s: float) -> Summary:
    exact = [Interval(value, math.nan, math.nan) for value in (success, mean_s, p95_s)]
    share, mean, p95 = exact
    return Summary(
        "", "", "", 1, {}, share, mean, mean, p95, p95, mean, [], {}, {}, {}, 0.0, 0, 1.0
    )


@pytest.mark.parametrize(
    ("goal", "best"),
    [
        ("p95<=30", 1),  # the most success within it
        ("p95<=5", 2),  # none keeps it: the nearest
        ("mean<=9", 1),
        ("success>=0.45", 1),  # the fastest with it
        ("success>=0.9", 0),  # none has it: the nearest
        ("best", 2),  # the largest area
    ],
)
def test_what_is_best(goal: str, best: int) -> None:
    tried = [
        (summary(0.6, 20.0, 50.0), 0.1),
        (summary(0.5, 9.0, 30.0), 0.2),
        (summary(0.4, 7.0, 20.0), 0.3),
        (summary(math.nan, math.nan, math.nan), 0.0),
    ]
    assert max(range(4), key=lambda number: parse(goal).rank(*tried[number])) == best


# The search.


def test_the_search_closes_in_on_the_best_value() -> None:
    tried: list[float] = []

    def best_with(points: list[Point]) -> Point:
        tried.extend(value for (value,) in points)
        return (min(tried, key=lambda value: abs(math.log(value / 0.2))),)

    refine([[0.01, 0.1, 1.0, 10.0]], best_with)
    assert min(abs(math.log(value / 0.2)) for value in tried) < math.log(1.2)
    assert len(tried) == len(set(tried)) == 4 + 2 + 2 + 2


def test_the_search_refines_all_dials_and_ends_at_the_edge_of_the_grid() -> None:
    tried: list[Point] = []

    def best_with(points: list[Point]) -> Point:
        tried.extend(points)
        return min(tried, key=lambda point: (abs(math.log(point[0] / 5.0)) + 1.0) * point[1])

    refine([[1.0, 10.0], [0.1, 1.0]], best_with)
    assert len(tried) == len(set(tried))
    assert all(1.0 <= one <= 10.0 and 0.1 <= other <= 1.0 for one, other in tried)
    found = best_with([])
    assert found[0] == pytest.approx(5.0, rel=0.2)
    assert found[1] == 0.1


def test_a_grid_of_one_point_is_tried_once() -> None:
    tried: list[Point] = []

    def best_with(points: list[Point]) -> Point:
        tried.extend(points)
        return tried[0]

    refine([[1.0]], best_with)
    assert tried == [(1.0,)]


# Mistakes.


@pytest.mark.parametrize(
    ("goal", "options", "said"),
    [
        ("p95>=20", [], "--goal 'p95>=20': write 'p95<=SECONDS'"),
        ("best", ["--policy", "chimra"], "no policy 'chimra'; there are: chimera, paper"),
        ("best", ["--policy", "least_loaded"], "'least_loaded': no knob is left to tune"),
        ("best", ["--policy", "static:small"], "'static:small': no knob is left to tune"),
        ("best", ["--policy", "static:huge"], "no engine serves 'huge'"),
        ("best", ["--policy", "chimera:price=1"], "'chimera:price=1': no knob is left"),
        ("best", ["--policy", "chimera:prize=1"], "did you mean `price`"),
        ("best", ["--policy", "chimera:aging_tokens_per_s=5/9"], "give each knob one value"),
        ("best", ["--load", "0"], "--load '0': write a share above 0"),
        ("best", ["--predictions", "magic"], "no predictions 'magic'"),
        ("best", ["--out", "no/such/folder.jsonl"], "--out: no folder no/such"),
    ],
)
def test_a_mistake_gets_one_clear_line(
    given: list[str],
    goal: str,
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tune(given, goal, *options) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("chimera: ")]
    assert said in line
    assert not shown.out


def test_traces_without_outcomes(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "traces" / "runs.jsonl"
    lines = [json.loads(line) for line in runs.read_text(encoding="utf-8").splitlines()]
    runs.write_text("".join(json.dumps(line | {"success": None}) + "\n" for line in lines))
    for goal in ("best", "success>=0.1"):
        assert tune(given, goal) == 2
        assert f"--goal {goal}: the traces tell no success" in capsys.readouterr().err
    assert tune(given, "mean<=1000") == 0
    assert "Goal mean<=1000 on the test half: met: " in capsys.readouterr().out


# Whole runs.


def test_the_best_trade_of_one_half_is_reported_on_the_other(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert tune(given, "best", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    price = configured(shown).price
    assert configured(shown).policy == "chimera"

    searched, reported = (rows_of(out, "frontier", half) for half in ("tune", "test"))
    settings = len(command._COARSE["price"]) + 2 * command._REFINEMENTS + 1
    assert len(searched) in (settings, settings - command._REFINEMENTS)  # at an end: one side alone
    assert f"{2 * len(searched)} simulations of {len(searched)} settings" in shown
    chosen = f"chimera price={price:g}"
    areas = {name: row["hypervolume"]["value"] for name, row in searched.items()}
    del areas["least_loaded"]
    assert areas[chosen] == max(areas.values()) > min(areas.values())
    assert list(reported) == ["least_loaded", chosen, "chimera"]
    assert {row["chosen"] for row in (*searched.values(), *reported.values())} == {chosen}
    assert all(row["hypervolume"]["low"] is not None for row in reported.values())
    areas = {name: row["hypervolume"]["value"] for name, row in reported.items()}
    ours = areas.pop(chosen)
    assert ("NOT better there" in shown) == (max(areas.values()) >= ours)


def test_both_halves_are_those_of_simulate(tmp_path: Path, given: list[str]) -> None:
    tuned, simulated = tmp_path / "tuned.jsonl", tmp_path / "simulated.jsonl"
    assert tune(given, "best", "--out", str(tuned)) == 0
    for half in ("tune", "test"):
        chosen = rows_of(tuned, "policy", half)
        name = next(row["chosen"] for row in chosen.values())
        policies = ["least_loaded", name.replace(" ", ":")]
        options = ["--half", half, "--policy", *policies, "--out", str(simulated)]
        assert cli.main(["simulate", *given, *FEW, *options]) == 0
        alone = rows_of(simulated, "policy", half)
        for setting in ("least_loaded", name):
            for figure in ("success", "latency_mean_s", "latency_p95_s"):
                # Sums over other numbers of draws may round differently.
                assert chosen[setting][figure]["value"] == pytest.approx(
                    alone[setting][figure]["value"], rel=1e-12
                )


def test_a_floor_of_success(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    floor = 0.6
    assert tune(given, f"success>={floor}", "--out", str(out)) == 0
    searched = rows_of(out, "policy", "tune")
    del searched["least_loaded"]
    kept = [row for row in searched.values() if row["success"]["value"] >= floor]
    assert 0 < len(kept) < len(searched)
    fastest = min(kept, key=lambda row: row["latency_mean_s"]["value"])
    assert fastest["setting"] == fastest["chosen"]
    assert f"price = {fastest['chosen'].partition('=')[2]}" in capsys.readouterr().out


def test_a_goal_out_of_reach_is_said(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert tune(given, "p95<=0.001", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    assert "No value tried keeps the goal on the tune half" in shown
    assert "Goal p95<=0.001 on the test half: NOT met: " in shown
    searched = rows_of(out, "policy", "tune")
    del searched["least_loaded"]
    nearest = min(searched.values(), key=lambda row: row["latency_p95_s"]["value"])
    assert nearest["latency_p95_s"] == searched[nearest["chosen"]]["latency_p95_s"]


def test_the_papers_policy_and_knobs_that_stay(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    written = "paper:delta_s=0.1,aging_tokens_per_s=5"
    assert tune(given, "mean<=1000", "--policy", written) == 0
    shown = capsys.readouterr().out
    found = configured(shown)
    assert (found.policy, found.paper.delta_s, found.aging_tokens_per_s) == ("paper", 0.1, 5.0)
    paper = msgspec.structs.replace(found.paper, tau=0.5, delta_s=0.05)
    assert paper == configuration.PaperConfig()
    assert f"paper delta_s=0.1 aging_tokens_per_s=5 tau={found.paper.tau:g}" in shown
