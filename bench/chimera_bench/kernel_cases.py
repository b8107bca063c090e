"""What `chimera bench kernels` compares: encoders and heads, ours and those of others.

Every contestant of a case computes the same from the same inputs, which lie in fixed memory, and is
compared with the fp32 reference. Needs torch and Triton, `transformers` for the others; owns no
clock and no table.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chimera_bench.roofline import MODELS, Model, Shape
from chimera_kernels import reference, reference_heads
from chimera_kernels.encoder import TritonEncoder
from chimera_kernels.heads import Heads, Sizes, StageBatch, sizes_of
from chimera_kernels.reference import Layer, Linear, Norm, Spec, Weights
from chimera_kernels.reference_heads import HeadInputs, HeadOutputs, HeadWeights
from chimera_predictors import checkpoint
from chimera_predictors.encoder import EncoderError, load_encoder

Call = Callable[[], Tensor]
Attention = Literal["eager", "sdpa"]

# Heads as large as those trained on the MINT traces.
MINT = Sizes(D=384, N=37, G=8, K=8, P=23, O=32, S=6, M=13, Q=7, C=379, H=1280)
SETS = 4  # of inputs, which take turns
TEXT_TOKENS = 128
_PASS_TOKENS = 16_384  # of all new texts before the heads
_SCRATCH = ("stream", "_middle", "_normed", "_qkv", "_context", "_wide")
_CONFIG = {
    "bert": {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    "modernbert": {"local_attention": 128, "norm_eps": 1e-5, "hidden_activation": "gelu"},
}
_THETAS = {True: 160_000.0, False: 10_000.0}  # of layers that see everything, and of the others


class Subject(NamedTuple):
    """One encoder: fp32 weights on the device, and what `transformers` makes its model from."""

    weights: Weights
    spec: Spec
    config: dict[str, Any]
    source: str  # "real" or "random"


def subject(model: str, encoder: str, device: str) -> Subject:
    """The model of this name; MiniLM with the weights of `encoder` where they can be had."""
    if model == "minilm":
        try:
            found = load_encoder(encoder, max_tokens=TEXT_TOKENS)
        except EncoderError as error:
            print(f"random weights in place of {encoder}: {error}")
        else:
            weights = reference.map_tensors(found.weights, lambda t: t.to(device))
            return Subject(weights, found.checkpoint.spec, found.checkpoint.config, "real")
    sizes = MODELS[model]
    return Subject(random_weights(sizes, device), spec_of(sizes), config_of(sizes), "random")


def config_of(model: Model) -> dict[str, Any]:
    """A `config.json` of these sizes."""
    return {
        "model_type": model.family,
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "intermediate_size": model.inner,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.longest,
        "pad_token_id": 0,
    } | _CONFIG[model.family]


def spec_of(model: Model) -> Spec:
    """The same for the kernels and their reference."""
    if model.family == "bert":
        return Spec("bert", model.heads, 1e-12, model.longest, "gelu")
    thetas = tuple(_THETAS[window is None] for window in model.windows)
    return Spec("modernbert", model.heads, 1e-5, model.longest, "gelu", model.windows, thetas)


def random_weights(model: Model, device: str) -> Weights:
    """fp32, about as large as these families are initialised.

    That is half of what keeps a linear's output as large as its input for BERT; in ModernBERT what
    all layers add to the stream is together as large as its start (Shoeybi et al. 2019). With
    larger ones bf16 alone is 1 % off after 12 or 28 layers.
    """
    post, width, inner = model.family == "bert", model.width, model.inner
    size, added = (0.5, 0.5) if post else (1.0, (2 * model.layers) ** -0.5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def linear(out: int, into: int, scale: float) -> Linear:
        return Linear(draw(out, into) * scale / into**0.5, draw(out) * 0.1 if post else None)

    def norm() -> Norm:
        return Norm(1.0 + 0.1 * draw(width), draw(width) * 0.1 if post else None)

    def layer(number: int) -> Layer:
        up = inner if post else 2 * inner
        return Layer(
            norm() if post or number else None,
            linear(3 * width, width, size), linear(width, width, added),
            norm(), linear(up, width, size), linear(width, inner, added),
        )  # fmt: skip

    return Weights(
        tokens=draw(model.vocabulary, width),
        positions=draw(model.longest, width) if post else None,
        token_types=draw(2, width) if post else None,
        embedding_norm=norm(),
        layers=tuple(layer(number) for number in range(model.layers)),
        final_norm=None if post else norm(),
    )


class EncoderCase:
    """One shape: its inputs, the truth, and everybody who can compute it."""

    def __init__(self, shape: Shape, subject: Subject, seed: int, device: str) -> None:
        """Lengths are those of `seed`; ids are drawn anew each time."""
        self.shape, self.subject, self.device = shape, subject, device
        self.lengths = shape.lengths(seed)
        self.tokens, self.longest = sum(self.lengths), max(self.lengths)
        places = [torch.arange(n, dtype=torch.int32) for n in self.lengths]
        self.positions = torch.cat(places).to(device)
        bounds = [0, *accumulate(self.lengths)]
        self.cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        self._real = torch.arange(self.longest, device=device) < lengths[:, None]  # [S, L]
        self._sets: list[Tensor] = []
        self.ids = torch.empty(self.tokens, dtype=torch.int32, device=device)
        self._padded = torch.zeros(self._real.shape, dtype=torch.int64, device=device)
        keeps_its_place(self._padded)
        self.renew()

    def renew(self) -> None:
        """Other random tokens in all sets."""
        vocabulary, size = len(self.subject.weights.tokens), (SETS, self.tokens)
        ids = torch.randint(vocabulary, size, dtype=torch.int32, device=self.device)
        self._sets = list(ids)
        self.load(0)

    def load(self, number: int) -> None:
        """Puts the tokens of one set, counted around, where every contestant reads them."""
        self.ids.copy_(self._sets[number % SETS])
        self._padded.masked_scatter_(self._real, self.ids.long())

    def wanted(self) -> Tensor:
        """Hidden states [T, D] by the fp32 reference."""
        subject = self.subject
        with torch.inference_mode():
            return reference.forward(self.ids, self.cu_seqlens, subject.weights, subject.spec)

    def error(self, call: Call) -> float:
        """‖out - reference‖ / ‖reference‖ on the tokens that are loaded; NaN if there is one."""
        found = call()
        if found.dim() == 3:
            found = found[self._real]
        return relative_error(found, self.wanted())

    def ours(self, kind: type[TritonEncoder]) -> tuple[TritonEncoder, Call]:
        """An encoder, and its launch with the last layer norm behind it.

        In the whole pass that norm is the heads' business; others have it in their encoder, so that
        here torch computes it, and its time counts.
        """
        weights, spec = self.subject.weights, self.subject.spec
        encoder = kind(weights, spec, tokens=self.tokens, device=self.device)
        norm = encoder.final_norm

        def call() -> Tensor:
            hidden = encoder.launch(
                self.ids, self.positions, self.cu_seqlens,
                tokens=self.tokens, sequences=len(self.lengths), longest=self.longest,
            )  # fmt: skip
            return F.layer_norm(hidden, hidden.shape[-1:], norm.weight, norm.bias, spec.eps)

        return encoder, call

    def _mask(self) -> Tensor:
        """[S, 1, L, L]: 0 for real tokens, the lowest number for padding."""
        mask = torch.zeros(self._real.shape, dtype=torch.bfloat16, device=self.device)
        mask.masked_fill_(~self._real, torch.finfo(mask.dtype).min)
        mask = mask[:, None, None].expand(-1, -1, self.longest, -1)
        keeps_its_place(mask)
        return mask

    def transformers(self, attention: Attention) -> Call:
        """The library's model in bf16 on the padded batch.

        It gets no mask where all lengths are equal, and else the additive one that it would make,
        so that making it costs nothing.
        """
        model = library_model(self.subject, attention, self.device)
        mask = None if self.shape.shortest == self.shape.longest else self._mask()

        def call() -> Tensor:
            return model(input_ids=self._padded, attention_mask=mask).last_hidden_state

        return call


def persists(shape: Shape, tokens: int) -> bool:
    """Whether the persistent kernel is meant for this shape, up to so many tokens."""
    return shape.sizes.family == "bert" and shape.sequences * shape.longest <= tokens


def poison(encoder: TritonEncoder) -> None:
    """NaN wherever a launch writes, so that what it leaves out shows."""
    for name in _SCRATCH:
        getattr(encoder, name).fill_(float("nan"))


def library_model(subject: Subject, attention: Attention, device: str) -> Any:
    """A model of `transformers` in bf16 with these weights."""
    import transformers

    config = transformers.AutoConfig.for_model(**subject.config)
    bare = {"add_pooling_layer": False} if subject.spec.family == "bert" else {}
    with torch.device(device):
        model = transformers.AutoModel.from_config(
            config, attn_implementation=attention, dtype=torch.bfloat16, **bare
        )
    model.load_state_dict(checkpoint.named_tensors(subject.weights, subject.config))
    return model.eval().requires_grad_(False)


def compiled(call: Call, mode: str) -> Call:
    """`call` through torch.compile, for the shapes it has now alone."""
    torch.compiler.reset()
    found = torch.compile(call, mode=mode, dynamic=False)

    def marked() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the result of the run before is not kept
        return found()

    return marked if mode == "max-autotune" else found


def keeps_its_place(tensor: Tensor) -> None:
    """Tells torch.compile, whose graphs would else copy it to a place of their own in each run."""
    torch._dynamo.mark_static_address(tensor)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖ in fp64."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


class HeadsCase:
    """B stages, each with a new text whose hidden states just came out of the encoder."""

    def __init__(self, weights: HeadWeights, stages: int, device: str) -> None:
        self.stages = stages
        self.length = min(TEXT_TOKENS, _PASS_TOKENS // stages)
        self.tokens = stages * self.length
        self._sizes = sizes = sizes_of(weights)
        self._weights = HeadWeights(*(tensor.to(device) for tensor in weights))
        self.heads = Heads(weights, device, stages, stages)
        norm = 1.0 + 0.1 * torch.randn(2, sizes.D, device=device)
        gain, shift = norm[0].clone(), norm[1] - 1.0
        self._norm = Norm(gain, shift)
        for tensor in (*self._weights, gain, shift):
            keeps_its_place(tensor)
        bounds = torch.arange(stages + 1, dtype=torch.int32, device=device)
        self._cu_seqlens = bounds * self.length
        self._slots = bounds[:-1].clone()
        self._texts = torch.full((stages, self.heads.text_width), float("nan"), device=device)
        self.out = torch.empty(stages, sizes.M, 2 + 2 * sizes.Q, device=device)
        self._hidden = torch.empty(self.tokens, sizes.D, device=device)
        places = [torch.empty(stages, dtype=torch.int32, device=device) for _ in range(2)]
        counts = torch.tensor([stages, stages], dtype=torch.int32, device=device)
        numbers = torch.empty(stages, sizes.N, device=device)
        group, kind = places
        self._batch = StageBatch(numbers, group, kind, self._slots, self._slots.flip(0), counts)
        self._sets: list[tuple[Tensor, ...]] = []
        self.renew()

    def renew(self) -> None:
        """Other random inputs in all sets."""
        sizes, batch = self._sizes, self._batch
        self._sets = [
            (
                torch.randn_like(self._hidden),
                torch.randn_like(batch.numbers),
                torch.randint_like(batch.stage_group, sizes.S),
                torch.randint_like(batch.kind, -1, sizes.K),
            )
            for _ in range(SETS)
        ]
        self.load(0)

    def load(self, number: int) -> None:
        """Puts one set, counted around, where every contestant reads it."""
        places = (self._hidden, *self._batch[:3])
        for place, values in zip(places, self._sets[number % SETS], strict=True):
            place.copy_(values)

    def ours(self) -> Tensor:
        """One launch."""
        self.heads.launch(
            self._hidden, self._norm, 1e-5, "mean", self._cu_seqlens, self._slots, self._batch,
            self._texts, self.out,
        )  # fmt: skip
        return self.out

    def plain(self) -> Tensor:
        """Norm, pooling and the reference's heads in torch, fp32."""
        hidden = F.layer_norm(self._hidden, self._hidden.shape[-1:], *self._norm, 1e-5)
        texts = F.normalize(hidden.unflatten(0, (self.stages, -1)).mean(1), dim=-1)
        batch = self._batch
        inputs = HeadInputs(
            batch.numbers, batch.stage_group.long(), batch.kind.long(), texts, texts.flip(0)
        )
        return joined(reference_heads.heads(inputs, self._weights))

    def error(self, call: Call) -> float:
        """‖out - reference‖ / ‖reference‖ on what is loaded; NaN where nothing was written."""
        return relative_error(call(), self.plain())


