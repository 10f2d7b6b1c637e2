"""What do the memory measurements hold? Many connections that have proved to work and then stay silent.

`python -m bench.idle serve PORT` echoes. `python -m bench.idle hold ADDRESS PORT COUNT` opens connections,
sends a byte through each, waits for its echo, prints "ready" and keeps them until its standard input ends.
"""

from __future__ import annotations

import argparse
import resource
import selectors
import socket
import sys

CONNECT_TIMEOUT_S = 20.0


def serve(port: int) -> None:
    """Echo on a TCP port for ever."""
    selector = selectors.DefaultSelector()
    with socket.create_server(("", port), backlog=1024) as server:
        selector.register(server, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is server:
                    selector.register(server.accept()[0], selectors.EVENT_READ)
                else:
                    _echo(selector, key)


def _echo(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    connection = key.fileobj
    assert isinstance(connection, socket.socket)
    try:
        data = connection.recv(4096)
        connection.sendall(data)
    except ConnectionError:
        data = b""
    if not data:
        selector.unregister(connection)
        connection.close()


def hold(address: str, port: int, count: int) -> None:
    """Open `count` connections, prove each, say "ready", wait for the end of standard input."""
    connections = []
    for _ in range(count):
        connection = socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S)
        connection.sendall(b"x")
        connections.append(connection)
    for connection in connections:
        if connection.recv(1) != b"x":
            raise ConnectionError("a connection ended instead of echoing")
    print("ready", flush=True)
    sys.stdin.read()


def main() -> None:
    """Be the server or the holder."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    parser = argparse.ArgumentParser(description=__doc__)
    roles = parser.add_subparsers(dest="role", required=True)
    roles.add_parser("serve").add_argument("port", type=int)
    holder = roles.add_parser("hold")
    holder.add_argument("address")
    holder.add_argument("port", type=int)
    holder.add_argument("count", type=int)
    arguments = parser.parse_args()
    if arguments.role == "serve":
        serve(arguments.port)
    else:
        hold(arguments.address, arguments.port, arguments.count)


if __name__ == "__main__":
    main()
