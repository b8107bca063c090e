"""Profiles of engines for the simulator: by roofline from a model and a GPU, or from measurements.

Owns the tables of models and GPUs and the formulas between them. Knows no engine that runs: whoever
measures one hands its samples in. Figures of models are from their published configurations,
figures of GPUs from NVIDIA's data sheets (dense BF16, without sparsity).
"""

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from msgspec import Struct

from chimera_bench.sim_engine import EngineProfile

if TYPE_CHECKING:
    import numpy as np

_MIN_SAMPLES = 4
_CONTEXT_TOKENS = 1000  # of a sequence in a full batch, at least


class ModelSize(Struct, frozen=True, forbid_unknown_fields=True):
    """A decoder, in parameters and shapes. A mixture reads fewer parameters than it has."""

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    experts: int = 1  # per layer
    experts_per_token: int = 1
    expert_parameters: float = 0.0  # of one expert, all layers; 0: no mixture

    @property
    def active_parameters(self) -> float:
        """That one token is computed with."""
        return self.parameters - (self.experts - self.experts_per_token) * self.expert_parameters

    def touched_parameters(self, tokens: float) -> float:
        """Expected number that a step of so many tokens reads.

        If every token takes k of E experts independently and evenly, an expert stays untouched
        with probability ``(1 - k/E)^tokens``. A dense model reads everything.
        """
        untouched = (1.0 - self.experts_per_token / self.experts) ** tokens
        return self.parameters - self.experts * self.expert_parameters * untouched

    def kv_bytes_per_token(self, element_bytes: float) -> float:
        """Keys and values of every layer."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * element_bytes


class Gpu(Struct, frozen=True, forbid_unknown_fields=True):
    """What one card can do at best."""

    name: str
    bytes_per_s: float
    flops: float  # dense BF16
    memory_bytes: float
    allreduce_s: float  # of a decode step's small message between cards: latency


class Efficiency(Struct, frozen=True, forbid_unknown_fields=True):
    """What engines get of what a card can do. Rough values for vLLM with CUDA graphs.

    They shift all engines of a cluster alike; to be replaced by measured profiles where a figure
    must hold for one machine.
    """

    bandwidth: float = 0.8  # of the data sheet's, reading weights and KV
    flops: float = 0.5  # of the data sheet's, reading prompts
    overhead_s: float = 0.002  # of a step: scheduling, launching, sampling
    per_sequence_s: float = 2e-5  # of a step and sequence: sampling, output
    memory: float = 0.9  # vLLM's `gpu_memory_utilization`
    reserved_bytes: float = 2e9  # per card: activations, graphs


# Shapes from `config.json` of each model on the Hugging Face hub, parameters from its weights.
MODELS = {
    model.name: model
    for model in (
        ModelSize("Llama-3-8B", 8.03e9, 32, 8, 128, 8192),
        ModelSize("Llama-3-70B", 70.55e9, 80, 8, 128, 8192),
        ModelSize("CodeActAgent-Mistral-7B", 7.24e9, 32, 8, 128, 32_768),
        ModelSize("CodeQwen1.5-7B", 7.25e9, 32, 4, 128, 65_536),
        # An expert of Mixtral: three matrices of 4096 x 14336 in each of 32 layers.
        ModelSize("Mixtral-8x7B", 46.70e9, 32, 8, 128, 32_768, 8, 2, 3 * 4096 * 14_336 * 32),
    )
}

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 2.039e12, 312e12, 80e9, 1.0e-5),  # SXM, 80 GB
        Gpu("H100", 3.35e12, 989e12, 80e9, 1.0e-5),  # SXM
        Gpu("H200", 4.8e12, 989e12, 141e9, 1.0e-5),  # SXM
        Gpu("A6000", 0.768e12, 154.8e12, 48e9, 2.5e-5),  # RTX A6000; between cards PCIe
        Gpu("L4", 0.300e12, 121e12, 24e9, 2.5e-5),  # between cards PCIe
    )
}


def named_model(name: str) -> ModelSize:
    """From the table; raises `ValueError` with the names there are."""
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; there are: {', '.join(MODELS)}")
    return MODELS[name]


def named_gpu(name: str) -> Gpu:
    """From the table; raises `ValueError` with the names there are."""
    if name not in GPUS:
        raise ValueError(f"no GPU {name!r}; there are: {', '.join(GPUS)}")
    return GPUS[name]


class Roofline(Struct, frozen=True, forbid_unknown_fields=True):
    """A model on one or more cards that share its weights evenly (tensor parallel)."""

    model: ModelSize
    gpu: Gpu
    gpus: int = 1
    element_bytes: float = 2.0  # of weights and KV: BF16
    efficiency: Efficiency = Efficiency()

    def step_s(self, sequences: float, kv_tokens: float = 0.0) -> float:
        """Seconds of a decode step: the slower of memory and arithmetic, and what comes on top.

        A step reads the weights that its tokens touch and all keys and values, and computes two
        operations per active parameter and token; matrix products overlap the two. Two all-reduces
        per layer join the cards. (Pope et al., "Efficiently scaling transformer inference", 2022.)
        """
        model, efficiency = self.model, self.efficiency
        read = model.touched_parameters(sequences) * self.element_bytes
        read += kv_tokens * model.kv_bytes_per_token(self.element_bytes)
        memory_s = read / (self.gpus * self.gpu.bytes_per_s * efficiency.bandwidth)
        arithmetic_s = sequences * self.prefill_s_per_token
        return (
            max(memory_s, arithmetic_s)
            + efficiency.overhead_s
            + efficiency.per_sequence_s * sequences
            + self._joining_s
        )

    @property
    def prefill_s_per_token(self) -> float:
        """Seconds of arithmetic per prompt token: two operations per active parameter.

        Attention among the prompt's own tokens is left out: below 8k tokens it is a few percent.
        """
        rate = self.gpus * self.gpu.flops * self.efficiency.flops
        return 2.0 * self.model.active_parameters / rate

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit beside the weights."""
        efficiency = self.efficiency
        usable = self.gpu.memory_bytes * efficiency.memory - efficiency.reserved_bytes
        free = self.gpus * usable - self.model.parameters * self.element_bytes
        return int(free / self.model.kv_bytes_per_token(self.element_bytes))

    @property
    def _joining_s(self) -> float:
        return 2 * self.model.layers * self.gpu.allreduce_s if self.gpus > 1 else 0.0

    def profile(
        self, *, slots: int = 64, token_budget: int = 2048, prefix_cache: bool = True
    ) -> EngineProfile:
        """The terms of `step_s`, exact as long as memory bounds a step.

        Raises `ValueError` where it does not with ``slots`` sequences of 1,000 tokens, and where
        the weights leave no room for one context.
        """
        model, efficiency, where = self.model, self.efficiency, f"{self.gpus} {self.gpu.name}"
        if self.gpus < 1:
            raise ValueError(f"{model.name} on {where}: at least 1 is needed")
        if self.kv_tokens < model.context_tokens:
            raise ValueError(
                f"{model.name} does not fit on {where}: room for {max(self.kv_tokens, 0)} KV "
                f"tokens would be left, one context is {model.context_tokens}"
            )
        rate = self.gpus * self.gpu.bytes_per_s * efficiency.bandwidth
        experts_s = model.experts * model.expert_parameters * self.element_bytes / rate
        weights_s = model.parameters * self.element_bytes / rate
        kv_s = model.kv_bytes_per_token(self.element_bytes) / rate
        excess_s = self.prefill_s_per_token - _CONTEXT_TOKENS * kv_s  # of one more sequence
        if slots * excess_s > weights_s:
            raise ValueError(
                f"{model.name} on {where}: with {slots} slots arithmetic bounds a step, not "
                f"memory; at most {int(weights_s / excess_s)} are described"
            )
        return EngineProfile(
            weights_s - experts_s + efficiency.overhead_s + self._joining_s,
            efficiency.per_sequence_s,
            kv_s,
            self.prefill_s_per_token,
            slots=slots,
            kv_tokens=self.kv_tokens,
            context_tokens=model.context_tokens,
            token_budget=token_budget,
            prefix_cache=prefix_cache,
            experts_s=experts_s,
            expert_share=model.experts_per_token / model.experts if experts_s else 0.0,
        )


