"""One cluster for all tests of this folder: its engines take most of a minute to start."""

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from chimera_daemon.client import connect_sync
from tests.clients.testbed import ENGINES, FILES, WAIT_S, Testbed


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    for name in ENGINES:
        if not (FILES / "models" / f"testbed-{name}" / "model.safetensors").is_file():
            pytest.skip(f"no weights of testbed-{name}")
    sockets = Path(tempfile.mkdtemp(prefix="chimera-"))  # paths of sockets must be short
    testbed = Testbed(tmp_path_factory.mktemp("testbed"), sockets)
    testbed.start()
    try:
        testbed.until_ready()
        with connect_sync(testbed.front, timeout_s=WAIT_S) as testbed.client:
            yield testbed
            code = testbed.stop()
        assert code == 0, testbed.log()
    finally:
        testbed.kill()
        shutil.rmtree(sockets, ignore_errors=True)


@pytest.fixture
def testbed(cluster: Testbed) -> Iterator[Testbed]:
    """The cluster, idle before and after the test."""
    cluster.until_idle()
    yield cluster
    cluster.until_idle()
