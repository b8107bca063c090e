"""docs/openai.md against the code: settings, fields and errors. Its commands: test_examples."""

import re

from chimera_daemon import config
from chimera_daemon.gateway import errors
from chimera_daemon.gateway.forms import Extension
from tests.clients.testbed import ROOT

GUIDE = (ROOT / "docs/openai.md").read_text()


def test_its_settings_are_the_defaults() -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        config.parse(block)
    (gateway,) = (block for block in blocks if block.startswith("[gateway]"))
    assert config.parse(gateway).gateway == config.GatewayConfig()
    named = re.findall(r"^(\w+) =", gateway, re.MULTILINE)
    assert named == list(config.GatewayConfig.__struct_fields__)


def test_it_names_every_error() -> None:
    named = {
        (status, code)
        for row in re.findall(r"^\| (\d{3}.*?) \| (`.*?) \|", GUIDE, re.MULTILINE)
        for status in row[0].split(", ")
        for code in re.findall(r"`(\w+)`", row[1])
    }
    # What only a mistake of ours can lead to is left out.
    internal = {"conflict", "protocol", "version", "client_closed"}
    for code, status in errors._STATUS.items():
        if code not in internal:
            assert (str(int(status)), errors._CODE.get(code, code)) in named


def test_it_names_every_field_of_the_extension() -> None:
    for name in Extension.__struct_fields__:
        assert re.search(rf"^\|[^|]*`{name}`", GUIDE, re.MULTILINE), name
