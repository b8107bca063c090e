"""The plain-torch ops: equal to `transformers`, whatever is packed beside what."""

from itertools import accumulate

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from chimera_kernels import reference  # noqa: E402
from chimera_kernels.reference import Layer, Linear, Norm, Spec, Weights  # noqa: E402

VOCABULARY = 97
LENGTHS = [1, 23, 7, 7, 7, 6, 31, 2]  # odd, one token, equal neighbours, just beyond the window


def shaken(model):
    """The model with every parameter moved, so that no weight is left at 1 and no bias at 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def linear(module, *more):
    modules = (module, *more)
    bias = None if module.bias is None else torch.cat([m.bias.detach() for m in modules])
    return Linear(torch.cat([m.weight.detach() for m in modules]), bias)


def norm(module):
    return Norm(module.weight.detach(), None if module.bias is None else module.bias.detach())


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=33,
    )
    model = shaken(transformers.BertModel(config))
    layers = [
        Layer(
            norm(layer.attention.output.LayerNorm),
            linear(
                layer.attention.self.query, layer.attention.self.key, layer.attention.self.value
            ),
            linear(layer.attention.output.dense),
            norm(layer.output.LayerNorm),
            linear(layer.intermediate.dense),
            linear(layer.output.dense),
        )
        for layer in model.encoder.layer
    ]
    tables = model.embeddings
    weights = Weights(
        tables.word_embeddings.weight.detach(),
        tables.position_embeddings.weight.detach(),
        tables.token_type_embeddings.weight.detach(),
        norm(tables.LayerNorm),
        tuple(layers),
        None,
    )
    return model, weights, Spec("bert", 3, config.layer_norm_eps, 33, "gelu")


def modernbert(biases=False):
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=64,
        local_attention=8,
        pad_token_id=0,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
        norm_bias=biases,
        attention_bias=biases,
        mlp_bias=biases,
    )
    model = shaken(transformers.ModernBertModel(config))
    layers = [
        Layer(
            norm(layer.attn_norm) if number else None,
            linear(layer.attn.Wqkv),
            linear(layer.attn.Wo),
            norm(layer.mlp_norm),
            linear(layer.mlp.Wi),
            linear(layer.mlp.Wo),
        )
        for number, layer in enumerate(model.layers)
    ]
    weights = Weights(
        model.embeddings.tok_embeddings.weight.detach(),
        None,
        None,
        norm(model.embeddings.norm),
        tuple(layers),
        norm(model.final_norm),
    )
    windows, thetas = (None, 4, 4, None), (160_000.0, 10_000.0, 10_000.0, 160_000.0)
    return model, weights, Spec("modernbert", 3, config.norm_eps, 64, "gelu", windows, thetas)


MODELS = {"bert": bert, "modernbert": modernbert, "biased": lambda: modernbert(biases=True)}


@pytest.fixture(params=MODELS)
def family(request):
    torch.manual_seed(7)
    return MODELS[request.param]()


def packed(lengths):
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), dtype=torch.int32)
    return ids, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def test_a_packed_batch_equals_transformers_one_by_one(family):
    model, weights, spec = family
    ids, cu_seqlens = packed(LENGTHS)
    hidden = reference.forward(ids, cu_seqlens, weights, spec)
    for got, sequence in zip(hidden.split(LENGTHS), ids.split(LENGTHS), strict=True):
        with torch.no_grad():
            expected = model(sequence[None].long()).last_hidden_state[0]
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_scores_made_in_small_portions_are_the_same(family, monkeypatch):
    _, weights, spec = family
    batch = packed(LENGTHS)
    whole = reference.forward(*batch, weights, spec)
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 100)
    torch.testing.assert_close(reference.forward(*batch, weights, spec), whole)


def test_bf16_is_close(family):
    _, weights, spec = family
    batch = packed(LENGTHS)
    half = reference.map_tensors(weights, lambda tensor: tensor.bfloat16())
    exact, rough = (reference.forward(*batch, w, spec) for w in (weights, half))
    assert rough.dtype == torch.bfloat16
    assert torch.cosine_similarity(exact, rough.float()).min() > 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepacked_weights_give_the_same(family, dtype):
    _, weights, spec = family
    batch = packed(LENGTHS)
    plain = reference.map_tensors(weights, lambda tensor: tensor.to(dtype))
    laid_out = reference.prepack(plain)
    expected = reference.forward(*batch, plain, spec)
    got = reference.forward(*batch, laid_out, spec)
    assert torch.cosine_similarity(got.float(), expected.float()).min() > 0.9999


def test_every_parameter_gets_a_finite_gradient(family):
    _, weights, spec = family
    leaves = reference.map_tensors(weights, lambda t: t.clone().requires_grad_())
    ids, cu_seqlens = packed(LENGTHS)
    vectors = reference.pool(reference.forward(ids, cu_seqlens, leaves, spec), cu_seqlens, "mean")
    (reference.normalise(vectors) * torch.randn_like(vectors)).sum().backward()
    gradients = [tensor.grad for tensor in reference.tensors(leaves)]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert sum(bool(g.any()) for g in gradients if g is not None) == len(gradients)


def test_pooling():
    hidden = torch.tensor([[3.0, 4.0], [1.0, 2.0], [5.0, 0.0]], dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 1, 3])
    mean = reference.pool(hidden, cu_seqlens, "mean")
    assert mean.dtype == torch.float32
    assert mean.tolist() == [[3.0, 4.0], [3.0, 1.0]]
    assert reference.pool(hidden, cu_seqlens, "cls").tolist() == [[3.0, 4.0], [1.0, 2.0]]
    torch.testing.assert_close(reference.normalise(mean)[0], torch.tensor([0.6, 0.8]))
    assert reference.normalise(torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="'mean' or 'cls', not 'max'"):
        reference.pool(hidden, cu_seqlens, "max")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("ids", "cu_seqlens", "says"),
    [
        ([1, 2, 3], [0, 2], "from 0 to 2, not from 0 to the 3 tokens"),
        ([1, 2, 3], [1, 3], "from 1 to 3"),
        ([1, 2, 3], [0, 2, 2, 3], "sequence 1 has 0 tokens"),
        ([1, 2, 3], [0, 3, 2, 3], "sequence 1 has -1 tokens"),
        ([1, 2, 3], [0], "at least one sequence"),
        ([1, 2, 3], [0.0, 3.0], "holds integers"),
        ([1, 2, 97], [0, 3], "ids from 1 to 97 do not fit a vocabulary of 97"),
        ([-1, 2, 3], [0, 3], "ids from -1 to 3"),
        ([1.0, 2.0, 3.0], [0, 3], "ids are integers"),
        ([[1, 2, 3]], [0, 3], r"vectors, not of shapes \[1, 3\]"),
        ([1] * 34, [0, 34], "34 tokens; this encoder takes 33"),
    ],
)
def test_bad_input_is_named(ids, cu_seqlens, says):
    _, weights, spec = bert()
    with pytest.raises(ValueError, match=says):
        reference.forward(torch.tensor(ids), torch.tensor(cu_seqlens), weights, spec)
