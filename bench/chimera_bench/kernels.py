"""`chimera bench kernels`: the GPU kernels against `transformers` and torch.compile, on this card.

First everything is compared with the fp32 reference; if one thing is wrong, nothing is timed. Then
the card's own ceilings are measured, then the encoder, the heads, the whole pass, and text in to
scores out. Owns the command's options, its tables and its files; kernel_bench.py measures.
"""

import argparse
import contextlib
import importlib.metadata
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chimera_bench import machine, roofline
from chimera_daemon.config import ConfigError

TESTBED = Path(__file__).parent / "testbed" / "predictor"
PARTS = ("encoder", "heads", "pass", "text")
CONTESTANTS = ("layered", "persistent", "eager", "sdpa", "compile")
SHAPES = (
    "minilm:1x128",
    "minilm:32x128",
    "minilm:64x256",
    "minilm:32x16..128",
    "bert-base:1x128",
    "modernbert-large:8x512",
)
_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_GOALS_OF = "H200"
_DISTRIBUTIONS = ("triton", "transformers", "tokenizers")

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chimera bench kernels`."""
    parser.add_argument("--check", action="store_true",
                        help="only compare with the reference; with TRITON_INTERPRET=1 this needs "
                        "no GPU, but small shapes")  # fmt: skip
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="instead: which tiles and limits of the encoder are best here",
    )
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="MODEL:SxT",
                        default=[roofline.parse_shape(text) for text in SHAPES],
                        help=f"S sequences of T tokens, or of T..T; models: "
                        f"{', '.join(roofline.MODELS)} (default: {' '.join(SHAPES)})")  # fmt: skip
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 32, 256],
                        help="of heads, pass and text (default: 1 32 256)")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS,
                        help="contestants of encoder and heads (default: all)")  # fmt: skip
    parser.add_argument("--bundle", type=Path, metavar="FOLDER",
                        help="predict with it (default: random heads as large as MINT's on MiniLM, "
                        "and the testbed's bundle)")  # fmt: skip
    parser.add_argument("--encoder", default=_ENCODER, metavar="NAME",
                        help="weights of MiniLM, a folder or what the Hugging Face cache has; "
                        "without them they are random (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.2,
                        help="per measurement; default: %(default)s")  # fmt: skip
    parser.add_argument("--deadline", type=float, default=300.0, metavar="SECONDS",
                        help="after so long torch.compile begins nothing more, so that all ends "
                        "in eight minutes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append JSONL rows to this file")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw a roofline")


def _shape(text: str) -> roofline.Shape:
    try:
        return roofline.parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(arguments: argparse.Namespace) -> int:
    """Check, measure, print; 1 if something is wrong. Raises ConfigError where it cannot run."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a benchmark waits for no network
    if not 1 <= min(arguments.stages) <= max(arguments.stages) <= 256:
        raise ConfigError("--stages are 1 to 256")
    try:
        import torch

        from chimera_bench import kernel_bench
        from chimera_predictors.bundle import BundleError
    except ImportError as error:
        raise ConfigError(
            f"{error}; this benchmark needs: pip install 'chimera-daemon[train,bench]', and a "
            "torch for CUDA"
        ) from error
    progress = Progress()
    plan = _plan(arguments, device_for(arguments.check))
    try:
        with torch.no_grad():
            cases = kernel_bench.prepare(plan)
            checked = [progress.show(row) for row in kernel_bench.gate(cases, plan)]
            if not all(row["right"] for row in checked):
                print("the kernels are wrong here, so nothing is timed")
                return 1
            if arguments.check:
                return 0
            return _time(arguments, cases, plan, progress)
    except BundleError as error:
        raise ConfigError(f"--bundle: {error}") from error


def device_for(check: bool) -> str:
    """Where kernels run. Raises ConfigError where they cannot, or cannot be timed."""
    import torch
    from triton import knobs

    if torch.cuda.is_available():
        return "cuda"
    if not check:
        raise ConfigError(
            "there is no GPU, so there is nothing to time; `TRITON_INTERPRET=1 chimera bench "
            "kernels --check --parts encoder --shapes tiny:2x9` checks the kernels without one"
        )
    if not knobs.runtime.interpret:
        raise ConfigError("there is no GPU; to check without one, set TRITON_INTERPRET=1")
    return "cpu"


