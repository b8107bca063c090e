"""Trains the bundle that the demo predicts with, on traces of `chimera bench traces`.

`python -m chimera_bench.testbed.predictor --traces DIR --encoder DIR --out DIR`

As `chimera train --encoder DIR --include-encoder`, with fewer and narrower heads: the bundle is
committed, and beside the testbed's engines a prediction may cost a fraction of a millisecond.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from chimera_predictors.bundle import Bundle, write_bundle
from chimera_predictors.encoder import load_encoder
from chimera_predictors.options import Options
from chimera_predictors.traces import read_traces
from chimera_predictors.trainer import train_bundle, training_cache

_MAX_TOKENS = 128  # the longest prompt of the testbed has fewer
_OPTIONS = Options(members_per_fold=1, hidden=32, centres=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, nargs="+", required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    encoder = load_encoder(str(arguments.encoder), max_tokens=_MAX_TOKENS)
    traces = read_traces(arguments.traces)
    bundle = train_bundle(traces, training_cache(encoder), _OPTIONS, included=True)
    bundle = _renamed(bundle)
    write_bundle(bundle, arguments.out, encoder.save)
    print(bundle.info.metrics)


def _renamed(bundle: Bundle) -> Bundle:
    """The encoder is inside; where it lay on the machine that trained it is nobody's concern."""
    replace = msgspec.structs.replace
    encoder = replace(bundle.info.encoder, name="testbed")
    return replace(bundle, info=replace(bundle.info, encoder=encoder))


if __name__ == "__main__":
    main()
