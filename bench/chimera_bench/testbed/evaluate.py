"""Accuracy of a model over workflow shapes, kinds and difficulties.

`python -m chimera_bench.testbed.evaluate --model DIR [--split validation] [--per-cell 30]`
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from chimera_bench.testbed.decode import Speaker, run_workflows
from chimera_bench.testbed.tasks import DIFFICULTIES, KINDS, Split, check, generate
from chimera_bench.testbed.workflows import SHAPES, final_answer, shape


class Cell(msgspec.Struct, frozen=True):
    """Successes among `n` tasks of one shape, kind and difficulty."""

    shape: str
    kind: str
    difficulty: int
    n: int
    successes: int


class StageLength(msgspec.Struct, frozen=True):
    """Output tokens of one stage of a shape."""

    shape: str
    stage: str
    mean: float
    p95: float


class Evaluation(msgspec.Struct, frozen=True):
    """All cells of one model and the lengths of its answers."""

    cells: list[Cell]
    lengths: list[StageLength]


def evaluate(
    speaker: Speaker,
    split: Split = "validation",
    per_cell: int = 30,
    shapes: Sequence[str] = SHAPES,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Run `per_cell` tasks of each kind and difficulty through each shape with one model."""
    tasks = [
        task
        for kind in KINDS
        for difficulty in DIFFICULTIES
        for task in generate(split, per_cell, seed, (kind,), (difficulty,))
    ]
    cells: list[Cell] = []
    lengths: list[StageLength] = []
    for name in shapes:
        progress(f"{name}: {len(tasks)} tasks")
        outputs = run_workflows([speaker], tasks, name)
        good = [check(t, final_answer(o)) for t, o in zip(tasks, outputs, strict=True)]
        for at in range(0, len(tasks), per_cell):
            first = tasks[at]
            won = sum(good[at : at + per_cell])
            cells.append(Cell(name, first.kind, first.difficulty, per_cell, won))
        for i, stage in enumerate(shape(name).stages):
            counts = sorted(speaker.count_tokens(o[i]) for o in outputs)
            p95 = float(counts[int(0.95 * (len(counts) - 1))])
            lengths.append(StageLength(name, stage, round(statistics.mean(counts), 1), p95))
    return Evaluation(cells, lengths)


def rate(cells: Sequence[Cell], **where: object) -> float:
    """Success rate over the cells whose fields equal `where`; 0 where there are none."""
    picked = [c for c in cells if all(getattr(c, k) == v for k, v in where.items())]
    tasks = sum(c.n for c in picked)
    return sum(c.successes for c in picked) / tasks if tasks else 0.0


def table(cells: Sequence[Cell]) -> str:
    """A markdown table: a row per shape and kind, a column per difficulty, success in percent."""
    head = ["shape", "kind", *(str(d) for d in DIFFICULTIES), "all"]
    rows = [head, ["---"] * len(head)]
    for name in dict.fromkeys(c.shape for c in cells):
        for kind in KINDS:
            found = [rate(cells, shape=name, kind=kind, difficulty=d) for d in DIFFICULTIES]
            found.append(rate(cells, shape=name, kind=kind))
            rows.append([name, kind, *(f"{100 * r:.0f}" for r in found)])
    found = [rate(cells, difficulty=d) for d in DIFFICULTIES] + [rate(cells)]
    rows.append(["all", "all", *(f"{100 * r:.0f}" for r in found)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--split", choices=("validation", "demo"), default="validation")
    parser.add_argument("--per-cell", type=int, default=30, help="tasks per kind and difficulty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the cells to this file")
    args = parser.parse_args()
    found = evaluate(
        Speaker.load(args.model),
        args.split,
        args.per_cell,
        seed=args.seed,
        progress=lambda text: print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True),
    )
    print(file=sys.stderr)
    print(table(found.cells))
    for item in found.lengths:
        print(f"{item.shape} {item.stage}: mean {item.mean} tokens, p95 {item.p95:.0f}")
    if args.json:
        args.json.write_text(json.dumps(msgspec.to_builtins(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
