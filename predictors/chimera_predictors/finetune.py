"""Fine-tuning of the encoder: one linear head per model and label on top of it, trained end to end.

The tuned encoder knows the tasks it was tuned on, so one fold of tasks is kept from it: what the
heads are calibrated and judged by. Knows no bundle.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chimera_kernels import reference
from chimera_predictors.dataset import Ints, labels_of
from chimera_predictors.encoder import Encoder
from chimera_predictors.options import Options, Progress
from chimera_predictors.text import cut
from chimera_predictors.traces import Traces

_EPOCHS = 4
_TEXTS_AT_ONCE = 16
_ENCODER_RATE = 5e-5
_HEAD_RATE = 2e-3
_SCALE = 8.0  # unit vectors are short for a linear head


class FinetuneError(ValueError):
    """The encoder cannot be fine-tuned on these traces."""


def finetune(
    encoder: Encoder, traces: Traces, options: Options, progress: Progress
) -> tuple[Encoder, np.ndarray]:
    """A tuned encoder, and [R] true for the rows of the tasks that it has not seen.

    Trained on the first stage's text of each task: success of every model and the lengths of the
    first stage and of the whole workflow, missing labels masked. Raises FinetuneError.
    """
    fold = traces.fold_of(min(options.folds, max(len(traces.task_ids), 1)), options.seed)
    unseen = fold == 0
    texts, targets, known = _tasks(traces, ~unseen)
    if not texts:
        raise FinetuneError("--finetune needs texts and labels of first stages; there are none")
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    device = encoder.device
    weights = reference.map_tensors(
        encoder.weights, lambda t: t.detach().to(device).clone().requires_grad_()
    )
    head = nn.Linear(encoder.dim, targets.shape[1] * targets.shape[2]).to(device)
    optimiser = torch.optim.AdamW(
        [
            {"params": reference.tensors(weights), "lr": _ENCODER_RATE},
            {"params": head.parameters(), "lr": _HEAD_RATE},
        ],
        weight_decay=0.01,
    )
    steps = _EPOCHS * (-(-len(texts) // _TEXTS_AT_ONCE))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / (0.1 * steps + 1)) * (1.0 - step / steps)
    )
    step = 0
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(texts), generator=generator).split(_TEXTS_AT_ONCE):
            packed = encoder.tokenizer.encode([texts[row] for row in rows.tolist()])
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                vectors = encoder.embed(weights, packed)
            found = head(_SCALE * vectors.float()).view(len(rows), *targets.shape[1:])
            loss = _loss(found, targets[rows].to(device), known[rows].to(device))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reference.tensors(weights), 1.0)
            optimiser.step()
            schedule.step()
            step += 1
            progress("fine-tuning the encoder", 0.0 if step == 1 else 0.4 * step / steps)
    return encoder.with_weights(weights), unseen


def _tasks(traces: Traces, used: np.ndarray) -> tuple[list[str], Tensor, Tensor]:
    """Texts [U]; targets and which are known [U, M, 3]: success, two standardised lengths."""
    labels = labels_of(traces)
    columns = np.stack([labels.success, labels.stage, labels.remaining], axis=1)
    first = used & (traces.stage == 0)
    names = [traces.workflow_text[workflow] for workflow in traces.workflow]
    place: dict[str, int] = {}
    rows: Ints = np.flatnonzero(first)
    rows = np.array([row for row in rows if names[row]], dtype=np.int64)
    if not len(rows) or not np.isfinite(columns[rows]).any():
        return [], torch.zeros(0), torch.zeros(0)
    for row in rows:
        place.setdefault(names[row], len(place))
    shape = (len(place), len(traces.models), 3)
    total, count = np.zeros(shape), np.zeros(shape)
    for row in rows:
        at = place[names[row]], labels.model[row]
        total[at] += np.nan_to_num(columns[row])
        count[at] += np.isfinite(columns[row])
    mean = total / np.maximum(count, 1.0)
    for column in (1, 2):
        part = mean[..., column]
        there = count[..., column] > 0
        if there.any():
            mean[..., column] = (part - part[there].mean()) / max(part[there].std(), 1e-3)
    limit = 20_000  # characters; the tokenizer keeps far less
    texts = [cut(text, limit) for text in place]
    return texts, torch.from_numpy(mean).float(), torch.from_numpy(count > 0)


def _loss(found: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    success = F.binary_cross_entropy_with_logits(
        found[..., 0], targets[..., 0].clamp(0.0, 1.0), reduction="none"
    )
    lengths = F.smooth_l1_loss(found[..., 1:], targets[..., 1:], reduction="none")
    losses = torch.cat([success[..., None], lengths], dim=-1)
    return (losses * known).sum() / known.sum().clamp(min=1)
