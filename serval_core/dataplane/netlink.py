"""Who talks rtnetlink? `Netlink`: pyroute2 in a thread of its own, for everything that configures or lists.

pyroute2's synchronous classes run an event loop of their own, which is impossible in the thread of a running loop.
Calls take a few milliseconds and happen at start, at the end and when the kernel reports a change, never per connection.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pyroute2 import Ethtool, IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from serval_core.errors import KernelRefused

T = TypeVar("T")

RTMGRP_LINK = 0x1
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV4_ROUTE = 0x40
RTMGRP_IPV4_RULE = 0x80


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


class ChangeMonitor:
    """Becomes readable when links, addresses, routes or rules change. What changed is asked again, not parsed."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV4_RULE))

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> None:
        """Read all notifications that wait. Lost ones (ENOBUFS) are as good as read: everything is asked again anyway."""
        while True:
            try:
                self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != 105:  # ENOBUFS
                    raise

    def close(self) -> None:
        with contextlib.closing(self._socket):
            pass
