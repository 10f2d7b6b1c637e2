"""What does a crowd of impatient legacy clients see? Short HTTP connections at a steady pace, one line of JSON for each.

`python -m lab.short_connections --address A --port P --path /who` dials until its standard input ends. A line says
when the connection began (seconds of the wall clock), how long it took, and what body came, or how it failed.
"""

from __future__ import annotations

import argparse
import errno
import json
import socket
import sys
import threading
import time

TIMEOUT_S = 20.0
_END_OF_HEAD = b"\r\n\r\n"


def fetch(address: str, port: int, path: str) -> str:
    """The body of one GET over a connection of its own. OSError; ValueError if what came is no whole answer."""
    with socket.create_connection((address, port), TIMEOUT_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while data := connection.recv(65536):
            answer += data
    head, found, body = answer.partition(_END_OF_HEAD)
    if not found or f"Content-Length: {len(body)}".encode() not in head or b" 200 " not in head:
        raise ValueError("the answer is not whole")
    return body.decode()


def dial(arguments: argparse.Namespace, number: int, ended: threading.Event) -> None:
    """One client after the other, each `workers / per_second` after the last if that was quick enough."""
    period_s = arguments.workers / arguments.per_second
    due = time.monotonic() + period_s * number / arguments.workers
    while not ended.wait(max(0.0, due - time.monotonic())):
        due = max(due + period_s, time.monotonic())
        line: dict[str, object] = {"began": time.time()}
        started = time.monotonic()
        try:
            line["got"] = fetch(arguments.address, arguments.port, arguments.path)
        except OSError as error:
            line["failed"] = errno.errorcode.get(error.errno or 0, str(error))
        except ValueError as error:
            line["failed"] = str(error)
        line["took_s"] = time.monotonic() - started
        sys.stdout.write(json.dumps(line) + "\n")


def main() -> None:
    """Dial until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, default=80)
    parser.add_argument("--path", default="/")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--per-second", type=float, default=50.0)
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    ended = threading.Event()
    clients = [
        threading.Thread(target=dial, args=(arguments, number, ended)) for number in range(arguments.workers)
    ]
    for client in clients:
        client.start()
    sys.stdin.read()
    ended.set()
    for client in clients:
        client.join()


if __name__ == "__main__":
    main()
