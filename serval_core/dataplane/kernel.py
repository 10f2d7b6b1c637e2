"""How do flows live in the kernel? `KernelDataPlane`: sockets in ESTABLISHED, the flow map, the raw socket for control packets.

It carries out the data-plane effects of the SAL and reports what the BPF programs noticed. It does not know the protocol's state
machine. Every fd that `open_transport` returns belongs to the caller until handed back to `take_down`.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from serval_core.dataplane import bpf_loader, tcp_repair
from serval_core.dataplane.addresses import KernelPaths
from serval_core.dataplane.devices import (
    ANCHOR,
    ANCHOR_OUTER,
    CHECKSUM,
    OWN_DEVICES,
    SEGMENTER,
    Devices,
)
from serval_core.dataplane.encapsulation import Encapsulation
from serval_core.dataplane.flow_sockets import FlowSockets
from serval_core.dataplane.forward_batch import BatchForwarder
from serval_core.dataplane.icmp_errors import IcmpErrors
from serval_core.dataplane.layouts import (
    CONFIGURATION,
    DROP_REASONS,
    EVENT,
    FLOW,
    FLOW_ADDRESSES,
    FLOW_CHECKSUMS,
    FLOW_COMPLETE_CHECKSUM,
    FLOW_COMPLETE_THROUGH_NAT,
    FLOW_EXPECTED,
    FLOW_FLAGS,
    FLOW_KEY,
    FLOW_LOCAL,
    FLOW_MACS,
    FLOW_NATIVE,
    FLOW_NEIGHBOUR_KNOWN,
    FLOW_OTHER_LOCAL,
    FLOW_OTHER_PEER,
    FLOW_OUTER_PORTS,
    FLOW_PATH_NUMBER,
    FLOW_PEER,
    FLOW_TELL_PROOF,
    MAX_FLOWS,
    NATIVE_DOUBTS,
    NATIVE_FOLLOW,
    OBJECT_FILE,
    OUTER_PORTS,
    FlowEvent,
    FlowState,
    Noticed,
    fresh_state,
)
from serval_core.dataplane.native_ports import DEFAULT_PORTS, PortRange, ReservedPorts
from serval_core.dataplane.neighbours import Key, Neighbours
from serval_core.dataplane.netlink import ChangeMonitor, Netlink
from serval_core.dataplane.next_hops import Link, NextHops
from serval_core.dataplane.packet_socket import RawSocket
from serval_core.dataplane.segment_limits import SegmentLimits, SegmentSize
from serval_core.dataplane.too_big import TooBigMessages
from serval_core.effects import LimitSegments, MovePath, OpenTransport
from serval_core.errors import KernelRefused
from serval_core.framing import Framing
from serval_core.handshake import OUTER_UDP_BYTES
from serval_core.names import FlowID, parse_address
from serval_core.wire import sal

NO_HEADERS = bytes(12), bytes(12), bytes(6), bytes(6), 0, 0, 0, 0, 0, 0, 0

class FlowCounters(NamedTuple):
    """Data packets of a flow on the wire; bytes are those of the IP packets."""

    packets_out: int
    bytes_out: int
    packets_in: int
    bytes_in: int


@dataclass(frozen=True)
class DataPlaneSettings:
    """`interfaces`: names to use, None for all that are up. `virtual_network`: a /16 of its own for the kernel's sockets, and the
    address of our side in `virtual_address`; neither ever appears on a wire. A flow whose peer's host is silent for
    `peer_timeout_s` ends with ETIMEDOUT (0: never). A service router forwards in the kernel unless `forward_in_kernel` is false.
    `native_ports`: those that framing `native` may use."""

    interfaces: Sequence[str] | None = None
    congestion_control: str = "cubic"
    virtual_network: str = "100.126.0.0"
    virtual_address: str = "100.127.255.1"
    virtual_port: int = 54324
    peer_timeout_s: int = 120
    forward_in_kernel: bool = True
    native_ports: PortRange = DEFAULT_PORTS


class KernelDataPlane:
    """The data plane of one stack. `open()` or nothing; `close()` removes every trace."""

    def __init__(self, settings: DataPlaneSettings) -> None:
        self._settings = settings
        self._address = parse_address(settings.virtual_address)
        self._network = parse_address(settings.virtual_network)
        self._port = settings.virtual_port
        self._congestion_control = settings.congestion_control.encode()
        # First in, first out: a program that still runs with an old entry must not write into a new flow's state.
        self._slots = deque(range(MAX_FLOWS))
        self._slot_of: dict[int, int] = {}
        self._native_port_of: dict[int, int] = {}
        self._ours: set[FlowID] = set()  # the flows whose peer is a stack like this
        self._received_from: dict[int, int] = {}  # fd -> the sequence number that its socket expected first
        self._needs_checksum: dict[int, bool] = {}
        self._own_macs: dict[int, bytes] = {}
        self.on_link_change: Callable[[Key], None] | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    def open(self) -> list[str]:
        """Set everything up. Returns what a crashed predecessor had left behind and is now removed."""
        self._netlink = Netlink()
        self.devices = Devices(self._netlink, self._address, self._network)
        try:
            leftovers = self.devices.remove_leftovers()
            indexes = self.devices.create()
            self._load(indexes)
            self._raw = RawSocket(self._object.program_fd("serval_control"))
            self.encapsulation = Encapsulation(self._object.program_fd("serval_outer"))
            self.icmp_errors = IcmpErrors()
            self.too_big = TooBigMessages()
            self.sockets = FlowSockets(self._object, self._address, self._port, self._network)
            self.segment_limits = SegmentLimits(self.sockets)
            self.monitor = ChangeMonitor()
            self.neighbours = Neighbours()
            self._next_hops = NextHops(self.neighbours)
            self.paths = KernelPaths(self._netlink, OWN_DEVICES, self._settings.interfaces)
            self.attach_interfaces()
            leftovers += self._end_left_connections()
        except BaseException:
            self.devices.remove()
            self._netlink.close()
            raise
        return leftovers

    def _end_left_connections(self) -> list[str]:
        """Reset the sockets of flows that died with a crashed predecessor, which had handed them to other programs."""
        found = []
        for flow_id in self._left_flows():
            seen = self.sockets.look(flow_id)
            if seen is not None and seen.receive_next:
                self.sockets.reset_unattended(flow_id, seen)
                found.append(f"connection of flow {flow_id}")
        return found

    def _left_flows(self) -> list[FlowID]:
        """The flowIDs that sockets of this network namespace spell."""
        own = f"{int.from_bytes(self._address.to_bytes(4, 'big'), sys.byteorder):08X}:{self._port:04X}"
        found = []
        with open("/proc/thread-self/net/tcp") as table:
            for line in table:
                fields = line.split()
                if fields[1] == own:
                    address, _, port = fields[2].partition(":")
                    remote = int.from_bytes(int(address, 16).to_bytes(4, sys.byteorder), "big")
                    found.append(FlowID((remote & 0xFFFF) << 16 | int(port, 16)))
        return found

    def _load(self, indexes: dict[str, int]) -> None:
        configuration = CONFIGURATION.pack(
            self._address,
            self._network,
            self._port,
            indexes[ANCHOR_OUTER].to_bytes(4, "little"),
            indexes[SEGMENTER].to_bytes(4, "little"),
            indexes[CHECKSUM].to_bytes(4, "little"),
            indexes[ANCHOR].to_bytes(4, "little"),
        )
        self._object = bpf_loader.BpfObject(str(OBJECT_FILE), configuration)
        self._flows = self._object.map("flows")
        self._states = self._object.map("flow_states")
        self._drops = self._object.per_cpu_map("drop_counters")
        self._events = self._object.ring_buffer("flow_events")
        self.native_ports = ReservedPorts(self._settings.native_ports, self._object.map("native_ports"))
        programs = self._object.program_fd("serval_out"), self._object.program_fd("serval_insert")
        self.devices.attach_own(indexes, *programs)

    def close(self) -> None:
        self.monitor.close()
        self.neighbours.close()
        self.sockets.close()
        self._raw.close()
        self.encapsulation.close()
        self.native_ports.close()
        self.icmp_errors.close()
        self.too_big.close()
        self.paths.close()
        self.devices.remove()
        self._netlink.close()
        self._object.close()

    # -- interfaces ---------------------------------------------------------------------------------------------------

    def attach_interfaces(self) -> None:
        """Bring the filters in line with the interfaces that are up; called at start and when the kernel reports changes."""
        wanted = {interface.index for interface in self.paths.interfaces()}
        self.devices.attach(wanted, self._object.program_fd("serval_in"))
        self._own_macs = {
            interface.index: interface.mac for interface in self.paths.interfaces() if len(interface.mac) == 6
        }
        self._needs_checksum = {
            interface.index: not self._netlink.features(interface.name).get("tx-checksum-ip-generic", False)
            for interface in self.paths.interfaces()
        }

    def attach_router(self, interface_indexes: Set[int], program_fd: int) -> None:
        """Have the service router's program on exactly these interfaces, of those that are used."""
        self.devices.attach_router(interface_indexes, program_fd)

    def use_next_hop(self, key: Key) -> Link | None:
        """The MAC addresses for frames to a next hop, if the kernel has them. `on_link_change` is told when that changes."""
        macs = self._macs(self._next_hops.use(key), key[0])
        return None if macs is None else Link(*macs)

    def release_next_hops(self) -> None:
        """No next hop is in use any more, other than by flows."""
        self._next_hops.release_all()

    def _next_hop_changed(self, user: int, mac: bytes | None) -> None:
        key = self._next_hops.changed(user, mac)
        if key is not None and self.on_link_change is not None:
            self.on_link_change(key)

    # -- control packets ----------------------------------------------------------------------------------------------

    @property
    def control_fd(self) -> int:
        return self._raw.fd

    def receive(self) -> list[tuple[bytes, int, bool]]:
        """Control packets that wait, at most 64: (IPv4 packet, interface index, was a broadcast)."""
        return self._raw.receive()

    def forward_with(self, forwarder: BatchForwarder | None) -> None:
        """Give received packets to `forwarder` first: `receive` returns those that it leaves."""
        self._raw.forward_with(forwarder)

    def send(self, packet: bytes, destination: int, interface_index: int) -> int:
        """Send an IPv4 packet; returns 0 or the errno."""
        return self._raw.send(packet, destination, interface_index)

    # -- flows --------------------------------------------------------------------------------------------------------

    def expect_data(self, flow_id: FlowID) -> None:
        """Let data for this half-open flow through to user space."""
        value = FLOW.pack(0, 0, 0, bytes(4), bytes(4), FLOW_EXPECTED.to_bytes(4, "little"), *NO_HEADERS)
        self._flows.update(FLOW_KEY.pack(flow_id), value)

    def forget_expected(self, flow_id: FlowID) -> None:
        self._flows.delete(FLOW_KEY.pack(flow_id))

    def open_transport(self, flow: OpenTransport) -> int:
        """Create the kernel socket and the flow's map entry; returns the fd. Raises KernelRefused, leaving nothing behind."""
        flow_id = flow.flow_id
        path = self.paths.path_to(flow.peer_address, flow.interface_index)
        if path is None:
            raise KernelRefused(
                "route to the peer", errno.EHOSTUNREACH, "No path leads to the address of the SYN-ACK."
            )
        if not self._slots:
            raise KernelRefused(
                "flow table", errno.ENFILE, f"All {MAX_FLOWS} flows of the data plane are in use."
            )
        self.devices.netfilter.connection_begins(time.monotonic())
        parameters = flow.parameters
        fd = tcp_repair.create_established(
            self._address,
            self._port,
            self._network | flow_id >> 16,
            flow_id & 0xFFFF,
            parameters.send_next,
            parameters.receive_next,
            parameters.mss_bytes,
            parameters.send_window_scale,
            parameters.receive_window_scale,
            parameters.sack,
            parameters.timestamp,
            parameters.send_window_bytes,
            parameters.receive_window_bytes,
            self._congestion_control,
            self._settings.peer_timeout_s,
        )
        slot = self._slots.popleft()
        flags = self._checksum_flags(flow.peer_is_ours, path.interface_index, flow.outer_ports is not None)
        neighbour = self.neighbours.use(flow_id, (path.interface_index, path.next_hop))
        macs = self._macs(neighbour, path.interface_index)
        if macs:
            flags |= FLOW_NEIGHBOUR_KNOWN
        native = flow.native
        if native is not None:
            flags |= FLOW_NATIVE | (FLOW_TELL_PROOF if native.tell_proof else 0)
        value = FLOW.pack(
            flow.local_address,
            flow.peer_address,
            path.next_hop,
            path.interface_index.to_bytes(4, "little"),
            slot.to_bytes(4, "little"),
            flags.to_bytes(4, "little"),
            sal.data_header(flow_id, flow.peer_flow_id, sal.PROTOCOL_TCP),
            sal.data_header(flow.peer_flow_id, flow_id, sal.PROTOCOL_TCP),
            *(macs or (bytes(6), bytes(6))),
            *((native.local_port, native.peer_port) if native else (0, 0)),
            *(flow.outer_ports or (0, 0)),
            0,
            0,
            0,
        )
        try:
            doubts = NATIVE_DOUBTS if native is not None and not native.sending else 0
            self._states.update(slot.to_bytes(4, "little"), fresh_state(parameters.send_next, doubts))
            self._flows.update(FLOW_KEY.pack(flow_id), value)
        except KernelRefused:
            self._slots.append(slot)
            self.neighbours.release(flow_id)
            tcp_repair.take_down(fd)
            raise
        self._slot_of[flow_id] = slot
        if native is not None:
            self._native_port_of[flow_id] = native.local_port
            self.native_ports.give(native.local_port, flow_id)
        if flow.peer_is_ours:
            self._ours.add(flow_id)
        self.segment_limits.begin(
            flow_id, SegmentSize(parameters.mss_bytes, timestamps=parameters.timestamp is not None)
        )
        self._received_from[fd] = parameters.receive_next
        return fd

    def move(self, moved: MovePath) -> bool:
        """From now on the flow's data takes another way; False when it has no entry, or there is no such way any more.

        Nothing is lost or doubled by it: a packet is sent by the old entry or by the new one as a whole.
        """
        flow_id = moved.flow_id
        value = self._flows.get(FLOW_KEY.pack(flow_id))
        path = self.paths.path_to(moved.peer_address, moved.interface_index)
        if value is None or path is None:
            return False
        entry = bytearray(value)
        for at, other, address in (
            (FLOW_LOCAL, FLOW_OTHER_LOCAL, moved.local_address),
            (FLOW_PEER, FLOW_OTHER_PEER, moved.peer_address),
        ):
            if entry[at] != address.to_bytes(4, "big"):
                entry[other] = entry[at]  # what is on its way is the flow's, too
        index = path.interface_index
        FLOW_ADDRESSES.pack_into(
            entry, 0, moved.local_address, moved.peer_address, path.next_hop, index.to_bytes(4, "little")
        )
        old_path = self.neighbours.release(flow_id)
        macs = self._macs(self.neighbours.use(flow_id, (index, path.next_hop)), index)
        flags = int.from_bytes(entry[FLOW_FLAGS], "little") & ~(FLOW_NEIGHBOUR_KNOWN | FLOW_CHECKSUMS)
        flags |= self._checksum_flags(flow_id in self._ours, index, moved.outer_ports is not None)
        if moved.outer_ports is not None:
            flags &= ~FLOW_NATIVE
        entry[FLOW_OUTER_PORTS] = OUTER_PORTS.pack(*(moved.outer_ports or (0, 0)))
        entry[FLOW_FLAGS] = (flags | (FLOW_NEIGHBOUR_KNOWN if macs else 0)).to_bytes(4, "little")
        entry[FLOW_MACS] = b"".join(macs) if macs else bytes(12)
        entry[FLOW_PATH_NUMBER] = (int.from_bytes(entry[FLOW_PATH_NUMBER], "big") + 1).to_bytes(4, "big")
        self._flows.update(FLOW_KEY.pack(flow_id), bytes(entry))
        seen = self.sockets.look(flow_id)
        if seen is not None and seen.receive_next:
            if old_path is not None and old_path != (index, path.next_hop):
                self.neighbours.give_up(old_path)
            outer_bytes = 0 if moved.outer_ports is None else OUTER_UDP_BYTES
            self.segment_limits.limit(flow_id, seen, moved.mtu_bytes - outer_bytes, True)
            self.sockets.take_back_timeouts(flow_id, seen)
            self.sockets.have_it_acknowledge(flow_id, seen)
        return True

    def expect_peer(self, flow_id: FlowID, address: int) -> None:
        """The flow's peer is about to send from this address as well."""
        value = self._flows.get(FLOW_KEY.pack(flow_id))
        if value is not None:
            entry = bytearray(value)
            entry[FLOW_OTHER_PEER] = address.to_bytes(4, "big")
            self._flows.update(FLOW_KEY.pack(flow_id), bytes(entry))

    def limit_segments(self, wanted: LimitSegments) -> None:
        """Have a flow's kernel socket send no packets that are larger than its path carries."""
        flow_id = wanted.flow_id
        seen = self.sockets.look(flow_id)
        value = self._flows.get(FLOW_KEY.pack(flow_id))
        if seen is not None and seen.mss_bytes and value is not None:
            outer_bytes = OUTER_UDP_BYTES if any(value[FLOW_OUTER_PORTS]) else 0
            self.segment_limits.limit(flow_id, seen, wanted.mtu_bytes - outer_bytes, wanted.lasting)

    def neighbours_changed(self) -> None:
        """Carry what the kernel reports of next hops into the flows that use them."""
        for flow_id, neighbour in self.neighbours.changes():
            if flow_id < 0:
                self._next_hop_changed(flow_id, neighbour)
                continue
            value = self._flows.get(FLOW_KEY.pack(flow_id))
            if value is None:
                continue
            entry = bytearray(value)
            macs = self._macs(neighbour, int.from_bytes(entry[12:16], "little"))
            flags = int.from_bytes(entry[FLOW_FLAGS], "little") & ~FLOW_NEIGHBOUR_KNOWN
            entry[FLOW_FLAGS] = (flags | (FLOW_NEIGHBOUR_KNOWN if macs else 0)).to_bytes(4, "little")
            entry[FLOW_MACS] = b"".join(macs) if macs else bytes(12)
            self._flows.update(FLOW_KEY.pack(flow_id), bytes(entry))

    def _macs(self, neighbour: bytes | None, interface_index: int) -> tuple[bytes, bytes] | None:
        own = self._own_macs.get(interface_index)
        return (neighbour, own) if neighbour and own else None

    def _checksum_flags(self, peer_is_ours: bool, interface_index: int, encapsulated: bool) -> int:
        """What the program has to do about the checksums of a flow's segments."""
        if not peer_is_ours or self._needs_checksum.get(interface_index, True):
            return FLOW_COMPLETE_CHECKSUM
        return FLOW_COMPLETE_THROUGH_NAT if encapsulated else 0

    def remove_flow(self, flow_id: FlowID) -> FlowCounters:
        """Take the flow out of the map: from now on nothing of it enters or leaves. Returns its final counters."""
        counters = self.flow_counters(flow_id)
        self._flows.delete(FLOW_KEY.pack(flow_id))
        self.neighbours.release(flow_id)
        native_port = self._native_port_of.pop(flow_id, 0)
        if native_port:
            self.native_ports.take_back(native_port, flow_id)
        slot = self._slot_of.pop(flow_id, None)
        self._ours.discard(flow_id)
        self.segment_limits.forget(flow_id)
        if slot is not None:
            self._slots.append(slot)
        return counters

    def take_down(self, fd: int) -> None:
        """Close a transport's socket silently. Takes the fd; the flow must have been removed from the map before."""
        del self._received_from[fd]
        tcp_repair.take_down(fd)

    def let_go(self, fd: int) -> None:
        """Close our descriptor of a socket that another process has, too. Takes the fd; the flow stays in the map."""
        del self._received_from[fd]
        os.close(fd)

    def reset(self, flow_id: FlowID, fd: int) -> None:
        """Let whoever uses a transport's socket see a reset; `FlowSockets.reset`."""
        self.sockets.reset(flow_id, fd, self._received_from[fd])

    # -- what the programs noticed ------------------------------------------------------------------------------------

    @property
    def event_fd(self) -> int:
        return self._events.fd

    def take_events(self) -> list[Noticed]:
        """Flow events since the last call, oldest first."""
        found = []
        for sample in self._events.take():
            flow_id, kind, address, port = EVENT.unpack(sample)
            found.append(Noticed(FlowID(flow_id), FlowEvent(int.from_bytes(kind, "little")), address, port))
        return found

    def flow_counters(self, flow_id: FlowID) -> FlowCounters:
        """The counters of a live flow, zeros if there is none."""
        slot = self._slot_of.get(flow_id)
        value = None if slot is None else self._states.get(slot.to_bytes(4, "little"))
        if value is None:
            return FlowCounters(0, 0, 0, 0)
        state = FlowState.parse(value)
        return FlowCounters(state.packets_out, state.bytes_out, state.packets_in, state.bytes_in)

    def framing(self, flow_id: FlowID) -> Framing:
        """How the next segment of the flow is going to be sent, as far as that is known before it is there."""
        slot = self._slot_of.get(flow_id)
        entry = self._flows.get(FLOW_KEY.pack(flow_id))
        value = None if slot is None else self._states.get(slot.to_bytes(4, "little"))
        if entry is None or value is None:
            return Framing.SAL
        fields = FLOW.unpack(entry)
        state = FlowState.parse(value)
        native = int.from_bytes(fields[5], "little") & FLOW_NATIVE and state.packets_in
        believed = state.native_proved or state.native_doubts < NATIVE_DOUBTS
        if native and believed and state.peer_in_sal < NATIVE_FOLLOW:
            return Framing.NATIVE
        return Framing.UDP if fields[12] else Framing.SAL

    def entries(self) -> int:
        """How many entries the flow map has right now, half-open ones included: for leak checks and `show`."""
        return len(self._flows.keys())

    def counters(self) -> dict[str, int]:
        """What the data plane dropped, by reason."""
        found = {}
        for index, name in enumerate(DROP_REASONS):
            values = self._drops.get(index.to_bytes(4, "little")) or b""
            found[f"dataplane_drop_{name}"] = sum(struct.unpack(f"={len(values) // 8}Q", values))
        return found
