"""The queues against naive ones that sort a list, and count every round of every item."""

from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from chimera_daemon.queues import RankQueue, StarvationQueue


class Item(Struct, eq=False):
    """What a queue needs."""

    rank: float
    arrival: int
    level: int = 0
    ticket: int = -1
    queued_round: int = 0


class NaiveItem(Struct, eq=False):
    """The same item where every round is counted."""

    item: Item
    level: int
    passed_over: int = 0


class NaiveQueue:
    """A round passes over each item that stays; in the S-th of them its level drops."""

    def __init__(self, rounds: int | None) -> None:
        self.rounds = rounds
        self.waiting: list[NaiveItem] = []

    def push(self, item: Item) -> None:
        self.waiting.append(NaiveItem(item, item.level))

    def pop(self) -> NaiveItem:
        first = min(self.waiting, key=lambda n: (n.level, n.item.rank, n.item.arrival))
        self.waiting.remove(first)
        for other in self.waiting:
            other.passed_over += 1
            if other.passed_over == self.rounds:
                other.level -= 1
                other.passed_over = 0
        return first

    def remove(self, item: Item) -> NaiveItem:
        found = next(n for n in self.waiting if n.item is item)
        self.waiting.remove(found)
        return found


def make_queue(
    rounds: int | None, tickets: Iterator[int] | None = None
) -> RankQueue[Item] | StarvationQueue[Item]:
    """A queue that ages by rounds if these are given."""
    tickets = tickets or count(1)
    return StarvationQueue[Item](tickets, rounds) if rounds else RankQueue[Item](tickets)


STEPS = st.lists(
    st.tuples(st.sampled_from(["push", "push", "pop", "remove", "push back"]), st.integers(0, 9)),
    max_size=120,
)


@given(rounds=st.none() | st.integers(1, 6), steps=STEPS)
def test_queues_do_what_naive_ones_do(rounds: int | None, steps: list[tuple[str, int]]) -> None:
    queue = make_queue(rounds)
    naive = NaiveQueue(rounds)
    outside: list[Item] = []
    for arrival, (what, number) in enumerate(steps):
        if what == "push" or (what == "push back" and outside):
            item = outside.pop() if what == "push back" else Item(float(number % 4), arrival)
            queue.push(item)
            naive.push(item)
        elif naive.waiting and what == "pop":
            expected = naive.pop()
            item = queue.pop()
            assert item is expected.item
            assert item.level == expected.level
            outside.append(item)
        elif naive.waiting and what == "remove":
            item = naive.waiting[number % len(naive.waiting)].item
            expected = naive.remove(item)
            queue.remove(item)
            assert item.level == expected.level
            outside.append(item)
        assert len(queue) == len(naive.waiting)
        assert {i.arrival for i in queue.items()} == {n.item.arrival for n in naive.waiting}
        assert all(i.ticket == -1 for i in outside)
    while naive.waiting:
        expected = naive.pop()
        item = queue.pop()
        assert (item, item.level) == (expected.item, expected.level)
    with pytest.raises(IndexError):
        queue.pop()


@given(
    ranks=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=16),
    removed=st.integers(0, 15),
)
def test_the_cheapest_has_the_lowest_sum_and_the_rest_stays_in_order(
    ranks: list[tuple[int, int]], removed: int
) -> None:
    queue = RankQueue[Item](count(1))
    items = [Item(float(rank), n) for n, (rank, _) in enumerate(ranks)]
    for item in items:
        queue.push(item)
    if removed < len(items) - 1:
        queue.remove(items.pop(removed))
    extras = {n: float(extra) for n, (_, extra) in enumerate(ranks)}
    expected = min(items, key=lambda i: (i.rank + extras[i.arrival], i.rank, i.arrival))
    assert queue.pop_cheapest(lambda item: extras[item.arrival]) is expected
    assert (expected.ticket, len(queue)) == (-1, len(items) - 1)
    items.remove(expected)
    rest = sorted(items, key=lambda i: (i.rank, i.arrival))
    assert [queue.pop() for _ in rest] == rest


def test_the_cheapest_is_sought_among_the_first_sixteen() -> None:
    queue = RankQueue[Item](count(1))
    for number in range(17):
        queue.push(Item(0.0, number))
    assert queue.pop_cheapest(lambda item: 0.0 if item.arrival == 16 else 1.0).arrival == 0


@pytest.mark.parametrize("rounds", [None, 3])
def test_an_item_that_moved_to_another_queue_is_in_that_one_only(rounds: int | None) -> None:
    tickets = count(1)
    here, there = make_queue(rounds, tickets), make_queue(rounds, tickets)
    item = Item(1.0, 1)
    here.push(item)
    here.remove(item)
    there.push(item)
    assert (here.items(), len(here)) == ([], 0)
    here.push(Item(2.0, 2))
    assert here.pop().arrival == 2
    assert there.pop() is item


def entries(queue: RankQueue[Item] | StarvationQueue[Item]) -> int:
    """How many entries a queue holds, dead ones included, wherever it holds them."""
    lists = [v for v in vars(queue).values() if isinstance(v, list)]
    lists += [v for d in vars(queue).values() if isinstance(d, dict) for v in d.values()]
    return sum(map(len, lists))


@pytest.mark.parametrize("rounds", [None, 1, 7, 200, 1 << 40])
@pytest.mark.parametrize("waiting", [1, 300])
def test_queues_hold_no_more_than_a_few_entries_per_item_however_long_they_run(
    rounds: int | None, waiting: int
) -> None:
    queue = make_queue(rounds)
    for arrival in range(waiting):
        queue.push(Item(float(arrival), arrival))
    for arrival in range(waiting, 5000):
        queue.push(Item(float(-arrival if arrival % 2 else arrival), arrival))
        if arrival % 3:
            queue.pop()
        else:
            queue.remove(queue.items()[-1])
        assert entries(queue) <= 5 * waiting + 400
