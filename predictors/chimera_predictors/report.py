"""The outcome of an evaluation: figures with intervals, as tables for people and as JSON.

Holds the bootstrap samples, so that differences of methods are paired. Computes no metric.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from chimera_predictors.metrics import Array, Figure, figure, paired

if TYPE_CHECKING:
    from rich.table import Table

DASH = "–"


class Key(NamedTuple):
    """Names a figure."""

    target: str  # router | router_all | remaining | stage
    metric: str
    group: str = ""  # "", or model=NAME, stage=N, pair=SMALL:LARGE


Samples = dict[Key, Array]  # each [1 + bootstrap]

_ROUTER = (("AUC, mean over models", "auc"), ("mAP", "ap"), ("Brier", "brier"), ("ECE", "ece"))
_PAIR = (("APGR", "apgr"), ("gap, Pearson", "gap_pearson"), ("gap, Spearman", "gap_spearman"))
_LENGTH = (
    ("Kendall distance", "kendall"),
    ("Spearman", "spearman"),
    ("R² of log", "r2_log"),
    ("pinball (.1, .5, .9), log", "pinball"),
    ("coverage of 80 %", "coverage"),
)
_COMPARED = (
    ("AUC, mean over models", Key("router", "auc")),
    ("mAP", Key("router", "ap")),
    ("Brier", Key("router", "brier")),
    ("ECE", Key("router", "ece")),
    *((f"remaining: {text}", Key("remaining", metric)) for text, metric in _LENGTH),
    *((f"stage: {text}", Key("stage", metric)) for text, metric in _LENGTH),
)


@dataclass(frozen=True)
class Report:
    """Figures of several methods on the same rows.

    ``samples``: per method the samples [1 + bootstrap] of each figure it has. ``about``: what was
    measured on and with and how many rows counted, ready for JSON (`evaluate` fills it).
    """

    samples: dict[str, Samples]
    about: dict[str, Any]
    models: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    def figure(self, method: str, key: Key) -> Figure:
        """One figure; NaN where the method does not have it."""
        samples = self.samples[method].get(key)
        return Figure(math.nan, math.nan, math.nan) if samples is None else figure(samples)

    def difference(self, a: str, b: str, key: Key) -> Figure:
        """a - b, paired over the same bootstrap samples; NaN where one lacks the figure."""
        of_a, of_b = self.samples[a].get(key), self.samples[b].get(key)
        if of_a is None or of_b is None:
            return Figure(math.nan, math.nan, math.nan)
        return paired(of_a, of_b)

    def to_dict(self) -> dict[str, object]:
        """All figures and the differences of the first method, as JSON; undefined ones are null."""
        first, *others = self.samples
        return {
            "about": self.about,
            "methods": {
                name: _nested({key: figure(values) for key, values in samples.items()})
                for name, samples in self.samples.items()
            },
            "differences": {
                f"{first} - {other}": _nested(
                    {
                        key: self.difference(first, other, key)
                        for key in self.samples[first]
                        if key in self.samples[other]
                    }
                )
                for other in others
            },
            "undefined": {name: self.undefined(name) for name in self.samples},
        }

    def undefined(self, method: str) -> int:
        """How many of a method's figures are undefined (one outcome only, no spread)."""
        return sum(not math.isfinite(values[0]) for values in self.samples[method].values())

    def tables(self) -> list["Table"]:
        """Tables: router, length, per model, per stage, differences; empty ones are left out."""
        parts = [
            self._table("Router: confidence of success", self._router_rows()),
            self._table("Length: output tokens", self._length_rows()),
            self._table("Per model", self._model_rows()),
            self._table("Per stage (remaining tokens)", self._stage_rows()),
            self._difference_table(),
        ]
        return [part for part in parts if part is not None]

    def notes(self) -> list[str]:
        """What a reader of the tables must know, one line each."""
        about, counted = self.about, self.about["counted"]
        lines = [
            f"{about['rows']} rows, {about['workflows']} workflows, {about['tasks']} tasks "
            f"({about['task_texts']} after joining equal texts), data {about['data_digest']}; "
            f"95 % intervals from {about['bootstrap']} samples of tasks, seed {about['seed']}; "
            f"ECE in {about['ece_bins']} bins of equal mass; {DASH}: undefined or not predicted.",
            f"router: confidence at stage 0, {counted['router']} rows; remaining: tokens of this "
            f"and later stages, {counted['remaining']} rows; stage: {counted['stage']} rows.",
        ]
        for method, targets in about["left_out"].items():
            missing = [f"{rows} of {target}" for target, rows in targets.items() if rows]
            if missing:
                lines.append(
                    f"{method} says nothing for some rows ({', '.join(missing)}): they are left "
                    "out of all columns."
                )
        for method, models in about["unknown_models"].items():
            if models:
                text = ", ".join(f"{model} ({rows} rows)" for model, rows in models.items())
                lines.append(f"{method} does not know these models: {text}.")
        lines += [
            f"{method}: {number} figures are undefined (one outcome only, or nothing to rank)."
            for method in self.samples
            if (number := self.undefined(method))
        ]
        return lines

    def _router_rows(self) -> list[tuple[str, Key]]:
        rows = [(text, Key("router", metric)) for text, metric in _ROUTER]
        counted = self.about["counted"]
        if counted["router_all"] > counted["router"]:
            rows += [(f"{text}, all stages", Key("router_all", metric)) for text, metric in _ROUTER]
        for small, large in self.pairs:
            rows += [
                (f"{text}: {_short(small)} → {_short(large)}",
                 Key("router", metric, f"pair={small}:{large}"))
                for text, metric in _PAIR
            ]  # fmt: skip
        return rows

    def _length_rows(self) -> list[tuple[str, Key]]:
        return [
            (f"{target}: {text}", Key(target, metric))
            for target in ("remaining", "stage")
            for text, metric in _LENGTH
        ]

    def _model_rows(self) -> list[tuple[str, Key]]:
        return [
            (f"{text}: {_short(model)}", Key(target, metric, f"model={model}"))
            for text, target, metric in (
                ("AUC", "router", "auc"),
                ("Kendall, remaining", "remaining", "kendall"),
            )
            for model in self.models
        ]

    def _stage_rows(self) -> list[tuple[str, Key]]:
        groups = sorted(
            {
                key.group
                for samples in self.samples.values()
                for key in samples
                if key.target == "remaining" and key.group.startswith("stage=")
            }
        )
        return [
            (f"{text}: {group.replace('=', ' ')}", Key("remaining", metric, group))
            for text, metric in (
                ("Kendall", "kendall"),
                ("coverage", "coverage"),
                ("pinball", "pinball"),
            )
            for group in groups
        ]

    def _table(self, title: str, rows: Sequence[tuple[str, Key]]) -> "Table | None":
        """One row per figure that any method has, one column per method."""
        table = _new_table(title, list(self.samples))
        for text, key in rows:
            figures = [self.figure(name, key) for name in self.samples]
            if any(math.isfinite(one.value) for one in figures):
                table.add_row(text, *(_cell(one) for one in figures))
        return table if table.row_count else None

    def _difference_table(self) -> "Table | None":
        first, *others = self.samples
        table = _new_table(f"{first} minus the others, paired (* interval without 0)", others)
        for text, key in self._compared():
            figures = [self.difference(first, other, key) for other in others]
            if any(math.isfinite(one.value) for one in figures):
                table.add_row(text, *(_cell(one, signed=True) for one in figures))
        return table if table.row_count else None

    def _compared(self) -> list[tuple[str, Key]]:
        pairs = [row for row in self._router_rows() if row[1].metric == "apgr"]
        return [*_COMPARED, *pairs]


def _new_table(title: str, columns: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cell(one: Figure, signed: bool = False) -> str:
    if not math.isfinite(one.value):
        return DASH
    value = _number(one.value, signed)
    if not math.isfinite(one.low):
        return value
    star = "*" if signed and (one.low > 0 or one.high < 0) else ""
    return f"{value}{star} \\[{_number(one.low, signed)}, {_number(one.high, signed)}]"


def _number(value: float, signed: bool) -> str:
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _short(model: str, longest: int = 26) -> str:
    return model if len(model) <= longest else model[: longest - 1] + "…"


def _nested(figures: dict[Key, Figure]) -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    """target -> metric -> group ("all" for none) -> value, low, high."""
    nested: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    for key, one in figures.items():
        groups = nested.setdefault(key.target, {}).setdefault(key.metric, {})
        groups[key.group or "all"] = {
            name: value if math.isfinite(value) else None for name, value in one._asdict().items()
        }
    return nested
