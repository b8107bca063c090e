"""What `chimera up` says to whoever started it."""

import pytest

from chimera_daemon.announce import Announcer
from chimera_daemon.config import Config, EngineConfig, GatewayConfig

ENGINES = (
    EngineConfig("s1", "small", "echo"),
    EngineConfig("s2", "small", "echo"),
    EngineConfig("l", "large", "openai", "http://h/v1"),
)


def said(config: Config, gateways: bool = True) -> str:
    texts: list[str] = []
    Announcer(config, texts.append).begin(gateways)
    (text,) = texts
    return text


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("127.0.0.1:5700", "http://127.0.0.1:5700/v1"),
        ("0.0.0.0:80", "http://127.0.0.1:80/v1"),
        ("[::]:80", "http://[::1]:80/v1"),
        ("box.example:80", "http://box.example:80/v1"),
    ],
)
def test_where_things_are(listen: str, url: str) -> None:
    text = said(Config(engines=ENGINES, front="tcp://*:5570", gateway=GatewayConfig(listen)))
    _, http, clients, engines = text.splitlines()
    assert http.split() == ["OpenAI", "API", url]
    assert clients.split() == ["clients", "tcp://127.0.0.1:5570"]
    assert engines.split(maxsplit=1)[1] == "s1: small (echo), s2: small (echo), l: large (openai)"


def test_how_many() -> None:
    text = said(Config(workers=3, gateway=GatewayConfig(processes=2)))
    assert "/v1  (2 processes)" in text
    assert "tcp://127.0.0.1:5570  (3 workers)" in text
    assert "none yet; they join at tcp://127.0.0.1:5571" in text


def test_no_gateway() -> None:
    assert "none: see the error above" in said(Config(), gateways=False)
    none = said(Config(gateway=GatewayConfig(processes=0)), gateways=False)
    assert "none" in none
    assert "error" not in none


def test_each_model_is_announced_once() -> None:
    texts: list[str] = []
    announcer = Announcer(Config(engines=ENGINES), texts.append)
    for engine in (*ENGINES, *ENGINES):
        announcer.ready(engine)
    first, second = texts
    assert first.startswith("ready: small after ")
    assert first.endswith(" s; waiting for large")
    assert second.startswith("ready: large after ")
    assert second.endswith(" s; all models are ready")
