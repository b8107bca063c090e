"""Policies as a user writes them for simulations: `chimera:price=0.1/0.3`, `paper:tau=1`.

Owns the notation. What a knob may be is the configuration's part.
"""

import difflib
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from chimera_daemon import config as configuration
from chimera_daemon import policy
from chimera_daemon.config import Config, ConfigError

if TYPE_CHECKING:
    from chimera_bench.sim_runs import Setting

_ORACLE = "_oracle"  # `X_oracle`: X with the truth as prediction
_SHORT = {"router": "router_only"}
# Settings that differ in these alone are one curve.
_DIALS = {"chimera": ("price",), "paper": ("tau", "delta_s")}
_PREDICTIONS = "predictions"
_UNHEARD = "constant"  # for policies that look at none: costs nothing
# What clients do; the same for all policies unless said otherwise.
_CLIENT_KNOBS = ("tries", "optional")


def settings(
    written: str, common: Mapping[str, str], predictions: str, models: Sequence[str]
) -> "list[Setting]":
    """The settings of one POLICY[:KNOB=VALUE,…]; a value A/B/C stands for three settings.

    ``common`` knobs hold where the text does not say otherwise. The knob `predictions` replaces
    ``predictions``. Raises `ConfigError`.
    """
    if written.startswith("static:"):
        return [_setting(written, written, {}, common, predictions, models)]
    name, colon, rest = written.partition(":")
    base = name
    if name.endswith(_ORACLE):
        base = name.removesuffix(_ORACLE)
        base, predictions = _SHORT.get(base, base), "oracle"
    knobs = _pairs(rest, f"--policy {written!r}") if colon else {}
    predictions = knobs.pop(_PREDICTIONS, predictions)
    label = name + (f" {predictions}" if _PREDICTIONS in rest else "")
    choices = [[(key, value) for value in text.split("/")] for key, text in knobs.items()]
    return [
        _setting(base, label, dict(chosen), common, predictions, models)
        for chosen in product(*choices)
    ]


def common_knobs(written: Sequence[str]) -> dict[str, str]:
    """KNOB=VALUE for all settings; raises `ConfigError`."""
    knobs: dict[str, str] = {}
    for text in written:
        knobs |= _pairs(text, "--set")
    known = [*paths(""), *(key for name in policy.NAMES for key in paths(name)), *_CLIENT_KNOBS]
    _refuse_unknown(knobs, known, "--set")
    return knobs


def free_dials(written: str) -> tuple[str, ...]:
    """Knobs that a policy's trade is tuned by, without those that the text sets."""
    name, _, rest = written.partition(":")
    dials = _DIALS.get(name.removesuffix(_ORACLE), ())
    given = _pairs(rest, f"--policy {written!r}") if dials and rest else {}
    return tuple(dial for dial in dials if dial not in given)


def with_knobs(written: str, knobs: Mapping[str, str]) -> str:
    """The text with more knobs."""
    pairs = ",".join(f"{key}={value}" for key, value in knobs.items())
    return f"{written}{',' if ':' in written else ':'}{pairs}"


def _pairs(text: str, where: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for pair in text.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise ConfigError(f"{where}: {pair!r} is not KNOB=VALUE")
        if key in pairs:
            raise ConfigError(f"{where}: `{key}` is set twice")
        pairs[key] = value
    return pairs


def _setting(
    base: str,
    label: str,
    knobs: Mapping[str, str],
    common: Mapping[str, str],
    predictions: str,
    models: Sequence[str],
) -> "Setting":
    from chimera_bench.sim_runs import Setting

    where, places = f"--policy {label!r}", paths(base)
    _refuse_misspelt(base, where, models)
    if base not in policy.PREDICTIVE:
        predictions = _UNHEARD
    _refuse_unknown(knobs, [*places, _PREDICTIONS, *_CLIENT_KNOBS], where)
    every = {**common, **knobs}
    config = _config(base, {places[key]: value for key, value in every.items() if key in places})
    dials = _DIALS.get(base, ())
    fixed = {key: value for key, value in knobs.items() if key not in dials}
    tries = _whole("tries", every.get("tries", "1"), 1, 100, where)
    optional = _whole("optional", every.get("optional", "0"), 0, 1, where)
    name, sweep = _named(label, knobs), _named(label, fixed)
    return Setting(name, sweep, config, predictions, tries, bool(optional))


def _whole(key: str, text: str, least: int, most: int, where: str) -> int:
    if not (text.isdigit() and least <= int(text) <= most):
        raise ConfigError(f"{where}: `{key}` is a whole number from {least} to {most}, not {text}")
    return int(text)


def _named(label: str, knobs: Mapping[str, str]) -> str:
    return " ".join([label, *(f"{key}={value}" for key, value in knobs.items())])


def _refuse_misspelt(name: str, where: str, models: Sequence[str]) -> None:
    try:
        policy.make_policy(Config(policy=name))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; X_oracle: X with true predictions") from error
    model = name.removeprefix("static:")
    if model != name and model not in models:
        raise ConfigError(f"{where}: no engine serves {model!r}; there are: {', '.join(models)}")


def _refuse_unknown(knobs: Mapping[str, str], known: Sequence[str], where: str) -> None:
    for key in knobs:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{where}: no knob `{key}` here; did you mean `{near}`?")


def paths(name: str) -> dict[str, tuple[str, ...]]:
    """Where each knob of a policy is in the configuration: numbers, its own table's included."""
    found = {key: (key,) for key in _numbers(Config)}
    table = getattr(Config(), name, None)
    if isinstance(table, Struct):
        found |= {key: (name, key) for key in _numbers(type(table))}
    return found


def _numbers(struct: type[Struct]) -> list[str]:
    fields = msgspec.structs.fields(struct)
    return [f.name for f in fields if isinstance(f.default, int | float)]


def _config(name: str, values: Mapping[tuple[str, ...], str]) -> Config:
    table: dict[str, Any] = {"policy": name}
    for path, value in values.items():
        inner = table
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    try:
        config = msgspec.convert(table, Config, strict=False)
        configuration.check(config)
    except (msgspec.ValidationError, ConfigError) as error:
        raise ConfigError(f"policy {name!r}: {error}") from error
    return config
