"""How rows of the demo's table are written: policies, knobs, and predictions left out."""

import msgspec
import pytest

from chimera_bench.variants import Variant, split, variants
from chimera_daemon.config import Config, ConfigError, EngineConfig, PaperConfig, PredictorConfig

ENGINES = tuple(EngineConfig(name=n, model=n, kind="echo") for n in ("small", "large"))
CONFIG = Config(engines=ENGINES, price=0.4, predictor=PredictorConfig(bundle="b"))


def test_commas_part_rows_and_knobs() -> None:
    assert split("chimera, paper:tau=3, delta_s=0.3,static:small,") == [
        "chimera", "paper:tau=3,delta_s=0.3", "static:small",
    ]  # fmt: skip
    assert split("paper:tau=3,delta_s=0.3:prior,ltr:prior") == [
        "paper:tau=3,delta_s=0.3:prior", "ltr:prior",
    ]  # fmt: skip
    assert split("a=1,b") == ["a=1", "b"]
    assert split(" , ") == []


def test_a_name_alone_is_as_configured() -> None:
    assert variants("chimera", CONFIG) == [Variant("chimera", "chimera", "chimera", "b")]
    assert variants("chimera:prior", CONFIG) == [
        Variant("chimera (prior)", "chimera", "chimera (prior)")
    ]
    (fixed,) = variants("static:small", CONFIG)
    assert (fixed.name, fixed.policy, fixed.bundle) == ("static:small", "static:small", None)
    assert fixed.applied(CONFIG) == CONFIG


def test_knobs_change_what_they_name_and_nothing_else() -> None:
    (one,) = variants("paper:tau=3,delta_s=0.3", CONFIG)
    assert (one.name, one.policy, one.sweep) == ("paper tau=3 delta_s=0.3", "paper", "paper")
    paper = msgspec.structs.replace(PaperConfig(), tau=3.0, delta_s=0.3)
    assert one.applied(CONFIG) == msgspec.structs.replace(CONFIG, paper=paper)
    # A knob may bring back the default that the configuration had changed.
    (plain,) = variants(f"chimera:price={Config().price}", CONFIG)
    assert plain.applied(CONFIG).price == Config().price


def test_values_side_by_side_are_rows_of_one_curve() -> None:
    rows = variants("chimera:price=0.1/0.4/2,aging_tokens_per_s=20", CONFIG)
    assert [row.applied(CONFIG).price for row in rows] == [0.1, 0.4, 2.0]
    assert {row.applied(CONFIG).aging_tokens_per_s for row in rows} == {20.0}
    assert len({row.name for row in rows}) == 3
    assert {row.sweep for row in rows} == {"chimera aging_tokens_per_s=20"}
    assert {row.bundle for row in rows} == {"b"}
    prior = variants("chimera:price=0.1/0.4:prior", CONFIG)
    assert [(row.sweep, row.bundle) for row in prior] == 2 * [("chimera (prior)", None)]
    assert prior[0].name == "chimera price=0.1 (prior)"


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("chimera:prise=1", "--policies: 'chimera'.* did you mean `price`"),
        ("chimera:price", "--policies: 'chimera:price': 'price' is not KNOB=VALUE"),
        ("chimera:price=-1", "--policies: .*price"),
        ("chimera:price=much", "--policies: .*price"),
        ("chimera:price=1,price=2", "`price` is set twice"),
        ("chimera:tau=1", "no knob `tau`"),
        ("chimaera:price=1", "there are: chimera"),
        ("stjf_oracle:price=1", "no policy 'stjf_oracle'"),
        ("chimera:predictions=oracle", "leave `predictions` out"),
        ("least_loaded:aging_tokens_per_s=2:prior", "no different from"),
        ("static:medium", "there are: small, large"),
    ],
)
def test_bad_rows_are_named(written: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        variants(written, CONFIG)