def roofline(model: str, gpu: str, gpus: int = 1, *, slots: int = 64) -> EngineProfile:
    """The profile of a model and a GPU of the tables; raises `ValueError` for unknown names."""
    return Roofline(named_model(model), named_gpu(gpu), gpus).profile(slots=slots)


class StepSample(Struct, frozen=True, forbid_unknown_fields=True):
    """One measured step of an engine."""

    sequences: int  # that decoded
    kv_tokens: int  # held by all of them
    prefill_tokens: int  # prompt tokens read in it
    seconds: float
    prompts: int = 0  # that it began to read


class StepCost(Struct, frozen=True, forbid_unknown_fields=True):
    """The terms of a step (see `EngineProfile`), and how far off they are."""

    step_s: float
    step_per_seq_s: float
    step_per_kv_token_s: float
    prefill_s_per_token: float
    prompt_s: float
    relative_error: float  # root mean square of (fitted - measured) / measured


def fit_steps(samples: Sequence[StepSample]) -> StepCost:
    """Least squares of relative errors, no term below 0, over measured steps.

    Relative, so that a long step does not outweigh ten short ones. A quantity that never varies
    among the samples gets no term of its own: what it costs is part of ``step_s``. Raises
    `ValueError` for fewer than four samples and for what is no time.
    """
    import numpy as np

    if len(samples) < _MIN_SAMPLES:
        raise ValueError(f"{len(samples)} samples of steps; at least {_MIN_SAMPLES} are needed")
    for number, sample in enumerate(samples):
        if not (isfinite(sample.seconds) and sample.seconds > 0.0):
            raise ValueError(f"sample {number}: a step of {sample.seconds} s")
        if min(_counts(sample)) < 0:
            raise ValueError(f"sample {number}: a count below 0")
    rows = np.array([(1.0, *_counts(sample)) for sample in samples])
    seconds = np.array([s.seconds for s in samples])
    terms = _non_negative(rows / seconds[:, None], [c for c in range(5) if _tells(rows[:, c], c)])
    error = float(np.sqrt(np.mean((rows @ terms / seconds - 1.0) ** 2)))
    return StepCost(*(float(term) for term in terms), relative_error=error)


