"""Clusters for the simulator: a TOML file of engines becomes a list of `EngineSetup`.

Owns the form of the file. An engine is a model on cards (roofline) or a profile of measured
numbers; figures of models and cards that no table has are written beside it. Knows no trace.
"""

import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct

from chimera_bench.engine_profiles import GPUS, MODELS, Gpu, ModelSize, Roofline
from chimera_bench.sim_engine import EngineProfile
from chimera_bench.sim_input import EngineSetup
from chimera_daemon.config import ConfigError
from chimera_daemon.messages import Id

SHIPPED = Path(__file__).parent / "clusters"

_SLOTS = 64
_T = TypeVar("_T")
_Count = Annotated[int, Meta(ge=1, le=4096)]


class _Engines(Struct, frozen=True, forbid_unknown_fields=True):
    """`[[engines]]`: ``count`` equal ones, by roofline or by a profile."""

    name: Id
    model: Id  # as the traces name it
    count: _Count = 1
    size: str | None = None  # of the model, in the tables below; None: called like the model
    gpu: str | None = None
    gpus: _Count | None = None  # tensor parallel
    slots: _Count | None = None
    max_inflight: _Count | None = None
    profile: EngineProfile | None = None


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    engines: tuple[_Engines, ...] = ()
    models: tuple[ModelSize, ...] = ()  # beyond the table, or instead of its entries
    gpus: tuple[Gpu, ...] = ()


class _Tables(NamedTuple):
    models: Mapping[str, ModelSize]
    gpus: Mapping[str, Gpu]


def load(path: str | Path) -> tuple[EngineSetup, ...]:
    """Read a cluster file; a bare name such as `a` means one that comes with the project.

    Raises `ConfigError`, naming file, place and what to write instead.
    """
    path = _found(Path(path))
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; {_shipped_words()}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(text: str) -> tuple[EngineSetup, ...]:
    """Turn TOML text into the engines of a cluster; raises `ConfigError`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from error
    try:
        file = msgspec.convert(table, _File)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from error
    if not file.engines:
        raise ConfigError("the cluster has no engine: write an `[[engines]]` table")
    tables = _Tables(
        {**MODELS, **{model.name: model for model in file.models}},
        {**GPUS, **{gpu.name: gpu for gpu in file.gpus}},
    )
    setups: list[EngineSetup] = []
    for number, engines in enumerate(file.engines):
        try:
            setups += _setups(engines, tables)
        except ValueError as error:
            raise ConfigError(f"engines[{number}] ({engines.name!r}): {error}") from error
    for name, times in Counter(setup.name for setup in setups).items():
        if times > 1:
            raise ConfigError(f"engine {name!r}: the name is used {times} times")
    return tuple(setups)


def _found(path: Path) -> Path:
    shipped = SHIPPED / f"{path}.toml"
    return shipped if not path.suffix and not path.exists() and shipped.is_file() else path


def _shipped_words() -> str:
    names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.toml")))
    return f"clusters that can be named without a file: {names}"


def _setups(engines: _Engines, tables: _Tables) -> list[EngineSetup]:
    profile = _profile(engines, tables)
    names = [f"{engines.name}-{n + 1}" for n in range(engines.count)]
    return [
        EngineSetup(name, engines.model, profile, engines.max_inflight)
        for name in (names if engines.count > 1 else [engines.name])
    ]


def _profile(engines: _Engines, tables: _Tables) -> EngineProfile:
    if engines.profile is not None:
        for key in ("gpu", "gpus", "size", "slots"):
            if getattr(engines, key) is not None:
                raise ValueError(f"`{key}` and a `profile`: write one of them")
        return engines.profile
    if engines.gpu is None:
        raise ValueError("`gpu` is missing (or a table `engines.profile` of measured numbers)")
    model = _entry(tables.models, engines.size or engines.model, "size", "models")
    gpu = _entry(tables.gpus, engines.gpu, "gpu", "gpus")
    return Roofline(model, gpu, engines.gpus or 1).profile(slots=engines.slots or _SLOTS)


def _entry(table: Mapping[str, _T], name: str, key: str, where: str) -> _T:
    if name not in table:
        raise ValueError(
            f"no `{key}` {name!r}; there are: {', '.join(table)}; others go into `[[{where}]]`"
        )
    return table[name]
