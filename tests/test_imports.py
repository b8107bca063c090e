"""The direction of imports (docs/architecture.md), read from the sources without importing them.

Modules that do not exist yet are not checked. New ones that no rule names are covered by the rules
for everything: no cycle, no third-party library outside its place, nothing done at import.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "chimera_daemon": ROOT / "chimera_daemon",
    "chimera_kernels": ROOT / "kernels" / "chimera_kernels",
    "chimera_predictors": ROOT / "predictors" / "chimera_predictors",
    "chimera_bench": ROOT / "bench" / "chimera_bench",
}

PURE = ["messages", "config", "policy", "core", "prior"]
IMPURE = {"asyncio", "time", "random", "secrets", "socket", "threading", "subprocess", "select"}

# What a module may reach within the project, directly or not. Longest prefix wins.
MAY_REACH = {
    "chimera_daemon.messages": [],
    "chimera_daemon.config": ["messages"],
    "chimera_daemon.policy": ["messages", "config"],
    "chimera_daemon.core": ["messages", "config", "policy", "queues", "state"],
    "chimera_daemon.prior": ["messages", "config"],
    "chimera_daemon.wire": ["messages"],
    "chimera_daemon.channel": ["messages", "wire"],
    "chimera_daemon.board": ["messages"],
    "chimera_daemon.client": ["messages", "wire", "channel", "board", "client"],
}
MAY_NOT_REACH = {
    "chimera_daemon.engines": [
        *["core", "policy", "prior", "predict", "daemon", "supervisor"],
        *["serve", "gateway", "client", "cli"],
    ],
    "chimera_daemon.gateway": [
        *["core", "policy", "prior", "predict", "daemon", "supervisor", "serve", "engines", "cli"],
    ],
    "chimera_daemon.predict": ["core", "daemon", "serve", "gateway", "engines", "cli", "client"],
    "chimera_daemon.daemon": ["supervisor", "serve", "gateway", "engines", "cli", "client"],
}

# Third-party libraries (and parts of the standard one) of `chimera_daemon` that have one place.
ONLY_IN = {
    "torch": ["predict", "engines.vllm"],
    "transformers": ["predict", "engines.vllm"],
    "tokenizers": ["predict", "engines.vllm"],
    "numpy": ["predict", "engines.vllm"],
    "vllm": ["engines.vllm"],
    "http": ["gateway", "engines.openai"],
    "urllib": ["gateway", "engines.openai"],
    "aiohttp": ["gateway", "engines.openai"],
    "httpx": ["gateway", "engines.openai"],
    "requests": [],
    "fastapi": ["gateway"],
    "starlette": ["gateway"],
    "uvicorn": ["gateway"],
    "httptools": ["gateway", "engines.openai"],
    "h11": ["gateway", "engines.openai"],
    "pickle": [],
    "marshal": [],
    "shelve": [],
}


class Module(NamedTuple):
    """One source file; ``at_import`` are those of its imports met while it is imported."""

    name: str
    tree: ast.Module
    imports: set[str]
    at_import: set[str]


def _sources() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(node: ast.AST, module: str, is_package: bool, deep: bool) -> Iterator[str]:
    """Imported names below a node. Not ``deep``: leave out functions and TYPE_CHECKING blocks."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                parents = module.split(".")
                keep = len(parents) - child.level + is_package
                base = ".".join([*parents[:keep], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in child.names)
        elif deep or not (_is_function(child) or _is_type_checking(child)):
            yield from _imports(child, module, is_package, deep)


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _load() -> dict[str, Module]:
    modules: dict[str, Module] = {}
    for name, path in _sources():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        is_package = path.name == "__init__.py"
        deep = set(_imports(tree, name, is_package, deep=True))
        modules[name] = Module(name, tree, deep, set(_imports(tree, name, is_package, deep=False)))
    return modules


MODULES = _load()


def _ours(imported: set[str]) -> set[str]:
    """Modules of the project among imported names (`from package import module` included)."""
    found: set[str] = set()
    for name in imported:
        owner = name if name in MODULES else name.rpartition(".")[0]
        if owner in MODULES and owner not in PACKAGES:
            found.add(owner)
    return found


def _reach(start: str, at_import: bool = False) -> set[str]:
    """Modules of the project that a module needs, itself excluded unless in a cycle."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        module = MODULES[todo.pop()]
        new = _ours(module.at_import if at_import else module.imports) - seen
        seen |= new
        todo += new
    return seen


def _under(name: str, prefixes: list[str]) -> bool:
    full = [f"chimera_daemon.{p}" for p in prefixes]
    return any(name == p or name.startswith(p + ".") for p in full)


def _roots(imported: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in imported}


def _named(prefix: str) -> list[str]:
    return [m for m in MODULES if m == prefix or m.startswith(prefix + ".")]


def test_sources_are_found() -> None:
    assert {*PACKAGES, "chimera_daemon.messages"} <= set(MODULES)


@pytest.mark.parametrize("name", PURE)
def test_core_and_all_it_needs_is_pure(name: str) -> None:
    start = f"chimera_daemon.{name}"
    if start not in MODULES:
        pytest.skip("not written yet")
    for module in {start} | _reach(start):
        roots = _roots(MODULES[module].imports)
        foreign = roots - sys.stdlib_module_names - {"msgspec", "chimera_daemon"}
        assert not foreign, f"{module} imports {foreign}"
        assert not roots & IMPURE, f"{module} imports {roots & IMPURE}"


@pytest.mark.parametrize("prefix", MAY_REACH)
def test_lower_layers_know_nothing_above_them(prefix: str) -> None:
    for module in _named(prefix):
        above = {m for m in _reach(module) if not _under(m, MAY_REACH[prefix])}
        assert not above, f"{module} reaches {above}"


@pytest.mark.parametrize("prefix", MAY_NOT_REACH)
def test_processes_meet_on_the_wire_only(prefix: str) -> None:
    for module in _named(prefix):
        wrong = {m for m in _reach(module) if _under(m, MAY_NOT_REACH[prefix])}
        assert not wrong, f"{module} reaches {wrong}"


def test_client_needs_msgspec_and_pyzmq_only() -> None:
    for start in _named("chimera_daemon.client"):
        for module in {start} | _reach(start, at_import=True):
            foreign = _roots(MODULES[module].at_import) - sys.stdlib_module_names
            assert foreign <= {"msgspec", "zmq", "chimera_daemon"}, f"{module} imports {foreign}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_have_one_place(library: str) -> None:
    for module in _named("chimera_daemon"):
        if library in _roots(MODULES[module].imports):
            assert _under(module, ONLY_IN[library]), f"{module} imports {library}"


def test_nothing_imports_the_command_line() -> None:
    for module in MODULES.values():
        if not _under(module.name, ["cli", "__main__"]):
            wrong = {m for m in _ours(module.imports) if _under(m, ["cli"])}
            assert not wrong, f"{module.name} imports {wrong}"


def test_component_packages_point_one_way() -> None:
    allowed = {
        "chimera_kernels": {"chimera_kernels"},
        "chimera_predictors": {"chimera_predictors", "chimera_kernels"},
        "chimera_bench": set(PACKAGES),
    }
    for package, below in allowed.items():
        for module in _named(package):
            wrong = (_roots(MODULES[module].imports) & set(PACKAGES)) - below
            assert not wrong, f"{module} imports {wrong}"
    for module in _named("chimera_daemon"):
        roots = _roots(MODULES[module].imports)
        if not _under(module, ["cli"]):
            assert "chimera_bench" not in roots, f"{module} imports chimera_bench"
        if not _under(module, ["predict"]):
            wrong = roots & {"chimera_predictors", "chimera_kernels"}
            assert not wrong, f"{module} imports {wrong}"


def test_no_cycles() -> None:
    for module in MODULES:
        assert module not in _reach(module, at_import=True), f"{module} imports itself in a circle"


def test_importing_does_nothing() -> None:
    for module in MODULES.values():
        if module.name.endswith(".__main__"):
            continue
        for statement in module.tree.body:
            is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            assert not is_call, f"{module.name}:{statement.lineno} calls something when imported"
