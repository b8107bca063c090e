"""A row of the demo's table: a policy, and whether it gets learned predictions or averages."""

from msgspec import Struct

from chimera_daemon.config import Config, ConfigError

_PRIOR = ":prior"
# Policies that look at predictions; the others would only pay for them.
_PREDICTIVE = ("chimera", "paper", "ltr", "stjf", "router_only")


class Variant(Struct, frozen=True):
    """``bundle``: folder of what predicts; None: averages per model and kind, learned online."""

    name: str
    policy: str
    bundle: str | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """What `chimera up` is told, beyond the policy."""
        return () if self.bundle is None else ("--bundle", self.bundle)


def variant(written: str, config: Config) -> Variant:
    """Read `POLICY` or `POLICY:prior`; predictive policies get the configuration's bundle.

    Raises `ConfigError` for `:prior` where it means nothing.
    """
    policy = written.removesuffix(_PRIOR)
    bundle = config.predictor.bundle if policy in _PREDICTIVE else None
    if policy == written:
        return Variant(policy, policy, bundle)
    if bundle is None:
        raise ConfigError(
            f"--policies: `{written}` is no different from `{policy}` "
            + ("here: no bundle is configured" if policy in _PREDICTIVE else "anywhere")
        )
    return Variant(f"{policy} (prior)", policy)
