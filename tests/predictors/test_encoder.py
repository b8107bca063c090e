"""Encoders: what is read from checkpoint folders and hub, what comes out, what is refused."""

import importlib.util
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

from tokenizers import Tokenizer as LibraryTokenizer  # noqa: E402
from tokenizers import models, pre_tokenizers, processors  # noqa: E402

from chimera_kernels import reference  # noqa: E402
from chimera_predictors import checkpoint as checkpoint_module  # noqa: E402
from chimera_predictors import encoder as encoder_module  # noqa: E402
from chimera_predictors.checkpoint import OFFLINE_PACKAGE, find_checkpoint  # noqa: E402
from chimera_predictors.encoder import (  # noqa: E402
    DEFAULT_ENCODER,
    EmbeddingCache,
    EncoderError,
    load_encoder,
)

SPECIAL = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": 4}
WORDS = SPECIAL | {f"w{i}": i for i in range(5, 60)}
TEXTS = ["w5 w6 w7", "w59", "", "w14 unknown w9 w9", "w8 " * 500, "w5 w6 w7"]


def write_tokenizer(folder):
    tokenizer = LibraryTokenizer(models.WordLevel(WORDS, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def bert(kind=transformers.BertModel):
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=40,
    )
    return kind(config)


def modernbert(kind=transformers.ModernBertModel):
    config = transformers.ModernBertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=64,
        local_attention=8,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        norm_bias=True,
        **dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"], 0),
        **dict.fromkeys(["cls_token_id", "sep_token_id"], 0),
    )
    return kind(config)


MODELS = {
    "bert": bert,
    "bert with a prefix": lambda: bert(transformers.BertForMaskedLM),
    "modernbert": modernbert,
    "modernbert with a prefix": lambda: modernbert(transformers.ModernBertForMaskedLM),
}


def save_checkpoint(model, folder, **options):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(folder, **options)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(1)
    return save_checkpoint(bert(), tmp_path / "checkpoint")


@pytest.fixture
def encoder(folder):
    return load_encoder(str(folder), max_tokens=12, dtype=torch.float32)


def edit(path, **changes):
    content = json.loads(path.read_text())
    content = {k: v for k, v in (content | changes).items() if v is not ...}
    path.write_text(json.dumps(content))


def expected(model, text, pool=lambda hidden: hidden.mean(0)):
    """The vector that transformers' model gives a text short enough not to be cut."""
    ids = [1, *(WORDS.get(word, 3) for word in text.split()), 2]
    with torch.no_grad():
        hidden = getattr(model, model.base_model_prefix, model)(torch.tensor([ids]))
    vector = pool(hidden.last_hidden_state[0])
    return (vector / vector.norm()).numpy()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "8KB"}])
def test_vectors_equal_those_of_transformers(kind, shards, tmp_path):
    torch.manual_seed(2)
    model = MODELS[kind]()
    save_checkpoint(model, tmp_path, **shards)
    assert (tmp_path / "model.safetensors").exists() == (not shards)
    encoder = load_encoder(str(tmp_path), max_tokens=12, dtype=torch.float32)
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.dim)
    assert vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        known = expected(model, " ".join(text.split()[:10]))
        np.testing.assert_allclose(vector, known, atol=2e-6)


def test_names_of_2018(folder, encoder):
    tensors = reference_tensors(folder)
    older = {
        f"bert.{n}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t
        for n, t in tensors.items()
    }
    checkpoint_module.save_file(older, folder / "model.safetensors")
    assert load_encoder(str(folder), max_tokens=12).digest == encoder.digest


def reference_tensors(folder):
    return checkpoint_module._read_tensors(folder)


def test_pooling_is_read(folder, encoder):
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling" / "config.json"
    model = transformers.BertModel.from_pretrained(folder)
    pooling.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    vector = load_encoder(str(folder), max_tokens=12, dtype=torch.float32).encode(["w5 w6"])[0]
    np.testing.assert_allclose(vector, expected(model, "w5 w6", lambda h: h[0]), atol=2e-6)
    pooling.write_text('{"pooling_mode": "max"}')
    with pytest.raises(EncoderError, match="pooling max does not work"):
        load_encoder(str(folder), max_tokens=12)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_saved_encoder_is_read_back(kind, tmp_path):
    save_checkpoint(MODELS[kind](), tmp_path / "a")
    first = load_encoder(str(tmp_path / "a"), max_tokens=12, dtype=torch.float32)
    tuned = first.with_weights(reference.map_tensors(first.weights, lambda t: t * 1.01))
    tuned.save(tmp_path / "b")
    second = load_encoder(str(tmp_path / "b"), max_tokens=12, dtype=torch.float32)
    assert second.digest == tuned.digest != first.digest
    np.testing.assert_array_equal(second.encode(TEXTS), tuned.encode(TEXTS))
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "b")
    np.testing.assert_allclose(second.encode(["w5 w6"])[0], expected(loaded, "w5 w6"), atol=2e-6)