def _plan(arguments: argparse.Namespace, device: str) -> Any:
    from chimera_bench.kernel_bench import Plan

    return Plan(
        device=device,
        shapes=_shapes(arguments),
        stages=tuple(arguments.stages),
        parts=("encoder",) if arguments.sweep else tuple(arguments.parts),
        contestants=tuple(arguments.only),
        encoder=arguments.encoder,
        bundle=arguments.bundle,
        testbed=TESTBED,
        seed=arguments.seed,
        seconds=arguments.seconds,
        deadline=time.monotonic() + arguments.deadline,
    )


def _shapes(arguments: argparse.Namespace) -> tuple[roofline.Shape, ...]:
    from chimera_bench.kernel_bench import sweep_shapes

    return sweep_shapes(arguments.shapes) if arguments.sweep else tuple(arguments.shapes)


def _time(arguments: argparse.Namespace, cases: Any, plan: Any, progress: "Progress") -> int:
    """All that comes after a green gate; what is measured is written even if it ends early."""
    from chimera_bench import gpu_timing, kernel_bench

    facts = _facts(arguments.seed)
    ceilings = gpu_timing.ceilings()
    limits = ceilings._asdict()
    print(f"this card: {limits['bytes_per_s'] / 1e12:.2f} TB/s, "
          f"{limits['flops_per_s'] / 1e12:.0f} TFLOP/s in bf16")  # fmt: skip
    rows: list[Row] = []
    try:
        for row in (
            kernel_bench.sweep(cases, plan)
            if arguments.sweep
            else kernel_bench.measure(cases, plan, ceilings)
        ):
            rows.append(progress.show(row))
    finally:
        on_goal = _GOALS_OF in facts["device"]
        judged = [judge(row, rows, on_goal) for row in rows]
        if arguments.out is not None:
            machine.append_rows(arguments.out, [row | limits | facts for row in judged])
    print("\n" + ("\n\n".join(sweep_tables(judged) if arguments.sweep else tables(judged))))
    if arguments.plot is not None and not arguments.sweep:
        marks = [row for row in judged if row["part"] == "encoder" and "p50_us" in row]
        title = f"Encoders on {facts['device']}, bf16; commit {facts['commit']}"
        roofline.draw(arguments.plot, marks, ceilings, title)
    return 0


def _facts(seed: int) -> Row:
    import torch

    found = {"bench": "kernels", "seed": seed, "device": torch.cuda.get_device_name()} | (
        machine.facts()
    )
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][name] = importlib.metadata.version(name)
    return found


class Progress:
    """Prints each row when it is there, so that nothing is lost if the run is ended."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def show(self, row: Row) -> Row:
        """The row itself."""
        said = [f"{row['part']:9} {row['shape']}, {row['contestant']}"]
        if row.get("setting"):
            said.append(row["setting"])
        said += [f"{what} {row[field]:{form}}" for field, what, form in _SHOWN if field in row]
        if row.get("right") is False:
            said.append("WRONG")
        if "skipped" in row:
            said.append(row["skipped"])
        print(f"[{time.monotonic() - self._started:5.0f} s] {', '.join(said)}", flush=True)
        return row


def judge(row: Row, rows: Sequence[Row], on_goal: bool) -> Row:
    """With the ratio to the best of torch.compile, and whether the goals are reached.

    `on_goal` says whether this is the GPU that the goals were set for.
    """
    rivals = [
        other["p50_us"]
        for other in rows
        if (other["part"], other["shape"]) == (row["part"], row["shape"])
        and other["contestant"].startswith("compile")
        and "p50_us" in other
    ]
    if rivals and "p50_us" in row:
        row = row | {"against_compile": min(rivals) / row["p50_us"]}
    goals = [(row["p50_us"], row["goal_us"])] if row.get("goal_us") and "p50_us" in row else []
    if "goal_p99_us" in row:
        goals.append((row["p99_us"], row["goal_p99_us"]))
    if goals and on_goal:
        row = row | {"reached": all(found <= goal for found, goal in goals)}
    return row


def tables(rows: Sequence[Row]) -> list[str]:
    """What was timed on the device, and host to host, as text; empty ones are left out."""
    device = [row for row in rows if row["part"] in ("encoder", "heads")]
    host = [row for row in rows if row["part"] not in ("encoder", "heads")]
    found = [_table(_DEVICE_COLUMNS, device), _table(_HOST_COLUMNS, host)]
    notes = (_DEVICE_NOTE, _HOST_NOTE)
    return [f"{text}\n\n{note}" for text, note in zip(found, notes, strict=True) if text]


def sweep_tables(rows: Sequence[Row]) -> list[str]:
    """For each shape the defaults, and the best setting of each thing that was varied."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["shape"], row["contestant"]
        if "p50_us" in row and row["p50_us"] < best.get(key, {"p50_us": math.inf})["p50_us"]:
            best[key] = row
    return [_table(_SWEEP_COLUMNS, list(best.values()))]


