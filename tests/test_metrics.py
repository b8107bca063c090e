"""The page for Prometheus: well-formed, every series once, and the right numbers."""

import re
from typing import Any

import pytest

from chimera_daemon import __version__
from chimera_daemon.board import Row
from chimera_daemon.durations import Durations
from chimera_daemon.metrics import render
from core_harness import Watched
from fake_status import LEARNED, SUPERVISED, busy, snapshot

ROWS = [
    Row("engine", "e", 11, "e", (7, 1, 250_000, 1234, 99_999, 6)),
    Row("worker", "worker-0", 12, "engine:e", (3, 400, 0, 0, 0, 0)),
    Row("gateway", "gateway-14", 14, "gateway", (5, 4, 3, 1000, 2, 77)),
    Row("gateway", "gateway-15", 15, "gateway", (1, 0, 0, 10, 0, 0)),
]
LINE = re.compile(
    r"(# (HELP|TYPE) (?P<head>chimera_[a-z0-9_]+) .+"
    r'|(?P<name>chimera_[a-z0-9_]+)(\{([a-z_]+="([^"\\]|\\["\\n])*",?)+\})? -?[0-9.e+-]+)'
)


def two_workers() -> list[dict[str, Any]]:
    first = busy(2, 3, p95_target_s=30.0)
    (attempt, *_) = first.attempts
    first.finish(attempt)
    first.core.counters.update({"failed": 3, "failed_no_engine": 2, "failed_engine_error": 1})
    return [
        snapshot(first, predictor=LEARNED, supervised=[SUPERVISED], connections={"late_chunks": 4}),
        snapshot(busy(1), worker=2),
    ]


def value(page: str, series: str) -> float:
    (found,) = re.findall(rf"^{re.escape(series)} (.+)$", page, re.MULTILINE)
    return float(found)


def test_numbers_of_all_workers_engines_and_gateways() -> None:
    page = render(two_workers(), ROWS)
    for series, number in {
        f'build_info{{version="{__version__}"}}': 1,
        'uptime_seconds{worker="0"}': 1.5,
        'stages{worker="0",state="waiting"}': 2,
        'stages{worker="2",state="running"}': 1,
        'stages_submitted_total{worker="0"}': 5,
        'stages_completed_total{worker="0"}': 1,
        'stages_failed_total{worker="0",code="no_engine"}': 2,
        'stages_failed_total{worker="0",code="engine_error"}': 1,
        'decisions_total{worker="2",source="prior"}': 1,
        'engines_registered_total{worker="2"}': 1,
        'wire_late_chunks_total{worker="0"}': 4,
        'predictor_resting{worker="0"}': 1,
        'predictor_predictions_total{worker="0"}': 7,
        'predictor_model_texts_known_total{worker="0"}': 5,
        'traces_written_total{worker="0"}': 4,
        'price_target_seconds{worker="0"}': 30,
        'price_workflows_total{worker="0",verdict="over"}': 0,
        'model_waiting{worker="0",model="small"}': 2,
        'engine_in_flight{worker="0",engine="e",model="small"}': 2,
        'engine_slots{worker="2",engine="e",model="small"}': 1,
        'engine_starts_total{engine="e",model="small"}': 2,
        'engine_running{engine="e"}': 7,
        'engine_kv_use_ratio{engine="e"}': 0.25,
        'engine_output_tokens_total{engine="e"}': 99_999,
        'engine_attempts{engine="e"}': 6,
        'gateway_requests_total{gateway="gateway-14"}': 1000,
        'gateway_unread_bytes{gateway="gateway-14"}': 77,
        'gateway_connections{gateway="gateway-15"}': 1,
        'board_writers{role="gateway"}': 2,
    }.items():
        assert value(page, f"chimera_{series}") == number, series
    assert 'chimera_stages_failed_total{worker="0"}' not in page
    assert 'predictor_waiting{worker="2"}' not in page


def test_without_a_board_engines_are_what_workers_were_told() -> None:
    core = busy(1)
    core.report("e", {}, running=5, output_tokens=123)
    page = render(snapshot(core), [])
    assert value(page, 'chimera_engine_running{engine="e"}') == 5
    assert value(page, 'chimera_engine_output_tokens_total{engine="e"}') == 123
    assert "chimera_engine_attempts" not in page
    assert "chimera_board_writers" not in page


