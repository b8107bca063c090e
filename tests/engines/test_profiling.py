"""The measured profile is the one that the engine has."""

import asyncio

import pytest

from chimera_daemon.engines.profiling import BUDGET_S, measure


class Engine:
    """Takes exactly as long as its cost model says, on a clock of its own."""

    def __init__(self, step_s: float, per_sequence_s: float, prefill_s: float) -> None:
        self.step_s, self.per_sequence_s, self.prefill_s = step_s, per_sequence_s, prefill_s
        self.now = 0.0
        self.longest = 0

    async def generate(self, sequences: int, prompt: int, output: int) -> None:
        self.longest = max(self.longest, prompt + output)
        self.now += 0.002 + self.prefill_s * prompt * sequences
        self.now += (output - 1) * (self.step_s + self.per_sequence_s * sequences)

    def time(self) -> float:
        return self.now


@pytest.mark.parametrize("step_s", [0.001, 0.02])
@pytest.mark.parametrize("context", [16, 128, 4096])
def test_finds_the_terms(step_s: float, context: int) -> None:
    engine = Engine(step_s, 0.0002, 0.00001)
    profile = asyncio.run(
        measure(engine.generate, context_tokens=context, max_inflight=8, clock=engine.time)
    )
    assert profile.step_s == pytest.approx(step_s, rel=1e-6)
    assert profile.step_per_seq_s == pytest.approx(0.0002, rel=1e-6)
    assert profile.prefill_s_per_token == pytest.approx(0.00001, rel=1e-6)
    assert engine.longest <= context


def test_slow_engine_stays_near_the_budget() -> None:
    engine = Engine(0.1, 0.001, 0.0001)
    asyncio.run(measure(engine.generate, context_tokens=4096, max_inflight=64, clock=engine.time))
    assert engine.now < BUDGET_S + 12.0


def test_one_slot() -> None:
    engine = Engine(0.001, 0.0, 0.00001)
    profile = asyncio.run(
        measure(engine.generate, context_tokens=4096, max_inflight=1, clock=engine.time)
    )
    assert profile.step_s == pytest.approx(0.001)
    assert profile.step_per_seq_s == 0.0
