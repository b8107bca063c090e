"""The command `chimera eval`: how good predictions are on traces, beside priors and baselines.

Reads arguments, runs the methods and writes tables, JSON and plots. Importing it is light: what a
command needs is imported when it runs.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chimera_predictors.evaluate import Method, RowPredictions
    from chimera_predictors.report import Report
    from chimera_predictors.traces import Traces

EXIT_USAGE = 2
BASELINES = ("tfidf", "knn", "forest", "lightgbm")


def add(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "eval",
        help="measure how good a bundle's predictions are, or cross-validate on traces",
        description="Evaluate a bundle on trace folders beside its own prior (--bundle), or train "
        "and evaluate out of fold on splits by task (--folds, --holdout). Figures come with 95 % "
        "intervals over tasks; see docs/traces.md for the folders.",
    )
    parser.add_argument("--traces", nargs="+", type=Path, required=True, metavar="DIR",
                        help="trace folders to evaluate on")  # fmt: skip
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--bundle", type=Path, help="the bundle to evaluate")
    way.add_argument("--folds", type=_folds, metavar="K", help="cross-validate in K folds of tasks")
    way.add_argument("--holdout", type=_share, metavar="SHARE",
                     help="train on the rest, evaluate on this share of tasks")  # fmt: skip
    parser.add_argument("--baselines", type=_baselines, default=(), metavar="NAMES",
                        help=f"all, or some of {','.join(BASELINES)}; with --bundle they learn "
                        "from --train-traces")  # fmt: skip
    parser.add_argument("--train-traces", nargs="+", type=Path, default=[], metavar="DIR",
                        help="what the baselines learn from beside --bundle")  # fmt: skip
    parser.add_argument("--pairs", nargs="+", default=[], metavar="SMALL:LARGE",
                        help="pairs of models for APGR and the gap (default: some that differ in "
                        "success)")  # fmt: skip
    parser.add_argument("--hide-kind", action="store_true",
                        help="as if no client declared a kind")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write PNG plots")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--bootstrap", type=_count, default=300, metavar="N",
                        help="bootstrap samples of tasks (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; return the exit code. Messages and progress go to standard error.

    Raises ImportError where a library is missing that all of it needs (extra `train`).
    """
    try:
        _evaluate(arguments)
    except _user_errors() as error:
        print(f"chimera: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _evaluate(arguments: argparse.Namespace) -> None:
    from chimera_predictors import evaluate

    _check(arguments)
    traces = _read(arguments.traces, arguments.hide_kind)
    pairs = parse_pairs(arguments.pairs, traces.models) or evaluate.default_pairs(traces)
    if arguments.bundle is not None:
        predictions = _with_bundle(arguments, traces)
    else:
        predictions, traces = _held_out(arguments, traces)
    report = evaluate.evaluate(
        predictions, traces, pairs, arguments.seed, arguments.bootstrap, _progress
    )
    _show(report)
    if arguments.json is not None:
        _write_json(arguments, report)
    if arguments.plots is not None:
        _plot(arguments.plots, predictions, traces)


def parse_pairs(texts: Sequence[str], models: Sequence[str]) -> list[tuple[str, str]]:
    """(small, large) of each SMALL:LARGE; a name may itself hold colons. Raises EvalError."""
    from chimera_predictors.evaluate import EvalError

    found: list[tuple[str, str]] = []
    for text in texts:
        parts = text.split(":")
        splits = [(":".join(parts[:n]), ":".join(parts[n:])) for n in range(1, len(parts))]
        known = [pair for pair in splits if set(pair) <= set(models)]
        if not known:
            raise EvalError(
                f"--pairs {text!r}: write SMALL:LARGE with two of the models in the traces: "
                + ", ".join(models)
            )
        found.append(known[0])
    return found


def _check(arguments: argparse.Namespace) -> None:
    """Find what would fail only after minutes of work."""
    from chimera_predictors.evaluate import EvalError

    if arguments.train_traces and arguments.bundle is None:
        raise EvalError("--train-traces goes with --bundle; --folds and --holdout split --traces")
    if arguments.bundle is not None and arguments.baselines and not arguments.train_traces:
        raise EvalError("say what the baselines learn from: --train-traces DIR")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise EvalError(f"--json {arguments.json}: its folder does not exist")
    if arguments.json is not None and arguments.json.is_dir():
        raise EvalError(f"--json {arguments.json} is a folder; name a file")
    _need("rich.console", "train")
    for module in _LIBRARIES if arguments.baselines else ():
        _need(module, "baselines")
    if arguments.plots is not None:
        _need("matplotlib.figure", "bench")
        try:
            arguments.plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvalError(f"--plots {arguments.plots}: {error.strerror or error}") from error


_LIBRARIES = ("sklearn", "lightgbm", "quantile_forest", "scipy")


def _need(module: str, extra: str) -> Any:
    from chimera_predictors.evaluate import EvalError

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EvalError(f"{error}; this needs: pip install 'chimera-daemon[{extra}]'") from error


def _read(folders: Sequence[Path], hide_kind: bool) -> "Traces":
    from chimera_predictors.traces import read_traces

    _progress(f"reading {', '.join(map(str, folders))}")
    traces = read_traces(folders)
    return traces.without_kind() if hide_kind else traces


def _with_bundle(arguments: argparse.Namespace, traces: "Traces") -> dict[str, "RowPredictions"]:
    """The bundle, its stored prior, and baselines trained on other traces."""
    from chimera_predictors import predictor, trainer

    bundle = predictor.load(arguments.bundle)
    learned: list[Method] = [trainer.BundleMethod(bundle), trainer.PriorMethod(bundle)]
    baselines = _make_baselines(arguments)
    if baselines:
        other = _read(arguments.train_traces, arguments.hide_kind)
        _warn_of_shared_tasks(other, traces)
        for method in baselines:
            _progress(f"{method.name}: training on {len(other)} rows")
            method.fit(other)
    predictions: dict[str, RowPredictions] = {}
    for method in [*learned, *baselines]:
        _progress(f"{method.name}: predicting {len(traces)} rows")
        predictions[method.name] = method.predict(traces)
    return predictions


def _warn_of_shared_tasks(train: "Traces", test: "Traces") -> None:
    from chimera_predictors.trace_files import normalised

    def names(traces: "Traces") -> list[str]:
        named = zip(traces.task_text, traces.task_ids, strict=True)
        return [normalised(text) or task_id for text, task_id in named]

    seen = set(names(train))
    shared = sum(name in seen for name in names(test))
    if shared:
        _progress(f"warning: {shared} of the {len(test.task_ids)} tasks are also in "
                  "--train-traces: the baselines have seen their outcome")  # fmt: skip


def _held_out(
    arguments: argparse.Namespace, traces: "Traces"
) -> tuple[dict[str, "RowPredictions"], "Traces"]:
    """Predictions by methods that never saw the row's task, and the rows they are for."""
    from chimera_predictors import trainer
    from chimera_predictors.baselines import Prior
    from chimera_predictors.evaluate import out_of_fold
    from chimera_predictors.options import Options

    ours = trainer.JointMethod(Options(seed=arguments.seed))
    methods: list[Method] = [ours, Prior(), *_make_baselines(arguments)]
    if arguments.folds is not None:
        fold = traces.fold_of(arguments.folds, arguments.seed)
        return {one.name: out_of_fold(one, traces, fold, _progress) for one in methods}, traces
    held = traces.holdout(arguments.holdout)
    learn, test = traces.select(~held), traces.select(held)
    predictions: dict[str, RowPredictions] = {}
    for method in methods:
        _progress(f"{method.name}: training on {len(learn)} rows, predicting {len(test)}")
        method.fit(learn)
        predictions[method.name] = method.predict(test)
    return predictions, test


def _make_baselines(arguments: argparse.Namespace) -> list["Method"]:
    from chimera_predictors import baselines

    seed = arguments.seed
    makers: dict[str, Callable[[], Method]] = {
        "tfidf": lambda: baselines.TfidfLogistic(seed=seed),
        "knn": lambda: baselines.KnnRouter(_embedder()),
        "forest": lambda: baselines.QuantileForest(seed=seed),
        "lightgbm": lambda: baselines.LightGbm(seed=seed),
    }
    return [makers[name]() for name in arguments.baselines]


def _embedder() -> Callable[[Sequence[str]], Any]:
    """Texts -> [n, D] with the default encoder; each text is encoded once, however many folds."""
    import numpy as np

    from chimera_predictors.encoder import load_encoder

    loaded = load_encoder()
    known: dict[str, Any] = {}

    def encode(texts: Sequence[str]) -> Any:
        new = sorted(set(texts) - known.keys())
        if new:
            _progress(f"knn: encoding {len(new)} texts")
            known.update(zip(new, np.asarray(loaded.encode(new)), strict=True))
        return np.stack([known[text] for text in texts])

    return encode


def _show(report: "Report") -> None:
    console = _need("rich.console", "train").Console(highlight=False)
    # A narrower table would cut figures off; a line that wraps only looks bad.
    console.width = max(console.width, 56 + 28 * len(report.samples))
    for table in report.tables():
        console.print(table)
    for line in report.notes():
        console.print(line, markup=False, soft_wrap=True)


def _write_json(arguments: argparse.Namespace, report: "Report") -> None:
    from chimera_predictors.evaluate import EvalError

    content = {
        "traces": [str(folder) for folder in arguments.traces],
        "bundle": str(arguments.bundle) if arguments.bundle is not None else None,
        "folds": arguments.folds,
        "holdout": arguments.holdout,
        "hide_kind": arguments.hide_kind,
        **report.to_dict(),
    }
    try:
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise EvalError(f"--json {arguments.json}: {error.strerror or error}") from error


def _plot(folder: Path, predictions: dict[str, "RowPredictions"], traces: "Traces") -> None:
    import numpy as np

    from chimera_predictors import plots
    from chimera_predictors.evaluate import compared_quantiles

    first = traces.stage == 0
    confidence = {
        name: one.confidence[first]
        for name, one in predictions.items()
        if np.isfinite(one.confidence[first]).any()
    }
    lengths = {
        name: compared_quantiles(one.remaining_tokens, one.levels)
        for name, one in predictions.items()
        if np.isfinite(one.remaining_tokens).any()
    }
    if confidence and np.isfinite(traces.success[first]).any():
        plots.reliability(folder / "reliability.png", confidence, traces.success[first])
    if lengths and np.isfinite(traces.remaining_tokens).any():
        plots.length_scatter(folder / "length.png", lengths, traces.remaining_tokens)
    _progress(f"plots are in {folder}")


def _user_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is for the user; asked for only when something was raised."""
    from chimera_predictors.evaluate import EvalError
    from chimera_predictors.trace_files import TracesError

    found: list[type[Exception]] = [EvalError, TracesError]
    for module, name in (("predictor", "BundleError"), ("encoder", "EncoderError")):
        loaded = sys.modules.get(f"chimera_predictors.{module}")
        if loaded is not None:
            found.append(getattr(loaded, name))
    return tuple(found)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _baselines(text: str) -> tuple[str, ...]:
    names = BASELINES if text == "all" else tuple(dict.fromkeys(text.split(",")))
    wrong = [name for name in names if name not in BASELINES]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r}: write all or {','.join(BASELINES)}")
    return names


def _folds(text: str) -> int:
    return _within(text, int, "a number of folds from 2 to 100", lambda value: 2 <= value <= 100)


def _share(text: str) -> float:
    return _within(text, float, "a share between 0 and 1", lambda value: 0 < value < 1)


def _count(text: str) -> int:
    return _within(text, int, "a number from 0 to 10000", lambda value: 0 <= value <= 10_000)


def _within(text: str, kind: Any, wanted: str, allowed: Callable[[Any], bool]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r}: write {wanted}")
    return value
