"""Cluster files: what they may say, and what a mistake in one is answered with."""

from pathlib import Path

import pytest

from chimera_bench import sim_cluster
from chimera_bench.engine_profiles import roofline
from chimera_daemon.config import ConfigError

ENGINE = '[[engines]]\nname = "e"\nmodel = "m"\n'
SIZE = 'size = "Llama-3-8B"\n'


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("a", ["Meta-Llama-3-8B-Instruct"] * 2 + ["Meta-Llama-3-70B-Instruct"]),
        ("b", ["CodeActAgent-Mistral-7b-v0.1"] * 2 + ["Meta-Llama-3-70B-Instruct"]),
        (
            "c",
            ["CodeQwen1.5-7B-Chat", "CodeActAgent-Mistral-7b-v0.1", "Mixtral-8x7B-Instruct-v0.1"]
            + ["Meta-Llama-3-70B-Instruct"],
        ),
    ],
)
def test_clusters_that_come_with_the_project(name: str, models: list[str]) -> None:
    setups = sim_cluster.load(name)
    assert [setup.model for setup in setups] == models
    assert len({setup.name for setup in setups}) == len(setups)
    large = setups[-1].profile
    assert large == roofline("Llama-3-70B", "A100", 4)
    assert large.step(1) > setups[0].profile.step(1)


def test_engines_by_count() -> None:
    text = ENGINE + SIZE + 'count = 2\ngpu = "L4"\nslots = 8\nmax_inflight = 5\n'
    setups = sim_cluster.parse(text)
    assert [setup.name for setup in setups] == ["e-1", "e-2"]
    assert all(setup.profile == roofline("Llama-3-8B", "L4", slots=8) for setup in setups)
    assert all(setup.max_inflight == 5 for setup in setups)


def test_an_engine_of_measured_numbers() -> None:
    text = ENGINE + (
        "[engines.profile]\nstep_s = 0.01\nstep_per_seq_s = 0.001\nstep_per_kv_token_s = 0.0\n"
        "prefill_s_per_token = 1e-4\nslots = 4\n"
    )
    (setup,) = sim_cluster.parse(text)
    assert (setup.name, setup.model, setup.profile.slots) == ("e", "m", 4)
    assert setup.profile.step(2, 0, 10) == pytest.approx(0.013)


def test_own_models_and_cards_come_before_the_tables() -> None:
    text = (
        'name = "{}"\nparameters = 1e9\nlayers = 10\nkv_heads = 2\nhead_dim = 64\n'
        "context_tokens = 1000\n"
    )
    gpu = (
        '[[gpus]]\nname = "mine"\nbytes_per_s = 1e12\nflops = 1e14\nmemory_bytes = 1e10\n'
        "allreduce_s = 1e-5\n"
    )
    (known,) = sim_cluster.parse(
        ENGINE + SIZE + 'gpu = "mine"\n[[models]]\n' + text.format("Llama-3-8B") + gpu
    )
    (named,) = sim_cluster.parse(ENGINE + 'gpu = "mine"\n[[models]]\n' + text.format("m") + gpu)
    assert known.profile == named.profile
    assert known.profile.context_tokens == 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no engine"),
        ("engines = 3", r"\$\.engines"),
        ("x = [", "not valid TOML"),
        ("colour = 1\n" + ENGINE, "`colour`"),
        (ENGINE + 'gpuz = "A100"', r"`gpuz` - at `\$\.engines\[0\]`"),
        (ENGINE + "[engines.profile]\nstep = 1", r"`step` - at `\$\.engines\[0\]\.profile`"),
        (ENGINE + SIZE, r"engines\[0\] \('e'\): `gpu` is missing"),
        (ENGINE + 'gpu = "A100"', r"no `size` 'm'; there are: Llama-3-8B"),
        (ENGINE + SIZE + 'gpu = "A1000"', r"no `gpu` 'A1000'; there are: A100"),
        (ENGINE + 'size = "Llama-3-70B"\ngpu = "A100"\ngpus = 2', "does not fit on 2 A100"),
        (ENGINE + SIZE + 'gpu = "A100"\ncount = 0', r"count"),
        (ENGINE + SIZE + 'gpu = "A100"\nslots = 4000', "4000 slots"),
        ((ENGINE + SIZE + 'gpu = "A100"\n') * 2, "'e': the name is used 2 times"),
        (
            ENGINE + "slots = 3\n[engines.profile]\nstep_s = 0.01\nstep_per_seq_s = 0\n"
            "step_per_kv_token_s = 0\nprefill_s_per_token = 0",
            "`slots` and a `profile`",
        ),
    ],
)
def test_mistakes_are_named_with_their_place(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sim_cluster.parse(text)


def test_a_file_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.toml: .*`x`"):
        sim_cluster.load(path)
    with pytest.raises(ConfigError, match="nowhere: cannot be read.*a, b, c"):
        sim_cluster.load("nowhere")
