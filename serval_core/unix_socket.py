"""How does a stack listen on a Unix socket, and who is at the other end of one?"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

_CREDENTIALS = struct.Struct("iII")
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class PeerCredentials(NamedTuple):
    """Who is at the other end of a Unix socket, as the kernel knows it."""

    pid: int
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Who is at the other end of a connected Unix socket; pid 0 if it is in another PID namespace."""
    option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return PeerCredentials(*_CREDENTIALS.unpack(option))


class UnixListener:
    """Accepts connections on the asyncio loop that it is made on, from a listening socket (taken).

    `accepted` gets each of them. While there are no descriptors or no memory they stay queued: it tries again after `pause_s`,
    because the loop would call again at once, and counts that as "accept_failures" in `counters`.
    """

    def __init__(
        self,
        listener: socket.socket,
        accepted: Callable[[socket.socket], None],
        counters: dict[str, int],
        pause_s: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._accepted = accepted
        self._counters = counters
        self._pause_s = pause_s
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Accept no more. Closing twice is harmless."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            self._counters["accept_failures"] += 1
            self._loop.remove_reader(self._listener)
            self._loop.call_later(self._pause_s, self._resume)
            return
        self._accepted(connection)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)