@pytest.mark.parametrize("nothing", [{}, [], {"workers": []}])
def test_without_a_daemon_the_board_is_shown(nothing: Any) -> None:
    assert "uptime" not in render(nothing, [])
    assert value(render(nothing, ROWS), 'chimera_engine_running{engine="e"}') == 7


def test_gateways_of_one_name_are_added() -> None:
    rows = [row._replace(name="gateway") for row in ROWS]
    assert value(render({}, rows), 'chimera_gateway_requests_total{gateway="gateway"}') == 1010


def test_names_that_need_care_are_escaped() -> None:
    name = 'a"b\\c\nd é'
    core = Watched()
    core.join(name, name)
    page = render(snapshot(core, connections={"über-all": 1}), [])
    assert r'chimera_engine_slots{worker="0",engine="a\"b\\c\nd é"' in page
    assert value(page, 'chimera_wire__ber_all_total{worker="0"}') == 1
    check_form(page)


def test_decisions_are_a_histogram() -> None:
    decisions = Durations()
    for seconds in (1e-4, 1e-4, 3e-3):
        decisions.add(seconds)
    page = render(snapshot(Watched(), decisions=decisions.snapshot()), [])
    buckets = re.findall(r'decision_seconds_bucket\{worker="0",le="(.+)"\} (\d+)', page)
    counts = [int(count) for _, count in buckets]
    assert counts == sorted(counts)
    assert buckets[-1] == ("+Inf", "3")
    assert value(page, 'chimera_decision_seconds_count{worker="0"}') == 3
    assert value(page, 'chimera_decision_seconds_sum{worker="0"}') == pytest.approx(3.2e-3)


@pytest.mark.parametrize(
    ("number", "shown"),
    [(float("nan"), "NaN"), (float("inf"), "+Inf"), (float("-inf"), "-Inf"), (1e300, None)],
)
def test_numbers_beyond_the_usual(number: float, shown: str | None) -> None:
    page = render(snapshot(Watched(), uptime_s=number), [])
    (found,) = re.findall(r'^chimera_uptime_seconds\{worker="0"\} (.+)$', page, re.MULTILINE)
    assert found == shown if shown else float(found) == number


def check_form(page: str) -> None:
    """HELP and TYPE once and before the samples of a name; those together and each once."""
    assert page.endswith("\n")
    lines = page[:-1].split("\n")
    matches = [LINE.fullmatch(line) for line in lines]
    assert [line for line, match in zip(lines, matches, strict=True) if match is None] == []
    parts = re.compile(r"(?<=_seconds)_(bucket|sum|count)$")  # of a histogram
    names = [
        parts.sub("", match["head"] or match["name"]) for match in matches if match is not None
    ]
    blocks = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    assert len(blocks) == len(set(blocks))
    for name in blocks:
        kinds = [
            line.split(" ")[:2]
            for line in lines
            if re.search(rf"\b{name}(_bucket|_sum|_count)?\b", line)
        ]
        assert kinds[0] == ["#", "HELP"]
        assert kinds[1] == ["#", "TYPE"]
        assert ["#", "HELP"] not in kinds[1:]
        assert ["#", "TYPE"] not in kinds[2:]
        assert name.endswith("_total") == (f"# TYPE {name} counter" in lines)
    series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series))


def test_the_form_of_the_page() -> None:
    check_form(render(two_workers(), ROWS))
    check_form(render({}, []))


def test_prometheus_own_parser_reads_it() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    page = render(two_workers(), ROWS)
    families = list(parser.text_string_to_metric_families(page))
    assert all(family.type in ("counter", "gauge", "histogram") for family in families)
    assert all(family.documentation for family in families)
    samples = [sample for family in families for sample in family.samples]
    assert len(samples) == len([x for x in page.splitlines() if not x.startswith("#")])
    (running,) = (s for s in samples if s.name == "chimera_engine_running")
    assert (running.labels, running.value) == ({"engine": "e"}, 7.0)
