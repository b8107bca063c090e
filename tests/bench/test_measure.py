"""A measured engine is the engine: in virtual time, where its terms are known. And bad input."""

import argparse
import asyncio
import random
from collections.abc import Awaitable
from heapq import heappop, heappush
from math import inf
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import pytest
from msgspec.structs import replace

from chimera_bench import measure, sim_cluster
from chimera_bench.measure import Gauge, MeasureError
from chimera_bench.sim_engine import EngineProfile, SimEngine
from chimera_daemon.client import Client, Reply
from chimera_daemon.config import ConfigError
from chimera_daemon.messages import Receipt, Usage

T = TypeVar("T")
TRUTH = EngineProfile(
    step_s=0.004,
    step_per_seq_s=2e-4,
    step_per_kv_token_s=8e-7,
    prefill_s_per_token=5e-5,
    slots=16,
    kv_tokens=40_000,
    context_tokens=1024,
    prefix_cache=False,
    prompt_s=0.002,
    overhead_s=0.003,
)
RECEIPT = Receipt("static", "prior", "m", "only one", ())


class FakeDaemon:
    """As much of a client as is used, on a simulated engine; its time is virtual.

    A prompt of w words has 7 + 2w tokens.
    """

    def __init__(self, profile: EngineProfile) -> None:
        self.engine = SimEngine(profile)
        self.now = 0.0
        self.busy_with_others = 0
        self.ends_early = False
        self.engines = [{"engine": "e", "model": "m"}]
        self._timers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._answers: dict[int, asyncio.Future[None]] = {}
        self._numbers = 0

    def run(self, what: Awaitable[T]) -> T:
        async def both() -> T:
            driver = asyncio.ensure_future(self._drive())
            try:
                return await what
            finally:
                driver.cancel()

        return asyncio.run(both())

    async def _drive(self) -> None:
        while True:
            for _ in range(20):  # until nobody has anything to do at this instant
                await asyncio.sleep(0)
            self.engine.settle(self.now)
            self.engine.check()
            timer_s = self._timers[0][0] if self._timers else inf
            if min(self.engine.ends_s, timer_s) == inf:
                continue
            self.now = min(self.engine.ends_s, timer_s)
            while self._timers and self._timers[0][0] <= self.now:
                heappop(self._timers)[2].set_result(None)
            if self.engine.ends_s <= self.now:
                for finished in self.engine.complete():
                    self._answers.pop(finished.attempt_id).set_result(None)

    async def sleep(self, seconds: float) -> None:
        self._numbers += 1
        due: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self._timers, (self.now + seconds, self._numbers, due))
        await due

    async def status(self) -> dict[str, Any]:
        profile = self.engine.profile
        stats, _ = self.engine.report(self.now)
        common = {
            "max_inflight": profile.slots,
            "context_tokens": profile.context_tokens,
            "reported": {"kv_use": stats.kv_use},
        }
        models = [{"name": "m", "running": self.engine.running + self.busy_with_others}]
        engines = [common | row for row in self.engines]
        return {"core": {"engines": engines, "models": models, "stages": {"waiting": 0}}}

    def workflow(self, kind: str) -> "FakeWorkflow":
        return FakeWorkflow(self)

    async def answer(self, text: str, model: str, max_tokens: int) -> Reply:
        assert model == "m"
        prompt, began_s = 7 + 2 * len(text.split()), self.now
        output = max_tokens - 1 if self.ends_early and max_tokens > 1 else max_tokens
        self._numbers += 1
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answers[self._numbers] = answered
        self.engine.submit(self.now, self._numbers, 0, prompt, output, text, prompt)
        await answered
        usage = Usage(prompt, output)
        return Reply("", "m", "e", usage, "length", RECEIPT, "r", self.now - began_s, 0)


class FakeWorkflow:
    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    async def generate(
        self, messages: list[dict[str, str]], *, model: str, max_tokens: int, **options: Any
    ) -> Reply:
        assert options["ignore_eos"] is True
        return await self._daemon.answer(messages[0]["content"], model, max_tokens)


def gauge(daemon: FakeDaemon, model: str = "m") -> Gauge:
    return Gauge(cast("Client", daemon), model, daemon.sleep)


def measured(daemon: FakeDaemon, kv_tokens: int | None = None) -> measure.Measurement:
    random.seed(6)  # moments and words

    async def both() -> measure.Measurement:
        one = gauge(daemon)
        bounds = await one.bounds(kv_tokens, 2048)
        return measure.fitted(bounds, [await one.round(bounds) for _ in range(2)])

    return daemon.run(both())


