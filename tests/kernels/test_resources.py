"""Registers, shared memory and spills of every kernel, compiled ahead of time for real GPUs.

Compiling needs a process without TRITON_INTERPRET, so all of it runs in processes of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl
from triton import knobs

from chimera_kernels.resources import Resources, Variant, compile_for

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = (80, 90)
FITS = Resources(255, 163 << 10, 0, 0, 0, {})


@triton.jit
def _double(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def _powers(x, y, n, steps, SIZE: tl.constexpr):
    """With few warps the square does not fit into the registers."""
    at = tl.arange(0, SIZE)[:, None] * n + tl.arange(0, SIZE)[None, :]
    square = tl.load(x + at)
    for _ in range(steps):
        square += tl.dot(square, square).to(square.dtype)
    tl.store(y + at, square)


def variants() -> list[Variant]:
    """What the processes below compile, in place of the project's kernels."""
    half = {"x": "*fp16", "y": "*fp16"}
    sizes = {"n": "i32:16", "steps": "i32"}
    return [
        Variant("wide", _double, half | {"n": "i32:16"}, {"BLOCK": 1024}),
        Variant("narrow", _double, half | {"n": "i32"}, {"BLOCK": 1024}),
        Variant("fits", _powers, half | sizes, {"SIZE": 64}),
        Variant("spills", _powers, half | sizes, {"SIZE": 128}, 2),
    ]


def compiled(folder: Path, *modules: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and rows of the command, with a cache of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "chimera_kernels.resources", *modules, "--json"],
        env=environment | {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kernel_fits_without_spilling(tmp_path: Path) -> None:
    code, rows = compiled(tmp_path)
    assert {row["capability"] for row in rows} == set(CAPABILITIES)
    for row in rows:
        what = f"{row['name']} on sm_{row['capability']}"
        assert row["faults"] == [], what
        assert row["spill_store_bytes"] == row["spill_load_bytes"] == row["stack_bytes"] == 0, what
    assert code == 0


@pytest.fixture(scope="module")
def rows_of_variants(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    code, rows = compiled(tmp_path_factory.mktemp("cache"), "tests.kernels.test_resources")
    assert code == 1  # one spills
    return {(row["name"], row["capability"]): row for row in rows}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_spills_are_found(rows_of_variants: dict[tuple[str, int], Any], capability: int) -> None:
    row = rows_of_variants["spills", capability]
    # A thread has 256 sums of 4 bytes and as many halves, and 255 registers.
    for field in ("spill_store_bytes", "spill_load_bytes", "stack_bytes"):
        assert row[field] > 512, field
    assert len(row["faults"]) == 3


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_fits_is_counted(
    rows_of_variants: dict[tuple[str, int], Any], capability: int
) -> None:
    row = rows_of_variants["fits", capability]
    assert row["faults"] == []
    assert 32 < row["registers"] <= 255
    assert row["shared_bytes"] == 64 * 64 * 2
    # 64 x 64 x 64 products: by 16 x 8 x 16 in each of 4 warps, or by 64 x 64 x 16 of all.
    products = {80: ("HMMA", 32), 90: ("HGMMA", 4)}
    name, times = products[capability]
    assert row["instructions"][name] == times


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_alignment_is_told(rows_of_variants: dict[tuple[str, int], Any], capability: int) -> None:
    """Where masks end at any number, no two of the 8 halves of a thread can be loaded at once."""
    wide, narrow = (rows_of_variants[name, capability] for name in ("wide", "narrow"))
    assert wide["instructions"]["LDG"] == 1
    assert narrow["instructions"]["LDG"] == 8


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"registers": 256}, "registers"),
        ({"shared_bytes": (163 << 10) + 1}, "shared"),
        ({"stack_bytes": 8}, "stack"),
        ({"spill_store_bytes": 4}, "spill stores"),
        ({"spill_load_bytes": 4}, "spill loads"),
    ],
)
def test_limits(change: dict[str, int], word: str) -> None:
    assert FITS.faults(80) == []
    (fault,) = FITS._replace(**change).faults(80)
    assert word in fault


def test_shared_memory_is_that_of_the_capability() -> None:
    assert FITS._replace(shared_bytes=227 << 10).faults(90) == []
    assert len(FITS.faults(86)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"signature": {"x": "*fp16", "y": "*fp16"}},
        {"constants": {}},
        {"constants": {"BLOCK": 1024, "n": 1}},
        {"constants": {"BLOCK": 1024, "WIDTH": 1}},
    ],
)
def test_arguments_that_do_not_fit_the_kernel(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wide: signature and constants do not fit"):
        compile_for(variants()[0]._replace(**change), 90)


def test_an_interpreted_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    interpreted = triton.jit(_double.fn)
    with pytest.raises(RuntimeError, match="wide: TRITON_INTERPRET is set"):
        compile_for(variants()[0]._replace(kernel=interpreted), 90)