def test_other_weights_do_not_change_the_encoder_they_came_from(encoder):
    before = encoder.encode(TEXTS)
    leaves = reference.map_tensors(encoder.weights, lambda t: t.clone().requires_grad_())
    tuned = encoder.with_weights(leaves)
    with torch.no_grad():
        leaves.tokens.zero_()
    np.testing.assert_array_equal(tuned.encode(TEXTS), before)


def test_embed_can_be_differentiated(encoder):
    leaves = reference.map_tensors(encoder.weights, lambda t: t.clone().requires_grad_())
    vectors = encoder.embed(leaves, encoder.tokenizer.encode(TEXTS))
    np.testing.assert_allclose(vectors.detach().numpy(), encoder.encode(TEXTS), atol=1e-6)
    (vectors[0] @ vectors[1]).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in reference.tensors(leaves))


def test_many_texts_go_in_several_batches(encoder, monkeypatch):
    texts = ["w7 " * (i % 15) for i in range(200)]
    monkeypatch.setattr(encoder_module, "BATCH_TOKENS", 50)
    many = encoder.encode(texts)
    one_by_one = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(many, one_by_one, atol=1e-6)
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_batches_hold_every_text_once_within_the_budget(encoder):
    packed = encoder.tokenizer.encode(["w7 " * (i % 9) for i in range(50)])
    rows, sizes = [], []
    for numbers, batch in encoder_module.batches(packed, 30):
        assert batch.lengths.sum() == len(batch.ids)
        rows += numbers.tolist()
        sizes.append(len(batch.ids))
    assert sorted(rows) == list(range(50))
    assert max(sizes) < 30 + 12
    assert len(sizes) > 5


def test_the_cache_computes_each_text_once(encoder, monkeypatch):
    asked = []
    compute = encoder.encode

    def watched(texts):
        asked.append(list(texts))
        return compute(texts)

    monkeypatch.setattr(encoder, "encode", watched)
    cache = EmbeddingCache(encoder, capacity=2)
    vectors = cache.encode_cached(["w5", "w6", "w5"])
    np.testing.assert_allclose(vectors, compute(["w5", "w6", "w5"]), atol=1e-6)
    assert (cache.hits, cache.misses, len(cache)) == (1, 2, 2)
    cache.encode_cached(["w5", "w7"])  # w6, unused for longest, makes room
    assert asked == [["w5", "w6"], ["w7"]]
    cache.encode_cached(["w5", "w6", "w7"])
    assert asked[2:] == [["w6"]]
    assert (cache.hits, cache.misses, len(cache)) == (4, 4, 2)


def test_the_cache_takes_more_texts_than_it_holds(encoder):
    cache = EmbeddingCache(encoder, capacity=1)
    texts = [*TEXTS, "\ud800", b"\xff".decode(errors="surrogateescape")]
    np.testing.assert_allclose(cache.encode_cached(texts), encoder.encode(texts), atol=1e-6)
    assert len(cache) == 1
    with pytest.raises(ValueError, match="capacity is at least 1"):
        EmbeddingCache(encoder, capacity=0)


