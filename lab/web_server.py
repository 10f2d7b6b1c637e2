"""What does an unmodified web service look like? GET serves files by sendfile(2), PUT stores and hashes them.

Run as `python -m lab.web_server --directory D --port P`. One thread per connection, keep-alive, HTTP/1.1. With
`--service ID` in place of the port it is a native one: the same code on Serval sockets. SIGTERM ends it without a
client noticing.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import http.server
import os
import signal
import threading
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from serval_core import sockets

CHUNK_BYTES = 1 << 20
LOOK_S = 0.1
QUIET_S = 1.0  # longer than a handshake takes, should a packet of it be lost


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /name and PUT /name for the files of one directory; no other paths exist."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: object, directory: Path, **kwargs: object) -> None:
        self.directory = directory
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Send the file."""
        try:
            file = self._path().open("rb")
        except OSError as error:
            self.send_error(HTTPStatus.NOT_FOUND, str(error))
            return
        with file:
            left = os.fstat(file.fileno()).st_size
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Length", str(left))
            self.end_headers()
            self.wfile.flush()
            while left:
                left -= os.sendfile(self.connection.fileno(), file.fileno(), None, left)

    def do_PUT(self) -> None:
        """Store the body, answer with its SHA-256. A body cut short leaves what came; the connection ends."""
        left = int(self.headers["Content-Length"])
        digest = hashlib.sha256()
        with self._path().open("wb") as file:
            while left:
                chunk = self.rfile.read1(min(CHUNK_BYTES, left))
                if not chunk:
                    self.close_connection = True
                    return
                file.write(chunk)
                digest.update(chunk)
                left -= len(chunk)
        body = digest.hexdigest().encode()
        self.send_response(HTTPStatus.CREATED)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: tests look at what clients got."""

    def _path(self) -> Path:
        return self.directory / Path(self.path).name


class Server(http.server.ThreadingHTTPServer):
    """A threaded server that survives clients that go away in the middle."""

    request_queue_size = 1024
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that resets is no news."""


class NativeServer(Server):
    """The same on a serviceID."""

    daemon_threads = False

    def __init__(self, service: str, handler: Callable[..., Handler]) -> None:
        super().__init__((service, 0), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sockets.create_server(service, self.request_queue_size)
        self._waited = False

    def serve_until(self, asked: threading.Event) -> None:
        """Serve; when asked to end, send new clients elsewhere, but take those that are on their way."""
        self.timeout = LOOK_S
        while not asked.is_set():
            self.handle_request()
        self.socket.listen(0)
        self.timeout = QUIET_S
        while not self._waited:
            self.handle_request()

    def handle_timeout(self) -> None:
        """Nobody came."""
        self._waited = self.timeout == QUIET_S


def main() -> None:
    """Serve until killed, or asked to end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--port", type=int, default=80)
    parser.add_argument("--service")
    parser.add_argument("--address", default="0.0.0.0")
    arguments = parser.parse_args()
    handler = functools.partial(Handler, directory=arguments.directory)
    if arguments.service:
        asked = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: asked.set())
        with NativeServer(arguments.service, handler) as native:
            native.serve_until(asked)
        return
    with Server((arguments.address, arguments.port), handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
