"""`chimera simulate`: notation of policies, mistakes, and whole runs on small made-up traces."""

import argparse
import io
import json
import shlex
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from chimera_bench import frontier_report, sim_policies, sim_runs, sim_study
from chimera_bench import simulate as command
from chimera_bench.progress import Progress
from chimera_bench.sim_policies import settings
from chimera_daemon import cli
from chimera_daemon.config import ConfigError
from chimera_predictors.traces import Traces
from tests.fake_traces import make_traces

PROFILE = (
    "[engines.profile]\nstep_s = {}\nstep_per_seq_s = 0.0005\nstep_per_kv_token_s = 1e-8\n"
    "prefill_s_per_token = 1e-5\nslots = 4\n"
)
CLUSTER = (
    '[[engines]]\nname = "quick"\nmodel = "small"\ncount = 2\n'
    + PROFILE.format(0.005)
    + '[[engines]]\nname = "slow"\nmodel = "large"\n'
    + PROFILE.format(0.02)
)


def write_traces(folder: Path, traces: Traces) -> Path:
    """As a trace folder (docs/traces.md)."""
    lines: dict[int, dict[str, Any]] = {}
    for row in range(len(traces)):
        workflow, task = int(traces.workflow[row]), int(traces.task[row])
        line = lines.setdefault(
            workflow,
            {
                "workflow_id": traces.workflow_ids[workflow],
                "task_id": traces.task_ids[task],
                "kind": traces.kind[row],
                "success": float(traces.success[row]),
                "stages": [],
            },
        )
        line["stages"].append(
            {
                "model": traces.models[traces.model[row]],
                "prompt_text": traces.new_text[row],
                "prompt_tokens": int(traces.prompt_tokens[row]),
                "output_tokens": int(traces.output_tokens[row]),
            }
        )
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    (folder / "runs.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    return write_traces(tmp_path / "traces", make_traces(tasks=30))


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER, encoding="utf-8")
    return path


@pytest.fixture
def other_cluster(tmp_path: Path) -> Path:
    path = tmp_path / "other.toml"
    path.write_text(CLUSTER.replace("count = 2", "count = 1"), encoding="utf-8")
    return path


def simulate(traces: Path, cluster: Path, *options: str) -> int:
    few = ["--workflows", "60", "--seeds", "2", "--jobs", "1"]
    load = [] if "--load" in options else ["--load", "0.8"]
    return cli.main(
        ["simulate", "--traces", str(traces), "--cluster", str(cluster), *few, *load, *options]
    )


def a_plan(traces: Path, cluster: Path, *policies: str, load: str = "0.8") -> sim_runs.Plan:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    common = ["--traces", str(traces), "--cluster", str(cluster), "--workflows", "60"]
    options = ["--seeds", "2", "--load", load, "--policy", *policies]
    return command.plan(parser.parse_args([*common, *options]), cluster)


# Notation.


@pytest.mark.parametrize(
    ("written", "names", "sweeps", "policy", "predictions"),
    [
        ("chimera", ["chimera"], ["chimera"], "chimera", "prior"),
        (
            "chimera:price=0.1/0.3",
            ["chimera price=0.1", "chimera price=0.3"],
            ["chimera"] * 2,
            "chimera",
            "prior",
        ),
        (
            "chimera:price=1,aging_tokens_per_s=5/9",
            [f"chimera price=1 aging_tokens_per_s={n}" for n in (5, 9)],
            [f"chimera aging_tokens_per_s={n}" for n in (5, 9)],
            "chimera",
            "prior",
        ),
        ("paper:tau=1,delta_s=0.1", ["paper tau=1 delta_s=0.1"], ["paper"], "paper", "prior"),
        ("stjf_oracle", ["stjf_oracle"], ["stjf_oracle"], "stjf", "oracle"),
        ("router_oracle", ["router_oracle"], ["router_oracle"], "router_only", "oracle"),
        ("chimera:predictions=noise:2", ["chimera noise:2"], ["chimera noise:2"], "chimera",
         "noise:2"),
        ("chimera:tries=2,price=1", ["chimera tries=2 price=1"], ["chimera tries=2"], "chimera",
         "prior"),
        ("static:a:b", ["static:a:b"], ["static:a:b"], "static:a:b", "constant"),
    ],
)  # fmt: skip
def test_notation(
    written: str, names: list[str], sweeps: list[str], policy: str, predictions: str
) -> None:
    found = settings(written, {}, "prior", ["a:b"])
    assert [setting.name for setting in found] == names
    assert [setting.sweep for setting in found] == sweeps
    assert {setting.config.policy for setting in found} == {policy}
    assert {setting.predictions for setting in found} == {predictions}


