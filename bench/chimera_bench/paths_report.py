"""The Markdown page of `chimera bench overhead --paths`, from its rows alone."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chimera_bench import doors

_FORMS = {"plain": "Answers in one piece", "stream": "Streams of 16 tokens, each in its own chunk"}

Row = Mapping[str, Any]


def write(path: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Write the page; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(_page(rows, facts)) + "\n", encoding="utf-8")


def _page(rows: Sequence[Row], facts: Mapping[str, Any]) -> Iterator[str]:
    first = rows[0]
    yield "# The cost of being in the path"
    yield ""
    yield (
        f"{facts['machine']}; {facts['system']}, Python {facts['python']}; commit "
        f"`{facts['commit']}`; {facts['time']}; load before the run {facts['load_1m']}."
    )
    versions = {row["path"]: row["version"] for row in rows if row["version"]} | facts["versions"]
    yield "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    yield ""
    yield "```"
    yield "chimera " + " ".join(_shown(word) for word in sys.argv[1:])
    yield "```"
    yield ""
    yield from _method(first)
    for form, title in _FORMS.items():
        of_form = [row for row in rows if row["form"] == form]
        for in_flight in dict.fromkeys(row["in_flight"] for row in of_form):
            level = [row for row in of_form if row["in_flight"] == in_flight]
            yield from ["", f"## {title}, {in_flight} in flight", ""]
            yield from _table(level)
            yield from ratios(level)


def _shown(word: str) -> str:
    """Where a peer's program lies on this machine is nobody's business."""
    name, equals, program = word.partition("=")
    return f"{name}={Path(program).name}" if equals and name in doors.PEERS else word


def _method(row: Row) -> Iterator[str]:
    cores = f" on cores {row['cpus']}" if row["cpus"] else ""
    yield (
        "Load generator, doors and backends share the machine and run all the time; doors are "
        f"asked in turn, {row['runs']} rounds of {row['seconds']:g} s each{cores}, so many "
        "requests in flight in closed loop, and every answer's text is checked. Figures are "
        "medians over the rounds, in brackets P20 and P80. What a door adds is against the same "
        "transport without a door, in the same round. CPU is of all processes of a door, engine "
        "hosts included, and not of the backend and the load generator; idle: the share of a core "
        "that it takes while nobody asks. Memory is resident, after the last round, pages that "
        "processes share counted for each. Behind the routers and the proxy is one static "
        "HTTP server, behind our other doors one process with two static engines, which all answer "
        "at once with the same bytes and are no language models. "
        f"Our doors: {row['workers']} daemon(s), {row['gateways']} gateway(s), requests by the "
        f"choice of policy `{row['policy']}`. Over HTTP each request is a workflow of its own, "
        "over ZeroMQ a workflow has four stages."
    )


def _table(level: Sequence[Row]) -> Iterator[str]:
    yield (
        "| | p50 µs | p99 µs | added p50 | added p99 | first byte p50 | requests/s | "
        "CPU s per 1,000 | MiB | CPU idle | errors |"
    )
    yield "|---|" + "---:|" * 10
    for row in level:
        direct = row["path"] == row["direct"]
        cells = [
            row["path"],
            _spread(row, "p50_us"),
            _spread(row, "p99_us"),
            "" if direct else _spread(row, "added_p50_us"),
            "" if direct else _spread(row, "added_p99_us"),
            f"{row['first_p50_us']:,.0f}",
            _spread(row, "requests_per_s"),
            "" if direct else f"{row['cpu_s_per_1000']:.3f}",
            "" if direct else f"{row['resident_mib']:,.0f}",
            "" if direct else f"{row['idle_cpu']:.1%}",
            str(sum(row["errors"].values())),
        ]
        yield "| " + " | ".join(cells) + " |"


def _spread(row: Row, name: str) -> str:
    return f"{row[name]:,.0f} ({row[name + '_p20']:,.0f} to {row[name + '_p80']:,.0f})"


def ratios(level: Sequence[Row]) -> Iterator[str]:
    """Of our doors to the other routers of the same run."""
    others = [row for row in level if row["path"] in doors.PEERS]
    ours = [row for row in level if row["path"] != row["direct"] and row not in others]
    if not others or not ours:
        return
    yield ""
    yield "| ratio to | " + " | ".join(
        f"{row['path']}: requests/s | added p50 | CPU" for row in others
    ) + " |"  # fmt: skip
    yield "|---|" + "---:|" * 3 * len(others)
    for row in ours:
        cells = [row["path"]]
        for other in others:
            for name in ("requests_per_s", "added_p50_us", "cpu_s_per_1000"):
                cells.append(f"{row[name] / other[name]:.2f}" if other[name] else "")
        yield "| " + " | ".join(cells) + " |"
