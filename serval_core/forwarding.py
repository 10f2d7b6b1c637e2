"""What does a service router do with packets for services of other hosts? (SPEC 6.5; OBSERVED, "SAL forwarding")

A packet that names a service, belongs to no flow of this host and came to an address of this host is resolved
by the service table. If the answer is FORWARD it goes on to the target: same IP source, new IP destination,
one hop less to live, and this host's address appended to the SOURCE extension. The answer to a SYN goes
straight to the client, and everything after it too, so a router keeps no state of flows.

Of the table's targets those are never chosen that cannot be meant: this host, whoever has had the packet
before, and broadcast addresses. An RSYN goes to several targets, since only one of them has the flow that it names
(`rendezvous`). What nobody is left for stays here, as if forwarding were off. What a DELAY
rule holds is dispatched anew when somebody has said where the service is.

`dataplane.router` does the same faster for what is common. This file is what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

from serval_core.addresses import is_unicast
from serval_core.core import Core
from serval_core.effects import SendPacket
from serval_core.errors import TheirMistake
from serval_core.paths import Interface, Path
from serval_core.rendezvous import COPIES_LIMIT
from serval_core.rules import RuleType
from serval_core.wire import encapsulation, ipv4
from serval_core.wire.checksum import update_checksum
from serval_core.wire.ipv4 import IPv4Packet, OuterPorts
from serval_core.wire.sal import (
    ACK,
    MAX_SOURCE_ADDRESSES,
    PROTOCOL_SAL,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    RSYN,
    SalPacket,
    append_source,
)

_TCP_CHECKSUM_AT = 16
_UDP_CHECKSUM_AT = 6


Dispatch = Callable[[IPv4Packet, SalPacket, int, bool, float], None]


class _SynOfOthers(NamedTuple):
    """What tells one client's SYN from another's."""

    source: int
    flow_id: int
    nonce: bytes


class Forwarding:
    """Forwards for one host. `enabled` may be switched at any time."""

    __slots__ = ("_broadcast", "_core", "_dispatch", "_interfaces", "_own", "_waiting", "enabled")

    def __init__(self, core: Core, dispatch: Dispatch) -> None:
        """`dispatch(ip, sal, interface_index, broadcast, now)` takes packets that have waited."""
        self._core = core
        self._dispatch = dispatch
        self._waiting: set[_SynOfOthers] = set()
        self.enabled = core.settings.forwarding
        self._interfaces: Sequence[Interface] = ()
        self._own: frozenset[int] = frozenset()
        self._broadcast: frozenset[int] = frozenset()

    def takes(
        self, ip: IPv4Packet, sal: SalPacket, interface_index: int, broadcast: bool, now: float
    ) -> bool:
        """Whether the packet, of no flow of this host, is not for this host and has been dealt with.

        Raises TheirMistake when it must not go any further.
        """
        if not self.enabled or broadcast or not sal.services:
            return False
        own = self._own_addresses()
        if ip.source in own or not is_unicast(ip.source):
            return False
        core = self._core
        exclude = self._broadcast | own | {ip.source, *sal.source_addresses}
        if sal.control is not None and sal.control.flags & (RSYN | ACK) == RSYN:
            return self._spread(ip, sal, exclude)
        while True:
            rule_type, targets = core.table.resolve(
                sal.services[0], core.random.random, exclude, len(sal.transport)
            )
            if rule_type is RuleType.DROP:
                raise TheirMistake("drop_rule")
            if rule_type is RuleType.DELAY:
                self._delay(ip, sal, interface_index, now)
                return True
            if rule_type is not RuleType.FORWARD:
                return False
            if not targets or targets[0].broadcast:
                core.counters["forwarding_without_target"] += 1
                return False
            target = targets[0]
            path = core.paths.path_to(target.address, target.interface_index)
            if path is not None:
                self._forward(ip, sal, target.address, path)
                return True
            core.counters["forwarding_unreachable_targets"] += 1
            exclude |= {target.address}

    def _spread(self, ip: IPv4Packet, sal: SalPacket, exclude: Set[int]) -> bool:
        """Send an RSYN to instances that may have its flow; whether there is one.

        Each router that it has passed halves their number, or routers that know each other would multiply it to many
        thousands. A repeated RSYN may get to others.
        """
        core = self._core
        found = 0
        passed = max(0, len(sal.source_addresses) - 1)  # the first one is the originator's
        for _ in range(max(1, COPIES_LIMIT >> passed)):
            rule_type, targets = core.table.resolve(
                sal.services[0], core.random.random, exclude, len(sal.transport)
            )
            if rule_type is not RuleType.FORWARD or not targets or targets[0].broadcast:
                break
            target = targets[0]
            path = core.paths.path_to(target.address, target.interface_index)
            if path is not None:
                self._forward(ip, sal, target.address, path)
                found += 1
            exclude |= {target.address}
        return found > 0

    def _forward(self, ip: IPv4Packet, sal: SalPacket, address: int, path: Path) -> None:
        if ip.destination in sal.source_addresses:
            raise TheirMistake("forwarding_loop")
        if ip.ttl <= 1:
            raise TheirMistake("time_to_live")
        if len(sal.source_addresses) >= MAX_SOURCE_ADDRESSES:
            raise TheirMistake("source_full")
        core = self._core
        for packet in ipv4.fragments(rewrite(ip, sal, address), path.mtu_bytes):
            core.effects.append(SendPacket(packet, address, path.interface_index))
        core.counters["packets_forwarded"] += 1

    def _delay(self, ip: IPv4Packet, sal: SalPacket, interface_index: int, now: float) -> None:
        """Let the packet wait; but a SYN that is repeated meanwhile only once, or each copy might go elsewhere."""
        syn = None
        if sal.control is not None:
            syn = _SynOfOthers(ip.source, sal.src_flow_id, sal.control.nonce)
            if syn in self._waiting:
                raise TheirMistake("repeated_while_delayed")

        def leave() -> None:
            if syn is not None:
                self._waiting.discard(syn)

        def resume(now: float) -> None:
            leave()
            try:
                self._dispatch(ip, sal, interface_index, False, now)
            except TheirMistake as mistake:
                self._core.drop(mistake.reason)

        def end(reason: str, now: float) -> None:
            leave()
            self._core.drop("delayed")

        if self._core.delayed.park(sal.services[0], "forwarded", resume, end, now) is None:
            raise TheirMistake("delayed")
        if syn is not None:
            self._waiting.add(syn)

    def _own_addresses(self) -> frozenset[int]:
        interfaces = self._core.paths.interfaces()
        if interfaces is not self._interfaces:
            self._interfaces = interfaces
            self._own = frozenset(each.address for each in interfaces)
            self._broadcast = frozenset(each.broadcast_address for each in interfaces)
        return self._own


def rewrite(ip: IPv4Packet, sal: SalPacket, address: int) -> bytes:
    """The IPv4 packet that goes on to `address`. `sal` is what `ip` carries; both have been checked.

    Raises TheirMistake if the SAL header has no room for another address.
    """
    transport_bytes = len(sal.transport)
    header = append_source(ip.payload[: len(ip.payload) - transport_bytes], ip.source, ip.destination)
    transport = _transport_to(sal.transport, sal.protocol, ip.destination, address)
    if ip.outer_ports is not None:
        # The next one is to see the client's port, which its answer goes to (SPEC 8).
        onward = OuterPorts(ip.outer_ports.peer, ip.outer_ports.local)
        return encapsulation.emit(ip.source, address, onward, header + transport, ip.ttl - 1)
    return ipv4.emit(
        ip.source,
        address,
        PROTOCOL_SAL,
        header + transport,
        ttl=ip.ttl - 1,
        identification=ip.identification,
        flags_fragment=ip.flags_fragment,
        tos=ip.tos,
    )


def _transport_to(transport: bytes, protocol: int, old: int, new: int) -> bytes:
    """The transport part with its checksum following the new address, so that a wrong one stays wrong."""
    if protocol == PROTOCOL_TCP:
        at = _TCP_CHECKSUM_AT
    elif protocol == PROTOCOL_UDP:
        at = _UDP_CHECKSUM_AT
    else:
        return transport
    if len(transport) < at + 2:
        return transport
    checksum = int.from_bytes(transport[at : at + 2], "big")
    if protocol == PROTOCOL_UDP:
        if checksum == 0:  # the datagram carries none
            return transport
        checksum = update_checksum(checksum, old, new) or 0xFFFF
    else:
        checksum = update_checksum(checksum, old, new)
    return transport[:at] + checksum.to_bytes(2, "big") + transport[at + 2 :]