def remove_tensor(folder):
    tensors = reference_tensors(folder)
    del tensors["encoder.layer.1.output.dense.bias"]
    checkpoint_module.save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "architecture": (
        lambda f: edit(f / "config.json", model_type="gpt2"),
        "model_type is 'gpt2'; encoders of type bert and modernbert work",
    ),
    "entry": (lambda f: edit(f / "config.json", num_attention_heads=...), "num_attention_heads"),
    "depth": (lambda f: edit(f / "config.json", num_hidden_layers=None), "wrong entry"),
    "heads": (lambda f: edit(f / "config.json", num_attention_heads=5), "no multiple of the heads"),
    "activation": (lambda f: edit(f / "config.json", hidden_act="mish"), "activation 'mish'"),
    "positions": (
        lambda f: edit(f / "config.json", position_embedding_type="relative_key"),
        "absolute positions",
    ),
    "shape": (lambda f: edit(f / "config.json", vocab_size=61), r"\[60, 24\].* it has \[61, 24\]"),
    "tensor": (remove_tensor, "no tensor encoder.layer.1.output.dense.bias"),
    "truncated": (truncate, "not a whole safetensors file"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: not a"),
    "bytes": (
        lambda f: (f / "tokenizer.json").write_bytes(b"\xff"),
        "tokenizer.json: cannot be read",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors: missing"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_checkpoints_are_refused(fault, folder):
    damage, says = BROKEN[fault]
    damage(folder)
    with pytest.raises(EncoderError, match=says):
        load_encoder(str(folder), max_tokens=12)


def test_a_tokenizer_of_another_checkpoint_is_refused(folder):
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(
        tokenizer.read_text().replace('"w59":59', '"w59":60').replace('"w59": 59', '"w59": 60')
    )
    with pytest.raises(EncoderError, match="knows 61 tokens, the weights only 60"):
        load_encoder(str(folder), max_tokens=12)


def test_more_tokens_than_positions_are_refused(folder):
    with pytest.raises(EncoderError, match="max_tokens is 41, but .* has only 40"):
        load_encoder(str(folder), max_tokens=41)


def test_modernbert_of_an_odd_make_is_refused(tmp_path):
    save_checkpoint(modernbert(), tmp_path)
    edit(tmp_path / "config.json", layer_types=["full_attention"] * 3)
    with pytest.raises(EncoderError, match="layer_types"):
        load_encoder(str(tmp_path), max_tokens=12)
    scaled = {"full_attention": {"rope_type": "yarn"}}
    edit(tmp_path / "config.json", layer_types=None, rope_parameters=scaled)
    with pytest.raises(EncoderError, match="scaled rotary positions"):
        load_encoder(str(tmp_path), max_tokens=12)


def test_a_device_that_is_not_there_is_refused(folder):
    with pytest.raises(EncoderError, match="device 'nonsense' cannot be used"):
        load_encoder(str(folder), max_tokens=12, device="nonsense")


def test_older_files_are_converted_by_transformers(folder, encoder):
    torch.save(reference_tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_encoder(str(folder), max_tokens=12).digest == encoder.digest
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    encoder = load_encoder(str(folder), max_tokens=12)
    assert encoder.tokenizer.encode(["w5 w6"]).ids.tolist() == [1, 5, 6, 2]


def refuse(*_args, **_options):
    raise huggingface_hub.errors.LocalEntryNotFoundError("Name or service not known\nmore")


def test_the_hub_is_asked_for_an_id(folder, monkeypatch):
    asked = []

    def download(name, local_files_only=False, **_options):
        asked.append((name, local_files_only))
        return refuse() if local_files_only else str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_checkpoint("someone/model") == folder
    assert asked == [("someone/model", True), ("someone/model", False)]


def test_a_cached_checkpoint_needs_no_network(folder, monkeypatch):
    def cached(name, local_files_only=False, **_options):
        return str(folder) if local_files_only else refuse()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert find_checkpoint("someone/model") == folder


def test_without_network_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(checkpoint_module, "OFFLINE_PACKAGE", "no_such_package")
    with pytest.raises(EncoderError, match=r"\(Name or service not known\).*\[offline\]"):
        load_encoder(DEFAULT_ENCODER)
    with pytest.raises(EncoderError, match="give the path of a checkpoint folder"):
        load_encoder("someone/model")
    with pytest.raises(EncoderError, match="no such folder"):
        load_encoder("./missing")


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(OFFLINE_PACKAGE) is None, reason=f"{OFFLINE_PACKAGE} is not installed"
)
QUESTIONS = [
    "How many apples are left if Tom eats two of his seven apples?",
    "Tom has seven apples and eats two. How many remain?",
    "def quicksort(a): return a if len(a) < 2 else ...",
]


@pytest.fixture(scope="module")
def minilm():
    return load_encoder(max_tokens=64, dtype=torch.float32)


@needs_minilm
def test_minilm_equals_transformers(minilm):
    path = find_checkpoint(DEFAULT_ENCODER)
    model = transformers.AutoModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for text, vector in zip(QUESTIONS, minilm.encode(QUESTIONS), strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, mean / mean.norm(), atol=1e-6)


@needs_minilm
def test_minilm_in_bf16_is_close(minilm):
    texts = [*QUESTIONS, "é" * 3000, ""]
    half = load_encoder(max_tokens=64, dtype=torch.bfloat16)
    assert (half.encode(texts) * minilm.encode(texts)).sum(1).min() > 0.999


@needs_minilm
def test_minilm_sees_likeness(minilm):
    first, reworded, code = minilm.encode(QUESTIONS)
    assert first @ reworded > 0.8
    assert first @ code < 0.3
