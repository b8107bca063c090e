"""Trains one testbed model on generated conversations and writes a folder that stock vLLM serves.

`python -m chimera_bench.testbed.train --size l --out DIR --minutes 30`

Loss on the assistant's text only; bf16 autocast; Muon on the hidden matrices and AdamW on the
rest; learning rate warm-up, then cosine to zero. `--seed` fixes weights and data, `--steps` the
length; `--minutes` fits a run into a time instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from torch.nn import functional
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from chimera_bench.testbed import tokenizer as vocabulary
from chimera_bench.testbed.arithmetic import TASK_LIMITS, WIDE_LIMITS, drill
from chimera_bench.testbed.corpus import Conversation, conversations

# A fast tokenizer of transformers, whose own annotations allow far more than it returns.
Tokenizer = Any

_CORPUS_FOR_VOCABULARY = 4000  # conversations
_BUCKET = 512  # conversations sorted by length together, to pad little
_DRILLS = 128  # rows of bare equations per bucket: four times the sums per token of a conversation
_DRILL_EQUATIONS = 16
_IGNORE = -100
_CONTEXT = 1024
_WARMUP_SHARE = 0.03
_SNAPSHOT_MIN = 5.0


class Size(msgspec.Struct, frozen=True):
    """Shape and optimiser settings; hidden/heads must be a head size vLLM's CPU attention has."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    muon_lr: float
    adam_lr: float
    batch_tokens: int


SIZES = {
    "s": Size(96, 2, 3, 3, 256, 0.02, 3e-3, 2048),
    "m": Size(96, 4, 3, 3, 256, 0.01, 1.5e-3, 1024),
    "l8": Size(96, 8, 3, 3, 256, 0.01, 1.5e-3, 1024),  # on the way from m to l
    "l": Size(96, 24, 3, 3, 256, 0.01, 1.5e-3, 1024),
}


class Batch(msgspec.Struct, frozen=True):
    """Right-padded token ids [B, T] and next-token targets [B, T], `_IGNORE` where not learnt."""

    ids: torch.Tensor
    targets: torch.Tensor


