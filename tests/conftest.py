"""Hypothesis profiles, and where kernels run in tests.

`pytest tests/core --hypothesis-profile=thorough` searches for minutes. Without a GPU, kernels run
in Triton's interpreter. It is turned on before Triton is imported anywhere, because importing
decides about it, and for this process only: engines started by tests must not see it.
"""

import contextlib
import os

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=100)
settings.register_profile("thorough", deadline=None, max_examples=3000)
settings.load_profile("default")


def _interpret_kernels() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from triton import knobs

        knobs.runtime.interpret = True
    finally:
        del os.environ["TRITON_INTERPRET"]


def _has_gpu() -> bool:
    with contextlib.suppress(ImportError):
        import torch

        return torch.cuda.is_available()
    return False


if not _has_gpu():
    with contextlib.suppress(ImportError):
        _interpret_kernels()


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: "cuda" where there is a GPU, else "cpu", in the interpreter."""
    pytest.importorskip("triton", reason="kernels need Triton")
    return "cuda" if _has_gpu() else "cpu"
