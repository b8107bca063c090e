"""What processes cost, read from /proc: processor time and resident memory, children included."""

import os
from collections import defaultdict
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


def family(pid: int) -> list[int]:
    """This process and all that descend from it."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))):
            children[int(fields[1])].append(int(entry.name))
    found = [pid]
    for each in found:
        found += children[each]
    return found


def cpu_s(pid: int) -> float:
    """User and system time of a process, all threads, in seconds; 0 where it is gone."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S if fields else 0.0


def resident_mib(pid: int) -> float:
    """Memory in use, pages shared with other processes included; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MIB
    except OSError:
        return 0.0


def role(pid: int) -> str:
    """Which part of Chimera a process is, by its command line: gateway, engine or daemon."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "gone"
    return next((name for name in ("gateway", "engine") if name.encode() in words), "daemon")


def resident_by_role(pid: int) -> dict[str, float]:
    """MiB of each part of a running Chimera whose first process this is."""
    by_role: defaultdict[str, float] = defaultdict(float)
    for each in family(pid):
        by_role[role(each)] += resident_mib(each)
    return dict(by_role)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
