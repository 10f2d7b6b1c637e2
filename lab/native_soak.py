"""Does servald keep anything of many connections? `python -m lab.native_soak`: thousands in turn, hundreds at once, a large file.

Prints what each host's servald holds before and after, the rate, and the hashes of the file at both ends. Exit status 1 when
anything is left or the hashes differ. Runs for a minute or two; needs root.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
import time
from pathlib import Path

import click

from lab.chain import TranslatorProcess
from lab.hosts import Host, Lab
from lab.native import SERVAL, hold_many, left_over, running, serval_json, start_servald
from lab.waiting import NeverHappened, wait_for
from serval_core import sockets

SERVICE = "76568"
WARM_UP = 50
CHUNK_BYTES = 1 << 20


def one_after_the_other(host: Host, count: int) -> float:
    """Open, use and close so many connections; returns connections per second."""

    def run() -> float:
        started = time.monotonic()
        for number in range(count):
            with sockets.create_connection(SERVICE, 10.0) as connection:
                connection.sendall(number.to_bytes(4, "big"))
                if connection.recv(4) != number.to_bytes(4, "big"):
                    raise AssertionError(f"connection {number} got another one's answer")
        return count / (time.monotonic() - started)

    return host.call(run)


def holding(daemon: TranslatorProcess) -> dict[str, int]:
    """What a servald holds: descriptors by kind, flows, map entries."""
    descriptors = {f"descriptors {kind}": count for kind, count in daemon.descriptors().items() if not kind.startswith("/")}
    return {**descriptors, **left_over(daemon)}


def more_than(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """What there is more of. Less is no leak: whoever asks the stack socket adds a descriptor for a moment."""
    return {kind: count for kind, count in now.items() if count > before.get(kind, 0)}


def settled(daemon: TranslatorProcess, before: dict[str, int], timeout_s: float = 30.0) -> dict[str, int]:
    """What it holds when that is no more than before, or else when time is up."""
    seen = holding(daemon)

    def no_more() -> bool:
        nonlocal seen
        seen = holding(daemon)
        return not more_than(before, seen)

    with contextlib.suppress(NeverHappened):
        wait_for(no_more, "no more than before", timeout_s)
    return seen


def idle(daemon: TranslatorProcess) -> dict[str, int]:
    """What it holds without any flow."""
    wait_for(lambda: set(left_over(daemon).values()) == {0}, "the last flow is closed", 30)
    return holding(daemon)


def large_file(near: Host, far: Host, directory: Path, size_bytes: int) -> bool:
    """Send a file and compare: sender's hash, receiver's hash, hash of what was stored."""
    sent, stored, digest = directory / "sent", directory / "stored", hashlib.sha256()
    with sent.open("wb") as file:
        for _ in range(size_bytes // CHUNK_BYTES):
            chunk = os.urandom(CHUNK_BYTES)
            file.write(chunk)
            digest.update(chunk)
    server = (*SERVAL, "tcp-server", "-s", SERVICE, "-f", stored, "-n", 1, "--json")
    with running(far, *server, serving=SERVICE) as receiving:
        told = serval_json(near, "tcp-client", "-s", SERVICE, "-f", sent)
        output, _ = receiving.communicate(timeout=120)
    with stored.open("rb") as file:
        arrived = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"file: {told['bytes']} bytes, {told['bytes_per_second'] * 8 / 1e9:.2f} Gbit/s, sha256 {arrived}")
    return arrived == told["sha256"] == digest.hexdigest() and arrived in output


@click.command()
@click.option("--connections", default=10_000, show_default=True)
@click.option("--at-once", default=500, show_default=True)
@click.option("--file-mib", default=1024, show_default=True)
def main(connections: int, at_once: int, file_mib: int) -> None:
    """Run it."""
    with Lab() as lab:
        near, far = lab.host("near"), lab.host("far")
        lab.connect(near, "10.1.0.1/24", far, "10.1.0.2/24")
        daemons = [start_servald(host, lab.directory / f"{host.name}.log") for host in (near, far)]
        with running(far, sys.executable, "examples/echo_server.py", SERVICE, serving=SERVICE):
            one_after_the_other(near, WARM_UP)
            before = [idle(daemon) for daemon in daemons]
            rate = one_after_the_other(near, connections)
            print(f"{connections} connections one after the other: {rate:.0f} per second")
            started = time.monotonic()
            near.call(asyncio.run, hold_many(SERVICE, at_once))
            print(f"{at_once} connections at once: {time.monotonic() - started:.2f} s to open, use and close all")
            leaks = []
            for daemon, held in zip(daemons, before, strict=True):
                after = settled(daemon, held)
                print(f"{daemon.host.name}: before {held}\n{' ' * len(daemon.host.name)}  after  {after}")
                leaks.append(more_than(held, after))
        intact = large_file(near, far, lab.directory, file_mib << 20)
        stopped = [daemon.stop() for daemon in daemons]
    if not (not any(leaks) and intact and stopped == [0, 0]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
