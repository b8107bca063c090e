"""A trained predictor on disk: `bundle.json`, `heads.safetensors` and perhaps an encoder.

Written whole or not at all, and checked whole when it is read: a bundle that is cut off, of another
version or does not fit together gives a `BundleError` that says what to do. No pickle.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.numpy import load, save

from chimera_kernels.reference_heads import HeadWeights
from chimera_predictors import features
from chimera_predictors.calibrate import Gate

SCHEMA = 1
_JSON, _HEADS, _ENCODER = "bundle.json", "heads.safetensors", "encoder"
_EXTRA = ("mean_factor", "prior_spread")


class BundleError(ValueError):
    """The bundle cannot be used; the message says why and what to do."""


class EncoderInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """Which encoder the heads were trained on."""

    name: str  # Hugging Face id or path; ignored where the bundle carries the weights
    digest: str  # sha256 of its weights
    dim: int
    max_tokens: int
    included: bool  # fine-tuned: its weights are in the bundle


class BundleInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """`bundle.json`."""

    schema: int
    encoder: EncoderInfo
    models: tuple[str, ...]
    kinds: tuple[str, ...]
    levels: tuple[float, ...]
    features: tuple[str, ...]
    stages: int
    gates: tuple[Gate, ...]
    heads_sha256: str
    trained: dict[str, Any]  # rows, tasks, digest of the data, options, versions
    metrics: dict[str, Any]  # on tasks held out


class Bundle(Struct, frozen=True):
    """All of a bundle but an encoder that is not inside."""

    info: BundleInfo
    weights: HeadWeights
    mean_factor: np.ndarray  # [2, S]
    prior_spread: np.ndarray  # [2, M, Q]
    folder: Path | None = None

    @property
    def encoder_source(self) -> str:
        """What `load_encoder` takes: the folder inside the bundle, or the encoder's name."""
        if self.info.encoder.included and self.folder is not None:
            return str(self.folder / _ENCODER)
        return self.info.encoder.name


def write_bundle(bundle: Bundle, folder: Path, save_encoder: Any = None) -> Path:
    """Write to `folder`, replacing a bundle that is there; `save_encoder(path)` adds an encoder.

    Raises BundleError where the folder holds something else or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / _JSON).is_file() and any(folder.iterdir()):
        raise BundleError(f"{folder} exists and is not a bundle; name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise BundleError(f"{folder} cannot be written: {error}") from error
    try:
        tensors = {name: value.numpy() for name, value in bundle.weights._asdict().items()}
        tensors |= {name: getattr(bundle, name) for name in _EXTRA}
        data = save({n: np.ascontiguousarray(v, dtype=np.float32) for n, v in tensors.items()})
        (made / _HEADS).write_bytes(data)
        info = msgspec.structs.replace(bundle.info, heads_sha256=hashlib.sha256(data).hexdigest())
        (made / _JSON).write_bytes(msgspec.json.format(msgspec.json.encode(info)) + b"\n")
        if save_encoder is not None:
            save_encoder(made / _ENCODER)
        made.chmod(0o755)
        _put(made, folder)
    except OSError as error:
        raise BundleError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _put(made: Path, folder: Path) -> None:
    """Move into place; a reader sees the old bundle or the new one, or for an instant none."""
    old = made.with_name(made.name + "-old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(made, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_bundle(folder: str | Path) -> Bundle:
    """Read and check a bundle; raises BundleError."""
    folder = Path(folder)
    info = _read_info(folder)
    try:
        data = (folder / _HEADS).read_bytes()
    except OSError as error:
        raise BundleError(f"{folder / _HEADS} cannot be read: {error}; train it again") from error
    if hashlib.sha256(data).hexdigest() != info.heads_sha256:
        raise BundleError(
            f"{folder / _HEADS} is not the file that {_JSON} was written with (cut off or "
            "changed); copy the bundle again, or train it again"
        )
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise BundleError(f"{folder / _HEADS} is not a safetensors file: {error}") from error
    _check_tensors(tensors, info, folder)
    weights = HeadWeights(*(torch.from_numpy(tensors[name].copy()) for name in HeadWeights._fields))
    return Bundle(info, weights, *(tensors[name] for name in _EXTRA), folder=folder)


def _read_info(folder: Path) -> BundleInfo:
    path = folder / _JSON
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{folder} is not a bundle: {path.name} cannot be read ({error}); "
            "`chimera train --traces DIR --out BUNDLE` makes one"
        ) from error
    try:
        schema = msgspec.json.decode(data, type=_Schema).schema
        if schema != SCHEMA:
            raise BundleError(
                f"{folder} has schema version {schema}, this Chimera reads {SCHEMA}; train it again"
            )
        info = msgspec.json.decode(data, type=BundleInfo)
    except msgspec.DecodeError as error:
        raise BundleError(f"{path} is not a bundle's description: {error}") from error
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not text in UTF-8: {error}") from error
    if info.features != features.NAMES or info.stages != features.STAGES:
        raise BundleError(f"{folder} was trained on other features; train it again")
    levels = info.levels
    if not {0.1, 0.5, 0.9} <= set(levels) or list(levels) != sorted(set(levels)):
        raise BundleError(f"{path}: the quantile levels {levels} must rise and hold .1, .5 and .9")
    if not info.models or len(info.gates) != len(info.models) or not info.kinds:
        raise BundleError(f"{path}: models, gates and kinds do not fit together")
    return info


class _Schema(Struct):
    schema: int


def _check_tensors(tensors: dict[str, np.ndarray], info: BundleInfo, folder: Path) -> None:
    missing = [name for name in (*HeadWeights._fields, *_EXTRA) if name not in tensors]
    if missing:
        raise BundleError(f"{folder / _HEADS} lacks {', '.join(missing)}; train it again")
    numbers, models, levels = len(info.features), len(info.models), len(info.levels)
    dim, kinds, stages = info.encoder.dim, len(info.kinds), info.stages
    steps = tensors["edges"].shape[-1] - 1
    task, new = (tensors[f"{what}_projection"].shape[-1] for what in ("task", "new"))
    hidden, centres = tensors["hidden_bias"].size, tensors["centres"].shape[0]
    wanted = {
        "edges": (numbers, steps + 1),
        "kind_weight": (dim, kinds),
        "kind_bias": (kinds,),
        "task_mean": (dim,),
        "task_projection": (dim, task),
        "new_mean": (dim,),
        "new_projection": (dim, new),
        "base": (stages, kinds, models, 4),
        "centres": (centres, dim),
        "width": (1,),
        "shift": (centres, models * 3),
        "shift_scale": (stages, 3),
        "hidden_weight": (numbers * steps + kinds + task + new, hidden),
        "hidden_bias": (hidden,),
        "out_weight": (hidden, models * (2 + 2 * levels)),
        "out_bias": (models * (2 + 2 * levels),),
        "router_share": (stages,),
        "platt": (models, 2),
        "conformal": (2, stages, levels),
        "mean_factor": (2, stages),
        "prior_spread": (2, models, levels),
    }
    for name, shape in wanted.items():
        found = tensors[name]
        if found.shape != shape or found.dtype != np.float32:
            raise BundleError(
                f"{folder / _HEADS}: {name} is {found.dtype} {list(found.shape)}, "
                f"not float32 {list(shape)}; train it again"
            )
        if not np.isfinite(found).all():
            raise BundleError(f"{folder / _HEADS}: {name} holds values that are not finite")
