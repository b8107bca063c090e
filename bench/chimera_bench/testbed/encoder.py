"""Trains the testbed's own small text encoder: what a problem asks for, seen in its prompt alone.

`python -m chimera_bench.testbed.encoder --out DIR`

A general encoder costs milliseconds of a core per prompt, and the testbed's engines are done in
tens. This one has two narrow layers and the testbed's vocabulary. It learns to say which steps a
problem of the `train` split has; predictors learn from other tasks what that means for a model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from chimera_bench.testbed import arithmetic, listcode, oracle, tasks, workflows
from chimera_bench.testbed.tasks import Task

_WIDTH, _LAYERS, _HEADS = 64, 2, 2
_CONTEXT = 256
_BATCH = 96
_RATE = 3e-3
_WARMUP_SHARE = 0.05
_VOCABULARY = Path(__file__).parent / "models" / "testbed-s" / "tokenizer.json"
_OPERATIONS = (*arithmetic.SYMBOL, *listcode.LIST_OPS, *dict.fromkeys(listcode.REDUCERS))


class _Network(nn.Module):
    """The encoder and a linear reading of its unit vectors, which is thrown away afterwards."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=_WIDTH,
            num_hidden_layers=_LAYERS,
            num_attention_heads=_HEADS,
            intermediate_size=4 * _WIDTH,
            max_position_embeddings=_CONTEXT,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.reading = nn.Linear(_WIDTH, len(_OPERATIONS) + 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Targets [B, T] as read from the prompts' mean-pooled unit vectors."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.reading(math.sqrt(_WIDTH) * functional.normalize(mean, dim=1))


def targets(task: Task) -> list[float]:
    """How often each operation is asked for, how many steps, how large the numbers, how long."""
    counts = [float(sum(step.op == name for step in task.steps)) for name in _OPERATIONS]
    size = sum(math.log1p(step.arg) for step in task.steps) + math.log1p(task.start)
    return [*counts, task.difficulty / 2.0, size / 4.0, len(oracle.solution(task)) / 30.0]


def train(steps: int, seed: int) -> BertModel:
    """The same encoder for the same seed on the same machine."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_file(str(_VOCABULARY))
    network = _Network(tokenizer.get_vocab_size())
    optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _slope(step / steps))
    batches = _batches(tokenizer, seed)
    seen = 0.0
    for step in range(steps):
        ids, mask, target = next(batches)
        loss = functional.smooth_l1_loss(network(ids, mask), target)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        seen = loss.item() if not step else 0.98 * seen + 0.02 * loss.item()
        if step % 200 == 199:
            print(f"step {step + 1} of {steps}: loss {seen:.4f}", flush=True)
    return network.encoder


def _slope(share: float) -> float:
    return min(share / _WARMUP_SHARE, 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))) + 1e-3


def _batches(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    rng = random.Random(f"instructions:{seed}")
    first = [workflows.INSTRUCTION[workflows.shape(name).stages[0]] for name in workflows.SHAPES]
    stream = tasks.stream("train", seed)
    while True:
        drawn = [next(stream) for _ in range(_BATCH)]
        texts = [f"{rng.choice(first)} {task.prompt}" for task in drawn]
        rows = [encoded.ids[:_CONTEXT] for encoded in tokenizer.encode_batch_fast(texts)]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).float()
        yield ids, mask, torch.tensor([targets(task) for task in drawn])


def save(encoder: BertModel, folder: Path) -> None:
    """A checkpoint folder that `chimera train --encoder` and `transformers` read."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder.save_pretrained(folder)
    shutil.copyfile(_VOCABULARY, folder / "tokenizer.json")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": _WIDTH, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save(train(arguments.steps, arguments.seed), arguments.out)


if __name__ == "__main__":
    main()
