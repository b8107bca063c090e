"""What a demo has found, at one load or several: figures, and the files that show them.

Owns what is compared with what, and what is in the rows, the texts and the Markdown page. Knows
the runs only by their outcomes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from chimera_bench import chaos, machine, plot, quality, report, summary

if TYPE_CHECKING:
    from chimera_bench.experiment import Calibration, Level, Outcome, Plan
    from chimera_daemon.config import EngineConfig

_BUSY_LOAD = 0.7  # load average over the last minute that a quiet machine does not have
# The first row of each is compared with all others; the second also as a baseline of the first.
_OURS = ("chimera", "paper")
_BASELINE = "least_loaded"  # of ratios


class Findings(Struct, frozen=True):
    """Figures of one load."""

    level: "Level"
    outcomes: "Mapping[str, Sequence[Outcome]]"  # one per seed
    summaries: list[summary.PolicySummary]
    comparisons: list[summary.Comparison]
    relatives: list[summary.Relative]
    qualities: list[quality.Quality]

    @property
    def latencies_s(self) -> dict[str, list[float]]:
        """Of each policy's answered workflows."""
        return {
            policy: [r.latency_s for o in each for r in o.records if r.latency_s is not None]
            for policy, each in self.outcomes.items()
        }


def examine(
    plan: "Plan", level: "Level", outcomes: "Mapping[str, Sequence[Outcome]]", traces: Path
) -> Findings:
    """``outcomes`` per row of the table; ``traces`` holds a folder for each that was predicted."""
    runs = {name: [o.records for o in each] for name, each in outcomes.items()}
    ours = [next((v.name for v in plan.variants if v.policy == p), None) for p in _OURS]
    pairs = [(p, b) for p in ours if p for b in runs if b != p and [b, p] != ours]
    return Findings(
        level,
        outcomes,
        summary.summarise(runs),
        summary.compare(runs, pairs),
        summary.relative(runs, _BASELINE) if _BASELINE in runs else [],
        [
            quality.judge(v.name, v.bundle, runs, traces / v.name)
            for v in plan.variants
            if v.bundle is not None
        ],
    )


def write(
    plan: "Plan", found: Sequence[Findings], facts: Mapping[str, Any], calibration: "Calibration"
) -> str:
    """Write rows, plot, text, and the page if there is to be one; return the text."""
    for each in found:
        machine.append_rows(plan.out / "summary.jsonl", _rows(plan, each, facts))
    text = _text(plan, found, facts, calibration)
    (plan.out / "report.txt").write_text(text + "\n", encoding="utf-8")
    pictures = [plan.out / "demo.png"]
    if plan.report is not None:
        pictures.append(plan.report.with_suffix(".png"))
        page = _page(plan, found, facts, calibration, pictures[-1].name)
        plan.report.write_text(page + "\n", encoding="utf-8")
    for picture in pictures:
        _draw(plan, found, facts, picture)
    return text


