"""Draws the daemon's snapshot as text, for `chimera status` and SIGHUP. Knows only the dict."""

from collections.abc import Sequence
from typing import Any


def render(status: dict[str, Any]) -> str:
    """A few small tables; ``status`` is what `Daemon.status` returns, also after JSON."""
    core = status["core"]
    stages = core["stages"]
    head = (
        f"daemon {status['daemon_id']}  up {status['uptime_s']:.0f} s  policy {core['policy']}"
        f"{'  DRAINING' if core['draining'] else ''}\n"
        f"clients {status['clients']}  workflows {core['workflows']}  stages: "
        f"{stages['running']} running, {stages['waiting']} waiting "
        f"({stages['without_engine']} without an engine)"
    )
    if core["price"] is not None:
        head += "\n" + _price(core["price"])
    parts = [head, _engines(core["engines"]), _models(core["models"])]
    if status["supervised"]:
        parts.append(_supervised(status["supervised"]))
    predictor = status["predictor"]
    if predictor:
        parts.append(_predictor(predictor))
    parts.append(_counters({**core["counters"], **status["connections"]}))
    return "\n\n".join(part for part in parts if part)


def _price(price: dict[str, Any]) -> str:
    judged = price["within"] + price["over"]
    return (
        f"price {price['now']:.3g}, learned from {judged} workflows: {price['over']} took longer "
        f"than {price['p95_target_s']:g} s"
    )


def _engines(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no engine is registered"
    return _table(
        ("engine", "model", "running", "slots", "tokens due", "tok/s", "KV use", "waiting there"),
        [
            (
                row["engine"] + (" (draining)" if row["draining"] else ""),
                row["model"],
                row["running"],
                row["max_inflight"],
                f"{row['predicted_tokens']:.0f}",
                f"{row['reported']['tokens_per_s']:.0f}",
                f"{row['reported']['kv_use']:.0%}",
                row["reported"]["waiting"],
            )
            for row in rows
        ],
    )


def _models(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    return _table(
        (
            "model",
            "engines",
            "running",
            "slots",
            "waiting",
            "tokens waiting",
            "step ms",
            "slowdown",
        ),
        [
            (
                row["name"],
                row["engines"],
                row["running"],
                row["slots"],
                row["waiting"],
                f"{row['waiting_tokens']:.0f}",
                f"{1e3 * (row['step_s'] + row['step_per_seq_s'] * row['slots_each']):.2f}",
                f"{row['slowdown']:.2f}",
            )
            for row in rows
        ],
    )


def _supervised(rows: list[dict[str, Any]]) -> str:
    return _table(
        ("supervised", "state", "pid", "starts", "failures in a row"),
        [(r["engine"], r["state"], r["pid"], r["starts"], r["failures"]) for r in rows],
    )


def _predictor(predictor: dict[str, Any]) -> str:
    lines: list[str] = []
    if predictor["bundle"] is not None:
        lines.append(
            f"bundle {predictor['bundle']}  digest {predictor['digest'][:16]}  "
            f"loaded {predictor['loaded_at']}  waiting {predictor['waiting']}"
            f"{'  RESTING after failures' if predictor['resting'] else ''}"
        )
        lines.append(f"runs on {predictor['runs_on']}  {_counters(predictor['model_counters'])}")
        if predictor["models_unknown"]:
            lines.append(f"models it does not know: {', '.join(predictor['models_unknown'])}")
    traces = predictor["traces"]
    if traces is not None:
        lines.append(
            f"traces {traces['path']}  written {traces['written']}  dropped {traces['dropped']}  "
            f"failed {traces['failed']}  incomplete {traces['incomplete']}"
        )
    lines.append(_counters(predictor["counters"]))
    return "\n".join(lines)


def _counters(counters: dict[str, int]) -> str:
    return "  ".join(f"{name} {value}" for name, value in sorted(counters.items()))


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """First column left, the others right aligned, two spaces between."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
