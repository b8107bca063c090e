"""Rooflines against sums by hand, fits against engines whose terms are known, bad input."""

from itertools import product
from math import inf, isclose
from random import Random

import pytest

from chimera_bench.engine_profiles import (
    GPUS,
    MODELS,
    Efficiency,
    Roofline,
    StepSample,
    fit_steps,
    measured,
    named_gpu,
    named_model,
    roofline,
)
from chimera_bench.sim_engine import EngineProfile

IDEAL = Efficiency(
    bandwidth=1.0, flops=1.0, overhead_s=0.0, per_sequence_s=0.0, memory=1.0, reserved_bytes=0.0
)


def test_a_dense_model_by_hand() -> None:
    """Llama-3-8B on an ideal A100: 16.06 GB of weights, 128 KiB per token, 312 TFLOPS."""
    of = Roofline(named_model("Llama-3-8B"), named_gpu("A100"), efficiency=IDEAL)
    profile = of.profile()
    assert isclose(profile.step_s, 16.06e9 / 2.039e12)
    assert isclose(profile.step_per_kv_token_s, 131_072 / 2.039e12)
    assert isclose(profile.prefill_s_per_token, 16.06e9 / 312e12)
    assert profile.kv_tokens == int((80e9 - 16.06e9) / 131_072)
    assert profile.experts_s == 0.0


def test_cards_share_the_work_and_pay_for_talking() -> None:
    model, gpu = named_model("Llama-3-70B"), named_gpu("H200")
    one = Roofline(model, gpu, 2, efficiency=IDEAL).profile()
    two = Roofline(model, gpu, 4, efficiency=IDEAL).profile()
    talk_s = 2 * 80 * gpu.allreduce_s
    assert isclose((one.step_s - talk_s) / (two.step_s - talk_s), 2.0)
    assert isclose(one.prefill_s_per_token / two.prefill_s_per_token, 2.0)
    assert two.kv_tokens > 2 * one.kv_tokens


def test_a_mixture_reads_what_its_tokens_touch() -> None:
    model = named_model("Mixtral-8x7B")
    assert isclose(model.active_parameters, 12.9e9, rel_tol=0.01)
    assert isclose(model.touched_parameters(1), model.active_parameters)
    assert model.touched_parameters(4) < 0.8 * model.parameters
    assert isclose(model.touched_parameters(64), model.parameters, rel_tol=1e-6)
    profile = Roofline(model, named_gpu("A100"), 2, efficiency=IDEAL).profile()
    assert profile.step(64) / profile.step(1) > 2.5
    assert isclose(profile.step(0, 0, 2048), profile.step(64) + 2048 * profile.prefill_s_per_token,
                   rel_tol=1e-6)  # fmt: skip
    believed = profile.believed()
    assert isclose(believed.step(1), profile.step(1))
    assert isclose(believed.step(16), profile.step(16))


def test_the_profile_is_the_roofline_for_every_model_and_gpu() -> None:
    found = 0
    for model, gpu, gpus in product(MODELS.values(), GPUS.values(), (1, 2, 4, 8)):
        of = Roofline(model, gpu, gpus)
        if of.kv_tokens < model.context_tokens:
            with pytest.raises(ValueError, match="does not fit"):
                of.profile()
            continue
        profile = of.profile(slots=48)
        found += 1
        for sequences, kv_tokens in ((1, 0), (7, 7000), (48, 48_000), (48, profile.kv_tokens)):
            expected = of.step_s(sequences, kv_tokens)
            assert isclose(profile.step(sequences, kv_tokens), expected)
        assert 0.003 < profile.step(1) < 0.2
    assert found > 60


def test_believed_terms_of_a_dense_engine_are_its_own() -> None:
    profile = roofline("CodeQwen1.5-7B", "L4")
    believed = profile.believed()
    assert isclose(believed.step_s, profile.step_s)
    assert isclose(believed.step_per_seq_s, profile.step_per_seq_s, rel_tol=1e-9)
    assert believed.prefill_s_per_token == profile.prefill_s_per_token


def drawn(profile: EngineProfile, number: int, noise: float, seed: int) -> list[StepSample]:
    draw = Random(seed)
    samples: list[StepSample] = []
    for _ in range(number):
        n, kv = draw.randint(1, 64), draw.randint(100, 100_000)
        prompt = draw.choice((0, 0, 0, draw.randint(1, 2000)))
        seconds = profile.step(n, kv, prompt) * (1.0 + draw.uniform(-noise, noise))
        samples.append(StepSample(n, kv, prompt, seconds))
    return samples


def test_a_fit_finds_the_terms_of_an_engine() -> None:
    profile = EngineProfile(0.004, 1e-4, 3e-8, 2e-5)
    exact = fit_steps(drawn(profile, 12, 0.0, seed=1))
    assert exact.relative_error < 1e-9
    for name in ("step_s", "step_per_seq_s", "step_per_kv_token_s", "prefill_s_per_token"):
        assert isclose(getattr(exact, name), getattr(profile, name), rel_tol=1e-6), name
    noisy = measured(
        drawn(profile, 400, 0.1, seed=2), slots=64, kv_tokens=100_000, context_tokens=8192
    )
    for n, kv, prompt in ((1, 500, 0), (64, 50_000, 0), (32, 1000, 2000)):
        assert isclose(noisy.step(n, kv, prompt), profile.step(n, kv, prompt), rel_tol=0.03)
    assert 0.04 < fit_steps(drawn(profile, 400, 0.1, seed=2)).relative_error < 0.08


def test_no_term_is_negative() -> None:
    """Here a larger batch was faster by chance: then it costs nothing, and the rest fits."""
    samples = [StepSample(n, 100, 0, 0.010 - 1e-5 * n) for n in range(1, 9)]
    fitted = fit_steps(samples)
    assert fitted.step_per_seq_s == fitted.step_per_kv_token_s == fitted.prefill_s_per_token == 0.0
    assert isclose(fitted.step_s, 0.010, rel_tol=0.01)


def test_bad_input_names_the_place() -> None:
    good = StepSample(1, 10, 0, 0.01)
    with pytest.raises(ValueError, match="3 samples of steps; at least 4"):
        fit_steps([good] * 3)
    with pytest.raises(ValueError, match="sample 4: a step of 0.0 s"):
        fit_steps([good] * 4 + [StepSample(1, 10, 0, 0.0)])
    with pytest.raises(ValueError, match="sample 1: a step of inf s"):
        fit_steps([good, StepSample(1, 10, 0, inf), good, good])
    with pytest.raises(ValueError, match="sample 0: a count below 0"):
        fit_steps([StepSample(-1, 10, 0, 0.01), good, good, good])
    with pytest.raises(ValueError, match="the cost of one is unknown"):
        measured([good] * 4, slots=8, kv_tokens=1000, context_tokens=1000)
    with pytest.raises(ValueError, match="no model 'Llama-9'; there are: Llama-3-8B"):
        roofline("Llama-9", "A100")
    with pytest.raises(ValueError, match="no GPU 'B9000'; there are: A100"):
        roofline("Llama-3-8B", "B9000")
    with pytest.raises(ValueError, match="Llama-3-70B does not fit on 1 A100"):
        roofline("Llama-3-70B", "A100")
    with pytest.raises(ValueError, match="on 0 A100: at least 1"):
        roofline("Llama-3-8B", "A100", 0)
    with pytest.raises(ValueError, match="256 slots arithmetic bounds a step.*at most 122"):
        roofline("Llama-3-70B", "A100", 4, slots=256)
