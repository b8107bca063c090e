"""One small bundle, trained once for all tests that need one."""

import pytest

from chimera_predictors.bundle import write_bundle
from chimera_predictors.encoder import EmbeddingCache, Encoder
from chimera_predictors.trainer import train_bundle
from fake_traces import make_traces
from tiny_bundle import OPTIONS, Trained
from tiny_encoder import make_encoder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def trained(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    traces = make_traces(tasks=150)
    bundle = train_bundle(traces, EmbeddingCache(encoder), OPTIONS)
    folder = write_bundle(bundle, tmp_path_factory.mktemp("bundles") / "bundle")
    return Trained(bundle, traces, encoder, folder)
