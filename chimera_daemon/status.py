"""Draws the daemon's snapshot as text, for `chimera status` and SIGHUP. Knows only the dicts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from chimera_daemon.board import (
    ENGINE_KEY,
    ENGINE_VALUES,
    GATEWAY_VALUES,
    WORKER_ENGINE_VALUES,
)

# What `Daemon.status` returns, also after JSON; of several workers a list, or as `Client.status`.
Status = Mapping[str, Any] | Sequence[Mapping[str, Any]]
Worker = tuple[str, Mapping[str, Any]]


def snapshots(status: Status) -> list[Worker]:
    """Name and snapshot of each worker that has answered."""
    if not isinstance(status, Mapping):
        found = status
    else:
        found = [status] if "core" in status else status.get("workers", [])
    return [(str(one.get("worker", number)), one) for number, one in enumerate(found)]


def render(status: Status) -> str:
    """A few small tables: of all workers together, and where it matters of each."""
    workers = snapshots(status)
    if not workers:
        return "no worker of the daemon answers"
    parts = [_head(*workers[0]) if len(workers) == 1 else _heads(workers)]
    parts += [_engines(workers), _models(workers), _board(workers)]
    counters: Counter[str] = Counter()
    for worker, one in workers:
        if one["supervised"]:
            parts.append(_supervised(one["supervised"]))
        if one["predictor"]:
            of = f"worker {worker}: " if len(workers) > 1 else ""
            parts.append(of + _predictor(one["predictor"]))
        counters.update({**one["core"]["counters"], **one["connections"]})
    parts.append(_counters(counters))
    return "\n\n".join(part for part in parts if part)


def _head(_: str, status: Mapping[str, Any]) -> str:
    core = status["core"]
    stages = core["stages"]
    head = (
        f"daemon {status['daemon_id']}  up {status['uptime_s']:.0f} s  policy {core['policy']}"
        f"{'  DRAINING' if core['draining'] else ''}\n"
        f"clients {status['clients']}  workflows {core['workflows']}  stages: "
        f"{stages['running']} running, {stages['waiting']} waiting "
        f"({stages['without_engine']} without an engine)"
    )
    decisions = status["decisions"]
    if decisions["count"]:
        head += "\nfrom submission to dispatch: " + _decisions(decisions)
    return head if core["price"] is None else f"{head}\n{_price(core['price'])}"


def _heads(workers: Sequence[Worker]) -> str:
    core = workers[0][1]["core"]
    table = _table(
        (
            *("worker", "id", "up s", "clients", "workflows", "running", "waiting", "no engine"),
            "to dispatch",
        ),
        [
            (
                worker + (" (draining)" if one["core"]["draining"] else ""),
                one["daemon_id"],
                f"{one['uptime_s']:.0f}",
                one["clients"],
                one["core"]["workflows"],
                *(one["core"]["stages"][k] for k in ("running", "waiting", "without_engine")),
                _decisions(one["decisions"]),
            )
            for worker, one in workers
        ],
    )
    prices = [
        f"worker {worker}: {_price(one['core']['price'])}"
        for worker, one in workers
        if one["core"]["price"] is not None
    ]
    title = f"{len(workers)} workers  policy {core['policy']}"
    return "\n".join([title, table, *prices])


def _decisions(decisions: Mapping[str, Any]) -> str:
    return f"p50 {1e3 * decisions['p50_s']:.2f} ms, p99 {1e3 * decisions['p99_s']:.2f} ms"


def _price(price: Mapping[str, Any]) -> str:
    judged = price["within"] + price["over"]
    return (
        f"price {price['now']:.3g}, learned from {judged} workflows: {price['over']} took longer "
        f"than {price['p95_target_s']:g} s"
    )


def _engines(workers: Sequence[Worker]) -> str:
    engines = _by_name(workers, "engines", "engine")
    if not engines:
        return "no engine is registered"
    return _table(
        ("engine", "model", "running", "slots", "tokens due", "tok/s", "KV use", "waiting there"),
        [
            (
                name + (" (draining)" if any(row["draining"] for row in rows) else ""),
                rows[0]["model"],
                " + ".join(str(row["running"]) for row in rows),
                max(row["max_inflight"] for row in rows),
                f"{sum(row['predicted_tokens'] for row in rows):.0f}",
                f"{rows[0]['reported']['tokens_per_s']:.0f}",
                f"{rows[0]['reported']['kv_use']:.0%}",
                rows[0]["reported"]["waiting"],
            )
            for name, rows in engines.items()
        ],
    )


def _models(workers: Sequence[Worker]) -> str:
    models = _by_name(workers, "models", "name")
    if not models:
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
                name,
                max(row["engines"] for row in rows),
                " + ".join(str(row["running"]) for row in rows),
                max(row["slots"] for row in rows),
                " + ".join(str(row["waiting"]) for row in rows),
                f"{sum(row['waiting_tokens'] for row in rows):.0f}",
                f"{1e3 * max(_step_s(row) for row in rows):.2f}",
                f"{max(row['slowdown'] for row in rows):.2f}",
            )
            for name, rows in models.items()
        ],
    )


def _step_s(model: Mapping[str, Any]) -> float:
    return model["step_s"] + model["step_per_seq_s"] * model["slots_each"]


def _by_name(workers: Sequence[Worker], table: str, key: str) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of the same engine or model, one per worker that knows it."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for _, one in workers:
        for row in one["core"][table]:
            found.setdefault(row[key], []).append(row)
    return found


def _board(workers: Sequence[Worker]) -> str:
    """All workers see the same board: the first that has one tells it."""
    board = next((one["board"] for _, one in workers if one["board"]["path"]), None)
    if board is None:
        return ""
    rows: list[dict[str, Any]] = board["rows"]
    writers = sorted({(row["role"], row["name"], row["pid"]) for row in rows})
    told = ", ".join(f"{role} {name} ({pid})" for role, name, pid in writers)
    head = f"board {board['path']}  written by {told or 'nobody'}"
    return "\n\n".join(part for part in (head, _board_engines(rows), _gateways(rows)) if part)


def _board_engines(rows: Sequence[Mapping[str, Any]]) -> str:
    """What hosts say of their engines, and beside it what each worker believes of them."""
    hosts = {row["key"]: _named(ENGINE_VALUES, row) for row in rows if row["role"] == "engine"}
    beliefs: dict[str, list[tuple[str, dict[str, int]]]] = {}
    for row in rows:
        if row["role"] == "worker" and row["key"].startswith(ENGINE_KEY):
            engine = row["key"].removeprefix(ENGINE_KEY)
            beliefs.setdefault(engine, []).append((row["name"], _named(WORKER_ENGINE_VALUES, row)))
    if not hosts and not beliefs:
        return ""
    return _table(
        (
            "engine on the board",
            "runs",
            "waiting",
            "KV use",
            "tok/s",
            "attempts",
            "tokens due",
            "in flight by worker",
        ),
        [
            (
                engine,
                *_host_cells(hosts.get(engine)),
                sum(belief["tokens_due"] for _, belief in beliefs.get(engine, [])),
                ", ".join(f"{name} {b['in_flight']}" for name, b in beliefs.get(engine, [])) or "-",
            )
            for engine in sorted({*hosts, *beliefs})
        ],
    )


def _host_cells(told: Mapping[str, int] | None) -> tuple[object, ...]:
    if told is None:  # its host is gone, or on another machine
        return ("-",) * 5
    use = f"{told['kv_use_ppm'] / 1e6:.0%}"
    return told["running"], told["waiting"], use, told["tokens_per_s"], told["attempts"]


def _gateways(rows: Sequence[Mapping[str, Any]]) -> str:
    gateways = [(row["name"], *row["values"]) for row in rows if row["role"] == "gateway"]
    if not gateways:
        return ""
    return _table(("gateway", *(name.replace("_", " ") for name in GATEWAY_VALUES)), gateways)


def _named(names: Sequence[str], row: Mapping[str, Any]) -> dict[str, int]:
    return dict(zip(names, row["values"], strict=False))


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


def _counters(counters: Mapping[str, int]) -> str:
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
