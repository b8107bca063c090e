"""What the session's small bundle is made of; the fixture `trained` is one of these."""

from dataclasses import dataclass
from pathlib import Path

from chimera_predictors.bundle import Bundle
from chimera_predictors.encoder import Encoder
from chimera_predictors.options import Options
from chimera_predictors.traces import Traces

OPTIONS = Options(rows_seen=3e4, epochs=(2, 60), hidden=8, folds=3, steps=4)


@dataclass(frozen=True)
class Trained:
    """A bundle, what it was trained on, and where it lies."""

    bundle: Bundle
    traces: Traces
    encoder: Encoder
    folder: Path
