"""Programs come onto interfaces and off again, by links as by filters of clsact. `serval_in` shows by its drops that it runs."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core.dataplane.bpf_loader import BpfObject, attach_tc
from serval_core.dataplane.filters import Filters, Place
from serval_core.dataplane.layouts import CONFIGURATION, DROP_REASONS, OBJECT_FILE
from serval_core.dataplane.netlink import Netlink
from serval_core.names import parse_address
from serval_core.wire import ipv4

VIRTUAL, REMOTE, OTHER = (parse_address(text) for text in ("100.127.255.1", "100.126.0.0", "192.0.2.1"))
DROPPED = struct.pack("=I", DROP_REASONS.index("in_virtual_address"))
FRAME = b"\xff" * 6 + bytes(6) + b"\x08\x00" + ipv4.emit(OTHER, VIRTUAL, 6, bytes(20))
PRIORITY = 0x5341
KINDS = pytest.mark.parametrize("use_links", [True, False], ids=["tcx", "clsact"])


class Wire:
    """A host with the program on its interface or not, and a neighbour that sends what the program drops."""

    def __init__(self, host: Host, neighbour: Host) -> None:
        self.host = host
        self.netlink = host.call(Netlink)
        self.index = host.call(socket.if_nametoindex, "eth0")
        ones = [struct.pack("=I", 1)] * 4
        configuration = CONFIGURATION.pack(VIRTUAL, REMOTE, 54324, *ones)
        self._objects = [BpfObject(str(OBJECT_FILE), configuration) for _ in range(2)]
        self._sender = neighbour.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._sender.bind(("eth0", 0))
        self._arrived = host.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        self._arrived.bind(("eth0", 0))

    def filters(self, use_links: bool) -> Filters:
        return Filters(self.netlink, use_links)

    def add(self, filters: Filters, which: int = 0) -> Place:
        """The first or the second copy of the program."""
        place = Place(self.index, PRIORITY + which)
        self.host.call(filters.add, place, self._objects[which].program_fd("serval_in"))
        return place

    def add_of_another(self) -> None:
        program_fd = self._objects[1].program_fd("serval_in")
        self.host.call(attach_tc, self.index, True, program_fd, 1, 1)

    def drops(self) -> bool:
        """Whether a frame for the virtual address is dropped; it is sent, and arrives before the program would see it."""
        before = self._counted()
        self._sender.send(FRAME)
        wait_for(lambda: self._arrived.recv(2000) == FRAME, "the frame to arrive")
        # Frames are handled one after the other: when the next has arrived, the program is through with this one.
        self._sender.send(FRAME[:-1] + b"x")
        wait_for(lambda: self._arrived.recv(2000) == FRAME[:-1] + b"x", "the frame after it")
        return self._counted() > before

    def clsact(self) -> bool:
        return "clsact" in self.host.run(["tc", "qdisc", "show", "dev", "eth0"]).stdout

    def close(self) -> None:
        self._sender.close()
        self._arrived.close()
        for loaded in self._objects:
            loaded.close()
        self.netlink.close()

    def _counted(self) -> int:
        values = b"".join(loaded.per_cpu_map("drop_counters").get(DROPPED) or b"" for loaded in self._objects)
        return sum(struct.unpack(f"={len(values) // 8}Q", values))


@pytest.fixture
def wire(lab: Lab) -> Iterator[Wire]:
    host, neighbour = lab.host("host"), lab.host("neighbour")
    lab.connect(host, "10.1.0.1/24", neighbour, "10.1.0.2/24")
    wire = Wire(host, neighbour)
    yield wire
    wire.close()


@KINDS
def test_runs_from_add_to_remove(wire: Wire, use_links: bool) -> None:
    filters = wire.filters(use_links)
    assert not wire.drops()
    place = wire.add(filters)
    wire.add(filters)
    assert wire.drops()
    assert filters.interfaces(PRIORITY) == {wire.index}
    assert wire.clsact() == (not use_links)
    wire.host.call(filters.remove, place)
    assert not wire.drops()
    assert filters.interfaces(PRIORITY) == set()
    assert not wire.clsact()


@KINDS
def test_close_takes_all_off(wire: Wire, use_links: bool) -> None:
    filters = wire.filters(use_links)
    wire.add(filters)
    wire.add(filters, 1)
    wire.host.call(filters.close)
    assert not wire.drops()
    assert not wire.clsact()


@KINDS
def test_one_of_two_stays(wire: Wire, use_links: bool) -> None:
    filters = wire.filters(use_links)
    first = wire.add(filters)
    wire.add(filters, 1)
    wire.host.call(filters.remove, first)
    assert wire.drops()
    wire.host.call(filters.close)


def test_clsact_of_another_stays(wire: Wire) -> None:
    """Both when it was there before, and when somebody else came to use ours."""
    filters = wire.filters(use_links=False)
    place = wire.add(filters)
    wire.add_of_another()
    wire.host.call(filters.remove, place)
    assert wire.clsact()
    assert not wire.drops()
    wire.add(filters)
    wire.host.call(filters.close)
    assert wire.clsact()


def test_what_a_crash_left_is_removed(wire: Wire) -> None:
    wire.add(wire.filters(use_links=False))
    successor = wire.filters(use_links=True)
    assert wire.host.call(successor.remove_left, wire.index, (PRIORITY,))
    assert not wire.drops()
    assert not wire.clsact()
    assert not wire.host.call(successor.remove_left, wire.index, (PRIORITY,))


@KINDS
def test_the_interface_may_go_first(wire: Wire, use_links: bool) -> None:
    filters = wire.filters(use_links)
    place = wire.add(filters)
    wire.host.run(["ip", "link", "del", "eth0"])
    wire.host.call(filters.remove, place)
    assert filters.interfaces(PRIORITY) == set()
