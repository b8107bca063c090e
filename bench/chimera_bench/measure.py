"""`chimera measure`: what a running engine costs, from outside, as a profile for the simulator.

Talks to a daemon as any client does and pins its requests to a model. Whole answers are timed, not
streamed tokens: a stream costs an engine time of its own, and stages of workflows seldom stream.
Terms come from differences between such times, so that what a request spends outside of the
engine's steps cancels out; it is told apart as `overhead_s`. Knows no engine.
"""

import argparse
import asyncio
import random
import statistics
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from chimera_bench.engine_profiles import StepSample, fit_steps, measured
from chimera_bench.sim_engine import EngineProfile
from chimera_daemon import config as configuration
from chimera_daemon import wire
from chimera_daemon.client import ChimeraError, Client, Reply, connect

DEFAULT_TOKEN_BUDGET: int = next(
    field.default for field in msgspec.structs.fields(EngineProfile) if field.name == "token_budget"
)
_EXIT_FAILED = 1
_CONNECT_S = 5.0
_REPETITIONS = 5
_BEGUN, _OUTPUT = 16, 80  # tokens of the two batches whose difference is timed
_SHORT, _LONG = 24, 1024  # tokens of prompts; the long one leaves half of the context
_MIN_CONTEXT = 256
_TIMEOUT_S = 300.0  # of a request: a slow engine under a full batch
_TRIES = 5  # whether a prefix cache is there
_LOOKS = 4  # batches during which the memory in use is looked at
_LOOK_S = 0.05
_FILLED = 0.9  # of the KV memory, at most, by a measured batch
_SAVED = 0.5  # of a prompt's reading, by a prefix cache, when it comes again
_WORDS = ("add", "take", "books", "and", "seven", "the", "number", "total", "of", "each", "left")


class MeasureError(RuntimeError):
    """The engine cannot be measured as it is; the message says what to change."""


class Measurement(Struct, frozen=True):
    """A profile and what it was fitted to."""

    engine: str
    model: str
    profile: EngineProfile
    samples: tuple[StepSample, ...]  # medians over the rounds
    relative_error: float  # root mean square, of the fitted samples
    spread: float  # of a sample over the rounds: median of (largest - smallest) / median
    rounds: int
    notes: tuple[str, ...] = ()


class Bounds(Struct, frozen=True):
    """What the engine holds, as far as it can be seen from outside."""

    engine: str
    model: str
    slots: int
    context_tokens: int
    kv_tokens: int
    prefix_cache: bool
    token_budget: int
    notes: tuple[str, ...] = ()


