"""How the heads are trained. Every default exists here and nowhere else."""

from collections.abc import Callable

from msgspec import Struct

# Quantile levels of the lengths; the middle one is the median.
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)

_MANY_ROWS = 40_000

Progress = Callable[[str, float], None]  # what is going on, and how much of all is done


class Options(Struct, frozen=True, forbid_unknown_fields=True):
    """How to train; the defaults were chosen on MINT and MMLU-Pro (predictors/NOTES.md)."""

    seed: int = 0
    folds: int = 5
    members_per_fold: int | None = None  # None: 2, or 1 where there are many rows
    rows_seen: float = 5e5  # by each member, within the bounds of epochs below
    epochs: tuple[int, int] = (10, 60)
    router_epochs: int = 10
    learning_rate: float = 1e-2
    router_rate: float = 3e-3
    weight_decay: float = 0.3
    hidden: int = 64  # of one head of one member
    dropout: float = 0.3  # of hidden units for lengths
    text_dropout: float = 0.5  # of a whole text, for lengths
    router_dropout: float = 0.5  # of hidden units for the confidence
    input_dropout: float = 0.3  # of each input, for the confidence
    kind_dropout: float = 0.3  # of the declared kind
    steps: int = 8  # of a number's encoding
    task_width: int | None = None  # None: by the number of tasks
    new_width: int = 32
    width: float = 0.2  # of the kernel over texts
    centres: int = 1024
    shared_noise: float = 0.5
    own_noise: float = 8.0
    later_weight: float = 0.5  # of a later stage's success against the first one's
    length_weight: float = 2.0

    def members(self, rows: int) -> int:
        """Members per fold for so many rows."""
        return self.members_per_fold or (2 if rows < _MANY_ROWS else 1)
