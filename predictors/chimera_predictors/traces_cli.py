"""The command `chimera traces`: look at a trace folder, make one from a public release.

Prints plain text; errors of the user's data go to standard error and return 2.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chimera_predictors.traces import Traces

EXIT_USAGE = 2
RELEASES = {
    "mint": "MINT's runs: xingyaoww/mint-bench, data/outputs",
    "mmlu-pro": "MMLU-Pro's answers: TIGER-AI-Lab/MMLU-Pro, eval_results",
    "routellm": "RouteLLM's GSM8K and MMLU answers: lm-sys/RouteLLM, routellm/evals",
}


def add(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "traces",
        help="look at a trace folder, or make one from a public release",
        description="Trace folders hold finished workflows to train on and to evaluate with; "
        "see docs/traces.md.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    info = actions.add_parser(
        "info",
        help="check a trace folder and say what is in it",
        description="Read and check trace folders, print what is in them.",
    )
    info.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    info.set_defaults(run=_info)
    _add_import(actions)


def _add_import(actions: Any) -> None:
    parser = actions.add_parser(
        "import",
        help="make a trace folder from a public release",
        description="Turn a copy of a public release into a trace folder.",
    )
    releases = parser.add_subparsers(required=True, metavar="RELEASE")
    for name, text in RELEASES.items():
        child = releases.add_parser(name, help=text, description=text)
        child.add_argument("path", type=Path, metavar="PATH", help="the copy, or part of it")
        child.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                           help="trace folder to write")  # fmt: skip
        child.add_argument("--models", default="", metavar="A,B",
                           help="only these models (default: all)")  # fmt: skip
        child.set_defaults(run=_import, release=name)


def _info(arguments: argparse.Namespace) -> int:
    from chimera_predictors.traces import TracesError, read_traces

    try:
        traces = read_traces(arguments.folders)
    except TracesError as error:
        return _refused(error)
    print(describe(traces))
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from chimera_predictors.importers import mint, mmlu_pro, routellm
    from chimera_predictors.trace_files import TracesError, write_traces

    readers = {"mint": mint.read, "mmlu-pro": mmlu_pro.read, "routellm": routellm.read}
    models = [name.strip() for name in arguments.models.split(",") if name.strip()]
    try:
        if not arguments.path.is_dir():
            raise TracesError(f"{arguments.path}: no such folder")
        stages, tasks = readers[arguments.release](arguments.path, models)
        rows = write_traces(arguments.out, stages=stages, tasks=tasks)
    except TracesError as error:
        return _refused(error)
    print(f"{arguments.out}: {rows:,} stages of {len(tasks):,} tasks")
    return 0


def _refused(error: Exception) -> int:
    print(f"chimera: {error}", file=sys.stderr)
    return EXIT_USAGE


def describe(traces: "Traces") -> str:
    """Return what is in the traces as text: sizes, known shares, one line per model."""
    import numpy as np

    kinds, counts = np.unique(traces.kind.astype(str), return_counts=True)
    known = {
        "success": np.isfinite(traces.success),
        "lengths": np.isfinite(traces.output_tokens),
        "remaining": np.isfinite(traces.remaining_tokens),
        "text": np.array([bool(text.strip()) for text in traces.new_text]),
        "verdict": np.isfinite(traces.verdict),
        "logprob": np.isfinite(traces.logprob),
    }
    lines = [
        f"stages     {len(traces):,}",
        f"workflows  {len(traces.workflow_ids):,}, at most {traces.n_stages.max()} stages",
        f"tasks      {len(traces.task_ids):,}",
        "kinds      "
        + ", ".join(f"{kind or '(none)'} {n:,}" for kind, n in zip(kinds, counts, strict=True)),
        "known      " + ", ".join(f"{name} {share.mean():.0%}" for name, share in known.items()),
        "",
    ]
    return "\n".join(lines + _table(_model_rows(traces)))


def _model_rows(traces: "Traces") -> list[tuple[str, ...]]:
    """A heading and a line per model; success counts each of a model's workflows once."""
    import numpy as np

    rows = [("model", "stages", "workflows", "success", "tokens/stage", "tokens/workflow")]
    for code, name in enumerate(traces.models):
        own = np.flatnonzero(traces.model == code)
        _, first = np.unique(traces.workflow[own], return_index=True)
        starts = own[traces.stage[own] == 0]
        rows.append(
            (
                name,
                f"{len(own):,}",
                f"{len(first):,}",
                _mean(traces.success[own[first]], ".3f"),
                _mean(traces.output_tokens[own], ".0f"),
                _mean(traces.remaining_tokens[starts], ".0f"),
            )
        )
    return rows


def _mean(values: Any, form: str) -> str:
    """The mean of the known values, a dash where none is."""
    known = values[values == values]
    return format(known.mean(), form) if len(known) else "-"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
