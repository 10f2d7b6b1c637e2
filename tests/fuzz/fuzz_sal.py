"""Is there any packet that our parsers do not survive? A fuzz target for atheris.

    python tests/fuzz/fuzz_sal.py                        a minute, seeded by the captures
    python tests/fuzz/fuzz_sal.py -runs=100000           that many inputs
    python tests/fuzz/fuzz_sal.py -max_total_time=600 CORPUS_DIRECTORY

The arguments are libFuzzer's. An input is the payload of a protocol-144 IP packet.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import atheris  # noqa: E402

with atheris.instrument_imports(include=["serval_core"]):
    from serval_core.errors import TheirMistake
    from serval_core.wire import ipv4, sal, tcp_segment, udp
    from serval_core.wire.checksum import internet_checksum

SOURCE = 0x0A000001
DESTINATION = 0x0A000002
DEFAULT_LIMIT = "-max_total_time=60"
REASONS = ipv4.REASONS | sal.REASONS | tcp_segment.REASONS | udp.REASONS


def with_right_checksum(data: bytes) -> bytes:
    """The same packet with a SAL checksum that sums up: chance alone would not get the fuzzer past it."""
    covered = data[8] * 4 if len(data) > 8 else 0
    if not 12 <= covered <= len(data):
        return data
    blank = data[:10] + b"\0\0" + data[12:covered]
    return data[:10] + internet_checksum(blank).to_bytes(2, "big") + data[12:]


def read(data: bytes) -> None:
    """Read a packet as the stack does, and write what was accepted: it must be read back the same."""
    outer = ipv4.parse(ipv4.emit(SOURCE, DESTINATION, sal.PROTOCOL_SAL, data))
    packet = sal.parse(outer.payload)
    assert sal.parse(sal.emit(packet)) == packet
    if packet.protocol == sal.PROTOCOL_TCP:
        segment = tcp_segment.parse(packet.transport, SOURCE, DESTINATION, verify=False)
        written = tcp_segment.emit(segment, SOURCE, DESTINATION)
        assert tcp_segment.parse(written, SOURCE, DESTINATION) == segment
        complete = tcp_segment.complete_checksum(packet.transport, SOURCE, DESTINATION)
        assert tcp_segment.checksum_state(complete, SOURCE, DESTINATION) == "complete"
    elif packet.protocol == sal.PROTOCOL_UDP:
        datagram = udp.parse(packet.transport, SOURCE, DESTINATION, verify=False)
        assert udp.parse(udp.emit(datagram, SOURCE, DESTINATION), SOURCE, DESTINATION) == datagram


def check(data: bytes) -> None:
    """One input. TheirMistake with a listed reason is the only exception that may come of it."""
    for variant in (data, with_right_checksum(data)):
        try:
            read(variant)
        except TheirMistake as mistake:
            if mistake.reason not in REASONS:
                raise AssertionError(f"{mistake.reason} is not listed") from mistake


def write_seeds(directory: Path) -> None:
    """Every distinct payload of the captures, as one file each."""
    from tests.serval_core.wire.captures import CAPTURES

    payloads = {packet[ipv4.HEADER_BYTES :] for capture in CAPTURES for packet in capture.packets()}
    for number, payload in enumerate(sorted(payloads)):
        (directory / f"{number:05}").write_bytes(payload)


def main() -> None:
    """Run libFuzzer with the arguments of the command line, an end, and the captures as seeds."""
    arguments = list(sys.argv)
    if not any(argument.startswith(("-runs=", "-max_total_time=")) for argument in arguments):
        arguments.append(DEFAULT_LIMIT)
    with tempfile.TemporaryDirectory() as seeds:
        write_seeds(Path(seeds))
        # libFuzzer never returns: it exits. A child of our own lets us clear up after it.
        child = os.fork()
        if child == 0:
            # What is found is added to the first directory: the caller's corpus, if one was named.
            atheris.Setup([*arguments, seeds], check)
            atheris.Fuzz()
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