def test_a_measured_engine_is_the_engine() -> None:
    found = measured(FakeDaemon(TRUTH))
    profile = found.profile
    assert (profile.slots, profile.context_tokens) == (16, 1024)
    assert profile.kv_tokens == pytest.approx(TRUTH.kv_tokens, rel=0.05)
    assert not profile.prefix_cache
    assert found.relative_error < 0.02
    for name in ("step_s", "step_per_kv_token_s", "prefill_s_per_token"):
        assert getattr(profile, name) == pytest.approx(getattr(TRUTH, name), rel=0.05), name
    # What a sequence costs while it reads its prompt is found as part of the prompt.
    assert profile.prompt_s == pytest.approx(TRUTH.prompt_s, rel=0.15)
    assert profile.overhead_s == pytest.approx(TRUTH.overhead_s, rel=0.1)
    for n, kv, read, prompts in ((1, 100, 0, 0), (16, 9000, 0, 0), (8, 800, 200, 1)):
        expected = TRUTH.step(n, kv, read, prompts)
        assert profile.step(n, kv, read, prompts) == pytest.approx(expected, rel=0.02)


def test_a_prefix_cache_shows() -> None:
    found = measured(FakeDaemon(replace(TRUTH, prefix_cache=True)), kv_tokens=40_000)
    assert found.profile.prefix_cache
    assert found.profile.kv_tokens == 40_000
    assert found.notes == ()


def test_small_memory_bounds_the_batches() -> None:
    """16 long prompts do not fit; batches that would wait for memory are not measured."""
    found = measured(FakeDaemon(replace(TRUTH, kv_tokens=5000)))
    assert max(s.kv_tokens for s in found.samples) < 5000
    assert found.profile.step(8, 4000) == pytest.approx(TRUTH.step(8, 4000), rel=0.03)


def test_the_table_is_a_cluster() -> None:
    found = measured(FakeDaemon(TRUTH))
    text = measure.to_toml(found, "my engine")
    (setup,) = sim_cluster.parse(text)
    assert (setup.name, setup.model) == ("my engine", "m")
    for name in EngineProfile.__struct_fields__:
        given = getattr(found.profile, name)
        assert getattr(setup.profile, name) == pytest.approx(given, rel=1e-3), name
    assert "2 rounds" in text
    assert "kv_tokens: estimated" in text


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        (replace(TRUTH, slots=1), "runs one request at a time.*`max_inflight` of at least 2"),
        (replace(TRUTH, context_tokens=255), "a context of 255 tokens; at least 256"),
    ],
)
def test_engines_that_cannot_be_measured(profile: EngineProfile, says: str) -> None:
    with pytest.raises(MeasureError, match=says):
        measured(FakeDaemon(profile))


def test_an_engine_with_other_work_is_refused() -> None:
    daemon = FakeDaemon(TRUTH)
    daemon.busy_with_others = 3
    with pytest.raises(MeasureError, match=r"has other work \(3 stages running, 0 waiting\)"):
        measured(daemon)


def test_an_engine_that_stops_by_itself_is_refused() -> None:
    daemon = FakeDaemon(TRUTH)
    daemon.ends_early = True
    with pytest.raises(MeasureError, match="15 tokens instead of 16.*`ignore_eos`"):
        measured(daemon)


def test_the_model_must_have_one_engine() -> None:
    daemon = FakeDaemon(TRUTH)
    with pytest.raises(MeasureError, match="no engine serves model 'x'; there are: m"):
        daemon.run(gauge(daemon, "x").bounds(None, 2048))
    daemon.engines = [{"engine": "e", "model": "m"}, {"engine": "f", "model": "m"}]
    with pytest.raises(MeasureError, match=r"2 engines serve model 'm' \(e, f\)"):
        daemon.run(gauge(daemon).bounds(None, 2048))
    daemon.engines = []
    with pytest.raises(MeasureError, match="there are: none"):
        daemon.run(gauge(daemon).bounds(None, 2048))


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    measure.add_arguments(parser)
    return parser.parse_args(given)


def test_nothing_listens(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_CONNECT_S", 0.05)
    assert measure.run(arguments("--model", "m", "--connect", f"ipc://{tmp_path}/none")) == 1
    assert "no Chimera daemon answers" in capsys.readouterr().out


def test_bad_options(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--out: there is no folder"):
        measure.run(arguments("--model", "m", "--out", f"{tmp_path}/none/x.toml"))
    with pytest.raises(ConfigError, match="--connect: .*nonsense"):
        measure.run(arguments("--model", "m", "--connect", "nonsense"))
    with pytest.raises(SystemExit):
        arguments("--model", "m", "--repetitions", "0")
    assert "'0': write a whole number of at least 1" in capsys.readouterr().err
