"""What did the machine do meanwhile? CPU time and memory from /proc, and the facts a reader needs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

from lab.traffic import PROJECT

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
VERSION_COMMANDS = {
    "haproxy": ["haproxy", "-v"],
    "nginx": ["nginx", "-v"],
    "socat": ["socat", "-V"],
    "wrk": ["wrk", "-v"],
    "project": ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"],
}


class CpuTime(NamedTuple):
    """Seconds that all CPUs together spent since boot, of which `stolen_s` by the hypervisor for others."""

    busy_s: float
    stolen_s: float

    @classmethod
    def now(cls) -> Self:
        """From the first line of /proc/stat (proc(5)): busy is all but idle, iowait and steal."""
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
        return cls((user + nice + system + irq + softirq) / TICKS_PER_S, steal / TICKS_PER_S)

    def since(self, earlier: CpuTime) -> CpuTime:
        """What was spent between two readings."""
        return CpuTime(self.busy_s - earlier.busy_s, self.stolen_s - earlier.stolen_s)


def pss_bytes(process_ids: Iterable[int]) -> int:
    """The proportional set size of some processes together: a shared page is divided among its sharers."""
    total_kib = 0
    for pid in process_ids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
        assert match, f"/proc/{pid}/smaps_rollup without a Pss line"
        total_kib += int(match[1])
    return total_kib * 1024


def slab_bytes() -> int:
    """The kernel's slab memory, of the whole machine."""
    match = re.search(r"^Slab:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert match, "/proc/meminfo without a Slab line"
    return int(match[1]) * 1024


def facts() -> dict[str, object]:
    """Kernel, CPU, memory, defaults and versions."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": cpu[1] if cpu else "unknown",
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_before": os.getloadavg(),
        "python": sys.version.split()[0],
        "versions": {name: _first_line(command) for name, command in VERSION_COMMANDS.items()},
    }


def _first_line(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        return "not installed"
    lines = [line for line in (result.stdout + result.stderr).splitlines() if re.search(r"\d", line)]
    return lines[0].strip() if lines else "unknown"
