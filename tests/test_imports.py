"""The direction of imports (docs/architecture.md), read from the sources without importing them.

Modules that do not exist yet are not checked. New ones that no rule names are covered by the rules
for everything: no cycle, no third-party library outside its place, nothing done at import.
"""

import ast
import os
import subprocess
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

# What serving shares with training: nouns and text functions. With these alone, and no extra
# installed, the daemon records traces.
SHARED = {"chimera_predictors.records", "chimera_predictors.text"}
SHARERS = ["memory", "recorder", "reading"]
PURE = ["messages", "config", "policy", "core", "pricing", "prior", "pace"]
IMPURE = {"asyncio", "time", "random", "secrets", "socket", "threading", "subprocess", "select"}

# What a module may reach within the project, directly or not. Longest prefix wins.
MAY_REACH = {
    "chimera_daemon.messages": [],
    "chimera_daemon.config": ["messages"],
    "chimera_daemon.policy": ["messages", "config"],
    "chimera_daemon.core": ["messages", "config", "policy", "queues", "state", "pricing"],
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
    "chimera_daemon.memory": ["core", "prior", "daemon", "serve", "engines", "cli", "client"],
    "chimera_daemon.recorder": ["core", "prior", "daemon", "serve", "engines", "cli", "client"],
    "chimera_daemon.reading": ["core", "prior", "daemon", "serve", "engines", "cli", "client"],
    "chimera_daemon.predict": ["core", "daemon", "serve", "gateway", "engines", "cli", "client"],
    "chimera_daemon.daemon": ["supervisor", "serve", "gateway", "engines", "cli", "client"],
}

# Third-party libraries (and parts of the standard one) of `chimera_daemon` that have one place.
ONLY_IN = {
    "torch": ["engines.vllm"],
    "transformers": ["engines.vllm"],
    "tokenizers": ["engines.vllm"],
    "numpy": ["engines.vllm"],
    "vllm": ["engines.vllm", "engines.vllm_openai"],
    "pydantic": ["engines.vllm_openai"],
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
# The same for `chimera_predictors`: each has an extra of its own, or there is a format behind it.
PREDICTORS_ONLY_IN = {
    "huggingface_hub": ["checkpoint"],
    "transformers": ["checkpoint"],
    "tokenizers": ["tokenizer"],
    "safetensors": ["checkpoint", "bundle"],
    "pyarrow": ["trace_files"],
    "rich": ["report", "eval_cli", "train_cli"],
    "matplotlib": ["plots"],
    "sklearn": ["baselines", "baseline_features"],
    "scipy": ["baselines", "baseline_features"],
    "lightgbm": ["baselines"],
    "quantile_forest": ["baselines"],
    "pickle": [],
    "joblib": [],
    "sentence_transformers": [],
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


def _under(name: str, prefixes: list[str], package: str = "chimera_daemon") -> bool:
    full = [f"{package}.{p}" for p in prefixes]
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


@pytest.mark.parametrize("library", PREDICTORS_ONLY_IN)
def test_libraries_of_the_predictors_have_one_place(library: str) -> None:
    for module in _named("chimera_predictors"):
        if library in _roots(MODULES[module].imports):
            allowed = PREDICTORS_ONLY_IN[library]
            assert _under(module, allowed, "chimera_predictors"), f"{module} imports {library}"


def test_commands_of_the_predictors_are_light() -> None:
    """`chimera --help` imports them all; a command imports what it needs when it runs."""
    commands = [m for m in _named("chimera_predictors") if m.endswith("_cli")]
    assert commands
    for start in commands:
        for module in {start} | _reach(start, at_import=True):
            foreign = _roots(MODULES[module].at_import) - sys.stdlib_module_names - set(PACKAGES)
            assert foreign <= {"msgspec"}, f"{start} needs {module}, which imports {foreign}"


def test_kernels_know_tensors_alone() -> None:
    for module in _named("chimera_kernels"):
        foreign = _roots(MODULES[module].imports) - sys.stdlib_module_names - {"chimera_kernels"}
        assert foreign <= {"torch", "triton", "numpy"}, f"{module} imports {foreign}"


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
            ours = _ours(MODULES[module].imports)
            below = {m for m in ours if not m.startswith("chimera_daemon.")}
            wrong = below - (SHARED if _under(module, SHARERS) else set())
            assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("name", sorted(SHARED))
def test_what_serving_shares_with_training_is_light(name: str) -> None:
    for module in {name} | _reach(name, at_import=True):
        foreign = _roots(MODULES[module].at_import) - sys.stdlib_module_names - set(PACKAGES)
        assert foreign <= {"msgspec"}, f"{module} imports {foreign}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("chimera_daemon.serve", {"numpy", "tokenizers", "chimera_predictors"}),
        ("chimera_daemon.predict", {"numpy", "tokenizers", "torch", "transformers", "vllm"}),
    ],
)
def test_torch_comes_with_a_bundle_and_all_of_it_when_asked_for(
    module: str, heavy: set[str]
) -> None:
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "predictors"), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"


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