def _table(columns: Sequence[tuple[str, Callable[[Row], str]]], rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    from chimera_bench.report import table  # numpy comes with it

    return table(
        [name for name, _ in columns], [[show(row) for _, show in columns] for row in rows]
    )


def _field(name: str, form: str = "", scale: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(name)
        if value is None:
            return "-"
        return f"{value * scale if form else value:{form}}"

    return show


def _goal(row: Row) -> str:
    if not row.get("goal_us"):
        return "-"
    said = f"{row['goal_us']:.0f}"
    if "goal_p99_us" in row:
        said += f", p99 {row['goal_p99_us']:.0f}"
    verdict = {True: " reached", False: " missed", None: ""}[row.get("reached")]
    return said + verdict


_SHOWN = (
    ("error", "error", ".1e"),
    ("ranked", "ranked alike", ".4f"),
    ("identical", "exactly", ".4f"),
    ("p50_us", "p50 us", ",.1f"),
    ("p99_us", "p99 us", ",.1f"),
)
_DEVICE_COLUMNS = (
    ("shape", _field("shape")),
    ("contestant", _field("contestant")),
    ("weights", _field("weights")),
    ("error", _field("error", ".1e")),
    ("p20", _field("p20_us", ",.1f")),
    ("p50", _field("p50_us", ",.1f")),
    ("p80", _field("p80_us", ",.1f")),
    ("cold", _field("cold_us", ",.1f")),
    ("wall", _field("wall_us", ",.1f")),
    ("floor", _field("floor_us", ",.1f")),
    ("% of it", _field("of_floor", ".1f", 100.0)),
    ("compile/this", _field("against_compile", ".2f")),
    ("goal", _goal),
    ("left out", _field("skipped")),
)
_HOST_COLUMNS = (
    ("what", _field("part")),
    ("shape", _field("shape")),
    ("predictor", _field("contestant")),
    ("p50", _field("p50_us", ",.1f")),
    ("p99", _field("p99_us", ",.1f")),
    ("goal", _goal),
)
_SWEEP_COLUMNS = (
    ("shape", _field("shape")),
    ("varied", lambda row: row["contestant"] or "nothing"),
    ("best", lambda row: row["setting"] or "default"),
    ("p50", _field("p50_us", ",.1f")),
)
_DEVICE_NOTE = """Microseconds of the device, launches hidden, weights and inputs in its cache where
they fit; cold: with the cache flushed; wall: the host's clock, for one call. Four input sets take
turns. Ours is packed, with the last layer norm by torch behind it; transformers and torch.compile
(of SDPA) get padded batches, without a mask where all lengths are equal. Heads are fp32 for all."""
_HOST_NOTE = """Microseconds of the host's clock. text: queries in, forecasts out, all texts new;
tokeniser: its part of that; pass: from token ids. One text of up to 128 tokens for each stage."""