def joined(outputs: HeadOutputs) -> Tensor:
    """[B, M, 2 + 2Q]: as the kernel writes them."""
    one = outputs.confidence[..., None], outputs.after[..., None]
    return torch.cat([*one, outputs.stage, outputs.remaining], dim=-1)


def random_heads(sizes: Sizes) -> HeadWeights:
    """Weights of these sizes whose predictions are spread out, on the CPU."""
    D, N, G, K, P, O, S, M, Q, C, H = sizes  # noqa: E741
    wide, values = N * G + K + P + O, M * (2 + 2 * Q)
    return HeadWeights(
        edges=torch.rand(N, G + 1).add(0.1).cumsum(1),
        kind_weight=torch.randn(D, K),
        kind_bias=torch.randn(K) * 0.5,
        task_mean=torch.randn(D) / D,
        task_projection=torch.randn(D, P),
        new_mean=torch.randn(D) / D,
        new_projection=torch.randn(D, O),
        base=torch.rand(S, K, M, 4) * torch.tensor([1.0, 6.0, 8.0, 2.0]),
        centres=F.normalize(torch.randn(C, D), dim=-1),
        width=torch.tensor([0.2]),
        shift=torch.randn(C, M * 3) * 0.5,
        shift_scale=torch.rand(S, 3) + 0.5,
        hidden_weight=torch.randn(wide, H) / wide**0.5,
        hidden_bias=torch.randn(H) * 0.5,
        out_weight=torch.randn(H, values) / H**0.5,
        out_bias=torch.randn(values) * 0.5,
        router_share=torch.rand(S),
        platt=torch.tensor([[1.0, 0.1]]).repeat(M, 1),
        conformal=torch.randn(2, S, Q) * 0.1,
    )
