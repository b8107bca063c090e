"""A deterministic stand-in for an engine, with a token clock: for tests and overhead measurements.

It is not a language model and is never called one. The same payload always gives the same text and
length. Without a step time every attempt is answered inside `submit`; with one, a single timer
drives all running attempts, a token each per step, as continuous batching does.
"""

import asyncio
import heapq
import zlib
from collections.abc import Callable
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta, Struct

from chimera_daemon.config import EngineConfig
from chimera_daemon.engines import echo_openai
from chimera_daemon.engines.backend import BackendInfo, EngineStartError, Events
from chimera_daemon.engines.echo_openai import CHARACTERS_PER_TOKEN, Reply
from chimera_daemon.engines.payload import (
    PayloadError,
    decode_body,
    encode_completion,
    encode_delta,
)
from chimera_daemon.engines.rate import Rate
from chimera_daemon.messages import (
    EngineChunk,
    EngineFailed,
    EngineFinished,
    EngineStats,
    Probability,
    Profile,
    Run,
    Seconds,
    Usage,
)

# A clock that is later than this (a stopped process) goes on from now instead of catching up.
_MAX_LAG_S = 1.0
_VOCABULARY = 1000
_WORDS = tuple(f"w{i % _VOCABULARY}" for i in range(2 * _VOCABULARY))

Length = Annotated[int, Meta(ge=1, le=1_000_000)]


class EchoOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """``args`` of an echo engine. A step of n attempts takes ``step_s + step_per_seq_s * n``."""

    step_s: Seconds = 0.0  # 0: answer at once, without a clock
    step_per_seq_s: Seconds = 0.0
    prefill_s_per_token: Seconds = 0.0  # added to the first step of an attempt
    slots: Annotated[int, Meta(ge=1, le=100_000)] = 64
    reply_tokens: tuple[Length, Length] = (16, 16)  # between these, by a hash of the payload
    context_tokens: Annotated[int, Meta(ge=2, le=10_000_000)] = 32_768
    fail_rate: Probability = 0.0  # of attempts, by a hash of payload and attempt
    seed: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)] = 0


class Timer(Protocol):
    """A callback that is due."""

    def cancel(self) -> object:
        """Forget it."""
        ...


class Clock(Protocol):
    """The part of an event loop that is needed; a test gives one that it can move."""

    def time(self) -> float:
        """Seconds, never going back."""
        ...

    def call_at(self, when: float, callback: Callable[[], object], /) -> Timer:
        """Call once at this time."""
        ...


class _Attempt:
    """One attempt between `submit` and its answer."""

    __slots__ = (
        *("done", "first", "offset", "prompt_tokens", "reason", "reply", "run", "tokens"),
        *("total", "width"),
    )

    def __init__(
        self,
        run: Run,
        first: int,
        total: int,
        reason: str,
        prompt_tokens: int,
        reply: Reply | None,
    ) -> None:
        self.run = run
        self.first = first  # index of the first word
        self.total = total  # tokens to produce, of each choice
        self.reason = reason
        self.prompt_tokens = prompt_tokens
        self.reply = reply  # None: the text form
        self.width = 1 if reply is None else reply.choices
        self.tokens = 0
        self.offset = 0  # characters streamed
        self.done = False


