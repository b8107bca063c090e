"""`chimera bench overhead --paths` and `--decisions`: real processes, short runs, and bad input."""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from chimera_bench import decisions, doors, overhead, paths, paths_report, process_costs
from chimera_daemon.config import ConfigError

SHORT = ("--in-flight", "2", "--seconds", "0.3", "--runs", "2")
ROUTER = """#!{python}
import os, sys
port = sys.argv[sys.argv.index("--port") + 1]
os.execv(sys.executable, [sys.executable, "-m", "chimera_bench.static_backend", "--port", port])
"""


@pytest.fixture(autouse=True)
def _few_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_LEAST_ANSWERS", 3)
    monkeypatch.setattr(paths, "_IDLE_S", 0.1)
    monkeypatch.setattr(decisions, "_SETTLE_S", 0.2)


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    overhead.add_arguments(parser)
    return parser.parse_args(given)


def rows_of(folder: Path, *given: str) -> list[dict[str, Any]]:
    out = folder / "rows.jsonl"
    assert overhead.run(arguments(*SHORT, *given, "--out", str(out))) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def program(path: Path, text: str) -> Path:
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("form", "chosen"),
    [("plain", ("proxy", "zmq")), ("stream", ("http", "client"))],
)
def test_our_doors_beside_another_router(
    form: str,
    chosen: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer = f"vllm-router={program(tmp_path / 'vllm-router', ROUTER)}"
    report = tmp_path / "reports" / "overhead.md"
    given = ("--peer", peer, "--forms", form, "--paths", *chosen, "--report", str(report))
    monkeypatch.setattr(sys, "argv", ["chimera", "bench", "overhead", *given])
    rows = rows_of(tmp_path, *given)
    over_http, over_zmq = (paths.NAMES[name] for name in chosen)
    assert [row["path"] for row in rows] == [
        *(paths.DIRECT["http"], "vllm-router", over_http),
        *(paths.DIRECT["zmq"], over_zmq),
    ]
    for row in rows:
        assert row["errors"] == {}
        assert (row["form"], row["in_flight"], row["runs"], row["seconds"]) == (form, 2, 2, 0.3)
        assert row["p50_us_p20"] <= row["p50_us"] <= row["p50_us_p80"]
        assert 0 < row["first_p50_us"] <= row["p50_us"] <= row["p99_us"]
        assert row["requests_per_s"] > 0
        if row["path"] == row["direct"]:
            assert (row["added_p50_us"], row["resident_mib"], row["cpu_s_per_1000"]) == (0, 0, 0)
        else:
            assert row["resident_mib"] > 5
    page = report.read_text()
    assert ("Streams of 16 tokens" in page) == (form == "stream")
    assert "vllm-router: requests/s" in page
    assert str(tmp_path / "vllm-router") not in page
    assert "--peer vllm-router=vllm-router" in page
    assert "added p50" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given",
    [
        ("--decisions", "--paths"),
        ("--report", "page.md", "--predict"),
        ("--decisions", "--stages", "1000"),
    ],
)
def test_one_thing_at_a_time(given: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="ask for different things"):
        overhead.run(arguments(*given))


def test_a_summary_holds_each_round_against_the_direct_way_of_that_round() -> None:
    def figures(p50: float) -> dict[str, float]:
        return {"p50_us": p50, "p99_us": 2 * p50, "first_p50_us": p50 / 2, "requests_per_s": 7.0}

    direct = [figures(p50) for p50 in (10.0, 30.0, 20.0, 40.0)]
    runs = [figures(p50) for p50 in (110.0, 140.0, 130.0, 141.0)]
    row = paths.summary(runs, direct)
    assert row["p50_us"] == pytest.approx(135.0)
    assert row["added_p50_us"] == pytest.approx(105.5)  # of 100, 110, 110 and 101
    assert (row["added_p50_us_p20"], row["added_p50_us_p80"]) == pytest.approx((100.6, 110.0))
    assert row["added_p99_us"] == pytest.approx(211.0)
    assert row["requests_per_s"] == 7.0
    only = paths.summary(runs[:1], direct[:1])
    assert only["added_p50_us_p20"] == only["added_p50_us"] == only["added_p50_us_p80"] == 100.0


def test_wrong_answers_end_with_an_exit_code_and_stand_in_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = {"path": "p", "errors": dict(Counter({"wrong text": 2}))}

    async def measure(chosen: argparse.Namespace) -> list[dict[str, Any]]:
        return [measured]

    monkeypatch.setattr(paths, "measure", measure)
    assert overhead.run(arguments("--paths", "zmq")) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--peer", "nginx=/usr/bin/nginx"), "vllm-router=/path/to/vllm-router"),
        (("--peer", "vllm-router"), "write vllm-router="),
        (("--paths", "carrier-pigeon"), "zmq"),
        (("--forms", "cuneiform"), "plain"),
        (("--cpus", "none"), "write numbers"),
        (("--cpus", "0,9999"), "this machine has"),
        (("--workers", "0"), "at least 1"),
        (("--gateways", "0"), "at least 1"),
        (("--seconds", "0"), "above 0"),
        (("--runs", "0"), "at least 1"),
        (("--in-flight", "0"), "at least 1"),
        (("--decisions", "-1"), "above 0"),
    ],
)
def test_bad_input(given: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(*given)
    assert said in capsys.readouterr().err


def test_peers_that_cannot_be_had(tmp_path: Path) -> None:
    for name in doors.PEERS:
        with pytest.raises(ConfigError, match="cannot start .*nowhere"):
            overhead.run(arguments(*SHORT, "--peer", f"{name}={tmp_path / 'nowhere'}"))
        broken = program(
            tmp_path / name, "#!{python}\nprint('no such option')\nraise SystemExit(2)"
        )
        with pytest.raises(ConfigError, match="ended at once; its last words:\nno such option"):
            overhead.run(arguments(*SHORT, "--peer", f"{name}={broken}"))


def test_nothing_stays_behind(tmp_path: Path) -> None:
    with doors.chimera(doors.ECHOES, gateways=1) as (over_zmq, over_http):
        family = process_costs.family(over_zmq.pid)
        assert over_http.pid == over_zmq.pid
        by_role = process_costs.resident_by_role(over_zmq.pid)
        assert set(by_role) == {"daemon", "engine", "gateway"}
        assert all(mib > 5 for mib in by_role.values())
        assert process_costs.cpu_s(over_zmq.pid) > 0
    assert len(family) == 4
    for pid in family:
        assert process_costs.resident_mib(pid) == process_costs.cpu_s(pid) == 0
        assert process_costs.role(pid) == "gone"


def test_family() -> None:
    assert process_costs.family(os.getpid())[0] == os.getpid()


def test_decisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare, daemon = rows_of(tmp_path, "--decisions", "300")
    for row in (bare, daemon):
        assert row["errors"] == {}
        assert (row["asked_per_s"], row["runs"]) == (300.0, 2)
        assert 0 < row["p50_us"] <= row["p99_us"] <= row["p99_us_max"]
        assert 0 < row["stages_per_s"] < 600
    assert (bare["side"], daemon["side"]) == ("bare socket, one hop", "daemon, two hops")
    assert 0 < daemon["own_p50_us"] <= daemon["own_p99_us"] <= 1.2 * daemon["p99_us_max"]
    assert 0 < daemon["own_count"] <= daemon["stages_per_s_max"] * 0.5
    assert "late p99" in capsys.readouterr().out


def test_report_of_our_doors_alone_has_no_ratios() -> None:
    assert not list(paths_report.ratios([{"path": "ours", "direct": "none"}]))
