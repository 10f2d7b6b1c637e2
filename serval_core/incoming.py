"""Which part of the service access layer does a packet concern?

That of the flow that it belongs to, in the state in which that is; a listener, a router, the endpoint of unconnected
datagrams; or nobody, who may have to be told so. Whatever is wrong with a packet is counted, never raised.
"""

from __future__ import annotations

from serval_core.active_open import ActiveOpen
from serval_core.close import Close
from serval_core.core import Core
from serval_core.effects import SendPacket
from serval_core.errors import TheirMistake
from serval_core.flow import SynKey
from serval_core.forwarding import Forwarding
from serval_core.passive_open import PassiveOpen
from serval_core.reset import answer_with_reset
from serval_core.sent_resets import SentResets
from serval_core.states import State
from serval_core.unconnected import Unconnected
from serval_core.wire import ipv4
from serval_core.wire.ipv4 import IPv4Packet, OuterPorts
from serval_core.wire.sal import PROTOCOL_SAL, RST, RSYN, SYN, SalPacket, parse


class Incoming:
    """Gives packets to the parts of one service access layer."""

    __slots__ = (
        "_active_open",
        "_close",
        "_core",
        "_passive_open",
        "_sent_resets",
        "_unconnected",
        "forwarding",
    )

    def __init__(
        self,
        core: Core,
        active_open: ActiveOpen,
        passive_open: PassiveOpen,
        close: Close,
        sent_resets: SentResets,
        unconnected: Unconnected,
    ) -> None:
        self._core = core
        self._active_open = active_open
        self._passive_open = passive_open
        self._close = close
        self._sent_resets = sent_resets
        self._unconnected = unconnected
        self.forwarding = Forwarding(core, self._dispatch)

    def packet_received(self, packet: bytes, interface_index: int, broadcast: bool, now: float) -> None:
        """Process an IPv4 packet of protocol 144 that came to this host or, if `broadcast`, to all."""
        core = self._core
        core.counters["packets_received"] += 1
        try:
            if (
                core.flows.half_open >= core.settings.request_queue_limit
                and not self.forwarding.enabled
                and _is_syn(packet)
            ):
                raise TheirMistake("request_queue_full")
            ip = ipv4.parse(packet)
            if ip.is_fragment:
                raise TheirMistake("fragment")
            self._dispatch(ip, parse(ip.payload), interface_index, broadcast, now)
        except TheirMistake as mistake:
            core.drop(mistake.reason)

    def encapsulated_received(
        self,
        payload: bytes,
        source: int,
        destination: int,
        ports: OuterPorts,
        interface_index: int,
        broadcast: bool,
        now: float,
    ) -> None:
        """Process what came inside UDP; `ports` as we see them. The outer checksum has been verified."""
        core = self._core
        core.counters["packets_received"] += 1
        try:
            ip = IPv4Packet(source, destination, PROTOCOL_SAL, ipv4.DEFAULT_TTL, 0, 0, 0, payload, ports)
            self._dispatch(ip, parse(payload), interface_index, broadcast, now)
        except TheirMistake as mistake:
            core.drop(mistake.reason)

    def _dispatch(
        self, ip: IPv4Packet, sal: SalPacket, interface_index: int, broadcast: bool, now: float
    ) -> None:
        control = sal.control
        if control is not None and control.flags == SYN:
            if self.forwarding.enabled and self._forwards_syn(
                ip, sal, interface_index, broadcast, now
            ):
                return
            self._passive_open.syn_received(ip, sal, interface_index, broadcast, now)
            return
        flows = self._core.flows
        flow = flows.by_id.get(sal.dst_flow_id)
        if flow is None:
            if (record := flows.time_wait.get(sal.dst_flow_id)) is not None:
                self._close.time_wait_received(record, ip, sal)
            elif (reset := self._sent_resets.find(sal.dst_flow_id)) is not None:
                self._sent_resets.receive(reset, sal)
            elif not self.forwarding.takes(ip, sal, interface_index, broadcast, now):
                self._unknown_flow(ip, sal, interface_index, broadcast, now)
        elif flow.state is State.REQUEST:
            self._active_open.receive(flow, ip, sal, interface_index, broadcast, now)
        elif flow.state is State.RESPOND:
            self._passive_open.receive(flow, ip, sal, now)
            if control is not None and control.flags == RSYN:
                self._close.receive(flow, ip, sal, interface_index, now)
        else:
            self._close.receive(flow, ip, sal, interface_index, now)

    def _forwards_syn(
        self, ip: IPv4Packet, sal: SalPacket, interface_index: int, broadcast: bool, now: float
    ) -> bool:
        """Whether a SYN went on to another host. One that this host has begun to answer stays here."""
        assert sal.control is not None
        client = sal.source_addresses[0] if sal.source_addresses else ip.source
        if SynKey(client, sal.src_flow_id, sal.control.nonce) in self._core.flows.by_syn:
            return False
        return self.forwarding.takes(ip, sal, interface_index, broadcast, now)

    def _unknown_flow(
        self, ip: IPv4Packet, sal: SalPacket, interface_index: int, broadcast: bool, now: float
    ) -> None:
        """A packet that names a service is told that nobody has the flow; others are ignored (SPEC 3.9).

        An RSYN that names one asks several instances for the one that has the flow (`rendezvous`).

        Broadcast ones are ignored as well: each host would answer, and an RST kills a prototype's socket.
        Unconnected datagrams belong to no flow.
        """
        control = sal.control
        if sal.services and self._unconnected.receive(ip, sal, interface_index):
            return
        if self._unconnected.refused(ip, sal, now):
            return
        if sal.services and not broadcast and (control is None or not control.flags & (RST | RSYN | SYN)):
            packet = answer_with_reset(ip, sal)
            self._core.effects.append(SendPacket(packet, ip.source, interface_index))
            self._core.counters["resets_answered"] += 1
        raise TheirMistake("unknown_flow")


def _is_syn(packet: bytes) -> bool:
    """Whether a packet looks like a SYN: a glance that costs next to nothing during a flood."""
    control = (packet[0] & 15) * 4 + 12 if packet else 0
    return len(packet) > control + 2 and packet[control] >> 4 == 1 and packet[control + 2] & 0xFC == SYN