def _rows(plan: "Plan", found: Findings, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    facts = {**facts, "rate_per_s": found.level.rate_per_s, "load": found.level.load}
    rows: list[dict[str, Any]] = []
    for s in found.summaries:
        outcomes = found.outcomes[s.policy]
        seen = [msgspec.to_builtins(o.seen) for o in outcomes]
        strikes = [msgspec.to_builtins(o.strike) for o in outcomes if o.strike]
        row = {"row": "policy", **facts, "seeds": plan.seeds, **msgspec.to_builtins(s)}
        rows.append({**row, "stages": seen, "strikes": strikes})
    for name, figures in (
        ("comparison", found.comparisons),
        ("relative", found.relatives),
        ("predictions", found.qualities),
    ):
        rows += [{"row": name, **facts, **msgspec.to_builtins(each)} for each in figures]
    return rows


def _text(
    plan: "Plan", found: Sequence[Findings], facts: Mapping[str, Any], calibration: "Calibration"
) -> str:
    parts = ["\n".join(_setting(plan, facts, calibration))]
    for each in found:
        parts.append(_level_words(plan, each, calibration))
        parts.append(report.policies(each.summaries).plain())
        parts += _remarks(plan, each)
        if each.comparisons:
            parts.append(report.comparisons_table(each.comparisons))
            parts.append("\n".join(report.verdict(c) for c in each.comparisons))
        parts += _accounts(plan, each)
    if len(found) > 1:
        parts += [f"{title}\n{grid.plain()}" for title, grid in _across(found)]
    return "\n\n".join(parts)


def _page(
    plan: "Plan",
    found: Sequence[Findings],
    facts: Mapping[str, Any],
    calibration: "Calibration",
    picture: str,
) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    about = [
        *_setting(plan, facts, calibration),
        f"{facts['time']}, {facts['total_s']:.0f} s in all; {facts['system']}, "
        f"Python {facts['python']}; {versions}",
        "latency: from the planned arrival to the last answer, tool gaps included; queue and "
        "longest wait: of stages in the daemon; success: share of all workflows, answered or not",
        f"rows: run `{facts['run']}` in `{_rows_path(plan, 'summary')}` and "
        f"`{_rows_path(plan, 'workflows')}`",
    ]
    parts = ["# Policies on real engines", f"```\n{plan.command}\n```", _bullets(about)]
    parts.append(f"![Success against latency, and distributions, per policy]({picture})")
    for title, grid in _across(found):
        parts += [f"## {title[0].upper()}{title[1:]}", grid.markdown()]
    for each in found:
        parts.append(f"## All figures at {each.level.name}")
        parts.append(_level_words(plan, each, calibration))
        parts.append(report.policies(each.summaries).markdown())
        said = [*_remarks(plan, each), *(report.verdict(c) for c in each.comparisons)]
        parts += [_bullets(said)] if said else []
        parts += [f"```\n{told}\n```" for told in _accounts(plan, each)]
    return "\n\n".join(parts)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _setting(plan: "Plan", facts: Mapping[str, Any], calibration: "Calibration") -> list[str]:
    """What holds at every load, in lines."""
    versions = facts["versions"]
    vllm = next((f"{n} {v}" for n, v in versions.items() if n.startswith("vllm")), "no vLLM")
    engines = ", ".join(_engine_words(e) for e in plan.config.engines)
    lines = [
        f"{facts['machine']}; commit {facts['commit']}; {vllm}",
        f"engines: {engines}; started and calibrated in {facts['ready_s']} s",
        f"calibration: uniform routing reached {calibration.capacity_per_s:.2f} workflows/s, "
        f"{calibration.in_flight} at a time ({calibration.tokens_per_s:.0f} output tokens/s)",
    ]
    if facts["load_1m"] > _BUSY_LOAD:
        lines.append(
            f"OTHER WORK was on this machine: a load average of {facts['load_1m']:g} on "
            f"{facts['cores']} cores before the start"
        )
    lines.append(
        "brackets: 95 % intervals over the workflows of these runs, for chance in tasks and order; "
        "what the machine changes from run to run is not in them: compare seeds, add --seeds"
    )
    return lines


def _level_words(plan: "Plan", found: Findings, calibration: "Calibration") -> str:
    rate_per_s = found.level.rate_per_s
    said = (
        f"{found.level.name}: the same {found.summaries[0].workflows} workflows for every policy "
        f"(seeds {', '.join(map(str, plan.seeds))}), Poisson arrivals at {rate_per_s:.2f} a second"
    )
    if calibration.capacity_per_s > 0.0:
        said += f" = {rate_per_s / calibration.capacity_per_s:.2g} x what uniform routing reached"
    late_s = max(s.client_late_s for s in found.summaries)
    if late_s > 0.0:
        said += f"; the client itself was late by up to {late_s:.2f} s, which counts as latency"
    return said


def _remarks(plan: "Plan", found: Findings) -> list[str]:
    """Lines below a table, but for the comparisons."""
    lines = [report.predictions(q) for q in found.qualities]
    return [*lines, report.by_seed(found.summaries)] if len(plan.seeds) > 1 else lines


def _accounts(plan: "Plan", found: Findings) -> list[str]:
    """Of every run that was not sound, or was not meant to be."""
    told: list[str] = []
    for policy, each in found.outcomes.items():
        for outcome in each:
            if plan.chaos or not outcome.sound:
                state = "sound" if outcome.sound else "NOT SOUND"
                account = chaos.describe(outcome.strike, outcome.seen, outcome.counters)
                told.append(f"{policy}: {state}\n{account}")
    return told


def _across(found: Sequence[Findings]) -> list[tuple[str, report.Grid]]:
    return report.across_loads(
        {each.level.name: each.summaries for each in found},
        {each.level.name: each.relatives for each in found},
    )


def _draw(plan: "Plan", found: Sequence[Findings], facts: Mapping[str, Any], path: Path) -> None:
    models = ", ".join(e.model for e in plan.config.engines)
    sweeps = {v.name: v.sweep for v in plan.variants}
    if len(found) == 1:
        (only,) = found
        title = f"{facts['machine']}; {only.level.rate_per_s:.1f} workflows/s, {models}"
        plot.draw(path, only.summaries, only.latencies_s, title, sweeps)
        return
    panels = [
        plot.Panel(
            f"{each.level.name}, {each.level.rate_per_s:.1f} workflows/s",
            each.summaries,
            each.latencies_s,
        )
        for each in found
    ]
    plot.draw_loads(path, panels, f"{facts['machine']}; {models}", sweeps)


def _engine_words(engine: "EngineConfig") -> str:
    cores = f", cores {','.join(map(str, engine.cpus))}" if engine.cpus else ""
    return f"{engine.name} ({engine.model}, {engine.kind}{cores})"


def _rows_path(plan: "Plan", name: str) -> Path:
    return plan.out / f"{name}.jsonl"