class Round(Struct, frozen=True):
    """One repetition of all batches."""

    samples: tuple[StepSample, ...]
    overheads_s: tuple[float, ...]  # of requests beside a batch, one for each length of prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chimera measure`."""
    parser.add_argument("--connect", default=configuration.Config().front, metavar="ADDRESS",
                        help="the daemon's front address (default: %(default)s)")  # fmt: skip
    parser.add_argument("--model", required=True, metavar="NAME",
                        help="the model that the engine serves")  # fmt: skip
    parser.add_argument("--name", help="of the engine in the table (default: its own)")
    parser.add_argument("--repetitions", type=_positive, default=_REPETITIONS, metavar="N",
                        help="of every batch; medians count (default: %(default)s)")  # fmt: skip
    parser.add_argument("--kv-tokens", type=_positive, metavar="TOKENS",
                        help="that the engine's KV cache holds, as its log says at the start "
                        "(default: estimated from the share in use that it reports)")  # fmt: skip
    parser.add_argument("--token-budget", type=_positive, metavar="TOKENS",
                        default=DEFAULT_TOKEN_BUDGET,
                        help="of a step, vLLM's max_num_batched_tokens, which cannot be seen from "
                        "outside (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="TOML", help="also write the table there")


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number of at least 1")
    return number


def require_numpy() -> None:
    """Raises `ConfigError` where what fits the times is not installed: now, not after minutes."""
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        raise configuration.ConfigError(
            f"{error}; measuring needs: pip install 'chimera-daemon[bench]'"
        ) from error


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write the table; the exit code is 0 if there is one."""
    require_numpy()
    out: Path | None = arguments.out
    if out is not None and not out.parent.is_dir():
        raise configuration.ConfigError(f"--out: there is no folder {out.parent}")
    try:
        wire.check_address(arguments.connect)
    except ValueError as error:
        raise configuration.ConfigError(f"--connect: {error}") from error
    try:
        found = asyncio.run(_run(arguments))
    except (ChimeraError, MeasureError) as error:
        print(f"chimera measure: {error}")
        return _EXIT_FAILED
    text = to_toml(found, arguments.name or found.engine)
    print(text, end="")
    if out is not None:
        out.write_text(text, encoding="utf-8")
    return 0


async def _run(arguments: argparse.Namespace) -> Measurement:
    async with connect(arguments.connect, timeout_s=_CONNECT_S) as client:
        gauge = Gauge(client, arguments.model)
        bounds = await gauge.bounds(arguments.kv_tokens, arguments.token_budget)
        rounds: list[Round] = []
        for number in range(arguments.repetitions):
            print(f"# round {number + 1} of {arguments.repetitions}", flush=True)
            rounds.append(await gauge.round(bounds))
    return fitted(bounds, rounds)


class Gauge:
    """Measures the one engine of a daemon that serves a model; nothing else may use it meanwhile.

    Methods raise `MeasureError` where the engine cannot be measured, and the client's errors.
    """

    def __init__(
        self, client: Client, model: str, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._client = client
        self._model = model
        self._sleep = sleep
        self._head = 0.0  # tokens of a prompt without words
        self._per_word = 1.0

    async def bounds(self, kv_tokens: int | None, token_budget: int) -> Bounds:
        """Warm up and find out what the engine holds. None: estimate the memory."""
        row = await self._row()
        slots, context_tokens = row["max_inflight"], row["context_tokens"]
        if slots < 2:
            raise MeasureError(
                f"engine {row['engine']!r} runs one request at a time: what a batch costs cannot "
                "be told; give it `max_inflight` of at least 2"
            )
        if context_tokens < _MIN_CONTEXT:
            raise MeasureError(
                f"engine {row['engine']!r} has a context of {context_tokens} tokens; at least "
                f"{_MIN_CONTEXT} are needed to tell what the KV cache costs"
            )
        await self._check_idle()
        await self._learn_words()
        long = _long(context_tokens)
        for prompt in (_SHORT, long):  # shapes that have not been seen compile
            await self._batch(min(slots, 4), prompt, _BEGUN)
        notes: list[str] = []
        if kv_tokens is None:
            kv_tokens = await self._kv_tokens(slots, context_tokens, notes)
        cached = await self._caches(long)
        return Bounds(
            *(row["engine"], self._model, slots, context_tokens, kv_tokens, cached, token_budget),
            notes=tuple(notes),
        )

    async def round(self, bounds: Bounds) -> Round:
        """Measure every batch once.

        A batch of n answers of 80 tokens less one of 16 tokens gives the seconds of a step of n
        sequences. With one-token requests beside it, one after the other at random moments, it
        takes longer: per request, by what a step takes longer that reads a prompt. What such a
        request takes itself, beyond that step and half of the one under way when it comes, is spent
        outside of steps. An idle engine would show less of it: there is no other work to wait for.
        """
        long = _long(bounds.context_tokens)
        samples: list[StepSample] = []
        for prompt in (_SHORT, long):
            for n in _batches(bounds, prompt):
                begun_s, _ = await self._batch(n, prompt, _BEGUN)
                seconds, tokens = await self._batch(n, prompt, _OUTPUT)
                step_s = (seconds - begun_s) / (_OUTPUT - _BEGUN)
                if step_s <= 0.0:
                    raise MeasureError(
                        f"{n} answers of {_OUTPUT} tokens took no longer than of {_BEGUN}: the "
                        "engine is too fast to be measured from outside, or was disturbed"
                    )
                samples.append(StepSample(n, _held(n, tokens), 0, step_s))
        n = bounds.slots // 2
        plain = next(sample for sample in samples if sample.sequences == n)
        before_s, _ = await self._batch(n, _SHORT, _OUTPUT)
        overheads_s: list[float] = []
        for prompt in (_SHORT, long // 4, long):
            seconds, latency_s, tokens = await self._beside(n, prompt, plain.seconds)
            after_s, _ = await self._batch(n, _SHORT, _OUTPUT)
            step_s = plain.seconds + max(0.0, seconds - 0.5 * (before_s + after_s)) / len(tokens)
            read = round(statistics.fmean(tokens))
            samples.append(StepSample(n, plain.kv_tokens, read, step_s, 1))
            overheads_s.append(latency_s - step_s - 0.5 * plain.seconds)
            before_s = after_s
        await self._check_idle()
        return Round(tuple(samples), tuple(overheads_s))

    # Requests.

    async def _one(self, prompt_tokens: int, output_tokens: int, text: str | None = None) -> Reply:
        words = max(1, round((prompt_tokens - self._head) / self._per_word))
        text = text or " ".join(random.choices(_WORDS, k=words))
        async with self._client.workflow(kind="measure") as workflow:
            reply = await workflow.generate(
                [{"role": "user", "content": text}],
                max_tokens=output_tokens,
                model=self._model,
                timeout_s=_TIMEOUT_S,
                ignore_eos=True,
            )
        if reply.usage.output_tokens != output_tokens:
            raise MeasureError(
                f"engine {reply.engine!r} answered with {reply.usage.output_tokens} tokens instead "
                f"of {output_tokens}: it must be one that heeds `ignore_eos`"
            )
        return reply

    async def _batch(self, n: int, prompt_tokens: int, output_tokens: int) -> tuple[float, float]:
        """Mean seconds until an answer, and mean tokens of the prompts."""
        replies = await asyncio.gather(*(self._one(prompt_tokens, output_tokens) for _ in range(n)))
        seconds = statistics.fmean(reply.latency_s for reply in replies)
        return seconds, statistics.fmean(reply.usage.prompt_tokens for reply in replies)

    async def _beside(
        self, n: int, prompt_tokens: int, step_s: float
    ) -> tuple[float, float, list[int]]:
        """One-token requests beside a batch.

        Seconds of the batch, mean seconds of the requests, the tokens of their prompts.
        """
        running = asyncio.ensure_future(self._batch(n, _SHORT, _OUTPUT))
        replies: list[Reply] = []
        while True:
            await self._sleep(random.uniform(0.0, 2.0 * step_s))
            reply = await self._one(prompt_tokens, 1)
            if running.done():
                break
            replies.append(reply)
        seconds, _ = await running
        if len(replies) < 2:
            raise MeasureError(
                f"{len(replies)} requests were answered while a batch ran: the engine is too fast "
                "to be measured from outside, or keeps requests waiting"
            )
        # The first one has waited for the prompts of the batch.
        latency_s = statistics.fmean(reply.latency_s for reply in replies[1:])
        return seconds, latency_s, [reply.usage.prompt_tokens for reply in replies]

    async def _learn_words(self) -> None:
        few, many = [await self._one(0, 1, " ".join(_WORDS * n)) for n in (1, 4)]
        more = many.usage.prompt_tokens - few.usage.prompt_tokens
        self._per_word = more / (3 * len(_WORDS))
        self._head = few.usage.prompt_tokens - len(_WORDS) * self._per_word

    # What the engine holds.

    async def _row(self) -> dict[str, Any]:
        core = (await self._client.status())["core"]
        rows = [row for row in core["engines"] if row["model"] == self._model]
        if not rows:
            models = ", ".join(sorted({row["model"] for row in core["engines"]})) or "none"
            raise MeasureError(f"no engine serves model {self._model!r}; there are: {models}")
        if len(rows) > 1:
            names = ", ".join(row["engine"] for row in rows)
            raise MeasureError(
                f"{len(rows)} engines serve model {self._model!r} ({names}), and a request can be "
                "pinned to a model only: measure with a daemon that has one of them"
            )
        return rows[0]

    async def _check_idle(self) -> None:
        core = (await self._client.status())["core"]
        running = sum(row["running"] for row in core["models"] if row["name"] == self._model)
        waiting = core["stages"]["waiting"]
        if running or waiting:
            raise MeasureError(
                f"the engine of model {self._model!r} has other work ({running} stages running, "
                f"{waiting} waiting): measure it while nobody else uses it"
            )

    async def _kv_tokens(self, slots: int, context_tokens: int, notes: list[str]) -> int:
        """From the share of its memory that the engine reports while it holds known contexts."""
        n, long = min(slots, 4), _long(context_tokens)
        most = 0.0
        for _ in range(_LOOKS):
            running = asyncio.ensure_future(self._batch(n, long, _OUTPUT))
            while not running.done():
                await self._sleep(_LOOK_S)
                most = max(most, (await self._row())["reported"]["kv_use"])
            await running
        if most <= 0.0:
            notes.append("kv_tokens: not seen; assumed to hold the context of every slot")
            return slots * context_tokens
        notes.append("kv_tokens: estimated from the share that the engine reported in use")
        return _two_digits(n * (long + _OUTPUT) / most)

    async def _caches(self, prompt_tokens: int) -> bool:
        """Whether the same prompt is read faster when it comes again."""
        short = statistics.median([(await self._one(_SHORT, 1)).latency_s for _ in range(_TRIES)])
        saved: list[bool] = []
        words = max(1, round((prompt_tokens - self._head) / self._per_word))
        for _ in range(_TRIES):
            text = " ".join(random.choices(_WORDS, k=words))
            first, again = [(await self._one(0, 1, text)).latency_s for _ in range(2)]
            saved.append(first - again > _SAVED * (first - short) > 0.0)
        return sum(saved) > _TRIES // 2


def fitted(bounds: Bounds, rounds: Sequence[Round]) -> Measurement:
    """Medians over the rounds, and the profile that fits them best; raises `MeasureError`."""
    columns = list(zip(*(each.samples for each in rounds), strict=True))
    samples = tuple(_median(column) for column in columns)
    try:
        cost = fit_steps(samples)
        profile = _profile(samples, bounds)
    except ValueError as error:
        raise MeasureError(f"the times do not tell what steps cost: {error}") from error
    overhead_s = statistics.median(s for each in rounds for s in each.overheads_s)
    profile = msgspec.structs.replace(profile, overhead_s=max(0.0, overhead_s))
    spreads = [_range(column) / _median(column).seconds for column in columns]
    return Measurement(
        *(bounds.engine, bounds.model, profile, samples, cost.relative_error),
        spread=statistics.median(spreads),
        rounds=len(rounds),
        notes=bounds.notes,
    )


def _profile(samples: Sequence[StepSample], bounds: Bounds) -> EngineProfile:
    return measured(
        samples,
        slots=bounds.slots,
        kv_tokens=bounds.kv_tokens,
        context_tokens=bounds.context_tokens,
        token_budget=max(bounds.token_budget, bounds.slots + 1),
        prefix_cache=bounds.prefix_cache,
    )


def to_toml(found: Measurement, name: str) -> str:
    """A cluster file of this engine (`sim_cluster`), with comments on how far to trust it."""
    lines = [
        f"# measured: engine {found.engine}, model {found.model}, {found.rounds} rounds",
        f"# fit: {found.relative_error:.1%} root mean square error over {len(found.samples)} kinds "
        f"of steps; each varied by {found.spread:.1%} between rounds",
        *(f"# {note}" for note in found.notes),
        "[[engines]]",
        f"name = {_quoted(name)}",
        f"model = {_quoted(found.model)}",
        "",
        "[engines.profile]",
    ]
    for key, value in msgspec.to_builtins(found.profile).items():
        if value != 0.0 or key in _ALWAYS:
            lines.append(f"{key} = {_number(value)}")
    return "\n".join(lines) + "\n"


_ALWAYS = ("step_per_seq_s", "step_per_kv_token_s", "prefill_s_per_token", "prefix_cache")


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()


def _number(value: float | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _long(context_tokens: int) -> int:
    return min(_LONG, context_tokens // 2 - _OUTPUT)


def _batches(bounds: Bounds, prompt: int) -> list[int]:
    """Powers of two and all slots, as far as memory lasts; always with half of the slots."""
    sizes = {1 << i for i in range(bounds.slots.bit_length())} | {bounds.slots, bounds.slots // 2}
    most = max(bounds.slots // 2, int(_FILLED * bounds.kv_tokens / (prompt + _OUTPUT)))
    return sorted(n for n in sizes if n <= min(most, bounds.slots))


def _held(n: int, prompt_tokens: float) -> int:
    """KV tokens of a batch in the mean over the steps that are timed."""
    return round(n * (prompt_tokens + 0.5 * (_BEGUN + _OUTPUT)))


def _median(column: Sequence[StepSample]) -> StepSample:
    """Equal batches; the tokens of their prompts differ a little."""

    def of(name: str) -> float:
        return statistics.median(getattr(sample, name) for sample in column)

    first = column[0]
    held, read = round(of("kv_tokens")), round(of("prefill_tokens"))
    return StepSample(first.sequences, held, read, of("seconds"), first.prompts)


def _range(column: Sequence[StepSample]) -> float:
    return max(s.seconds for s in column) - min(s.seconds for s in column)


def _two_digits(value: float) -> int:
    return int(float(f"{value:.1e}"))
