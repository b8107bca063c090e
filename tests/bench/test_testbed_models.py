"""The committed models: they load, match their reports, and really solve easy tasks."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer

import chimera_bench.testbed
from chimera_bench.testbed import oracle, workflows
from chimera_bench.testbed.decode import Speaker, run_workflows
from chimera_bench.testbed.evaluate import Cell, rate, table
from chimera_bench.testbed.tasks import check, generate

MODELS = Path(chimera_bench.testbed.__file__).parent / "models"
NAMES = ("testbed-s", "testbed-m", "testbed-l")
METRICS = json.loads((MODELS / "metrics.json").read_text())
TOKENIZER = AutoTokenizer.from_pretrained(MODELS / "testbed-s")


@given(st.text(max_size=100))
@settings(deadline=None)
def test_any_text_survives_the_tokenizer(text):
    """Up to NFC, which transformers applies to whatever it takes for a tokenizer of Qwen2."""
    text = unicodedata.normalize("NFC", text)
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    if not any(token in text for token in TOKENIZER.all_special_tokens):
        assert TOKENIZER.decode(ids) == text


def test_all_models_share_one_tokenizer_and_template():
    first, *rest = [(MODELS / name / "tokenizer.json").read_bytes() for name in NAMES]
    assert all(other == first for other in rest)
    templates = {AutoTokenizer.from_pretrained(MODELS / name).chat_template for name in NAMES}
    assert len(templates) == 1


def test_chat_template_renders_roles_and_the_generation_prompt():
    chat = [{"role": "user", "content": "Plan. x"}, {"role": "assistant", "content": "y"}]
    text = TOKENIZER.apply_chat_template(chat, tokenize=False)
    assert text == "<|user|>Plan. x<|end|><|assistant|>y<|end|>"
    open_text = TOKENIZER.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert open_text == "<|user|>Plan. x<|end|><|assistant|>"


def test_contexts_and_answers_fit_the_bounds():
    form = workflows.shape("planner_solver_verifier")
    for task in generate("validation", 200, seed=3):
        outputs = oracle.outputs(task, form)
        chat = workflows.messages_for(3, task, form, outputs[:3])
        ids = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert len(ids) + form.max_tokens[3] <= 512
        for text, bound in zip(outputs, form.max_tokens, strict=True):
            assert len(TOKENIZER.encode(text)) < bound


@pytest.mark.parametrize("name", NAMES)
def test_weights_match_their_reports(name):
    config = json.loads((MODELS / name / "config.json").read_text())
    training = json.loads((MODELS / name / "training.json").read_text())
    with safe_open(MODELS / name / "model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        count = 1
        for side in shape:
            count *= side
        total += count
    assert total == training["parameters"] == METRICS["models"][name]["parameters"]
    assert config["hidden_size"] // config["num_attention_heads"] in (32, 64)
    assert config["eos_token_id"] == TOKENIZER.eos_token_id
    settings_file = json.loads((MODELS / name / "generation_config.json").read_text())
    assert settings_file["eos_token_id"] == TOKENIZER.eos_token_id


def test_weights_fit_the_repository():
    files = [MODELS / name / "model.safetensors" for name in NAMES]
    assert sum(path.stat().st_size for path in files) <= 25 * 2**20


def test_measured_success_grows_with_size_and_falls_with_difficulty():
    rates = [METRICS["models"][name]["success"] for name in NAMES]
    assert rates == sorted(rates)
    assert rates[-1] - rates[0] > 0.2
    for name in NAMES:
        cells = [Cell(**cell) for cell in METRICS["models"][name]["cells"]]
        assert rate(cells) == pytest.approx(METRICS["models"][name]["success"], abs=1e-3)
        # Not from each to the next: of the easiest code problems there are few, none of them seen.
        assert rate(cells, difficulty=2) > rate(cells, difficulty=6)
        assert table(cells).count("\n") == 8


@pytest.mark.parametrize("name", NAMES)
def test_each_model_solves_easy_tasks(name):
    """A guess passes about 1 in 100; the weakest model is far above that."""
    tasks = generate("validation", 16, seed=5, difficulties=(1,))
    outputs = run_workflows([Speaker.load(MODELS / name)], tasks, "planner_solver")
    solved = sum(check(t, workflows.final_answer(o)) for t, o in zip(tasks, outputs, strict=True))
    assert solved >= 6
