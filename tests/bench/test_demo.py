"""`chimera demo` as a whole, with echo engines: files, exit codes, and what it leaves running."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chimera_bench import cluster, demo, machine, progress
from chimera_daemon import config as configuration
from chimera_daemon.config import Config, ConfigError, EngineConfig

ECHO = """
[[models]]
name = "small"
confidence = 0.4

[[engines]]
name = "s"
model = "small"
kind = "echo"
args = {step_s = 0.001, reply_tokens = [3, 6]}

[[engines]]
name = "l"
model = "large"
kind = "echo"
args = {step_s = 0.004, reply_tokens = [3, 6], slots = 4}
"""


# Echo engines need no time to get warm, and no test looks at how exact a capacity is.
CALIBRATION_S = 1.0
# `python -m chimera_daemon`, but for that.
COMMAND = f"""
import runpy
from chimera_bench import demo
demo._CALIBRATION_S = {CALIBRATION_S}
runpy.run_module("chimera_daemon", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def _short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_CALIBRATION_S", CALIBRATION_S)


@pytest.fixture
def echo_toml(tmp_path: Path) -> Path:
    path = tmp_path / "echo.toml"
    path.write_text(ECHO)
    return path


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(given)


def processes(marker: str) -> list[str]:
    """Command lines of processes (daemons, engine hosts) that mention ``marker``."""
    found: list[str] = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        if marker in command and "chimera_daemon" in command and folder.name != str(os.getpid()):
            found.append(command)
    return found


def sockets_of(out: Path) -> str:
    """The folder of the demo's sockets: it is in the command line of every engine host."""
    front = configuration.load(out / "logs" / "config.toml").front
    return str(Path(front.removeprefix("ipc://")).parent)


def conducted(plan: Any) -> bool:
    from chimera_bench.experiment import conduct

    return conduct(plan)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_policies_end_to_end(
    echo_toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ("--config", str(echo_toml), "--out", str(out), "--workflows", "12", "--rate", "40")
    given += ("--seeds", "1")
    assert demo.run(arguments(*given, "--policies", "chimera,static:small")) == 0

    workflows = rows(out / "workflows.jsonl")
    assert [row["policy"] for row in workflows] == ["chimera"] * 12 + ["static:small"] * 12
    first, second = workflows[:12], workflows[12:]
    assert [r["task_id"] for r in first] == [r["task_id"] for r in second]
    assert [r["arrive_s"] for r in first] == [r["arrive_s"] for r in second]
    assert {s["model"] for r in second for s in r["stages"]} == {"small"}
    assert all(r["error"] is None and r["latency_s"] > 0 for r in workflows)

    summary = rows(out / "summary.jsonl")
    assert [row["row"] for row in summary] == ["policy", "policy", "comparison"]
    assert {"machine", "commit", "versions", "seeds", "rate_per_s"} <= summary[0].keys()
    stages = summary[0]["stages"][0]
    assert stages["submitted"] == stages["answered"] == stages["completed"] > 12
    assert (stages["lost"], stages["answered_twice"], stages["errors"]) == (0, 0, 0)
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")

    said = capsys.readouterr().out
    assert (out / "report.txt").read_text() in said
    assert str(out / "demo.png") in said
    assert not processes(sockets_of(out))


def test_calibration_sets_the_rate(echo_toml: Path, tmp_path: Path) -> None:
    given = demo.plan(
        arguments(
            "--config",
            str(echo_toml),
            "--out",
            str(tmp_path / "out"),
            "--load",
            "0.5",
            "--workflows",
            "5",
            "--seeds",
            "1",
            "--policies",
            "round_robin",
        )  # fmt: skip
    )
    assert conducted(given)
    (row,) = rows(tmp_path / "out" / "summary.jsonl")
    capacity = row["calibration"]["capacity_per_s"]
    assert capacity > 1.0
    assert row["rate_per_s"] == pytest.approx(0.5 * capacity)
    assert row["load"] == 0.5


def test_several_loads_share_a_calibration_and_make_a_page(echo_toml: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.md"
    given = ("--config", str(echo_toml), "--out", str(out), "--report", str(page))
    given += ("--load", "0.2", "0.4", "--workflows", "3", "--seeds", "2")
    plan = demo.plan(arguments(*given, "--policies", "round_robin,least_loaded,chimera:price=0.7"))
    assert conducted(plan)

    workflows = rows(out / "workflows.jsonl")
    there = ["round_robin", "least_loaded", "chimera price=0.7"]
    cells = [(row["load"], row["seed"], row["policy"]) for row in workflows]
    assert list(dict.fromkeys(cells)) == [
        (load, seed, policy)
        for load in (0.2, 0.4)
        for seed, order in ((1, there), (2, there[::-1]))
        for policy in order
    ]
    assert all(cells.count(cell) == 3 for cell in cells)

    summary = rows(out / "summary.jsonl")
    (capacity,) = {row["calibration"]["capacity_per_s"] for row in summary}
    assert all(r["rate_per_s"] == pytest.approx(r["load"] * capacity) for r in summary)
    kinds = [(row["row"], row["load"]) for row in summary]
    assert all(kinds.count(("policy", load)) == 3 for load in (0.2, 0.4))
    relative = [row for row in summary if row["row"] == "relative"]
    assert [(row["policy"], row["baseline"]) for row in relative] == 2 * [
        ("round_robin", "least_loaded"), ("chimera price=0.7", "least_loaded"),
    ]  # fmt: skip

    said = page.read_text()
    assert plan.command in said
    assert "--load 0.2 0.4" in plan.command
    assert "seeds 1, 2" in said
    assert f"{capacity:.2f} workflows/s" in said
    assert "| policy | load 0.2 | load 0.4 |" in said
    assert "## Mean latency divided by that of least_loaded" in said
    assert "longest wait s" in said
    assert "![" in said
    assert "(page.png)" in said
    assert (tmp_path / "page.png").read_bytes() == (out / "demo.png").read_bytes()
    assert "load 0.2  " in (out / "report.txt").read_text()


def test_a_daemon_is_told_the_knobs_of_its_row(echo_toml: Path, tmp_path: Path) -> None:
    def price_after(name: str, policies: str) -> float:
        out = tmp_path / name
        given = ("--config", str(echo_toml), "--out", str(out), "--workflows", "2", "--rate", "40")
        given += ("--seeds", "1", "--policies", policies)
        assert conducted(demo.plan(arguments(*given)))
        return configuration.load(out / "logs" / "config.toml").price

    assert price_after("knob", "round_robin,chimera:price=0.7") == 0.7
    assert price_after("plain", "chimera:price=0.7,round_robin") == Config().price


def test_the_command_line_says_what_is_not_by_default() -> None:
    given = ["--policies", "chimera,paper:tau=1,delta_s=0.1", "--load", "0.5", "0.9", "--quick"]
    given += ["--out", "a folder", "--seeds", "3"]
    said = shlex.split(demo.command_line(arguments(*given)))
    assert said[:2] == ["chimera", "demo"]
    assert arguments(*said[2:]) == arguments(*given)
    assert "--seed" not in said
    assert demo.command_line(arguments()) == "chimera demo"


@pytest.mark.slow
def test_chaos_loses_nothing_and_the_engine_comes_back(
    echo_toml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ("--config", str(echo_toml), "--out", str(out), "--workflows", "120", "--rate", "60")
    given += ("--seeds", "1")
    assert demo.run(arguments(*given, "--chaos")) == 0
    (row,) = rows(out / "summary.jsonl")
    (strike,) = row["strikes"]
    assert strike["back_s"] is not None
    assert strike["new_pid"] not in (0, strike["pid"])
    (stages,) = row["stages"]
    assert stages["submitted"] == stages["answered"] + stages["errors"]
    assert (stages["lost"], stages["answered_twice"], stages["not_retryable"]) == (0, 0, 0)
    assert len(rows(out / "workflows.jsonl")) == 120
    assert "was killed with SIGKILL" in capsys.readouterr().out
    assert not processes(sockets_of(out))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything(echo_toml: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, "demo", "--config", str(echo_toml)]
    command += ["--out", str(out), "--workflows", "500", "--rate", "5", "--policies", "chimera"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        # The test's own path: the demo may not be installed here.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment,
            # A shell starts what is in its background with SIGINT ignored, tests included.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        wait_for(lambda: (out / "logs" / "daemon-chimera.log").exists(), process, log)
        sockets = sockets_of(out)
        wait_for(lambda: len(processes(sockets)) == 2, process, log)
        process.send_signal(number)
        assert process.wait(30) == (143 if number == signal.SIGTERM else 130), log.read_text()
    finally:
        process.kill()
        process.wait()
    assert not processes(sockets)
    assert not Path(sockets).exists()


def wait_for(condition: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60.0
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def test_an_engine_that_cannot_start_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = tmp_path / "bad.toml"
    toml.write_text(ECHO.replace("slots = 4", "slotz = 4"))
    given = ("--config", str(toml), "--out", str(tmp_path / "out"), "--rate", "5")
    assert demo.run(arguments(*given)) == 1
    said = capsys.readouterr().out
    assert "slotz" in said
    assert "logs" in said
    assert not processes(sockets_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("--policies", "chimaera"), "there are: chimera"),
        (("--policies", "static:medium"), "there are: small, large"),
        (("--policies", "chimera:prior"), "no bundle is configured"),
        (("--engines", "s,x"), "there are: s, l"),
        (("--load", "0"), "--load must be positive"),
        (("--load", "0.5", "-1"), "--load must be positive and finite, not -1"),
        (("--load", "nan"), "--load must be positive and finite, not nan"),
        (("--load", "0.5", "1", "0.50"), "--load: 0.5 is there twice"),
        (("--load", "0.5", "1", "--rate", "9"), "--rate is one arrival rate"),
        (("--rate", "inf"), "--rate must be positive"),
        (("--workflows", "-3"), "--workflows must be positive"),
        (("--report", "no/such/folder/page.md"), "make the folder no/such/folder first"),
        (("--report", "page.txt"), "must end in .md"),
    ],
)
def test_bad_options_are_named(echo_toml: Path, given: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        demo.plan(arguments("--config", str(echo_toml), *given))


def test_default_policies_follow_the_engines(echo_toml: Path) -> None:
    everything = demo.plan(arguments("--config", str(echo_toml)))
    assert names(everything) == [
        "chimera", "paper", "least_loaded", "static:small", "static:large",
    ]  # fmt: skip
    one = demo.plan(arguments("--config", str(echo_toml), "--engines", "l"))
    assert names(one) == ["chimera", "paper", "least_loaded", "static:large"]
    assert names(demo.plan(arguments("--config", str(echo_toml), "--chaos"))) == ["chimera"]


def names(plan: Any) -> list[str]:
    return [variant.name for variant in plan.variants]


def test_a_bundle_is_for_those_who_look_at_predictions(tmp_path: Path) -> None:
    toml = tmp_path / "learned.toml"
    toml.write_text(f'{ECHO}\n[predictor]\nbundle = "b"\n')
    plan = demo.plan(arguments("--config", str(toml)))
    assert names(plan)[:4] == ["chimera", "chimera (prior)", "paper", "least_loaded"]
    assert [v.bundle is not None for v in plan.variants] == [True, False, True, False, False, False]
    assert {v.bundle for v in plan.variants} == {str(tmp_path / "b"), None}
    with pytest.raises(ConfigError, match="no different"):
        demo.plan(arguments("--config", str(toml), "--policies", "least_loaded:prior"))


def test_engines_are_made_comparable() -> None:
    plain = EngineConfig(name="a", model="m", path="p")
    kept = EngineConfig(name="b", model="m", path="p", args={"enable_prefix_caching": True})
    first, second = demo.fair((plain, kept), cores=(0, 1, 2, 3, 4))
    assert first.args == {"enable_prefix_caching": False}
    assert second.args == kept.args
    assert (first.cpus, second.cpus) == ((0, 1), (2, 3, 4))
    # Too few cores, or somebody has already shared them out.
    assert [e.cpus for e in demo.fair((plain, kept), cores=(0,))] == [(), ()]
    pinned = msgspec.structs.replace(kept, cpus=(3,))
    assert [e.cpus for e in demo.fair((plain, pinned), cores=(0, 1))] == [(), (3,)]


def test_two_seeds_go_there_and_back(echo_toml: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ("--config", str(echo_toml), "--out", str(out), "--workflows", "3", "--rate", "40")
    assert demo.run(arguments(*given, "--policies", "round_robin,least_loaded")) == 0
    seen = [(row["seed"], row["policy"]) for row in rows(out / "workflows.jsonl")]
    assert list(dict.fromkeys(seen)) == [
        (1, "round_robin"), (1, "least_loaded"), (2, "least_loaded"), (2, "round_robin"),
    ]  # fmt: skip
    assert all(row["workflows"] == 6 for row in rows(out / "summary.jsonl")[:2])


def test_no_more_engines_than_cores() -> None:
    engines = tuple(EngineConfig(name=n, model=n, path="p") for n in "abcde")
    names = {n: "".join(e.name for e in demo.fitting(engines, tuple(range(n)))) for n in range(7)}
    assert names == {
        0: "abcde", 1: "abcde", 2: "ae", 3: "ace", 4: "abce", 5: "abcde", 6: "abcde",
    }  # fmt: skip


def test_config_survives_the_way_through_toml() -> None:
    odd = 'a "quoted" \\ ünï\tcode 😀 name'
    engine = EngineConfig(
        name=odd,
        model="m",
        path="/x y",
        cpus=(0, 2),
        args={"a-b": True, "f": 0.5, "s": [1, 2], "deep": {"x": "y"}, "none": False},
    )
    config = Config(engines=(engine,), log_dir="/l", price=1e-7, no_engine_s=1e9)
    assert configuration.parse(cluster.to_toml(config)) == config


def test_rows_carry_where_they_come_from(tmp_path: Path) -> None:
    facts = machine.facts()
    assert {"machine", "cpu", "cores", "commit", "versions", "time", "python"} <= facts.keys()
    assert facts["cores"] >= 1
    path = tmp_path / "deep" / "rows.jsonl"
    machine.append_rows(path, [{**facts, "n": 1}])
    machine.append_rows(path, [{"n": 2}])
    assert [row["n"] for row in rows(path)] == [1, 2]


def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress() as shown:
        shown.phase("load", 10)
        shown.update(3, "three")  # within the pause between two lines
        shown.end("all")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("load")
    assert lines[1].endswith("done  all")


def test_importing_the_demo_is_light() -> None:
    heavy = ("numpy", "matplotlib", "rich", "torch", "vllm", "zmq")
    code = f"import sys; import chimera_bench.demo; print([m for m in {heavy} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