def build_model(size: Size, tokenizer: Tokenizer) -> Qwen2ForCausalLM:
    """A fresh model with tied embeddings."""
    config = Qwen2Config(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.intermediate,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def grow(small: Any, large: Any) -> None:
    """Give `large` the function of `small`, of the same width and fewer layers.

    Each layer is followed by copies of itself whose output projections are zero: they pass their
    input on until training changes them (function-preserving growth, as in Net2Net).
    """
    factor, rest = divmod(large.config.num_hidden_layers, small.config.num_hidden_layers)
    if rest or large.config.hidden_size != small.config.hidden_size:
        raise ValueError("growth needs the same width and a multiple of the layers")
    large.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    large.model.norm.load_state_dict(small.model.norm.state_dict())
    for i, layer in enumerate(large.model.layers):
        layer.load_state_dict(small.model.layers[i // factor].state_dict())
        if i % factor:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)


def build_tokenizer() -> Tokenizer:
    """The shared tokenizer: always from the same corpus, so equal for all sizes and seeds."""
    talks = itertools.islice(conversations(0, WIDE_LIMITS), _CORPUS_FOR_VOCABULARY)
    return vocabulary.build(m["content"] for talk in talks for m in talk.messages)


def encode(talks: list[Conversation], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Token ids and targets of each conversation, as the chat template renders it."""
    texts = [m["content"] for talk in talks for m in talk.messages]
    pieces = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    role_id = {
        "user": tokenizer.convert_tokens_to_ids(vocabulary.USER),
        "assistant": tokenizer.convert_tokens_to_ids(vocabulary.ASSISTANT),
    }
    rows = []
    for talk in talks:
        ids: list[int] = []
        learn: list[bool] = []
        wanted = iter(talk.learn)
        for message in talk.messages:
            piece = [*next(pieces), tokenizer.eos_token_id]
            ids += [role_id[message["role"]], *piece]
            mark = message["role"] == "assistant" and next(wanted)
            learn += [False] + [mark] * len(piece)
        rows.append((ids, [*_masked(ids, learn)[1:], _IGNORE]))
    return rows


def batches(
    tokenizer: Tokenizer, seed: int, batch_tokens: int, limits: tuple[int, ...]
) -> Iterator[Batch]:
    """Batches of at most about `batch_tokens` tokens, of conversations of similar length."""
    source = conversations(seed, limits)
    rng = random.Random(f"batches:{seed}")
    while True:
        rows = encode(list(itertools.islice(source, _BUCKET)), tokenizer)
        rows += [_drill_row(rng, tokenizer, limits) for _ in range(_DRILLS)]
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if len(row[0]) * (len(groups[-1]) + 1) > batch_tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from (_pad(group, tokenizer.pad_token_id) for group in groups)


def _drill_row(
    rng: random.Random, tokenizer: Tokenizer, limits: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """Single equations in one row; only what stands behind an equals sign is learnt."""
    ids = [tokenizer.convert_tokens_to_ids(vocabulary.ASSISTANT)]
    learn = [False]
    for left, result in drill(rng, _DRILL_EQUATIONS, limits):
        for text, mark in ((left, False), (result + "\n", True)):
            piece = tokenizer.encode(text, add_special_tokens=False)
            ids += piece
            learn += [mark] * len(piece)
    return ids, [*_masked(ids, learn)[1:], _IGNORE]


def _masked(ids: list[int], learn: list[bool]) -> list[int]:
    return [i if mark else _IGNORE for i, mark in zip(ids, learn, strict=True)]


def _pad(rows: list[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad_id)
    targets = torch.full((len(rows), width), _IGNORE)
    for i, (row, target) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, : len(row)] = torch.tensor(target)
    return Batch(ids, targets)


def loss_of(model: Qwen2ForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross entropy over the learnt tokens; causal attention never sees right padding."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state  # [B, T, D]
        learnt = batch.targets != _IGNORE
        logits = model.lm_head(hidden[learnt])  # [N, V]
    return functional.cross_entropy(logits.float(), batch.targets[learnt])


def optimizers(model: Qwen2ForCausalLM, size: Size) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=size.muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=size.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_share(done: float) -> float:
    """Share of the peak rate when a share `done` of the run is behind: warm-up, then cosine."""
    if done < _WARMUP_SHARE:
        return (done + 1e-3) / (_WARMUP_SHARE + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - _WARMUP_SHARE) / (1 - _WARMUP_SHARE)))


class Run(msgspec.Struct, frozen=True):
    """What to train: everything a run depends on."""

    size: str
    out: Path
    seed: int
    base: Path | None
    wide: bool
    steps: int | None
    minutes: float
    rate: float = 1.0


class Report(msgspec.Struct, frozen=True):
    """What a run was: enough to repeat it and to judge it. `loss` is a running mean in nats."""

    size: str
    seed: int
    grown_from: str | None
    wide: bool
    rate: float
    steps: int
    tokens: int
    minutes: float
    threads: int
    loss: float
    parameters: int
    torch_version: str
    transformers_version: str


def train(run: Run) -> None:
    """Train one model for `run.steps`, or for `run.minutes` of wall time where those are None.

    With `run.base`, starts from that trained model instead of from random weights. Saves at the end
    and every `_SNAPSHOT_MIN` minutes, so that a cut run leaves a usable model.
    """
    torch.manual_seed(run.seed)
    size = SIZES[run.size]
    tokenizer = build_tokenizer()
    model = build_model(size, tokenizer).train()
    if run.base:
        grow(Qwen2ForCausalLM.from_pretrained(run.base, dtype=torch.float32), model)
    optims = optimizers(model, size)
    peaks = [run.rate * optim.param_groups[0]["lr"] for optim in optims]
    limits = WIDE_LIMITS if run.wide else TASK_LIMITS
    begin, tokens, smooth, step = time.monotonic(), 0, math.nan, 0
    next_save_min = _SNAPSHOT_MIN
    for step, batch in enumerate(batches(tokenizer, run.seed + 1, size.batch_tokens, limits)):
        passed_min = (time.monotonic() - begin) / 60
        done = step / run.steps if run.steps else passed_min / run.minutes
        if done >= 1:
            break
        for optim, peak in zip(optims, peaks, strict=True):
            optim.param_groups[0]["lr"] = peak * learning_rate_share(done)
        loss = update(model, optims, batch)
        tokens += batch.ids.numel()
        smooth = loss if step == 0 else 0.98 * smooth + 0.02 * loss
        if passed_min >= next_save_min:
            next_save_min += _SNAPSHOT_MIN
            save(run.out, model, tokenizer, _report(run, step, tokens, passed_min, smooth, model))
        if step % 50 == 0:
            _log(step, done, smooth, tokens / (60 * passed_min + 1e-9))
    passed_min = (time.monotonic() - begin) / 60
    save(run.out, model, tokenizer, _report(run, step, tokens, passed_min, smooth, model))


def update(model: Qwen2ForCausalLM, optims: list[torch.optim.Optimizer], batch: Batch) -> float:
    """One optimiser step; returns the loss before it, in nats."""
    loss = loss_of(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optim in optims:
        optim.step()
        optim.zero_grad(set_to_none=True)
    return loss.item()


def _log(step: int, done: float, loss: float, tokens_per_s: float) -> None:
    line = f"step {step} {100 * done:.1f}% loss {loss:.4f} {tokens_per_s:.0f} tok/s"
    print(line, file=sys.stderr, flush=True)


def _report(
    run: Run, steps: int, tokens: int, minutes: float, loss: float, model: Qwen2ForCausalLM
) -> Report:
    return Report(
        size=run.size,
        seed=run.seed,
        grown_from=run.base.name if run.base else None,
        wide=run.wide,
        rate=run.rate,
        steps=steps,
        tokens=tokens,
        minutes=round(minutes, 1),
        threads=torch.get_num_threads(),
        loss=round(loss, 5),
        parameters=sum(p.numel() for p in model.parameters()),
        torch_version=str(torch.__version__),
        transformers_version=transformers.__version__,
    )


def save(folder: Path, model: Qwen2ForCausalLM, tokenizer: Tokenizer, report: Report) -> None:
    """Write bf16 weights, tokenizer with chat template, generation settings and the report."""
    folder.mkdir(parents=True, exist_ok=True)
    copy: Any = Qwen2ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    # The name every release of transformers knows; newer ones write an alias of their own.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    text = json.dumps(msgspec.to_builtins(report), indent=1)
    (folder / "training.json").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=20.0, help="wall time, without --steps")
    parser.add_argument("--steps", type=int, help="optimiser steps; overrides --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--grow", type=Path, help="start from this model of equal width and as many or fewer layers"
    )
    parser.add_argument("--wide", action="store_true", help="larger operands than the tasks have")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of both learning rates")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(
        Run(
            size=args.size,
            out=args.out,
            seed=args.seed,
            base=args.grow,
            wide=args.wide,
            steps=args.steps,
            minutes=args.minutes,
            rate=args.rate,
        )
    )


if __name__ == "__main__":
    main()