def _counts(sample: StepSample) -> tuple[int, int, int, int]:
    return sample.sequences, sample.kv_tokens, sample.prefill_tokens, sample.prompts


def _tells(column: "np.ndarray", number: int) -> bool:
    return number == 0 or bool(column.max() > column.min())


def _non_negative(rows: "np.ndarray", columns: Iterable[int]) -> "np.ndarray":
    """Terms with ``rows @ terms`` near 1; the most negative is left out until none is."""
    import numpy as np

    left = list(columns)
    terms = np.zeros(rows.shape[1])
    while left:
        scale = np.abs(rows[:, left]).max(axis=0)
        found = np.linalg.lstsq(rows[:, left] / scale, np.ones(len(rows)), rcond=None)[0] / scale
        worst = int(np.argmin(found * scale))
        if found[worst] >= 0.0:
            terms[left] = found
            return terms
        del left[worst]
    return terms


def measured(
    samples: Sequence[StepSample],
    *,
    slots: int,
    kv_tokens: int,
    context_tokens: int,
    token_budget: int = 2048,
    prefix_cache: bool = True,
    overhead_s: float = 0.0,
) -> EngineProfile:
    """A profile from measured steps; bounds are what the engine was started with.

    Raises `ValueError` as `fit_steps` does, and where no step read a prompt or a step costs
    nothing: the samples say too little then.
    """
    step = fit_steps(samples)
    if len({sample.prefill_tokens for sample in samples}) < 2:
        raise ValueError("all samples read equally many prompt tokens; the cost of one is unknown")
    if step.step_s <= 0.0:
        raise ValueError("no constant part of a step can be told from the samples; vary the batch")
    return EngineProfile(
        step.step_s,
        step.step_per_seq_s,
        step.step_per_kv_token_s,
        step.prefill_s_per_token,
        slots=slots,
        kv_tokens=kv_tokens,
        context_tokens=context_tokens,
        token_budget=token_budget,
        prefix_cache=prefix_cache,
        prompt_s=step.prompt_s,
        overhead_s=overhead_s,
    )
