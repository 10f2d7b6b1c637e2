"""What is measured, and how exactly? One function per measurement, on a contender that runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any, NamedTuple

from bench.contenders import Contender
from bench.machine import CpuTime, pss_bytes, slab_bytes
from bench.topology import ECHO_PORT, WEB_PORT
from lab.hosts import Argument
from lab.traffic import PROJECT

WRK_SCRIPT = PROJECT / "bench/wrk.lua"
SHORT_CONNECTIONS_AT_ONCE = 32
LATENCY_CONNECTIONS = 4
GB = 1e9

METHOD = {
    "order": "every round measures all contenders one after the other, odd rounds backwards; ratios are "
    "taken within a round; the median over rounds is quoted",
    "throughput": "one TCP stream from the client; bytes and time as the receiver saw them, from first byte "
    "to EOF",
    "cpu": "busy time (user, nice, system, irq, softirq) of all CPUs in /proc/stat while the stream ran, "
    "both ends included, minus the idle machine's share measured before the run, per 1e9 bytes delivered",
    "short_connections": f"wrk, {SHORT_CONNECTIONS_AT_ONCE} at once, Connection: close, 6 bytes from nginx",
    "latency": f"wrk, {LATENCY_CONNECTIONS} kept-alive connections, the same answer",
    "memory": "growth of PSS of the contender's processes, and of the machine's slab, by idle connections "
    "that had echoed a byte; scaled to 1000. Slab includes the sockets of client and server",
    "shaped": "tbf 1 Gbit/s on both ends of both wires",
}


class Throughput(NamedTuple):
    """One stream. `cpu_s` is that of the whole machine, without its idle share."""

    bits_per_s: float
    bytes: int
    cpu_s: float
    stolen_s: float

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU-seconds for 1e9 bytes."""
        return self.cpu_s / (self.bytes / GB)


class Requests(NamedTuple):
    """A wrk run. Latencies in microseconds."""

    per_s: float
    errors: int
    p50_us: int
    p99_us: int


class IdleMemory(NamedTuple):
    """What idle connections took, in bytes for all `pairs` together."""

    pairs: int
    pss_bytes: int
    slab_bytes: int


def idle_busy_share(duration_s: float) -> float:
    """CPU-seconds per second that this machine spends while the benchmark does nothing."""
    before = CpuTime.now()
    time.sleep(duration_s)  # the length of the measurement itself
    return CpuTime.now().since(before).busy_s / duration_s


def throughput(contender: Contender, duration_s: float, idle_share: float) -> Throughput:
    """Send one stream for `duration_s`."""
    command = contender.stream_sender(duration_s)
    seen = json.loads(contender.topology.client.run(command, cwd=PROJECT, timeout_s=60).stdout)
    cpu_s = seen["busy_s"] - idle_share * seen["elapsed_s"]
    return Throughput(8 * seen["bytes"] / seen["seconds"], seen["bytes"], cpu_s, seen["stolen_s"])


def short_connections(contender: Contender, duration_s: float) -> Requests:
    """A new connection for each request."""
    return _wrk(contender, SHORT_CONNECTIONS_AT_ONCE, duration_s, "-H", "Connection: close")


def latency(contender: Contender, duration_s: float) -> Requests:
    """Few kept-alive connections, one request after the other on each."""
    return _wrk(contender, LATENCY_CONNECTIONS, duration_s)


def idle_memory(contender: Contender, pairs: int) -> IdleMemory:
    """Open `pairs` connections, prove them and let them rest."""
    processes_before, slab_before = pss_bytes(contender.process_ids()), slab_bytes()
    where: list[Argument] = [contender.address, ECHO_PORT, pairs]
    command = [sys.executable, "-m", "bench.idle", "hold", *where]
    holder: subprocess.Popen[Any] = contender.topology.client.popen(
        command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert holder.stdout
    if holder.stdout.readline() != "ready\n":
        raise RuntimeError(
            f"{contender.name} did not carry {pairs} idle connections: {holder.communicate()[1]}"
        )
    growth = pss_bytes(contender.process_ids()) - processes_before, slab_bytes() - slab_before
    holder.communicate(timeout=30)
    return IdleMemory(pairs, *growth)


def _wrk(contender: Contender, connections: int, duration_s: float, *options: str) -> Requests:
    url = f"http://{contender.address}:{WEB_PORT}/"
    counts: list[Argument] = ["-t", 1, "-c", connections, "-d", f"{max(1, round(duration_s))}s"]
    command: list[Argument] = ["wrk", *counts, "-s", WRK_SCRIPT, *options, url]
    output = contender.topology.client.run(command, timeout_s=60).stdout
    seen = json.loads(output.strip().splitlines()[-1])
    return Requests(
        1e6 * seen["requests"] / seen["duration_us"], seen["errors"], seen["p50_us"], seen["p99_us"]
    )
