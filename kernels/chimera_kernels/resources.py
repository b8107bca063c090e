"""What the Triton kernels take of a GPU, found without one: `python -m chimera_kernels.resources`.

Every kernel module lists its kernels as they are launched in a function `variants()`. Each is
compiled ahead of time, and registers, shared memory, spills and instructions are read from the
machine code. Knows no launcher and no tensor; needs a process without TRITON_INTERPRET.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import chimera_kernels

# Bytes of shared memory that one block may have and registers of one thread: CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability".
SHARED_LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
REGISTER_LIMIT = 255

_ALIGNED = [["tt.divisibility", 16]]
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
# Address, predicate, and the instruction's name with its modifiers: `/*00e0*/  @!P0 LDG.E.128 `
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_TABLE = ("HGMMA", "HMMA", "FFMA", "LDGSTS", "LDG", "STG", "LDSM", "LDS", "STS", "BAR")


class Variant(NamedTuple):
    """One kernel as it is launched.

    ``signature`` has Triton's types of the arguments, such as "*bf16" or "i32"; pointers are
    aligned to 16 bytes, and "i32:16" is an integer that 16 divides. ``constants`` has all others:
    constexpr ones, and arguments that are None or 1, of which Triton makes constants at a launch.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: dict[str, Any] = {}  # more of them, such as launch_cooperative_grid
    capabilities: tuple[int, ...] = (80, 90)  # of the GPUs that it is launched on


class Recorder:
    """Stands in for a module of kernels, and notes how each is launched instead of doing it.

    Takes tensors on the device "meta", which have types and shapes only.
    """

    def __init__(self, kernels: Any, name: str) -> None:
        self._kernels, self._name = kernels, name
        self._variants: dict[str, Variant] = {}

    @property
    def variants(self) -> list[Variant]:
        """Each different launch once."""
        return list(self._variants.values())

    def __getattr__(self, kernel: str) -> Any:
        return _Launches(kernel, self._note)

    def _note(self, name: str, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        kernel = getattr(self._kernels, name)
        names: list[str] = kernel.arg_names
        given = dict(zip(names, arguments, strict=False))
        given |= {key: value for key, value in options.items() if key in names}
        types = {key: _type_of(value) for key, value in given.items()}
        literal = {p.name for p in getattr(kernel, "params", ()) if p.is_constexpr}
        constants = {k: v for k, v in given.items() if types[k] is None or k in literal}
        signature = {k: t for k, t in types.items() if t is not None and k not in constants}
        more = {key: value for key, value in options.items() if key not in names}
        variant = Variant(
            f"{self._name} {name}", kernel, signature, constants,
            more.pop("num_warps", 4), more.pop("num_stages", 3), more,
        )  # fmt: skip
        self._variants.setdefault(repr(variant[1:]), variant)


class _Launches:
    def __init__(self, kernel: str, note: Callable[..., None]) -> None:
        self._kernel, self._note = kernel, note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self._note(self._kernel, arguments, options)


def _type_of(value: Any) -> str | None:
    """Triton's type of an argument; None for one of which a launch makes a constant."""
    if isinstance(value, torch.Tensor):
        return "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).split(".")[-1]]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int) and value != 1:
        return "i32:16" if value % 16 == 0 else "i32"
    return None


class Resources(NamedTuple):
    """What one variant takes on one compute capability.

    A spill counts with its width each time it stands in the code, however often it is run, as
    ptxas counts it; any other use of a thread's local memory would count as one too.
    """

    registers: int  # per thread
    shared_bytes: int  # per block
    stack_bytes: int  # per thread
    spill_store_bytes: int
    spill_load_bytes: int
    instructions: dict[str, int]  # by name without modifiers: HMMA, LDGSTS, ...

    def faults(self, capability: int) -> list[str]:
        """Why this kernel should not, or cannot, run on such a GPU; empty if all is well."""
        limits = (
            ("registers", self.registers, REGISTER_LIMIT),
            ("bytes of shared memory", self.shared_bytes, SHARED_LIMITS[capability]),
            ("bytes of stack", self.stack_bytes, 0),
            ("bytes of spill stores", self.spill_store_bytes, 0),
            ("bytes of spill loads", self.spill_load_bytes, 0),
        )
        return [f"{n} {what}, at most {most}" for what, n, most in limits if n > most]


def compile_for(variant: Variant, capability: int) -> Resources:
    """Compile for a compute capability (90 is 9.0) as a launch there would, and read the result.

    Raises ValueError for an argument that is neither in signature nor in constants or is in both,
    RuntimeError in a process with TRITON_INTERPRET, and what Triton raises for a wrong kernel.
    """
    source = _source(variant)
    if not isinstance(variant.kernel, triton.JITFunction):
        raise RuntimeError(f"{variant.name}: TRITON_INTERPRET is set, nothing can be compiled")
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages} | variant.options
    target = GPUTarget("cuda", capability, 32)
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        error.add_note(f"{variant.name} cannot be compiled for sm_{capability}")
        raise
    code = _disassembled(compiled.asm["cubin"])
    usage = _USAGE.search(code)
    assert usage is not None, "cuobjdump tells no resource usage"
    names = _INSTRUCTION.findall(code)
    return Resources(
        registers=int(usage[1]),
        shared_bytes=compiled.metadata.shared,
        stack_bytes=int(usage[2]),
        spill_store_bytes=sum(_width(name) for name in names if name.startswith("STL")),
        spill_load_bytes=sum(_width(name) for name in names if name.startswith("LDL")),
        instructions=dict(Counter(name.partition(".")[0] for name in names)),
    )


