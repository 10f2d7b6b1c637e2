"""What does an unmodified web service look like? GET serves files by sendfile(2), PUT stores and hashes them.

Run as `python -m lab.web_server --directory D --port P`. One thread per connection, keep-alive, HTTP/1.1.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import http.server
import os
from http import HTTPStatus
from pathlib import Path

CHUNK_BYTES = 1 << 20


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


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--port", type=int, default=80)
    parser.add_argument("--address", default="0.0.0.0")
    arguments = parser.parse_args()
    handler = functools.partial(Handler, directory=arguments.directory)
    with Server((arguments.address, arguments.port), handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
