"""What does a legacy download look like that ends when the client has had enough? Two plain TCP programs that hash.

`python -m lab.endless_stream serve PORT` sends numbered chunks to whoever connects until that one half-closes, and
prints a line of JSON with the number of bytes and their SHA-256. `python -m lab.endless_stream read ADDRESS PORT`
connects, prints its own port, reads, half-closes when its standard input ends, reads to the end, and prints the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import select
import socket
import sys
import threading

CHUNK_BYTES = 1 << 18
NUMBER_BYTES = 8


def serve(port: int) -> None:
    """Serve for ever, one thread per connection."""
    with socket.create_server(("", port), backlog=128) as server:
        while True:
            connection, (_, peer_port) = server.accept()
            threading.Thread(target=send_endlessly, args=(connection, peer_port), daemon=True).start()


def send_endlessly(connection: socket.socket, seed: int) -> None:
    """Send until the other end half-closes, then report. Takes the socket."""
    chunk = bytearray(random.Random(seed).randbytes(CHUNK_BYTES))
    digest, count = hashlib.sha256(), 0
    with connection:
        while not select.select([connection], [], [], 0)[0]:
            chunk[:NUMBER_BYTES] = count.to_bytes(NUMBER_BYTES, "big")  # no chunk can take another's place
            connection.sendall(chunk)
            digest.update(chunk)
            count += 1
        connection.shutdown(socket.SHUT_WR)
    report(count * CHUNK_BYTES, digest.hexdigest())


def read(address: str, port: int) -> None:
    """Receive until our standard input, and then the stream, has ended."""
    digest, count = hashlib.sha256(), 0
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    with socket.create_connection((address, port), timeout=20) as connection:
        connection.settimeout(None)
        print(json.dumps({"port": connection.getsockname()[1]}), flush=True)
        threading.Thread(target=_close_when_told, args=(connection,), daemon=True).start()
        while size := connection.recv_into(buffer):
            digest.update(view[:size])
            count += size
    report(count, digest.hexdigest())


def report(size_bytes: int, sha256: str) -> None:
    """Print what was sent or received, in one line."""
    print(json.dumps({"bytes": size_bytes, "sha256": sha256}), flush=True)


def _close_when_told(connection: socket.socket) -> None:
    sys.stdin.read()
    connection.shutdown(socket.SHUT_WR)


def main() -> None:
    """Be the server or the client."""
    parser = argparse.ArgumentParser(description=__doc__)
    roles = parser.add_subparsers(dest="role", required=True)
    roles.add_parser("serve").add_argument("port", type=int)
    reader = roles.add_parser("read")
    reader.add_argument("address")
    reader.add_argument("port", type=int)
    arguments = parser.parse_args()
    if arguments.role == "serve":
        serve(arguments.port)
    else:
        read(arguments.address, arguments.port)


if __name__ == "__main__":
    main()