def _source(variant: Variant) -> ASTSource:
    """What Triton compiles; alignment is told as its launcher does, for wide loads depend on it."""
    arguments: list[str] = variant.kernel.arg_names
    given = [*variant.signature, *variant.constants]
    if sorted(given) != sorted(arguments):
        wrong = sorted(set(given) ^ set(arguments)) or "given twice"
        raise ValueError(f"{variant.name}: signature and constants do not fit the kernel: {wrong}")
    types = {name: variant.signature.get(name, "constexpr") for name in arguments}
    aligned = [name for name, type_ in types.items() if type_[0] == "*" or type_.endswith(":16")]
    return ASTSource(
        variant.kernel,
        {name: type_.removesuffix(":16") for name, type_ in types.items()},
        variant.constants,
        {(arguments.index(name),): _ALIGNED for name in aligned},
    )


def _disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory(prefix="chimera-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _width(name: str) -> int:
    """Bytes that an access to local memory such as STL.64 or LDL.LU.128 moves."""
    bits = [int(part) for part in name.split(".") if part.isdigit()]
    return bits[0] // 8 if bits else 4


def find_variants(modules: Sequence[str] = ()) -> list[Variant]:
    """Those of the modules, by default of all in this package that have a function `variants`."""
    names = modules or [
        module.name
        for module in pkgutil.iter_modules(chimera_kernels.__path__, "chimera_kernels.")
        if module.name != __spec__.name
    ]
    found = [importlib.import_module(name) for name in names]
    return [v for module in found if hasattr(module, "variants") for v in module.variants()]


def _compile_all(variants: Iterable[Variant], capabilities: Iterable[int]) -> list[dict[str, Any]]:
    """One row for each variant and capability. Threads do: Triton lets go of Python's lock."""
    wanted = set(capabilities)
    jobs = [(variant, c) for variant in variants for c in variant.capabilities if c in wanted]
    # Where ptxas fails Triton prints all of the code, and raises its message.
    with contextlib.redirect_stdout(io.StringIO()), ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda job: compile_for(*job), jobs))
    return [
        {"name": variant.name, "capability": capability}
        | resources._asdict()
        | {"faults": resources.faults(capability)}
        for (variant, capability), resources in zip(jobs, done, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what all variants take; the exit code is 1 if one has a fault."""
    parser = argparse.ArgumentParser(prog="python -m chimera_kernels.resources")
    parser.add_argument("modules", nargs="*", help="with a function `variants`; default: all here")
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90],
                        choices=sorted(SHARED_LIMITS), help="default: 80 90")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    chosen = parser.parse_args(arguments)
    variants = find_variants(chosen.modules)
    if not variants:
        parser.error("no module has a function `variants` that lists any kernel")
    rows = _compile_all(variants, chosen.capability)
    print("\n".join(json.dumps(row) for row in rows) if chosen.json else _table(rows))
    return int(any(row["faults"] for row in rows))


def _table(rows: Sequence[dict[str, Any]]) -> str:
    width = max([len(row["name"]) for row in rows], default=0)
    head = ("sm", "regs", "shared", "stack", "spill", *_TABLE)
    lines = [" " * width + "".join(f"{name:>8}" for name in head)]
    for row in rows:
        numbers = [row["capability"], row["registers"], row["shared_bytes"], row["stack_bytes"]]
        numbers += [row["spill_store_bytes"] + row["spill_load_bytes"]]
        numbers += [row["instructions"].get(name, 0) for name in _TABLE]
        lines.append(f"{row['name']:{width}}" + "".join(f"{n:8d}" for n in numbers))
        lines += [f"    FAULT: {fault}" for fault in row["faults"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
