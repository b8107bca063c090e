"""The `chimera train` command: trace folders in, a bundle out. Light to import."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chimera_predictors.bundle import Bundle
    from chimera_predictors.encoder import Encoder
    from chimera_predictors.traces import Traces

EXIT_USAGE = 2
_DEFAULT_TOKENS = 128


def add(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "train",
        help="train a predictor bundle on traces of finished workflows",
        description="Train confidence and length predictors on trace folders (docs/traces.md) and "
        "write them as a bundle for `chimera up --bundle`. `chimera eval` says how good it is.",
    )
    parser.add_argument("--traces", nargs="+", type=Path, required=True, metavar="DIR",
                        help="trace folders to learn from")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE",
                        help="folder to write; a bundle that is there is replaced")  # fmt: skip
    parser.add_argument("--encoder", metavar="NAME",
                        help="Hugging Face id or folder of a BERT or ModernBERT checkpoint "
                        "(default: sentence-transformers/all-MiniLM-L6-v2)")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=_DEFAULT_TOKENS, metavar="N",
                        help="tokens of a text that are read, from both ends "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--finetune", action="store_true",
                        help="also train the encoder; its weights go into the bundle. Slow without "
                        "a GPU, and of use with thousands of tasks")  # fmt: skip
    parser.add_argument("--include-encoder", action="store_true",
                        help="put the encoder's weights into the bundle, unchanged")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: its own)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train; return the exit code. Messages and progress go to standard error."""
    from chimera_predictors import bundle, encoder, finetune, traces, trainer

    try:
        _train(arguments)
    except (
        traces.TracesError, trainer.TrainError, bundle.BundleError, encoder.EncoderError,
        finetune.FinetuneError,
    ) as error:  # fmt: skip
        print(f"chimera: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _train(arguments: argparse.Namespace) -> None:
    import torch

    from chimera_predictors import finetune, trainer
    from chimera_predictors.bundle import write_bundle
    from chimera_predictors.encoder import DEFAULT_ENCODER, load_encoder
    from chimera_predictors.options import Options
    from chimera_predictors.traces import read_traces

    started = time.monotonic()
    if arguments.threads is not None:
        torch.set_num_threads(max(arguments.threads, 1))
    options = Options(seed=arguments.seed)
    traces = read_traces(arguments.traces)
    encoder = load_encoder(
        arguments.encoder or DEFAULT_ENCODER,
        max_tokens=arguments.max_tokens,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    _say(_overview(traces, encoder))
    with _Bar() as bar:
        unseen = None
        if arguments.finetune:
            encoder, unseen = finetune.finetune(encoder, traces, options, bar.show)
        included = arguments.finetune or arguments.include_encoder
        cache = trainer.training_cache(encoder)
        bundle = trainer.train_bundle(
            traces, cache, options, bar.show, included=included, unseen=unseen
        )
        write_bundle(bundle, arguments.out, encoder.save if included else None)
    _say(_summary(bundle, arguments.out, time.monotonic() - started))


def _overview(traces: "Traces", encoder: "Encoder") -> str:
    return (
        f"{len(traces):,} stages of {len(traces.workflow_ids):,} workflows, "
        f"{len(traces.task_ids):,} tasks, {len(traces.models)} models; encoder {encoder.name}"
    )


def _summary(bundle: "Bundle", folder: Path, seconds: float) -> str:
    metrics = bundle.info.metrics
    lines = [f"{folder}: trained in {seconds:.0f} s. On tasks held out:"]
    for name, auc in metrics["auc_first_stage"].items():
        trusted = metrics["trusted"][name]
        shown = "–" if auc is None else f"{auc:.3f}"
        unused = [what for what in ("confidence", "lengths") if not trusted[what]]
        note = f"; {' and '.join(unused)} from the prior" if unused else ""
        lines.append(f"  {name}: AUC at the first stage {shown}{note}")
    distance = metrics["kendall_distance"]
    if distance is not None:
        lines.append(f"  remaining tokens: Kendall distance {distance:.3f} (0.5 is chance)")
    lines.append(f"Next: chimera eval --bundle {folder} --traces DIR; chimera up --bundle {folder}")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Bar:
    """A progress bar on a terminal, and a line per step elsewhere."""

    def __enter__(self) -> "_Bar":
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._terminal = console.is_terminal
        self._last = ""
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(), console=console, disable=not self._terminal,
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task("", total=1.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, what: str, share: float) -> None:
        """What is going on, and how much of all is done."""
        self._bar.update(self._task, description=what, completed=share)
        if what != self._last and not self._terminal:
            _say(f"{share:4.0%} {what}")
        self._last = what
