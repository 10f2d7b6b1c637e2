"""How do the splice tests set up pairs of real sockets, and how do they see that something has happened?"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import os
import random
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from translator.splice_engine import Completion, PairCounters, SpliceEngine

PATIENCE_S = 20.0
# Linux values that the socket module does not have.
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33


def eventually(condition: Callable[[], object], what: str) -> None:
    """Look again and again until it is so; fail after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.001)


def take_completions(engine: SpliceEngine, count: int = 1) -> list[Completion]:
    """Wait for that many completions, the way an event loop would: by notification_fd."""
    poll = select.poll()
    poll.register(engine.notification_fd, select.POLLIN)
    deadline = time.monotonic() + PATIENCE_S
    found: list[Completion] = []
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} completions"
        poll.poll(1000)
        found += engine.completions()
    return found


def tcp_connection(
    send_bytes: int | None = None, receive_bytes: int | None = None, forced_bytes: int | None = None
) -> tuple[socket.socket, socket.socket]:
    """Two ends of a loopback connection; SO_SNDBUF and SO_RCVBUF of both. `forced_bytes` sets both beyond the
    system's limit, which needs root.
    """
    options = {
        socket.SO_SNDBUF: send_bytes,
        socket.SO_RCVBUF: receive_bytes,
        SO_SNDBUFFORCE: forced_bytes,
        SO_RCVBUFFORCE: forced_bytes,
    }
    with socket.socket() as listener:
        client = socket.socket()
        for each in (listener, client):
            for option, value in options.items():
                if value is not None:
                    each.setsockopt(socket.SOL_SOCKET, option, value)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
    for each in (client, server):
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        each.settimeout(PATIENCE_S)
    return client, server


class Relayed:
    """A client and a server with an engine between them: client - left | engine | right - server."""

    def __init__(
        self,
        engine: SpliceEngine,
        pair_id: int = 1,
        send_bytes: int | None = None,
        receive_bytes: int | None = None,
        forced_bytes: int | None = None,
        narrow_right: bool = False,
        start: bool = True,
    ) -> None:
        """The sizes are those of tcp_connection, for both connections; `narrow_right` makes those of the right
        connection as small as they get, so that a few kB fill it.
        """
        self.engine = engine
        self.pair_id = pair_id
        sizes = (send_bytes, receive_bytes, forced_bytes)
        self.client, self.left = tcp_connection(*sizes)
        self.right, self.server = tcp_connection(*((4096, 4096, None) if narrow_right else sizes))
        self.left.setblocking(False)
        self.right.setblocking(False)
        if start:
            self.start()

    def start(self) -> None:
        self.engine.add(self.pair_id, self.left.fileno(), self.right.fileno())

    def counters(self) -> PairCounters:
        found = self.engine.pair_counters(self.pair_id)
        assert found is not None
        return found

    def completion(self) -> Completion:
        (found,) = take_completions(self.engine)
        assert found.pair_id == self.pair_id
        return found

    def close(self) -> None:
        for each in (self.client, self.left, self.right, self.server):
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def receive_exactly(source: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = source.recv(min(count - len(data), 1 << 20))
        assert more, f"end of stream after {len(data)} of {count} bytes"
        data += more
    return bytes(data)


def receive_all(source: socket.socket) -> bytes:
    """Everything up to the FIN."""
    data = bytearray()
    while more := source.recv(1 << 20):
        data += more
    return bytes(data)


def receive_until_reset(source: socket.socket) -> bytes:
    """Everything up to the RST; a FIN is a failure."""
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while more := source.recv(1 << 20):
            data += more
        raise AssertionError("the stream ended with a FIN, not with a RST")
    return bytes(data)


def reset(end: socket.socket) -> None:
    """Close with a RST."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def unacknowledged_bytes(end: socket.socket) -> int:
    answer: int = struct.unpack("i", fcntl.ioctl(end, termios.TIOCOUTQ, bytes(4)))[0]
    return answer


def send_until_stuck(end: socket.socket) -> int:
    """Send until nothing has been taken for a while, so that every buffer on the way is full; how many bytes
    it took."""
    sent = 0
    quiet = 0
    poll = select.poll()
    poll.register(end, select.POLLOUT)
    end.setblocking(False)
    while quiet < 3:
        if not poll.poll(50):
            quiet += 1
            continue
        try:
            sent += end.send(bytes(1 << 16))
            quiet = 0
        except BlockingIOError:
            continue
    end.settimeout(PATIENCE_S)
    return sent


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Sender(threading.Thread):
    """Sends random bytes in random pieces, then a FIN. `digest` is their SHA-256."""

    def __init__(self, end: socket.socket, count: int, seed: int, largest_piece: int = 1 << 20) -> None:
        super().__init__(daemon=True)
        self._end = end
        chance = random.Random(seed)
        self._data = chance.randbytes(count)
        self._pieces = []
        while count > 0:
            piece = min(count, int(2 ** chance.uniform(0, largest_piece.bit_length())))
            self._pieces.append(piece)
            count -= piece
        self.digest = hashlib.sha256(self._data).hexdigest()
        self.start()

    def run(self) -> None:
        position = 0
        for piece in self._pieces:
            self._end.sendall(self._data[position : position + piece])
            position += piece
        self._end.shutdown(socket.SHUT_WR)


class Receiver(threading.Thread):
    """Reads to the FIN, hashing."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(daemon=True)
        self._end = end
        self._hash = hashlib.sha256()
        self.byte_count = 0
        self.error: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            while data := self._end.recv(1 << 20):
                self._hash.update(data)
                self.byte_count += len(data)
        except OSError as error:
            self.error = error

    def digest(self) -> str:
        self.join(PATIENCE_S)
        assert not self.is_alive(), f"no end of stream; {self.byte_count} bytes so far"
        assert self.error is None, self.error
        return self._hash.hexdigest()


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    gc.collect()  # what earlier tests of this process left to the collector
    before = open_descriptors()
    yield
    gc.collect()
    after = open_descriptors()
    assert after == before, f"{after} descriptors are open, {before} were"
