"""Who talks rtnetlink? `Netlink` configures and lists, `RouteQueries` asks one thing, `ChangeMonitor` hears of changes.

`Netlink` is pyroute2 in a thread of its own, because its synchronous classes run an event loop, which is impossible in the
thread of a running one. Its calls take a few milliseconds and happen at start, at the end and when the kernel reports a
change. What a new connection may have to ask goes over a plain socket, in some 20 µs; this file knows how such messages
are framed (netlink(7)), not what they mean.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from pyroute2 import Ethtool, IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from serval_core.errors import KernelRefused

T = TypeVar("T")

NLM_F_REQUEST, NLM_F_ACK = 1, 4
NLMSG_ERROR = 2
RTMGRP_LINK = 0x1
RTMGRP_NEIGH = 0x4
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV4_ROUTE = 0x40
RTMGRP_IPV4_RULE = 0x80
RTMGRP_PATHS = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV4_RULE
MESSAGE_HEADER = struct.Struct("=IHHII")
ATTRIBUTE_HEADER = struct.Struct("=HH")
ANSWER_TIMEOUT_S = 1.0
DATAGRAM_LIMIT_BYTES = 65536


class Netlink:
    """One pyroute2 connection in the network namespace of the thread that created this object. Owns thread and sockets."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netlink")
        try:
            self._ip: Any = self._thread.submit(IPRoute).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def close(self) -> None:
        self._thread.submit(self._ip.close).result()
        self._thread.shutdown()

    def run(self, what: str, work: Callable[[Any], T]) -> T:
        """Carry out `work(ip)` and wait. A refusal by the kernel becomes KernelRefused naming `what`."""
        try:
            return self._thread.submit(work, self._ip).result()
        except NetlinkError as error:
            raise KernelRefused(
                what, error.code, "Needs CAP_NET_ADMIN; run `serval-translator doctor`."
            ) from error

    def features(self, interface: str) -> dict[str, bool]:
        """The offload features of an interface, by ethtool's names; empty where the driver has none to tell."""

        def query() -> dict[str, bool]:
            ethtool = Ethtool()
            try:
                listed = ethtool.get_features(interface).features
            except (OSError, NetlinkError):
                return {}
            finally:
                ethtool.close()
            return {name: feature.enable for name, feature in listed.items()}

        return self._thread.submit(query).result()

    def set_features(self, interface: str, wanted: dict[str, bool]) -> None:
        """Switch offload features; names the interface does not have are left out."""

        def change() -> None:
            ethtool = Ethtool()
            try:
                features = ethtool.get_features(interface)
                for name, enable in wanted.items():
                    if name in features.features:
                        features.features[name].enable = enable
                ethtool.set_features(interface, features)
            finally:
                ethtool.close()

        try:
            self._thread.submit(change).result()
        except OSError as error:
            raise KernelRefused(
                f"ethtool -K {interface}", error.errno or 0, "Needs CAP_NET_ADMIN."
            ) from error


class RouteQueries:
    """A socket for questions that have one message as their answer. Owns the socket; `close` it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.settimeout(ANSWER_TIMEOUT_S)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def ask(self, what: str, kind: int, body: bytes) -> Message:
        """The answer to a request of type `kind`. KernelRefused, naming `what`, if the answer is an error."""
        return self._exchange(what, kind, NLM_F_REQUEST, body)

    def order(self, what: str, kind: int, body: bytes) -> None:
        """Have something done. KernelRefused, naming `what`, if it is not."""
        self._exchange(what, kind, NLM_F_REQUEST | NLM_F_ACK, body)

    def _exchange(self, what: str, kind: int, flags: int, body: bytes) -> Message:
        self._sequence += 1
        header = MESSAGE_HEADER.pack(MESSAGE_HEADER.size + len(body), kind, flags, self._sequence, 0)
        self._socket.send(header + body)
        while True:
            for answer in messages(self._socket.recv(DATAGRAM_LIMIT_BYTES)):
                if answer.sequence != self._sequence:
                    continue  # an answer that came after its question had timed out
                if answer.kind == NLMSG_ERROR and (code := -struct.unpack_from("=i", answer.body)[0]):
                    raise KernelRefused(what, code, "")
                return answer


class ChangeMonitor:
    """Becomes readable when something of `groups` (RTMGRP_*) changes: by default what paths depend on."""

    def __init__(self, groups: int = RTMGRP_PATHS) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, groups))

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> Changes:
        """Read all notifications that wait."""
        datagrams, lost = [], False
        while True:
            try:
                datagrams.append(self._socket.recv(DATAGRAM_LIMIT_BYTES))
            except BlockingIOError:
                return Changes(datagrams, lost)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True

    def close(self) -> None:
        self._socket.close()


class Message(NamedTuple):
    """One netlink message; `body` is what follows its header."""

    kind: int
    sequence: int
    body: bytes


class Changes(NamedTuple):
    """Notifications, to be read with `messages`. `lost`: there were more, so everything has to be asked again."""

    datagrams: list[bytes]
    lost: bool


def messages(datagram: bytes) -> Iterator[Message]:
    """The messages of a datagram, up to one that is cut short."""
    offset = 0
    while offset + MESSAGE_HEADER.size <= len(datagram):
        length, kind, _, sequence, _ = MESSAGE_HEADER.unpack_from(datagram, offset)
        if length < MESSAGE_HEADER.size or offset + length > len(datagram):
            return
        yield Message(kind, sequence, datagram[offset + MESSAGE_HEADER.size : offset + length])
        offset += (length + 3) & ~3


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute; the values that we send need no padding."""
    return ATTRIBUTE_HEADER.pack(ATTRIBUTE_HEADER.size + len(value), kind) + value


def walk_attributes(data: bytes, offset: int) -> list[tuple[int, bytes]]:
    """The (type, value) pairs of a chain of netlink attributes."""
    found = []
    while offset + ATTRIBUTE_HEADER.size <= len(data):
        length, kind = ATTRIBUTE_HEADER.unpack_from(data, offset)
        if length < ATTRIBUTE_HEADER.size:
            break
        found.append((kind, data[offset + ATTRIBUTE_HEADER.size : offset + length]))
        offset += (length + 3) & ~3
    return found