class EchoBackend:
    """See the head of this file. ``clock`` defaults to the running loop."""

    def __init__(
        self,
        options: EchoOptions | None = None,
        clock: Clock | None = None,
        *,
        model: str = "echo",
    ) -> None:
        self._options = options or EchoOptions()
        self._model = echo_openai.quoted(model)
        self._clock = clock
        low, high = self._options.reply_tokens
        if low > high:
            raise EngineStartError(f"echo: `reply_tokens` [{low}, {high}]: write the lower first")
        self._waiting: list[tuple[int, int, _Attempt]] = []  # heap by priority, then arrival
        self._waiting_count = 0  # the heap keeps cancelled ones until they surface
        self._running: list[_Attempt] = []
        self._attempts: dict[int, _Attempt] = {}
        self._arrivals = 0
        self._output_tokens = 0
        self._rate = Rate()
        self._timer: Timer | None = None
        self._step_at = 0.0

    @classmethod
    def from_config(cls, engine: EngineConfig) -> "EchoBackend":
        """Raises `EngineStartError` that names the option which cannot be used."""
        try:
            options = msgspec.convert(engine.args, EchoOptions)
        except msgspec.ValidationError as error:
            raise EngineStartError(
                f"engine `{engine.name}`: `args` of an echo engine: {error}; known are "
                + ", ".join(EchoOptions.__struct_fields__)
            ) from error
        return cls(options, model=engine.model)

    async def start(self, events: Events) -> BackendInfo:
        """Ready at once."""
        self._events = events
        if self._clock is None:
            self._clock = asyncio.get_running_loop()
        options = self._options
        profile = Profile(options.step_s, options.step_per_seq_s, options.prefill_s_per_token)
        return BackendInfo(options.slots, options.context_tokens, profile)

    def submit(self, attempt: Run, payload: bytes) -> None:
        """Answer now, or let the clock do it."""
        options = self._options
        digest = zlib.crc32(payload, options.seed)
        reply = None
        try:
            if attempt.api == "text":
                body = decode_body(payload)
                characters = sum([len(message.text) for message in body.messages])
                prompt_tokens = longest_prompt = characters // CHARACTERS_PER_TOKEN + 1
                limit = attempt.max_tokens
            else:
                reply = echo_openai.read(attempt.api, payload, self._model, digest)
                prompt_tokens, longest_prompt = reply.prompt_tokens, reply.longest_prompt
                limit = reply.max_tokens or options.context_tokens
        except PayloadError as error:
            self._fail(attempt, str(error))
            return
        room = options.context_tokens - longest_prompt
        if room < 1:
            self._fail(
                attempt,
                f"the prompt has {longest_prompt} tokens and leaves no room for an answer in a "
                f"context of {options.context_tokens}",
            )
            return
        if options.fail_rate and self._unlucky(digest, attempt.attempt_id):
            failed = EngineFailed(attempt.attempt_id, "engine_error", "echo: fail_rate", True)
            self._events.emit(failed)
            return
        low, high = options.reply_tokens
        wanted = low + digest % (high - low + 1)
        limit = min(limit, room)
        total = min(wanted, limit)
        reason = "stop" if wanted <= limit else "length"
        if reply is not None and reply.tool is not None:
            total, reason = 1, "tool_calls"
        first = digest % _VOCABULARY
        state = _Attempt(attempt, first, total, reason, prompt_tokens, reply)
        if options.step_s == 0.0 and options.step_per_seq_s == 0.0:
            self._answer_now(state)
        else:
            self._enqueue(state)

    def cancel(self, attempt_id: int) -> None:
        """The slot is free for the next step."""
        attempt = self._attempts.pop(attempt_id, None)
        if attempt is None:
            return
        attempt.done = True
        if attempt in self._running:
            self._running.remove(attempt)
            return
        self._waiting_count -= 1
        if len(self._waiting) > 2 * self._waiting_count + 64:
            self._waiting = [entry for entry in self._waiting if not entry[2].done]
            heapq.heapify(self._waiting)

    def stats(self) -> EngineStats:
        """KV use is the share of the slots' context that is filled."""
        held = sum(a.prompt_tokens + a.tokens * a.width for a in self._running)
        capacity = self._options.slots * self._options.context_tokens
        return EngineStats(
            running=len(self._running),
            waiting=self._waiting_count,
            kv_use=min(1.0, held / capacity),
            tokens_per_s=self._rate.read(self._now(), self._output_tokens),
            output_tokens=self._output_tokens,
        )

    def progress(self) -> dict[int, int]:
        """Attempts that have a slot."""
        return {a.run.attempt_id: a.tokens * a.width for a in self._running}

    async def close(self) -> None:
        """Stop the clock and forget everything."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._running.clear()
        self._waiting.clear()
        self._attempts.clear()

    def _now(self) -> float:
        assert self._clock is not None, "start() comes first"
        return self._clock.time()

    def _unlucky(self, digest: int, attempt_id: int) -> bool:
        draw = zlib.crc32(attempt_id.to_bytes(8, "little"), digest)
        return draw < self._options.fail_rate * 2.0**32

    def _fail(self, attempt: Run, message: str) -> None:
        self._events.emit(EngineFailed(attempt.attempt_id, "bad_request", message[:4096]))

    # Without a clock.

    def _answer_now(self, attempt: _Attempt) -> None:
        attempt.tokens = attempt.total
        self._output_tokens += attempt.total * attempt.width
        if attempt.run.stream:
            self._stream(attempt, 0)
        self._finish(attempt)

    # With a clock.

    def _enqueue(self, attempt: _Attempt) -> None:
        self._attempts[attempt.run.attempt_id] = attempt
        self._arrivals += 1
        heapq.heappush(self._waiting, (attempt.run.priority, self._arrivals, attempt))
        self._waiting_count += 1
        if self._timer is None:
            self._step_at = self._now()
            self._begin_step()

    def _begin_step(self) -> None:
        """Fill the slots and set the timer to the end of the step; without work the clock stops."""
        options = self._options
        prefill_tokens = 0
        while self._waiting and len(self._running) < options.slots:
            attempt = heapq.heappop(self._waiting)[2]
            if not attempt.done:
                self._waiting_count -= 1
                self._running.append(attempt)
                prefill_tokens += attempt.prompt_tokens
        if not self._running:
            self._timer = None
            return
        duration = options.step_s + options.step_per_seq_s * len(self._running)
        duration += options.prefill_s_per_token * prefill_tokens
        # Counted from the step before, not from now: a late timer must not slow the clock down.
        self._step_at = max(self._step_at, self._now() - _MAX_LAG_S) + duration
        assert self._clock is not None
        self._timer = self._clock.call_at(self._step_at, self._end_step)

    def _end_step(self) -> None:
        # An attempt may be cancelled from inside `emit`, hence the copy and the marks.
        stepped = self._running[:]
        produced = 0
        for attempt in stepped:
            if attempt.done:
                continue
            attempt.tokens += 1
            produced += attempt.width
            if attempt.run.stream:
                self._stream(attempt, attempt.tokens - 1)
            if attempt.tokens == attempt.total and not attempt.done:
                del self._attempts[attempt.run.attempt_id]
                attempt.done = True
                self._finish(attempt)
        self._output_tokens += produced
        self._running = [a for a in self._running if not a.done]
        self._begin_step()

    # Both.

    def _text(self, attempt: _Attempt, begin: int, end: int) -> str:
        first = (attempt.first + begin) % _VOCABULARY
        if end - begin <= _VOCABULARY:
            return " ".join(_WORDS[first : first + end - begin])
        return " ".join([_WORDS[(first + i) % _VOCABULARY] for i in range(end - begin)])

    def _stream(self, attempt: _Attempt, begin: int) -> None:
        text = self._text(attempt, begin, attempt.tokens)
        if begin:
            text = " " + text
        if attempt.reply is not None:
            self._stream_objects(attempt, attempt.reply, text)
            return
        chunk = EngineChunk(attempt.run.attempt_id, attempt.offset)
        attempt.offset += len(text)
        self._events.emit(chunk, encode_delta(text))

    def _stream_objects(self, attempt: _Attempt, reply: Reply, text: str) -> None:
        attempt_id = attempt.run.attempt_id
        reason = attempt.reason if attempt.tokens == attempt.total else None
        for choice in range(reply.choices):
            if attempt.done:  # cancelled from inside `emit`
                return
            chunk = EngineChunk(attempt_id, reply.chunks)
            self._events.emit(chunk, reply.chunk(choice, text, reason))

    def _finish(self, attempt: _Attempt) -> None:
        usage = Usage(attempt.prompt_tokens, attempt.total * attempt.width)
        finished = EngineFinished(attempt.run.attempt_id, usage, attempt.reason)
        reply = attempt.reply
        if reply is None:
            payload = encode_completion(self._text(attempt, 0, attempt.total))
        elif attempt.run.stream:
            offset = reply.chunks
            chunk = reply.usage_chunk(usage)
            if chunk is not None:
                self._events.emit(EngineChunk(attempt.run.attempt_id, offset), chunk)
            payload = reply.end_of_stream()
        else:
            text = self._text(attempt, 0, attempt.total)
            payload = reply.answer(text, attempt.reason, usage)
        self._events.emit(finished, payload)
