"""How many SYNs per second does a service router send on, compared with the kernel's IP forwarding of the same packets?

    source 10.1.0.1 - 10.1.0.254 router 10.2.0.254 - sink

The same frame over and over, a SYN of a prototype (116 bytes of IP), from a source that is faster than any of
the contenders and runs on the first CPU, where the router's receiving softirq runs as well. IP forwarding and
the BPF program do everything there; user space has the other CPUs besides. Counted is what arrives at the sink's
interface, whose host drops it at once because the frames are for another. Contenders take turns.

    python -m bench.router [--rounds N] [--seconds S]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from lab.hosts import Host, Lab
from lab.traffic import PROJECT
from serval_core.dataplane.kernel import DataPlaneSettings
from serval_core.names import parse_address, parse_service
from serval_core.rules import Rule
from serval_core.sal import SalSettings
from serval_core.stack import ServalStack, StackSettings
from serval_core.wire import ipv4, sal, tcp_segment

SERVICE = parse_service("76568")
SOURCE, ROUTER, TARGET = "10.1.0.1", "10.1.0.254", "10.2.0.2"
NOBODYS_MAC = "02:00:00:00:00:99"
WARM_UP_S = 0.5
ROUNDS, SECONDS = 9, 1.0
QUICK_ROUNDS, QUICK_SECONDS = 2, 0.3

IP_FORWARDING, IN_KERNEL, USER_SPACE = "IP forwarding", "in the kernel (BPF)", "in user space"
COUNTER_OF = {IN_KERNEL: "forwarded_in_kernel", USER_SPACE: "forwarded_in_batches"}
CONTENDERS = (IP_FORWARDING, IN_KERNEL, USER_SPACE)


class RoutingRates(NamedTuple):
    """Packets per second by contender, one per round. Those of one place were measured in the same round."""

    rates: dict[str, list[float]]

    def median(self, contender: str) -> float:
        """Packets per second."""
        return statistics.median(self.rates[contender])

    def to_ip(self, contender: str) -> float:
        """The median over rounds of the ratio to IP forwarding."""
        pairs = zip(self.rates[contender], self.rates[IP_FORWARDING], strict=True)
        return statistics.median(rate / ip for rate, ip in pairs)

    def sentence(self) -> str:
        """The figures in one line."""
        ways = ", ".join(
            f"{name} {self.median(name) / 1e3:.0f} k/s ({self.to_ip(name):.2f})"
            for name in (IN_KERNEL, USER_SPACE)
        )
        return (
            f"service router, SYNs of {len(syn_packet(TARGET))} bytes: {ways}; "
            f"IP forwarding of the same packets {self.median(IP_FORWARDING) / 1e3:.0f} k/s"
        )


def syn_packet(destination: str) -> bytes:
    """A prototype's SYN for the service, from the source to an address."""
    addresses = parse_address(SOURCE), parse_address(destination)
    options = tcp_segment.TcpOptions(mss=1448, window_scale=1)
    segment = tcp_segment.emit(tcp_segment.TcpSegment(0, 0, 1, 0, 2, 0, 0, options, b""), *addresses)
    packet = sal.emit_control(
        2, 0, sal.PROTOCOL_TCP, sal.SYN, 1, 0, bytes(8), SERVICE.service_id, (), segment
    )
    return ipv4.emit(*addresses, sal.PROTOCOL_SAL, packet)


def measure(rounds: int, seconds: float, progress: Callable[[str], None] = lambda text: None) -> RoutingRates:
    """Measure all contenders. RuntimeError if one did not forward, or not in its way."""
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with Lab() as lab:
        source, router, sink = lab.host("source"), lab.host("router"), lab.host("sink")
        lab.connect(source, f"{SOURCE}/24", router, f"{ROUTER}/24")
        lab.connect(router, "10.2.0.254/24", sink, "10.2.0.3/24")
        router.forward()
        # The source's batches stay together on the way into the router, as those of a network card.
        router.offload("eth0", gro=True)
        neighbour = ("ip", "neigh", "replace", TARGET, "lladdr", NOBODYS_MAC, "dev", "eth1")
        router.run(neighbour)
        for number in range(rounds):
            # Whatever drifts during a round favours first or last alike.
            for name in CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]:
                progress(f"service router, round {number + 1} of {rounds}: {name}")
                rates[name].append(_rate_of(name, source, router, sink, seconds))
    return RoutingRates(rates)


def _rate_of(name: str, source: Host, router: Host, sink: Host, seconds: float) -> float:
    if name == IP_FORWARDING:
        return _rate(source, router, sink, TARGET, seconds)
    command = [sys.executable, "-m", "bench.router", "--serve", name]
    process = router.popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _await_ready(process)
    try:
        rate = _rate(source, router, sink, ROUTER, seconds)
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=20)
    if not json.loads(output.splitlines()[-1])[COUNTER_OF[name]]:
        raise RuntimeError(f"the service router did not forward {name}")
    return rate


def _rate(source: Host, router: Host, sink: Host, destination: str, seconds: float) -> float:
    """Packets per second that arrive at the sink."""
    frame = _mac(router) + _mac(source) + b"\x08\x00" + syn_packet(destination)
    frame += bytes(-len(frame) % 4)
    command = [sys.executable, "-m", "bench.packet_source", "eth0", frame.hex()]
    process = source.popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _await_ready(process)
    counters = sink.call(open, "/proc/thread-self/net/dev", "rb", buffering=0)
    try:
        time.sleep(WARM_UP_S)
        before, began = _arrived(counters.fileno()), time.monotonic()
        time.sleep(seconds)  # the length of the measurement itself
        rate = (_arrived(counters.fileno()) - before) / (time.monotonic() - began)
    finally:
        counters.close()
        process.terminate()
        process.wait()
    if not rate:
        raise RuntimeError(f"nothing addressed to {destination} arrived at the sink")
    return rate


def _await_ready(process: subprocess.Popen[Any]) -> None:
    assert process.stdout
    if process.stdout.readline() != "ready\n":
        raise RuntimeError(f"{process.args!r} did not start: {process.communicate()[1]}")


def _mac(host: Host) -> bytes:
    return bytes.fromhex(host.run(["cat", "/sys/class/net/eth0/address"]).stdout.strip().replace(":", ""))


def _arrived(counters_fd: int) -> int:
    """How many packets have arrived at a host's first interface."""
    text = os.pread(counters_fd, 4096, 0)
    return int(text[text.index(b"eth0:") + 5 :].split(None, 2)[1])


async def _serve(contender: str) -> None:
    """Run a stack that forwards in one of the two ways until SIGTERM; its last line are its counters."""
    settings = StackSettings(
        sal=SalSettings(forwarding=True),
        dataplane=DataPlaneSettings(forward_in_kernel=contender == IN_KERNEL),
        broadcast_resolution=False,
    )
    stack = await ServalStack.start(settings)
    stack.table.add(Rule.forward(SERVICE, parse_address(TARGET)))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("ready", flush=True)
    await ended.wait()
    print(json.dumps(stack.counters()), flush=True)
    await stack.stop()


def main() -> None:
    """Measure and print one JSON line, or be the router."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--serve", choices=(IN_KERNEL, USER_SPACE), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(_serve(arguments.serve))
        return
    found = measure(arguments.rounds, arguments.seconds)
    print(json.dumps(found._asdict()))
    print(found.sentence(), file=sys.stderr)


if __name__ == "__main__":
    main()
