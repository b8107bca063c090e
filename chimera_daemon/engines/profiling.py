"""Measures an engine's cost model from outside, by timing whole requests. Knows no engine.

A request of p prompt and n output tokens in a batch of b takes about
``prefill * p + (n - 1) * (step_s + step_per_seq_s * b)``; differences of such times give the terms.
The smallest of a few repetitions is taken: noise only ever adds time.
"""

import time
from collections.abc import Awaitable, Callable

from chimera_daemon.messages import Profile

BUDGET_S = 3.0  # when it is used up, each quantity not yet measured gets one repetition
_REPETITIONS = 4
_SHORT_PROMPT = 8
_LONG_PROMPT = 512
_OUTPUT = 32
_BATCH = 16

# Runs a batch: (sequences, prompt tokens, output tokens); prompts must not share prefixes.
Generate = Callable[[int, int, int], Awaitable[None]]


async def measure(
    generate: Generate,
    *,
    context_tokens: int,
    max_inflight: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Warm the engine up and return its profile."""
    deadline = clock() + BUDGET_S
    output = max(2, min(_OUTPUT, context_tokens // 4))
    long_prompt = max(_SHORT_PROMPT + 1, min(_LONG_PROMPT, context_tokens // 2))
    batch = min(_BATCH, max_inflight)

    async def best(sequences: int, prompt: int, tokens: int) -> float:
        seconds = float("inf")
        for repetition in range(_REPETITIONS):
            if repetition and clock() > deadline:
                break
            began = clock()
            await generate(sequences, prompt, tokens)
            seconds = min(seconds, clock() - began)
        return seconds

    # Not timed: the first requests of every shape compile.
    for sequences, prompt in ((1, _SHORT_PROMPT), (batch, _SHORT_PROMPT), (1, long_prompt)):
        await generate(sequences, prompt, 2)
    first = await best(1, _SHORT_PROMPT, 1)
    one = (await best(1, _SHORT_PROMPT, output) - first) / (output - 1)
    prefill = (await best(1, long_prompt, 1) - first) / (long_prompt - _SHORT_PROMPT)
    per_sequence = 0.0
    if batch > 1:
        first_of_batch = await best(batch, _SHORT_PROMPT, 1)
        many = (await best(batch, _SHORT_PROMPT, output) - first_of_batch) / (output - 1)
        per_sequence = max(0.0, (many - one) / (batch - 1))
    return Profile(
        step_s=max(1e-5, one - per_sequence),
        step_per_seq_s=per_sequence,
        prefill_s_per_token=max(1e-8, prefill),
    )
