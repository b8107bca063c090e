"""`scheduler` makes watched schedulers; at the end each must empty and replay."""

from collections.abc import Callable, Iterator

import pytest

from core_harness import Watched


@pytest.fixture
def scheduler() -> Iterator[Callable[..., Watched]]:
    """Make a scheduler from configuration fields."""
    made: list[Watched] = []

    def make(**config: object) -> Watched:
        made.append(Watched(**config))
        return made[-1]

    yield make
    for watched in made:
        watched.finish_all()
        watched.assert_replays()
