"""The queues in which stages wait for a slot: by rank, and by rank under the paper's aging.

Both give the lowest first and break ties by arrival. Removal is lazy: a heap entry is dead once the
waiting item no longer carries its ticket, and dead entries are swept when they are the majority.
Queues between which items move draw their tickets from one counter: otherwise a dead entry here
would come alive as soon as the item is given the same number there.
"""

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from math import inf
from typing import Generic, Protocol, TypeVar

_SWEEP_AT = 64  # dead entries below this number are not worth a sweep
_LOOK = 16  # items at the head of a queue that `pop_cheapest` weighs against each other


class Waiting(Protocol):
    """What a queue needs of an item. The queue owns the last two while the item waits in it."""

    rank: float
    arrival: int  # unique
    level: int  # the paper's starvation level: 0, then -1, -2, ... for those passed over
    ticket: int  # -1 while it waits nowhere
    queued_round: int  # of the queue, when the item came in


T = TypeVar("T", bound=Waiting)


class RankQueue(Generic[T]):
    """A heap on (rank, arrival)."""

    def __init__(self, tickets: Iterator[int]) -> None:
        self._heap: list[tuple[float, int, int, T]] = []
        self._tickets = tickets
        self._live = 0
        self.rounds = 0  # pops so far

    def __len__(self) -> int:
        return self._live

    def push(self, item: T) -> None:
        """Add an item that waits nowhere."""
        item.ticket = next(self._tickets)
        self._live += 1
        heappush(self._heap, (item.rank, item.arrival, item.ticket, item))

    def pop(self) -> T:
        """Take the first; the queue must not be empty."""
        while True:
            _, _, ticket, item = heappop(self._heap)
            if item.ticket == ticket:
                item.ticket = -1
                self._live -= 1
                self.rounds += 1
                return item

    def first(self) -> T:
        """What `pop` would take."""
        heap = self._heap
        while heap[0][3].ticket != heap[0][2]:
            heappop(heap)
        return heap[0][3]

    def pop_cheapest(self, extra: Callable[[T], float]) -> T:
        """Take the one of lowest ``rank + extra(item)`` among the first few, the earlier of equals.

        ``extra`` is 0 or more. With a bound E on it nothing passes an item whose rank is lower by
        more than E. The queue must not be empty.
        """
        heap, passed = self._heap, list[tuple[float, int, int, T]]()
        best: tuple[float, int, int, T] | None = None
        lowest = inf
        while heap and len(passed) < _LOOK and heap[0][0] < lowest:
            entry = heappop(heap)
            if entry[3].ticket != entry[2]:
                continue
            passed.append(entry)
            key = entry[0] + extra(entry[3])
            if key < lowest:
                best, lowest = entry, key
        assert best is not None
        for entry in passed:
            if entry is not best:
                heappush(heap, entry)
        item = best[3]
        item.ticket = -1
        self._live -= 1
        self.rounds += 1
        return item

    def remove(self, item: T) -> None:
        """Take this one, which waits here."""
        item.ticket = -1
        self._live -= 1
        if len(self._heap) > 2 * self._live + _SWEEP_AT:
            self._heap = [e for e in self._heap if e[3].ticket == e[2]]
            heapify(self._heap)

    def items(self) -> list[T]:
        """Everything that waits, in no particular order."""
        return [e[3] for e in self._heap if e[3].ticket == e[2]]


class StarvationQueue(Generic[T]):
    """A queue on (starvation level, rank, arrival), aging by rounds as in arXiv 2603.22206.

    A round is one pop. An item passed over in ``starvation_rounds`` (S) of them drops by one level
    and so runs before all of higher level. Its ``level`` is brought up to date when it leaves.

    Items that came in at the same round modulo S drop in the same rounds, so the order within such
    a cohort never changes: each is a heap. A heap of the cohorts' first items finds the first of
    all. A round changes the level of one cohort, so its cost does not grow with those that starve.
    """

    def __init__(self, tickets: Iterator[int], starvation_rounds: int) -> None:
        self._tickets = tickets
        self._starvation_rounds = starvation_rounds
        # By cohort: (level that it would have had in round 0, rank, arrival, ticket, item).
        self._cohorts: dict[int, list[tuple[int, float, int, int, T]]] = {}
        # (level, rank, arrival, cohort, ticket): the first of each cohort, and outdated entries.
        self._firsts: list[tuple[int, float, int, int, int]] = []
        self._live = 0
        self._dead = 0
        self.rounds = 0

    def __len__(self) -> int:
        return self._live

    def push(self, item: T) -> None:
        """Add an item that waits nowhere, at the level it has."""
        item.ticket = next(self._tickets)
        item.queued_round = self.rounds
        self._live += 1
        age, cohort = divmod(self.rounds, self._starvation_rounds)
        heap = self._cohorts.setdefault(cohort, [])
        entry = (item.level + age, item.rank, item.arrival, item.ticket, item)
        heappush(heap, entry)
        if heap[0] is entry:
            self._show_first(cohort)

    def pop(self) -> T:
        """Take the first; all that stay have been passed over once more. Not when empty."""
        while True:
            _, _, _, cohort, ticket = heappop(self._firsts)
            heap = self._cohorts.get(cohort)
            if heap is None or heap[0][3] != ticket:
                continue  # outdated: the first of this cohort has an entry of its own
            if heap[0][4].ticket == ticket:
                break
            self._show_first(cohort)
        item = heappop(heap)[4]
        self._leave(item)
        self.rounds += 1
        self._show_first(cohort)
        self._show_first(self.rounds % self._starvation_rounds)
        self._sweep()
        return item

    def remove(self, item: T) -> None:
        """Take this one, which waits here."""
        self._leave(item)
        self._dead += 1
        self._sweep()

    def items(self) -> list[T]:
        """Everything that waits, in no particular order."""
        return [e[4] for heap in self._cohorts.values() for e in heap if e[4].ticket == e[3]]

    def _leave(self, item: T) -> None:
        item.ticket = -1
        item.level -= (self.rounds - item.queued_round) // self._starvation_rounds
        self._live -= 1

    def _show_first(self, cohort: int) -> None:
        """Enter the first of a cohort, at the level it has now, among the first."""
        heap = self._cohorts.get(cohort)
        if heap is None:
            return
        while heap and heap[0][4].ticket != heap[0][3]:
            heappop(heap)
            self._dead -= 1
        if not heap:
            del self._cohorts[cohort]
            return
        level, rank, arrival, ticket, _ = heap[0]
        level -= (self.rounds - cohort) // self._starvation_rounds
        heappush(self._firsts, (level, rank, arrival, cohort, ticket))

    def _sweep(self) -> None:
        outdated = len(self._firsts) > 2 * self._live + _SWEEP_AT
        if self._dead > self._live + _SWEEP_AT:
            outdated = True
            self._dead = 0
            for heap in self._cohorts.values():
                heap[:] = [e for e in heap if e[4].ticket == e[3]]
                heapify(heap)
        if outdated:
            self._firsts.clear()
            for cohort in list(self._cohorts):
                self._show_first(cohort)


Queue = RankQueue[T] | StarvationQueue[T]
