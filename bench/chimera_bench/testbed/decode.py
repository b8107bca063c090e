"""Batched greedy decoding of whole workflows with transformers, for evaluation and for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chimera_bench.testbed.tasks import Task
from chimera_bench.testbed.workflows import Message, messages_for, shape


class Speaker:
    """One model with its tokenizer, answering chat messages greedily."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path | str) -> Speaker:
        """A speaker from a model folder, in float32 on the CPU."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls(model.eval(), AutoTokenizer.from_pretrained(folder))

    @torch.inference_mode()
    def answer(
        self, chats: Sequence[list[Message]], max_tokens: int, batch: int = 128
    ) -> list[str]:
        """One greedy answer per chat, each of at most `max_tokens` tokens, end token left out."""
        texts = [self._render(chat) for chat in chats]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        answers = [""] * len(texts)
        for at in range(0, len(order), batch):
            picked = order[at : at + batch]
            made = self._generate([texts[i] for i in picked], max_tokens)
            for i, text in zip(picked, made, strict=True):
                answers[i] = text
        return answers

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, the end token counted."""
        return len(self._tokenizer.encode(text)) + 1

    def _render(self, chat: list[Message]) -> str:
        return self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def _generate(self, texts: list[str], max_tokens: int) -> list[str]:
        inputs = self._tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        out = self._model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        made = out[:, inputs.input_ids.shape[1] :]
        return self._tokenizer.batch_decode(made, skip_special_tokens=True)


def run_workflows(
    speakers: Sequence[Speaker], tasks: Sequence[Task], shape_name: str
) -> list[list[str]]:
    """Outputs of every stage of every task; stage i is for `speakers[i % len(speakers)]`."""
    form = shape(shape_name)
    outputs: list[list[str]] = [[] for _ in tasks]
    for stage, max_tokens in enumerate(form.max_tokens):
        chats = [messages_for(stage, t, form, o) for t, o in zip(tasks, outputs, strict=True)]
        answers = speakers[stage % len(speakers)].answer(chats, max_tokens)
        for have, text in zip(outputs, answers, strict=True):
            have.append(text)
    return outputs
