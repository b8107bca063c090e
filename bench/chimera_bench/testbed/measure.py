"""Measures the committed models and writes `models/metrics.json`.

`python -m chimera_bench.testbed.measure [--per-cell 20]` prints the tables that the README shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import msgspec

from chimera_bench.testbed.decode import Speaker
from chimera_bench.testbed.evaluate import Evaluation, evaluate, rate, table
from chimera_bench.testbed.tasks import DIFFICULTIES, KINDS
from chimera_bench.testbed.workflows import SHAPES

MODELS = Path(__file__).parent / "models"
NAMES = ("testbed-s", "testbed-m", "testbed-l")


def summary(found: dict[str, Evaluation]) -> str:
    """A markdown table, a row per model: success in percent by kind, shape and difficulty."""
    head = ["model", "all", *KINDS, *SHAPES, *(f"difficulty {d}" for d in DIFFICULTIES)]
    rows = [head, ["---"] * len(head)]
    for name, result in found.items():
        cells = result.cells
        rates = [rate(cells)]
        rates += [rate(cells, kind=kind) for kind in KINDS]
        rates += [rate(cells, shape=shape) for shape in SHAPES]
        rates += [rate(cells, difficulty=d) for d in DIFFICULTIES]
        rows.append([name, *(f"{100 * r:.0f}" for r in rates)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def metrics(found: dict[str, Evaluation], split: str, seed: int) -> dict[str, object]:
    """Everything measured, with each model's training report, as plain JSON values."""
    models = {}
    for name, result in found.items():
        training = json.loads((MODELS / name / "training.json").read_text())
        models[name] = {
            "success": round(rate(result.cells), 4),
            "parameters": training["parameters"],
            "training": training,
            **msgspec.to_builtins(result),
        }
    return {"split": split, "seed": seed, "models": models}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--per-cell", type=int, default=20, help="tasks per kind and difficulty")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = {}
    for name in NAMES:
        found[name] = evaluate(
            Speaker.load(MODELS / name),
            "validation",
            args.per_cell,
            seed=args.seed,
            progress=lambda text, name=name: print(f"{name} {text}", file=sys.stderr, flush=True),
        )
        print(f"\n{name}\n\n{table(found[name].cells)}")
    print(f"\n{summary(found)}")
    text = json.dumps(metrics(found, "validation", args.seed), indent=1)
    (MODELS / "metrics.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
