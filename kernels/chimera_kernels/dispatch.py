"""The one place that decides where the predictors' pass runs: fused kernels, or plain torch."""

from typing import NamedTuple

import torch

from chimera_kernels.reference import Spec, Weights
from chimera_kernels.reference_heads import HeadWeights

# Asynchronous copies to shared memory and bf16 products came with 8.0 (Ampere).
LOWEST_CAPABILITY = (8, 0)


class Choice(NamedTuple):
    """Whether the fused kernels run, and why they do or do not."""

    fused: bool
    reason: str


def choose(device: str, weights: Weights, spec: Spec, heads: HeadWeights) -> Choice:
    """How an encoder with its heads is computed on `device`, "cpu" or "cuda"."""
    if torch.device(device).type != "cuda":
        return Choice(False, "no GPU")
    try:
        from chimera_kernels.encoder import unsupported
        from chimera_kernels.heads import sizes_of
    except ImportError as error:
        return Choice(False, f"Triton is not installed ({error})")
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        found, lowest = (".".join(map(str, c)) for c in (capability, LOWEST_CAPABILITY))
        return Choice(False, f"the GPU's compute capability is {found}, below {lowest}")
    reason = unsupported(weights, spec)
    try:
        sizes_of(heads)
    except ValueError as error:
        reason = reason or str(error)
    return (
        Choice(False, reason) if reason else Choice(True, f"{torch.cuda.get_device_name(device)}")
    )
