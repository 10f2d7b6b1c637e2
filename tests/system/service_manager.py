"""What does a program tell the service manager? A socket in its place, which programs that are started meanwhile find."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT_S = 20.0


@contextmanager
def service_manager() -> Iterator[socket.socket]:
    """Receives the datagrams of sd_notify(3)."""
    with (
        tempfile.TemporaryDirectory() as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        path = f"{directory}/notify"
        manager.bind(path)
        manager.settimeout(TIMEOUT_S)
        os.environ["NOTIFY_SOCKET"] = path
        try:
            yield manager
        finally:
            del os.environ["NOTIFY_SOCKET"]
