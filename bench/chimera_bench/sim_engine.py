"""One simulated engine with its own truth: slots, KV memory, batch, prefix cache, queue.

Knows nothing of the scheduler core and shares no belief with it. Works as vLLM does, in steps: a
step gives every decoding sequence one token and fills what is left of its token budget with prompt
chunks, which makes it longer for all. Time does not go step by step here: while the batch stays the
same, any number of steps is one *leap*, whose end has a closed form (see `EngineProfile`).
"""

from collections import OrderedDict, deque
from heapq import heappop, heappush
from math import inf, isfinite, sqrt
from typing import NamedTuple

from msgspec import Struct

from chimera_daemon.messages import EngineStats, Profile

# Steps are counted in floating point time; this part of a step is rounding, not time.
_ROUNDING = 1e-9
_MEASURED_BATCH = 16  # by which an engine measures what a sequence costs


class EngineProfile(Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine costs and holds.

    A step of n decoding sequences that reads k prompt tokens while the running sequences hold kv
    tokens takes ``step_s + step_per_seq_s n + step_per_kv_token_s kv + prefill_s_per_token k``
    seconds, and ``prompt_s`` more for each prompt that it begins to read. A mixture of experts
    reads only those that its tokens touch: to read all takes ``experts_s``, of which a step takes
    the share ``1 - (1 - expert_share)^(n + k)``. What a request needs beside steps (messages,
    tokenising, answering) holds up no other: ``overhead_s``, all of it before the first step.
    Raises `ValueError` where a value makes no sense.
    """

    step_s: float
    step_per_seq_s: float
    step_per_kv_token_s: float
    prefill_s_per_token: float
    slots: int = 64  # sequences at work at once (vLLM: `max_num_seqs`)
    kv_tokens: int = 100_000  # that running sequences and the prefix cache hold together
    context_tokens: int = 8192  # of one sequence, prompt and output
    token_budget: int = 2048  # of one step (vLLM: `max_num_batched_tokens`)
    prefix_cache: bool = True
    experts_s: float = 0.0
    expert_share: float = 0.0  # of the experts, that one token takes
    prompt_s: float = 0.0
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            *("step_s", "step_per_seq_s", "step_per_kv_token_s", "prefill_s_per_token"),
            *("experts_s", "prompt_s", "overhead_s"),
        ):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0.0):
                raise ValueError(f"`{name}` must be a finite time, not {value}")
        if self.step_s <= 0.0:
            raise ValueError("`step_s` must be more than 0: a step takes time")
        for name in ("slots", "kv_tokens", "context_tokens", "token_budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, not {getattr(self, name)}")
        if not 0.0 <= self.expert_share <= 1.0:
            raise ValueError(f"`expert_share` must be from 0 to 1, not {self.expert_share}")
        if self.token_budget <= self.slots:
            raise ValueError(
                f"`token_budget` ({self.token_budget}) must be more than `slots` ({self.slots}): "
                "decoding alone would use it up"
            )

    def step(
        self, sequences: int, kv_tokens: int = 0, prefill_tokens: int = 0, prompts: int = 0
    ) -> float:
        """Seconds of one step."""
        seconds = self.step_s
        if self.experts_s:
            untouched = (1.0 - self.expert_share) ** (sequences + prefill_tokens)
            seconds += self.experts_s * (1.0 - untouched)
        return (
            seconds
            + self.step_per_seq_s * sequences
            + self.step_per_kv_token_s * kv_tokens
            + self.prefill_s_per_token * prefill_tokens
            + self.prompt_s * prompts
        )

    def believed(self) -> Profile:
        """What the engine says of itself: measured as `chimera_daemon.engines.profiling` does.

        That is by batches of 1 and 16 with short prompts, so without the KV part.
        """
        one, batch = self.step(1), min(_MEASURED_BATCH, self.slots)
        per_sequence = (self.step(batch) - one) / (batch - 1) if batch > 1 else 0.0
        return Profile(max(1e-5, one - per_sequence), per_sequence, self.prefill_s_per_token)

    def refusal(self, prompt_tokens: int, output_tokens: int) -> str:
        """Why a sequence of this size can never run here; empty if it can."""
        needed, room = prompt_tokens + output_tokens, min(self.context_tokens, self.kv_tokens)
        return f"{needed} tokens do not fit into the {room} of a sequence" if needed > room else ""


def _series(steps: int, first: float, more: float) -> float:
    """Sum of so many terms, each of them greater than the one before by ``more``."""
    return steps * first + more * (steps * (steps - 1) // 2)


class Finished(NamedTuple):
    """An attempt that has all its tokens."""

    attempt_id: int
    output_tokens: int
    started_s: float  # when it was first given a slot


class _Sequence:
    """One attempt. Waiting: `held` is 0. Reading its prompt: `unread` > 0. Else decoding."""

    __slots__ = (
        "attempt_id", "priority", "order", "prompt", "output", "prefix", "shared", "read",
        "unread", "produced", "joined", "ends", "decoding", "cancelled", "arrives_s", "started_s",
    )  # fmt: skip

    def __init__(
        self, attempt_id: int, priority: int, order: int, prompt: int, output: int, prefix: str,
        shared: int,
    ) -> None:  # fmt: skip
        self.attempt_id = attempt_id
        self.priority = priority
        self.order = order  # of arrival
        self.prompt = prompt
        self.output = output
        self.prefix = prefix
        self.shared = shared
        self.read = prompt  # tokens to hold before the next one comes: recomputing adds output
        self.unread = 0  # of them, since it has its slot
        self.produced = 0  # output tokens when it began to decode
        self.joined = 0  # the step count at that time
        self.ends = 0  # the step count with which it has all its tokens
        self.decoding = False
        self.cancelled = False
        self.arrives_s = 0.0
        self.started_s = -1.0


class SimEngine:
    """Drive it so: at each instant `complete` what ends, `submit`, `cancel`, then `settle` once.

    ``ends_s`` is when the current leap ends (infinity: idle); it changes with `settle`, `submit`
    and `cancel`, never to a time before theirs.
    """

    __slots__ = (
        "profile", "ends_s", "busy_s", "events", "admissions", "preemptions", "prefilled_tokens",
        "cached_tokens", "output_tokens", "peak_running", "peak_kv", "_began_s", "_leap", "_base",
        "_growth", "_chunk", "_takes", "_boundary", "_running", "_prefilling", "_decoding",
        "_waiting", "_arriving", "_queue", "_finishing", "_cancelled", "_kv", "_reserved", "_steps",
        "_order", "_cache", "_cached", "_seen_tokens", "_seen_s",
    )  # fmt: skip

    def __init__(self, profile: EngineProfile) -> None:
        self.profile = profile
        self.ends_s = inf
        self.busy_s = 0.0
        self.events = 0  # attempts taken, admitted, finished, preempted, cancelled; leaps ended
        self.admissions = 0
        self.preemptions = 0
        self.prefilled_tokens = 0  # really read
        self.cached_tokens = 0  # found in the prefix cache instead
        self.output_tokens = 0
        self.peak_running = 0
        self.peak_kv = 0
        # The current leap: when it began, its steps, seconds of its first step without growth,
        # tokens that a step adds to the memory, prompt tokens of a step and whose they are.
        self._began_s = 0.0
        self._leap = 0
        self._base = 0.0
        self._growth = 0
        self._chunk = 0
        self._takes: list[tuple[_Sequence, int]] = []
        self._boundary = True  # between two steps: the next leap has not been planned
        self._running: dict[int, _Sequence] = {}  # all with a slot
        self._prefilling: deque[_Sequence] = deque()  # those of them that read, in order
        self._decoding = 0  # the number of the others
        self._waiting: dict[int, _Sequence] = {}
        self._arriving: deque[_Sequence] = deque()  # those of them on their way, in order
        self._queue: list[
            tuple[int, int, _Sequence]
        ] = []  # the others; a heap, dead where cancelled
        self._finishing: list[tuple[int, int, _Sequence]] = []  # heap by step count; may be dead
        self._cancelled: list[_Sequence] = []
        self._kv = 0  # tokens that running sequences hold
        self._reserved = 0  # tokens of prompts that running sequences have not read yet
        self._steps = 0
        self._order = 0
        self._cache: OrderedDict[str, int] = OrderedDict()  # prefix -> tokens, longest unused first
        self._cached = 0
        self._seen_tokens = 0
        self._seen_s = 0.0

    @property
    def running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences without one."""
        return len(self._waiting)

    # What comes in.

    def submit(
        self,
        now: float,
        attempt_id: int,
        priority: int,
        prompt_tokens: int,
        output_tokens: int,
        prefix: str = "",
        shared_tokens: int = 0,
    ) -> None:
        """Take an attempt that will produce so many tokens. Lower priority runs first.

        ``shared_tokens`` of the prompt are the context known as ``prefix``, so that they need not
        be read where that is cached. Raises `ValueError` for what can never run and what is here.
        """
        refusal = self.profile.refusal(prompt_tokens, output_tokens)
        if refusal or prompt_tokens < 1 or output_tokens < 1:
            raise ValueError(f"attempt {attempt_id}: {refusal or 'a token count below 1'}")
        if attempt_id in self._running or attempt_id in self._waiting:
            raise ValueError(f"attempt {attempt_id} is here already")
        self._order += 1
        self.events += 1
        sequence = _Sequence(
            attempt_id, priority, self._order, prompt_tokens, output_tokens, prefix, shared_tokens
        )
        self._waiting[attempt_id] = sequence
        sequence.arrives_s = now + self.profile.overhead_s
        if self.profile.overhead_s:
            self._arriving.append(sequence)
        else:
            heappush(self._queue, (priority, self._order, sequence))
        if not self._boundary:
            self._heed(sequence.arrives_s)

    def cancel(self, now: float, attempt_id: int) -> None:
        """Stop an attempt at the end of the current step; legal for any number."""
        sequence = self._waiting.pop(attempt_id, None) or self._running.get(attempt_id)
        if sequence is None or sequence.cancelled:
            return
        self.events += 1
        sequence.cancelled = True
        if attempt_id in self._running:
            self._cancelled.append(sequence)
            if self._boundary:
                self._drop_cancelled()
            else:
                self._shorten(now)

    # Leaps.

    def settle(self, now: float) -> None:
        """Plan the next leap if none is under way; call it when all of this instant is known."""
        if self._leap:
            return
        if not self._boundary:
            self.complete()
        self._began_s = now
        arriving = self._arriving
        while arriving and (arriving[0].arrives_s <= now or arriving[0].cancelled):
            sequence = arriving.popleft()
            heappush(self._queue, (sequence.priority, sequence.order, sequence))
        begun = self.admissions
        profile = self.profile
        preempted = False
        if self._kv + self._reserved + self._decoding > profile.kv_tokens:
            self._make_room()
            preempted = True
        elif self._queue and len(self._running) < profile.slots:
            self._admit()
        begun = self.admissions - begun
        decoding = self._decoding
        chunk = self._fill_budget() if self._prefilling else 0
        self._boundary = False
        if not decoding and not chunk:
            assert len(self._waiting) <= len(arriving), "an idle engine lets a sequence wait"
            self._boundary = True
            self.ends_s = arriving[0].arrives_s if arriving else inf
            return
        self._chunk = chunk
        self._growth = growth = decoding + chunk
        self._base = base = profile.step(decoding, self._kv, chunk, begun)
        # After a preemption nobody joins for a step; who does then is open.
        single = preempted or (begun and profile.prompt_s)
        self._leap = steps = 1 if single else self._longest_leap()
        self.ends_s = now + _series(steps, base, profile.step_per_kv_token_s * growth)
        if arriving:
            self._heed(arriving[0].arrives_s)

    def complete(self) -> list[Finished]:
        """The current leap has ended: what finished with it, in order."""
        steps, decoding = self._leap, self._decoding
        self._boundary = True
        if steps:
            self.events += 1
            self.busy_s += self.ends_s - self._began_s
            self._steps += steps
            self._kv += steps * self._growth
            self.output_tokens += steps * decoding
            if self._chunk:
                self._read(steps)
            if self._kv + self._reserved > self.peak_kv:
                self.peak_kv = self._kv + self._reserved
            self._leap = 0
        finished: list[Finished] = []
        heap, now_steps = self._finishing, self._steps
        while heap and heap[0][0] <= now_steps:
            ends, _, sequence = heappop(heap)
            if sequence.decoding and sequence.ends == ends:
                self._finish(sequence)
                if not sequence.cancelled:
                    finished.append(
                        Finished(sequence.attempt_id, sequence.output, sequence.started_s)
                    )
        if self._cancelled:
            self._drop_cancelled()
        return finished

    def _steps_in(self, seconds: float) -> float:
        """The inverse of `_series`; a root of a quadratic, in the form that allows no growth."""
        half = 0.5 * self.profile.step_per_kv_token_s * self._growth
        linear = self._base - half
        return 2.0 * seconds / (linear + sqrt(linear * linear + 4.0 * half * seconds))

    def _heed(self, arrives_s: float) -> None:
        """End the leap with the step in which somebody arrives who may join after it."""
        if len(self._running) >= self.profile.slots:
            return
        # Steps that read a prompt are either single or have no budget left for another.
        if not self._chunk or arrives_s <= self._began_s:
            self._shorten(arrives_s)

    def _shorten(self, now: float) -> None:
        """End the leap with the step that is under way; at its very start, before it."""
        if self._leap <= (1 if now > self._began_s else 0):
            return
        whole = self._steps_in(now - self._began_s)
        steps = int(whole)
        if whole - steps > _ROUNDING:
            steps += 1
        if steps < self._leap:
            self._leap = steps
            # Rounding must not let the engine act before the time of what it reacts to.
            more = self.profile.step_per_kv_token_s * self._growth
            self.ends_s = max(self._began_s + _series(steps, self._base, more), now)

    def _longest_leap(self) -> int:
        """Steps until a sequence finishes, the memory is full or a prompt is read."""
        steps = 1 << 62
        heap, decoding = self._finishing, self._decoding
        if decoding:
            while not (heap[0][2].decoding and heap[0][2].ends == heap[0][0]):
                heappop(heap)
            steps = heap[0][0] - self._steps
            fitting = (self.profile.kv_tokens - self._kv - self._reserved) // decoding
            if fitting < steps:
                steps = fitting
        if self._chunk:
            sequence, take = self._takes[0]
            alone = len(self._takes) == 1 and take < sequence.unread
            steps = min(steps, (sequence.unread - 1) // take) if alone else 1
        assert steps >= 1
        return steps

    # Batch and memory.

    def _make_room(self) -> None:
        """Preempt until the next step fits."""
        while self._kv + self._reserved + self._decoding > self.profile.kv_tokens:
            self._preempt(max(self._running.values(), key=lambda s: (s.priority, s.order)))

    def _admit(self) -> None:
        """Give slots in order of priority, as long as slots, budget and memory last.

        A whole prompt must fit before it is begun, as in vLLM since it reserves it; the first that
        does not fit holds all others back.
        """
        profile, queue, running = self.profile, self._queue, self._running
        budget = profile.token_budget - self._decoding
        budget -= sum(sequence.unread for sequence in self._prefilling)
        room = profile.kv_tokens - self._kv - self._reserved - self._decoding
        while queue and budget > 0 and len(running) < profile.slots:
            sequence = queue[0][2]
            if sequence.cancelled:
                heappop(queue)
                continue
            if sequence.read > room:
                break
            heappop(queue)
            del self._waiting[sequence.attempt_id]
            running[sequence.attempt_id] = sequence
            self._prefilling.append(sequence)
            room -= sequence.read
            found = self._from_cache(sequence)
            sequence.unread = sequence.read - found
            self._kv += found
            self._reserved += sequence.unread
            budget -= sequence.unread
            if sequence.started_s < 0.0:
                sequence.started_s = self._began_s
            self.admissions += 1
            self.events += 1
        if len(running) > self.peak_running:
            self.peak_running = len(running)
        assert self.peak_running <= profile.slots

    def _fill_budget(self) -> int:
        """Share the rest of a step's budget among the prompts, in order; returns its tokens."""
        left = budget = self.profile.token_budget - self._decoding
        self._takes = []
        for sequence in self._prefilling:
            take = min(sequence.unread, left)
            self._takes.append((sequence, take))
            left -= take
            if not left:
                break
        return budget - left

    def _read(self, steps: int) -> None:
        """Prompts have been read so far; with the last of one comes its first token."""
        for sequence, take in self._takes:
            tokens = take * steps
            sequence.unread -= tokens
            self._reserved -= tokens
            self.prefilled_tokens += tokens
            if sequence.unread:
                continue
            self._prefilling.remove(sequence)
            self._decoding += 1
            self.output_tokens += 1
            sequence.decoding = True
            sequence.produced += 1
            sequence.joined = self._steps
            sequence.ends = self._steps + sequence.output - sequence.produced
            heappush(self._finishing, (sequence.ends, sequence.order, sequence))

    def _held(self, sequence: _Sequence) -> int:
        """Tokens in memory of a sequence with a slot. Its newest token comes in with a step."""
        if sequence.decoding:
            return sequence.read + self._steps - sequence.joined
        return sequence.read - sequence.unread

    def _leave(self, sequence: _Sequence) -> int:
        """Take a sequence off its slot and its memory; returns what it held."""
        held = self._held(sequence)
        del self._running[sequence.attempt_id]
        self._kv -= held
        if sequence.decoding:
            self._decoding -= 1
            sequence.decoding = False
        else:
            self._reserved -= sequence.unread
            self._prefilling.remove(sequence)
        return held

    def _finish(self, sequence: _Sequence) -> None:
        self.events += 1
        self._keep(sequence.prefix, self._leave(sequence))

    def _preempt(self, sequence: _Sequence) -> None:
        """Back to the queue; what it has produced is recomputed with its prompt."""
        if sequence.decoding:
            sequence.produced += self._steps - sequence.joined
        self._keep(sequence.prefix, self._leave(sequence))
        sequence.read = sequence.prompt + sequence.produced
        sequence.unread = 0
        self._waiting[sequence.attempt_id] = sequence
        heappush(self._queue, (sequence.priority, sequence.order, sequence))
        self.preemptions += 1
        self.events += 1

    def _drop_cancelled(self) -> None:
        for sequence in self._cancelled:
            if self._running.get(sequence.attempt_id) is sequence:
                self._leave(sequence)
        self._cancelled.clear()

    # Prefix cache: contexts that no running sequence holds, in memory that none needs.

    def _from_cache(self, sequence: _Sequence) -> int:
        """Tokens that need not be read; the last of a prompt always is, its answer comes of it."""
        if not sequence.prefix or not self.profile.prefix_cache:
            return 0
        self._trim_cache()
        cached = self._cache.pop(sequence.prefix, 0)
        if not cached:
            return 0
        self._cached -= cached
        # A preempted sequence finds what it has read and produced itself.
        shared = sequence.shared if sequence.started_s < 0.0 else sequence.read
        found = min(cached, shared, sequence.read - 1)
        self.cached_tokens += found
        return found

    def _keep(self, prefix: str, tokens: int) -> None:
        if not prefix or not tokens or not self.profile.prefix_cache:
            return
        self._cached += tokens - self._cache.pop(prefix, 0)
        self._cache[prefix] = tokens

    def _trim_cache(self) -> None:
        """Give memory back, from the tail of what has not been used for longest.

        Done when somebody looks: what the sequences took meanwhile is gone by then.
        """
        over = self._cached + self._kv + self._reserved - self.profile.kv_tokens
        while over > 0 and self._cache:
            prefix, tokens = next(iter(self._cache.items()))
            cut = min(over, tokens)
            if cut == tokens:
                del self._cache[prefix]
            else:
                self._cache[prefix] = tokens - cut
            self._cached -= cut
            over -= cut

    # What goes out.

    def _steps_done(self, now: float) -> int:
        """Whole steps of the current leap until now."""
        if not self._leap or now <= self._began_s:
            return 0
        return min(int(self._steps_in(now - self._began_s) + _ROUNDING), self._leap)

    def report(self, now: float) -> tuple[EngineStats, dict[int, int]]:
        """The contents of a heartbeat: statistics, output tokens of each decoding attempt."""
        done = self._steps_done(now)
        steps = self._steps + done
        progress = {
            attempt_id: sequence.produced + steps - sequence.joined
            for attempt_id, sequence in self._running.items()
            if sequence.decoding
        }
        tokens = self.output_tokens + done * self._decoding
        seconds = now - self._seen_s
        rate = (tokens - self._seen_tokens) / seconds if seconds > 0.0 else 0.0
        self._seen_s, self._seen_tokens = now, tokens
        held = self._kv + done * self._growth
        use = min(held / self.profile.kv_tokens, 1.0)
        return EngineStats(len(self._running), len(self._waiting), use, rate, tokens), progress

    def check(self) -> None:
        """Assert every bound and sum; for tests. Costs time linear in the state."""
        running = list(self._running.values())
        assert len(running) <= self.profile.slots
        assert self._decoding == sum(s.decoding for s in running)
        assert set(self._prefilling) == {s for s in running if not s.decoding}
        assert self._kv == sum(map(self._held, running))
        assert self._reserved == sum(s.unread for s in running if not s.decoding)
        assert self._kv + self._reserved + self._leap * self._decoding <= self.profile.kv_tokens
        assert not self._running.keys() & self._waiting.keys()
        assert self._cached == sum(self._cache.values())
        assert all(tokens > 0 for tokens in self._cache.values())
        queued = {s.attempt_id for _, _, s in self._queue if not s.cancelled}
        coming = {s.attempt_id for s in self._arriving if not s.cancelled}
        assert queued | coming == self._waiting.keys()
        assert not queued & coming
        for sequence in running:
            if sequence.decoding:
                assert sequence.joined <= self._steps <= sequence.ends