def test_knobs_reach_the_configuration() -> None:
    common = sim_policies.common_knobs(["price=3,tau=7", "aging_tokens_per_s=2"])
    ours, paper = (
        settings(text, common, "prior", [])[0].config
        for text in ("chimera:price=0.25", "paper:delta_s=0.2")
    )
    assert (ours.price, ours.aging_tokens_per_s) == (0.25, 2.0)
    assert ours.paper.tau == 0.5  # not a knob of `chimera`
    assert (paper.price, paper.paper.tau, paper.paper.delta_s) == (3.0, 7.0, 0.2)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("chimra", "no policy 'chimra'; there are: chimera, paper"),
        ("chimra_oracle", "no policy 'chimra'"),
        ("chimera:prize=1", "no knob `prize` here; did you mean `price`"),
        ("least_loaded:tau=1", "no knob `tau`"),
        ("chimera:price=cheap", r"Expected `float`.*\$\.price"),
        ("paper:tau=-1", r">= 0.*\$\.paper\.tau"),
        ("chimera:price", "'price' is not KNOB=VALUE"),
        ("chimera:price=1,price=2", "`price` is set twice"),
        ("static:huge", "no engine serves 'huge'; there are: small, large"),
    ],
)
def test_misspelt_policies(written: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(written, {}, "prior", ["small", "large"])


# Mistakes.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--load", "0"], "--load '0': write a share above 0"),
        (["--load", "-0.5"], "--load '-0.5'"),
        (["--load", "Tx"], "--load 'Tx'"),
        (["--load", "nan"], "--load 'nan'"),
        (["--policy", "chimra"], "no policy 'chimra'"),
        (["--set", "prise=1"], "--set: no knob `prise` here; did you mean `price`"),
        (["--predictions", "magic"], "no predictions 'magic'"),
        (["--policy", "chimera:tries=0"], "`tries` is a whole number from 1 to 100, not 0"),
        (["--policy", "chimera:optional=yes"], "`optional` is a whole number from 0 to 1"),
        (["--predictions", "bundle:nowhere"], "nowhere"),
        (["--arrivals", "sometimes"], "--arrivals 'sometimes': there are: poisson"),
        (["--arrivals", "azure-code:nowhere"], "nowhere/arrivals.parquet"),
        (["--baseline", "paper"], "--baseline 'paper': it is not simulated"),
        (["--gap-s", "-1"], "--gap-s: "),
        (["--out", "no/such/folder.jsonl"], "--out: no folder no/such"),
        (["--report", "no/such/page.md"], "--report: no folder no/such"),
        (["--report", "page.md"], "--report: settings are held against least_loaded: add it"),
        (["--choose"], "--choose: settings are chosen on the tuning half, so report on the other"),
        (["--choose", "--half", "tune"], "write --half test, not tune"),
        (["--choose", "--half", "test"], "--choose: settings are held against least_loaded"),
        (["--cluster", "x/cluster.toml"], "are both called 'cluster'; name each cluster once"),
    ],
)
def test_a_mistake_gets_one_clear_line(
    traces: Path,
    cluster: Path,
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = [] if "--policy" in options else ["--policy", "chimera"]
    assert simulate(traces, cluster, *policy, *options) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("chimera: ")]
    assert said in line
    assert not shown.out


