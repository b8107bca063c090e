"""What is shipped: wheel, folders, set-up script, and documents that keep up with the code."""

import configparser
import os
import shutil
import subprocess
import sys
import tomllib
import typing
import zipfile
from pathlib import Path

import msgspec
import pytest
import zmq

from chimera_daemon import messages, wire

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WHEEL_PACKAGES: list[str] = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
MODELS = ROOT / "bench" / "chimera_bench" / "testbed" / "models"

# A stand-in for the PyPI package `kernels`: like it, a regular package with a version that
# transformers accepts. Any name can be imported from it.
KERNELS_STUB = """
STUB = True
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *args, **options: None})
"""


def _python(code: str, site: Path | None = None) -> str:
    """Run code in the repository root; ``site`` follows it on the path, as site-packages does."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(site) if site else ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Folders.


@pytest.mark.parametrize("folder", WHEEL_PACKAGES)
def test_packages_of_pyproject_exist(folder: str) -> None:
    assert (ROOT / folder / "__init__.py").is_file()


@pytest.mark.parametrize("folder", ["kernels", "predictors", "bench"])
def test_component_folders_are_not_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_our_kernels_folder_does_not_shadow_the_one_of_pypi(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(KERNELS_STUB)
    info = tmp_path / "kernels-0.17.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    code = "import transformers.integrations.hub_kernels, kernels; print(kernels.STUB)"
    assert _python(code, site=tmp_path) == "True"


def test_transformers_imports_without_the_one_of_pypi() -> None:
    pytest.importorskip("transformers")
    code = "import transformers.integrations.hub_kernels; print('imported')"
    assert _python(code).endswith("imported")


# Wheel.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel, built without isolation and without network."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    name = _python(f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))")
    return zipfile.ZipFile(folder / name.splitlines()[-1])


def test_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    packages = {Path(folder).name for folder in WHEEL_PACKAGES}
    assert {top for top in tops if not top.endswith(".dist-info")} == packages
    assert "chimera_daemon/py.typed" in wheel.namelist()
    assert not [name for name in wheel.namelist() if "__pycache__" in name]


def test_wheel_holds_the_models(wheel: zipfile.ZipFile) -> None:
    weights = sorted(MODELS.rglob("*.safetensors"))
    if not weights:
        pytest.skip("no model is trained yet")
    inside = set(wheel.namelist())
    for path in MODELS.rglob("*"):
        if path.is_file():
            assert path.relative_to(ROOT / "bench").as_posix() in inside
    assert sum(path.stat().st_size for path in weights) <= 25e6


def test_wheel_has_the_command(wheel: zipfile.ZipFile) -> None:
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(entry).decode())
    assert parser["console_scripts"]["chimera"] == "chimera_daemon.cli:main"


def test_base_install_is_light() -> None:
    names = {requirement.split(">")[0] for requirement in PROJECT["project"]["dependencies"]}
    assert names == {"msgspec", "pyzmq", "uvloop"}


def test_lock_covers_direct_dependencies() -> None:
    lines = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = (
        PROJECT["project"]["dependencies"] + extras["predict"] + extras["bench"] + extras["dev"]
    )
    assert {r.split(">")[0].lower() for r in wanted} <= pinned
    assert not pinned & {"torchvision", "torchaudio", "torchcodec"}


# Set-up script.

# Stands for Python: `-m venv` puts it into the environment, `-m pip` notes what it was asked.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2 $3" in
    "-m venv --clear")
        mkdir -p .venv/bin
        cp "$0" .venv/bin/python
        echo "VIRTUAL_ENV=$PWD/.venv" >.venv/bin/activate ;;
    "-m pip install") echo "$@" >>pip-calls; test ! -e network-is-down ;;
    *) exit 0 ;;
esac
"""
TOOLS = "awk bash cat cksum cp dirname flock grep head mkdir rm sh tail tee touch uname"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Just enough of the repository to run requirements/setup.sh, with a `bin` to put on PATH."""
    (tmp_path / "requirements").mkdir()
    for name in ["pyproject.toml", "requirements/cpu.lock", "requirements/setup.sh"]:
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS.split():
        found = shutil.which(tool)
        if found:
            (tmp_path / "bin" / tool).symlink_to(found)
    return tmp_path


def _setup(checkout: Path) -> "subprocess.CompletedProcess[str]":
    command = [str(checkout / "bin" / "bash"), "requirements/setup.sh", "cpu"]
    env = {"PATH": str(checkout / "bin")}
    return subprocess.run(
        command, cwd=checkout, env=env, capture_output=True, text=True, check=False
    )


def _add_python(checkout: Path) -> None:
    (checkout / "bin" / "python3.11").write_text(FAKE_PYTHON)
    (checkout / "bin" / "python3.11").chmod(0o755)


def _pip_calls(checkout: Path) -> list[str]:
    return (checkout / "pip-calls").read_text().splitlines()


def test_setup_says_when_there_is_no_python(checkout: Path) -> None:
    done = _setup(checkout)
    assert done.returncode == 1
    assert "no Python 3.11 or newer found" in done.stderr


def test_setup_installs_once(checkout: Path) -> None:
    _add_python(checkout)
    assert _setup(checkout).returncode == 0
    calls = len(_pip_calls(checkout))
    again = _setup(checkout)
    assert (again.returncode, again.stdout) == (0, "")
    assert len(_pip_calls(checkout)) == calls
    with (checkout / "requirements" / "cpu.lock").open("a") as lock:
        lock.write("# changed\n")
    assert _setup(checkout).returncode == 0
    assert len(_pip_calls(checkout)) == 2 * calls


def test_setup_repeats_a_failed_installation_in_full(checkout: Path) -> None:
    _add_python(checkout)
    (checkout / "network-is-down").touch()
    done = _setup(checkout)
    assert done.returncode == 1
    assert "install.log" in done.stderr
    (checkout / "network-is-down").unlink()
    (checkout / "pip-calls").unlink()
    assert _setup(checkout).returncode == 0
    assert any("--force-reinstall" in call for call in _pip_calls(checkout))


# Documents.

WIRE_TYPES = [
    kind
    for union in (messages.ToFront, messages.ToClient, messages.FromEngine, messages.ToEngine)
    for kind in typing.get_args(union)
]


@pytest.mark.parametrize("kind", WIRE_TYPES, ids=lambda kind: kind.__name__)
def test_protocol_document_names_every_message_and_field(kind: type[msgspec.Struct]) -> None:
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert f"`{kind.__struct_config__.tag}` (`{kind.__name__}`)" in text
    for name in kind.__struct_fields__:
        assert f"`{name}`" in text, f"{kind.__name__}.{name}"


def test_protocol_document_names_every_error() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    for code in typing.get_args(messages.ErrorCode):
        assert f"| `{code}` |" in text


def _repository_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_machine_or_a_registry() -> None:
    # Put together here, so that this file does not contain them.
    hosts = [
        "pypi" + ".org",
        "pythonhosted" + ".org",
        "download.pytorch" + ".org",
        "npmjs" + ".org",
    ]
    wanted = [text.encode() for text in ["/" + "work/", "/opt/" + "pypi", "/root" + "/", *hosts]]
    for path in _repository_files():
        content = path.read_bytes()
        assert not [w for w in wanted if w in content], path


def test_protocol_example_client_talks_to_a_daemon(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    address = f"ipc://{tmp_path}/front"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as front:
        front.setsockopt(zmq.RCVTIMEO, 30_000)
        front.bind(address)
        command = [sys.executable, "-c", code, address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            identity, ping = front.recv_multipart()
            assert wire.decode_front(ping) == messages.Ping(v=messages.PROTOCOL_VERSION)
            _, header, payload = front.recv_multipart()
            submit = wire.decode_front(header)
            assert isinstance(submit, messages.Submit)
            assert b"17 + 25" in payload
            receipt = messages.Receipt("paper", "prior", "small", "only one", ())
            usage = messages.Usage(prompt_tokens=9, output_tokens=1)
            result = messages.Result(submit.request_id, "small", "e0", usage, "stop", receipt)
            front.send_multipart([identity, wire.encode(result), b'{"text": "42"}'])
            output, _ = client.communicate(timeout=30)
    assert (client.returncode, output) == (0, "small 42\n")


def test_protocol_document_shows_the_bytes_of_a_ping() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert wire.encode(messages.Ping(v=messages.PROTOCOL_VERSION)).hex(" ") in text
