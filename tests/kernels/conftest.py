"""Inputs of these tests are random: others in each test, the same ones in each run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_inputs(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(sum(request.node.nodeid.encode()))