def test_a_report_does_not_replace_other_text(
    traces: Path, cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("my own words\n", encoding="utf-8")
    assert simulate(traces, cluster, "--report", str(page)) == 2
    assert "page.md has no part between" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "my own words\n"
    page.write_bytes(b"\xff\xfe")
    assert simulate(traces, cluster, "--report", str(page)) == 2
    assert "page.md cannot be read" in capsys.readouterr().err


def test_a_cluster_file_with_an_unknown_key(
    traces: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.write_text(CLUSTER.replace("count", "number"), encoding="utf-8")
    assert simulate(traces, cluster) == 2
    assert "cluster.toml: Object contains unknown field `number`" in capsys.readouterr().err


def test_a_model_that_the_traces_lack(
    traces: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.write_text(CLUSTER.replace('"large"', '"huge"'), encoding="utf-8")
    assert simulate(traces, cluster) == 2
    said = capsys.readouterr().err
    assert "no workflow by model 'huge', which the cluster serves; there are: large, small" in said


def test_traces_without_a_workflow(
    tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    assert simulate(empty, cluster) == 2
    empty.mkdir()
    (empty / "runs.jsonl").write_text("", encoding="utf-8")
    assert simulate(empty, cluster) == 2
    assert all(
        "empty" in line for line in capsys.readouterr().err.splitlines() if "chimera:" in line
    )


# Whole runs.


def test_a_run_writes_table_rows_picture_and_page(
    traces: Path, cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / f"out.{name}" for name in ("jsonl", "png", "html")}
    code = simulate(
        traces, cluster, "--load", "0.5", "T0.9", "--half", "test",
        "--policy", "chimera:price=0.1/1", "paper", "--policy", "least_loaded", "router_oracle",
        "--out", str(paths["jsonl"]), "--plot", str(paths["png"]), "--html", str(paths["html"]),
    )  # fmt: skip
    assert code == 0
    shown = capsys.readouterr().out
    names = ["chimera price=0.1", "chimera price=1", "paper", "least_loaded", "router_oracle"]
    for text in (*names, "load 0.5", "load T0.9", "ratios to least_loaded", "test tasks"):
        assert text in shown

    rows = [json.loads(line) for line in paths["jsonl"].read_text().splitlines()]
    kinds = [row["row"] for row in rows]
    # Of each load: five settings, all but one compared, four sweeps.
    assert [kinds.count(kind) for kind in ("policy", "comparison", "frontier")] == [10, 8, 8]
    # Over both loads: four sweeps, and by three metrics against the one reference.
    assert [kinds.count(kind) for kind in ("area", "match")] == [4, 12]
    for row in rows:
        assert {"machine", "versions", "commit", "seeds"} <= set(row)
        assert {"cluster", "rate_per_s"} <= set(row) or row["clusters"] == [str(cluster)]
    policies = {(row["setting"], row["load"]): row for row in rows if row["row"] == "policy"}
    for row in policies.values():
        assert row["workflows"] == 120
        assert row["latency_p50_s"]["value"] <= row["latency_p95_s"]["value"]
        assert sum(row["stage_share"].values()) == pytest.approx(1.0)
        assert not row["errors"]
    rates = [row["rate_per_s"] for row in rows if row.get("load") == "0.5"]
    assert rates == pytest.approx([0.5 * rows[0]["uniform_per_s"]] * len(rates))
    oracle, idle = policies["router_oracle", "0.5"], policies["least_loaded", "0.5"]
    assert oracle["success"]["value"] > idle["success"]["value"] + 0.05

    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    page = paths["html"].read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert 'src="http' not in page  # it needs nothing from elsewhere
    assert "<link" not in page
    for name in names:
        assert f"<td>{name}</td>" in page


def test_several_clusters_and_a_choice_on_the_other_half(
    traces: Path,
    cluster: Path,
    other_cluster: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page, out, plot = (tmp_path / name for name in ("page.md", "rows.jsonl", "all.png"))
    page.write_text(
        f"Before.\n{frontier_report.BEGIN}\nold\n{frontier_report.END}\nAfter.\n", encoding="utf-8"
    )
    options = (
        "--cluster", str(other_cluster), "--load", "0.8", "1.1", "--half", "test", "--choose", "2",
        "--policy", "chimera:price=0.01/0.1/1", "paper:tau=1/2", "least_loaded",
        "--out", str(out), "--plot", str(plot), "--report", str(page),
    )  # fmt: skip
    assert simulate(traces, cluster, *options) == 0
    shown = capsys.readouterr().out
    for text in ("ratio, cluster other", "ratio, all cells", "Mean latency over least_loaded's",
                 "P95 latency over paper tau=1's", "chosen on the tuning half"):  # fmt: skip
        assert text in shown
    assert "ratios to least_loaded" not in shown  # with several clusters: only in the rows

    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    kinds = [row["row"] for row in rows]
    places = 3  # all cells and two clusters
    assert kinds.count("policy") == 2 * 2 * 6
    assert kinds.count("area") == places * 3
    assert kinds.count("match") == places * 3 * 3 * 2
    policies = {
        (row["cluster"], row["load"], row["setting"]): row for row in rows if row["row"] == "policy"
    }
    sweeps = [row for row in rows if row["row"] == "frontier" and row["sweep"] == "chimera"]
    (area,) = [
        row
        for row in rows
        if row["row"] == "area" and (row["sweep"], row["where"]) == ("chimera", "all cells")
    ]
    assert area["baseline"] == "paper (2 points)"
    assert area["hypervolume"]["value"] == pytest.approx(
        np.mean([row["hypervolume"]["value"] for row in sweeps])
    )
    matches = [row for row in rows if row["row"] == "match" and row["where"] == "other"]
    for row in matches:
        figure = "latency_p95_s" if row["metric"] == "p95" else "latency_mean_s"
        ratios = [
            policies[str(other_cluster), load, setting][figure]["value"]
            / policies[str(other_cluster), load, row["reference"]][figure]["value"]
            for load, setting in zip(("0.8", "1.1"), row["settings"], strict=True)
            if setting
        ]
        assert len(ratios) == row["reached"]
        if ratios:
            assert row["ratio"]["value"] == pytest.approx(np.mean(ratios))
    # At least the references get as far as they do themselves.
    assert sum(row["reached"] > 0 for row in matches) >= 6

    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.\n")
    assert "\nold\n" not in text
    for wanted in (
        f"chimera simulate --traces {traces} ",
        "test tasks: cluster ",
        "Cluster other: starvation",
        "](frontier-other.png)",
        "| least_loaded | 1.00 [1.00, 1.00], ",
    ):
        assert wanted in text
    for line in text.splitlines():
        assert line.startswith("|") == line.endswith("|")
    for name in ("cluster", "other"):
        assert (tmp_path / f"frontier-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_other_half_decides_the_choice(traces: Path, cluster: Path) -> None:
    """Reported figures are those of the test half, whether or not settings are chosen there."""
    plan = a_plan(traces, cluster, "chimera:price=0.01/1", "least_loaded")
    plan = msgspec.structs.replace(plan, half="test")
    with Progress(io.StringIO()) as progress:
        here = sim_study.study("c", plan, None, progress)
        there = sim_study.study("c", plan, 1, progress)
        (one,) = sim_study.measured([here], "least_loaded", 1, progress)
        (other,) = sim_study.measured([there], "least_loaded", 1, progress)
    assert one.loads == other.loads
    assert there.tuning is not None
    assert there.tuning.plan.seeds == plan.seeds[:1]
    tested = {task.task_id for task in there.reported.tasks}
    assert not tested & {task.task_id for task in there.tuning.tasks}
    (by_itself,), (by_other,) = one.cells, other.cells
    assert by_itself.tuning is by_itself.drawn
    columns = sim_runs.run(there.tuning.plan, there.tuning, 1, lambda done, cell: None)
    for n, setting in enumerate(plan.settings):
        latency_s = columns[sim_runs.Cell(n, 0, plan.seeds[0])].latency_s
        assert by_other.tuning[setting.name].latency_s == pytest.approx(latency_s.mean())


@pytest.mark.parametrize(
    ("options", "compared", "cloud"),
    [
        ([], "least_loaded", ["paper tau=1", "paper tau=2"]),
        (["--baseline", "paper tau=2"], "paper tau=2", ["paper tau=1", "paper tau=2"]),
        (["--baseline", "paper"], "least_loaded", ["paper tau=1", "paper tau=2"]),
        (["--baseline", "chimera"], "chimera", ["chimera"]),
        (["--baseline", "paper_oracle"], "paper_oracle", ["paper_oracle"]),
    ],
)
def test_what_others_are_compared_with(
    traces: Path, cluster: Path, options: list[str], compared: str, cloud: list[str]
) -> None:
    policies = ["chimera", "paper:tau=1/2", "paper_oracle", "least_loaded"]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    common = ["--traces", str(traces), "--cluster", str(cluster), "--policy", *policies]
    arguments = parser.parse_args([*common, *options])
    found = command._baselines(arguments, command.plan(arguments, cluster).settings)
    assert (found[0], [setting.name for setting in found[1]]) == (compared, cloud)


def test_the_command_line_is_told_from_the_options() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    written = ["--traces", "my traces", "--cluster", "a", "b", "--half", "test", "--choose"]
    said = command.command_line(parser.parse_args(written))
    assert said.startswith("chimera simulate --traces 'my traces' ")
    again = parser.parse_args(shlex.split(said)[2:])
    assert again == parser.parse_args(written)


def test_traces_without_outcomes_still_give_latencies(
    tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_traces(tasks=20)
    folder = write_traces(tmp_path / "traces", made)
    runs = folder / "runs.jsonl"
    lines = [json.loads(line) for line in runs.read_text().splitlines()]
    runs.write_text("".join(json.dumps(line | {"success": None}) + "\n" for line in lines))
    plot = tmp_path / "plot.png"
    options = ("--policy", "chimera", "least_loaded", "--plot", str(plot))
    assert simulate(folder, cluster, *options) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if " chimera  " in line][:1]
    assert row.split()[1] == "-"
    assert float(row.split()[2]) > 0.0
    assert plot.stat().st_size > 0


def test_policies_get_the_same_workflows(traces: Path, cluster: Path) -> None:
    plan = a_plan(traces, cluster, "least_loaded", "static:small")
    done = sim_runs.run(plan, sim_runs.ground(plan), 1, lambda done, cell: None)
    assert list(done) == sim_runs.cells(plan)
    tasks = [
        [done[sim_runs.Cell(setting, 0, seed)].task for setting in (0, 1)] for seed in plan.seeds
    ]
    for one, other in tasks:
        assert (one == other).all()
    assert (tasks[0][0] != tasks[1][0]).any()


def test_no_workflow_is_faster_than_on_an_idle_engine(traces: Path, cluster: Path) -> None:
    plan = a_plan(traces, cluster, "static:small", "static:large", "chimera", load="0.001")
    ground = sim_runs.ground(plan)
    bounds = sim_runs.bounds(ground)
    done = sim_runs.run(plan, ground, 1, lambda done, cell: None)
    for cell, columns in done.items():
        assert (columns.latency_s >= bounds.idle_s[columns.task] - 1e-6).all()
        alone = plan.settings[cell.setting].name.removeprefix("static:")
        if alone in plan.models:
            success = bounds.success[columns.task, plan.models.index(alone)]
            assert (columns.success == success).all()
        if alone == "small":  # so rare that they never meet
            assert columns.latency_s == pytest.approx(bounds.idle_s[columns.task])


def test_a_bundle_is_read_once_for_all_simulations(
    traces: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Halves:
        """Knows nothing, but all models."""

        models = frozenset({"small", "large"})
        levels = (0.1, 0.5, 0.9)

        def predict(self, queries: list[Any]) -> list[dict[str, Any]]:
            return [{} for _ in queries]

    reads: list[str] = []
    monkeypatch.setattr(
        "chimera_predictors.predictor.load",
        lambda folder, device: reads.append(folder) or Halves(),
    )
    plan = a_plan(traces, cluster, "chimera:predictions=bundle:there", "least_loaded")
    ground = sim_runs.ground(plan)
    sim_runs.source(ground, "bundle:there", 0)
    assert reads == ["there"]
    assert len(ground.made["bundle:there"]) >= len(ground.tasks)
    sim_runs.run(plan, ground, 1, lambda done, cell: None)
    assert reads == ["there"]


def test_numbers_do_not_depend_on_how_many_processes_there_are(traces: Path, cluster: Path) -> None:
    plan = a_plan(traces, cluster, "chimera", "paper:predictions=noise:1")
    ground = sim_runs.ground(plan)
    counted: list[int] = []
    alone = sim_runs.run(plan, ground, 1, lambda done, cell: None)
    pooled = sim_runs.run(plan, ground, 2, lambda done, cell: counted.append(done))
    assert counted == [1, 2, 3, 4]
    assert list(alone) == list(pooled)
    for cell, columns in alone.items():
        for name in ("task", "latency_s", "success"):
            assert np.array_equal(getattr(columns, name), getattr(pooled[cell], name))
        assert columns.stages == pooled[cell].stages
