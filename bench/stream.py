"""What do the throughput measurements send? One stream for a while; the receiver says how fast it came.

`python -m bench.stream sink PORT` receives and discards what arrives on each connection, and answers at its
end with a line of JSON. `python -m bench.stream send ADDRESS PORT SECONDS` sends, and prints that together
with what the machine spent meanwhile.
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
import time
from collections.abc import Callable

from bench.machine import CpuTime

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60.0


def drain(connection: socket.socket) -> None:
    """Receive until EOF, answer with {"bytes", "seconds"} and close. Takes the socket. OSError when nothing comes for a minute.

    The time runs from the first byte to EOF, so neither connecting nor what the sender buffers counts.
    """
    buffer = bytearray(CHUNK_BYTES)
    # Python asks poll() before each call then. A native program has to, since the stack's sockets do not block: so all do.
    connection.settimeout(TIMEOUT_S)
    with connection:
        received = first = connection.recv_into(buffer)
        started = time.perf_counter()
        while first and (count := connection.recv_into(buffer)):
            received += count
        seconds = time.perf_counter() - started
        connection.sendall(json.dumps({"bytes": received - first, "seconds": seconds}).encode() + b"\n")


def sink(port: int) -> None:
    """Serve `drain` on a TCP port for ever, one thread per connection."""
    with socket.create_server(("", port), backlog=128) as server:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=drain, args=(connection,), daemon=True).start()


def send(connect: Callable[[], socket.socket], duration_s: float) -> dict[str, float]:
    """Send for `duration_s`; returns what the sink saw, and "elapsed_s", "busy_s", "stolen_s" (`CpuTime`)."""
    chunk = memoryview(bytes(CHUNK_BYTES))
    cpu_before, started = CpuTime.now(), time.perf_counter()
    with connect() as connection:
        connection.settimeout(TIMEOUT_S)
        end = time.perf_counter() + duration_s
        while time.perf_counter() < end:
            connection.send(chunk)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("r") as answer:
            seen: dict[str, float] = json.loads(answer.readline())
    return seen | {"elapsed_s": time.perf_counter() - started} | CpuTime.now().since(cpu_before)._asdict()


def main() -> None:
    """Be the sink or the sender."""
    parser = argparse.ArgumentParser(description=__doc__)
    roles = parser.add_subparsers(dest="role", required=True)
    roles.add_parser("sink").add_argument("port", type=int)
    sender = roles.add_parser("send")
    sender.add_argument("address")
    sender.add_argument("port", type=int)
    sender.add_argument("seconds", type=float)
    arguments = parser.parse_args()
    if arguments.role == "sink":
        sink(arguments.port)
    else:
        where = arguments.address, arguments.port
        print(json.dumps(send(lambda: socket.create_connection(where, timeout=10), arguments.seconds)))


if __name__ == "__main__":
    main()
