"""How does a packet get to an address? `Path` is the answer; who knows it is the data plane (`dataplane.addresses`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Path(NamedTuple):
    """One way out of this host. Addresses are 32-bit integers in host order; `mtu_bytes` is that of the IP packet."""

    interface_index: int
    interface_name: str
    source_address: int
    next_hop: int
    mtu_bytes: int


class Interface(NamedTuple):
    """An interface that is up and has an IPv4 address. `broadcast_address` is 0 where there is none (loopback)."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants here
    name: str
    address: int
    prefix_length: int
    broadcast_address: int
    mtu_bytes: int
    mac: bytes = b""  # empty where the interface has none


class PathFinder(Protocol):
    """What the SAL asks its environment. Answers come from a cache and never block."""

    def path_to(self, address: int, interface_index: int = 0) -> Path | None:
        """The path to `address`, restricted to one interface if `interface_index` is not 0; None: unreachable."""

    def has_address(self, address: int) -> bool:
        """Whether an interface that is up has this address, be it its first one or not."""

    def interfaces(self) -> Sequence[Interface]:
        """The interfaces that are up, loopback included."""
