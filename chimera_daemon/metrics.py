"""Draws snapshots and the congestion board for Prometheus: its text format, version 0.0.4.

Owns the names of the metrics. Knows only the dicts of `Daemon.status` and rows of the board: what a
worker says of itself comes from its snapshot, what engine hosts and gateways say from the board.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from chimera_daemon import __version__
from chimera_daemon.board import ENGINE_VALUES, GATEWAY_KEY, GATEWAY_VALUES, Row
from chimera_daemon.durations import octaves
from chimera_daemon.status import Status, snapshots

Kind = Literal["counter", "gauge", "histogram"]

_PARTS = {  # counters of the core with a label of their own
    "failed": ("stages_failed_total", "code", "Stages that ended with an error."),
    "rejected": ("stages_rejected_total", "code", "Stages that were not taken."),
    "decided": ("decisions_total", "source", "Choices of a model, by what predicted the stage."),
}
_CORE = {
    "submitted": ("stages_submitted_total", "Stages taken."),
    "repeated": ("stages_repeated_total", "Stages sent again with the same request id."),
    "completed": ("stages_completed_total", "Stages answered."),
    "requeued": ("stages_requeued_total", "Attempts begun anew after the loss of an engine."),
}
_SUMS = ("failed", "rejected")  # of the counters by code
_MODEL = {
    "engines": ("model_engines", "Engines ready."),
    "slots": ("model_slots", "Attempts that the engines of a model take at once."),
    "running": ("model_running", "Attempts of this worker that run."),
    "running_tokens": ("model_running_tokens", "Predicted output tokens still due of those."),
    "waiting": ("model_waiting", "Stages of this worker that wait."),
    "waiting_tokens": ("model_waiting_tokens", "Predicted output tokens of those."),
    "slowdown": ("model_slowdown_ratio", "Time of finished stages over the engine's profile."),
}
_ENGINE_OF_WORKER = {
    "max_inflight": ("engine_slots", "Attempts that an engine takes at once."),
    "running": ("engine_in_flight", "Attempts of this worker at an engine."),
    "predicted_tokens": ("engine_tokens_due", "Predicted output tokens still due of those."),
    "draining": ("engine_draining", "1 while an engine takes no more work."),
}
_ENGINE: dict[str, tuple[str, Kind, str]] = {
    "running": ("engine_running", "gauge", "Sequences that an engine says it runs."),
    "waiting": ("engine_waiting", "gauge", "Sequences that wait inside an engine."),
    "kv_use": ("engine_kv_use_ratio", "gauge", "Part of an engine's KV cache in use."),
    "tokens_per_s": ("engine_tokens_per_second", "gauge", "Output tokens per second."),
    "output_tokens": ("engine_output_tokens_total", "counter", "Output tokens of an engine."),
    "attempts": ("engine_attempts", "gauge", "Attempts that an engine host holds for daemons."),
}
_GATEWAY: dict[str, tuple[str, Kind, str]] = {
    "connections": ("gateway_connections", "gauge", "Open connections."),
    "in_flight": ("gateway_in_flight", "gauge", "Requests in flight."),
    "streams": ("gateway_streams", "gauge", "Streams open."),
    "requests": ("gateway_requests_total", "counter", "Requests in all."),
    "failures": ("gateway_failures_total", "counter", "Requests that ended with an error."),
    "unread_bytes": ("gateway_unread_bytes", "gauge", "Bytes waiting for slow readers."),
}


def render(status: Status, rows: Iterable[Row]) -> str:
    """One page for Prometheus.

    ``status`` is a snapshot of the daemon, one of several workers, or a list of them; empty where
    the daemon does not answer. ``rows`` are those of `Board.read`; empty without a board.
    """
    page = _Page()
    page.add("build_info", "gauge", "The release.", 1, version=__version__)
    workers = snapshots(status)
    for worker, snapshot in workers:
        _worker(page, worker, snapshot)
    rows = list(rows)
    _engines(page, [snapshot for _, snapshot in workers], rows)
    _gateways(page, rows)
    writers = {(row.role, row.name, row.pid) for row in rows}
    for role in sorted({role for role, _, _ in writers}):
        count = sum(writer[0] == role for writer in writers)
        page.add("board_writers", "gauge", "Processes that write to the board.", count, role=role)
    return page.text()


class _Page:
    """Metrics by name, each with its samples, in the order in which they first came."""

    def __init__(self) -> None:
        self._heads: dict[str, str] = {}
        self._samples: dict[str, dict[str, float]] = {}

    def add(self, name: str, kind: Kind, help_text: str, value: float, **labels: str) -> None:
        """One sample; a second one with the same labels is added to the first."""
        self.head(name, kind, help_text)
        self.part(name, name, value, **labels)

    def head(self, metric: str, kind: Kind, help_text: str) -> None:
        """What comes before the samples of a metric."""
        metric = _named(metric)
        self._heads.setdefault(metric, f"# HELP {metric} {help_text}\n# TYPE {metric} {kind}\n")

    def part(self, name: str, metric: str, value: float, **labels: str) -> None:
        """One sample of a metric that may have several names."""
        told = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        sample = _named(name) + (f"{{{told}}}" if told else "")
        samples = self._samples.setdefault(_named(metric), {})
        samples[sample] = samples.get(sample, 0) + value

    def text(self) -> str:
        """All of it, with the line feed at the end that the format asks for."""
        return "".join(
            self._heads[metric]
            + "".join(f"{sample} {_number(value)}\n" for sample, value in samples.items())
            for metric, samples in self._samples.items()
        )


def _worker(page: _Page, worker: str, snapshot: Mapping[str, Any]) -> None:
    core = snapshot["core"]
    for name, help_text, value in (
        ("uptime_seconds", "Time since the start.", snapshot["uptime_s"]),
        ("clients", "Clients connected, gateways among them.", snapshot["clients"]),
        ("workflows", "Workflows that have not ended.", core["workflows"]),
        ("draining", "1 while no new stage is taken.", core["draining"]),
    ):
        page.add(name, "gauge", help_text, value, worker=worker)
    for state, count in core["stages"].items():
        page.add("stages", "gauge", "Stages in work.", count, worker=worker, state=state)
    _decisions(page, worker, snapshot["decisions"])
    _core_counters(page, worker, core["counters"])
    _counters(page, "wire", "Messages and connections", worker, snapshot["connections"])
    _price(page, worker, core["price"])
    _predictor(page, worker, snapshot["predictor"])
    for row in core["models"]:
        for key, (name, help_text) in _MODEL.items():
            page.add(name, "gauge", help_text, row[key], worker=worker, model=row["name"])
    for row in core["engines"]:
        labels = {"worker": worker, "engine": row["engine"], "model": row["model"]}
        for key, (name, help_text) in _ENGINE_OF_WORKER.items():
            page.add(name, "gauge", help_text, row[key], **labels)
    for row in snapshot["supervised"]:
        labels = {"engine": row["engine"], "model": row["model"]}
        page.add("engine_starts_total", "counter", "Starts of a host.", row["starts"], **labels)


def _decisions(page: _Page, worker: str, decisions: Mapping[str, Any]) -> None:
    name = "decision_seconds"
    page.head(name, "histogram", "From submission to dispatch, of stages that need not wait.")
    for bound_s, count in octaves(decisions["buckets"]):
        page.part(f"{name}_bucket", name, count, worker=worker, le=f"{bound_s:.6g}")
    page.part(f"{name}_bucket", name, decisions["count"], worker=worker, le="+Inf")
    page.part(f"{name}_sum", name, decisions["sum_s"], worker=worker)
    page.part(f"{name}_count", name, decisions["count"], worker=worker)


def _core_counters(page: _Page, worker: str, counters: Mapping[str, int]) -> None:
    for key, value in counters.items():
        kind, _, rest = key.partition("_")
        if kind in _PARTS and rest:
            name, label, help_text = _PARTS[kind]
            page.add(name, "counter", help_text, value, worker=worker, **{label: rest})
        elif key not in _SUMS:
            told = f"{key.replace('_', ' ').capitalize()}."
            name, help_text = _CORE.get(key, (f"{key}_total", told))
            page.add(name, "counter", help_text, value, worker=worker)


def _counters(page: _Page, prefix: str, of: str, worker: str, counters: Mapping[str, int]) -> None:
    for key, value in counters.items():
        told = f"{of}: {key.replace('_', ' ')}."
        page.add(f"{prefix}_{key}_total", "counter", told, value, worker=worker)


def _price(page: _Page, worker: str, price: Mapping[str, Any] | None) -> None:
    if price is None:
        return
    page.add("price", "gauge", "The price that is learned.", price["now"], worker=worker)
    target = "Latency that 95 % of the workflows shall keep."
    page.add("price_target_seconds", "gauge", target, price["p95_target_s"], worker=worker)
    for verdict in ("within", "over"):
        page.add(
            "price_workflows_total",
            "counter",
            "Workflows that the price was learned from, by how they kept the target.",
            price[verdict],
            worker=worker,
            verdict=verdict,
        )


def _predictor(page: _Page, worker: str, predictor: Mapping[str, Any]) -> None:
    if not predictor:
        return
    for key, name, help_text in (
        ("waiting", "waiting", "Stages that wait for a prediction."),
        ("workflows", "workflows", "Workflows remembered."),
        ("text_bytes", "text_bytes", "Text remembered of them."),
        ("resting", "resting", "1 while the bundle is left alone after failures."),
    ):
        page.add(f"predictor_{name}", "gauge", help_text, predictor[key], worker=worker)
    _counters(page, "predictor", "Predictor", worker, predictor["counters"])
    _counters(
        page, "predictor_model", "Model of the predictor", worker, predictor["model_counters"]
    )
    traces = predictor["traces"]
    if traces is not None:
        numbers = {key: value for key, value in traces.items() if key != "path"}
        _counters(page, "traces", "Traces", worker, numbers)


def _engines(page: _Page, workers: list[Mapping[str, Any]], rows: list[Row]) -> None:
    """What engines say of themselves: the board is newer than what a worker was told."""
    reports: dict[str, dict[str, float]] = {}
    for snapshot in workers:
        for row in snapshot["core"]["engines"]:
            reports[row["engine"]] = row["reported"]
    for row in rows:
        if row.role == "engine":
            told = dict[str, float](zip(ENGINE_VALUES, row.values, strict=True))
            reports[row.key] = {**told, "kv_use": told["kv_use_ppm"] / 1e6}
    for engine, report in sorted(reports.items()):
        for key, (name, kind, help_text) in _ENGINE.items():
            if key in report:
                page.add(name, kind, help_text, report[key], engine=engine)


def _gateways(page: _Page, rows: list[Row]) -> None:
    for row in rows:
        if row.role == "gateway" and row.key == GATEWAY_KEY:
            for key, value in zip(GATEWAY_VALUES, row.values, strict=True):
                name, kind, help_text = _GATEWAY[key]
                page.add(name, kind, help_text, value, gateway=row.name)


def _named(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", f"chimera_{name}")


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(int(value)) if value == int(value) else repr(value)
    return "NaN" if math.isnan(value) else f"{value:+}".replace("inf", "Inf")
