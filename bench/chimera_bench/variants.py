"""Rows of the demo's table: a policy, its knobs, and whether it gets learned predictions.

Owns the demo's notation. What a knob is called and may be is shared with simulations.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from chimera_bench import sim_policies
from chimera_daemon import policy as policies
from chimera_daemon.config import Config, ConfigError

_PRIOR = ":prior"
_AS_CONFIGURED = ""  # of a knob of simulations that has no meaning here


class Variant(Struct, frozen=True):
    """``bundle``: folder of what predicts; None: averages per model and kind, learned online.

    ``sweep`` is the name without the policy's dial: rows of one sweep are one curve. ``knobs``
    are places in the configuration and what they are set to.
    """

    name: str
    policy: str
    sweep: str
    bundle: str | None = None
    knobs: tuple[tuple[tuple[str, ...], float], ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """What `chimera up` is told, beyond the policy."""
        return () if self.bundle is None else ("--bundle", self.bundle)

    def applied(self, config: Config) -> Config:
        """The configuration with these knobs."""
        for place, value in self.knobs:
            config = _replaced(config, place, value)
        return config


def split(written: str) -> list[str]:
    """`A,B:X=1,Y=2,C` as A, B:X=1,Y=2 and C: what begins with KNOB= belongs to the one before."""
    found: list[str] = []
    for piece in (piece.strip() for piece in written.split(",")):
        before, equals, _ = piece.partition("=")
        if found and equals and ":" not in before:
            found[-1] += f",{piece}"
        elif piece:
            found.append(piece)
    return found


def variants(written: str, config: Config) -> list[Variant]:
    """Read `POLICY[:KNOB=VALUE,…][:prior]`; a value A/B stands for two rows.

    Predictive policies get the configuration's bundle, but not with `:prior`. Raises `ConfigError`.
    """
    text = written.removesuffix(_PRIOR)
    policy, colon, _ = text.partition(":")
    fixed = not colon or policy == "static"
    _refuse_misspelt(text if fixed else policy, config)
    bundle = config.predictor.bundle if policy in policies.PREDICTIVE else None
    if text != written and bundle is None:
        raise ConfigError(
            f"--policies: `{written}` is no different from `{text}` "
            + ("here: no bundle is configured" if policy in policies.PREDICTIVE else "anywhere")
        )
    made = [Variant(text, text, text, bundle)] if fixed else _with_knobs(text, bundle, config)
    return made if text == written else [_without_bundle(each) for each in made]


def _without_bundle(row: Variant) -> Variant:
    return msgspec.structs.replace(
        row, name=f"{row.name} (prior)", sweep=f"{row.sweep} (prior)", bundle=None
    )


def _with_knobs(text: str, bundle: str | None, config: Config) -> list[Variant]:
    policy = text.partition(":")[0]
    places = sim_policies.paths(policy)
    configured = {key: str(_at(config, place)) for key, place in places.items()}
    try:
        found = sim_policies.settings(text, configured, _AS_CONFIGURED, _models(config))
    except ConfigError as error:
        raise ConfigError(f"--policies: {str(error).removeprefix('--policy ')}") from error
    rows: list[Variant] = []
    for setting in found:
        if setting.predictions != _AS_CONFIGURED:
            raise ConfigError(
                f"--policies: {text!r}: real engines are predicted by the bundle or, with "
                "`:prior` at the end, by averages; leave `predictions` out"
            )
        knobs = tuple(
            (place, _at(setting.config, place))
            for place in places.values()
            if _at(setting.config, place) != _at(config, place)
        )
        rows.append(Variant(setting.name, policy, setting.sweep, bundle, knobs))
    return rows


def _refuse_misspelt(name: str, config: Config) -> None:
    try:
        policies.make_policy(msgspec.structs.replace(config, policy=name))
    except ValueError as error:
        raise ConfigError(f"--policies: {error}") from error
    models = _models(config)
    if name.startswith("static:") and name.removeprefix("static:") not in models:
        raise ConfigError(
            f"--policies: no engine serves `{name.removeprefix('static:')}`; "
            f"there are: {', '.join(models)}"
        )


def _models(config: Config) -> list[str]:
    return list(dict.fromkeys(engine.model for engine in config.engines))


def _at(struct: Struct, place: Sequence[str]) -> Any:
    found: Any = struct
    for key in place:
        found = getattr(found, key)
    return found


def _replaced(struct: Any, place: Sequence[str], value: float) -> Any:
    key, *rest = place
    inner = _replaced(getattr(struct, key), rest, value) if rest else value
    return msgspec.structs.replace(struct, **{key: inner})
