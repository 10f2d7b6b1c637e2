"""What does the prototype do with a flow that moves, or whose peer moves? As in SPEC 5.3, faults included.

One control packet is outstanding at a time, and a new one takes over the flags of the one that it replaces. That is
behind most of the faults: an RSYN-ACK replaces an RSYN of one's own, and a bare ACK ends the waiting for an RSYN-ACK.
"""

from __future__ import annotations

from typing import Literal

from scapy.packet import Packet

from serval_core.wire.scapy_layers import IP, SAL, SALControl

from .prototype_flow import ACK, FIN, RST, RSYN, SYN, TRANSPORT_STATES, Flow, Identity
from .prototype_receiver import NEVER, SEQUENCE_NUMBERS, signed_difference

MigrationState = Literal["INITIAL", "SENT", "RECV", "SENT_RECV"]

_AFTER_REQUEST: dict[MigrationState, MigrationState] = {
    "INITIAL": "SENT",
    "SENT": "SENT",
    "RECV": "SENT_RECV",
    "SENT_RECV": "SENT_RECV",
}
_AFTER_RSYN: dict[MigrationState, MigrationState] = {
    "INITIAL": "RECV",
    "SENT": "SENT_RECV",
    "RECV": "RECV",
    "SENT_RECV": "SENT_RECV",
}


class MovingFlow(Flow):
    """A flow that can migrate, by itself (`Behaviour.migrations`) or when asked to."""

    migration: MigrationState = "INITIAL"
    _candidate = ""
    _new_address = ""
    _source = ""

    @property
    def identity(self) -> Identity:
        """The flow's own numbers."""
        return self._identity

    def migrate(self, address: str, now: float) -> None:
        """What the `serv migrate` command does: RSYN from another address of this host."""
        flags = RSYN
        if self.state in ("FINWAIT1", "CLOSING", "LASTACK") and self._outstanding is not None:
            flags |= FIN
        self._new_address = address
        self.migration = _AFTER_REQUEST[self.migration]
        verno, self._send_next = self._send_next, _next(self._send_next)
        self._counters["rsyns_sent"] += 1
        self._send_reliably(self._control(flags, verno), verno, now)

    def packet_received(self, packet: Packet, now: float) -> None:
        """Process a packet whose destination flow ID is ours."""
        self._source = packet[IP].src
        super().packet_received(packet, now)

    def _control_received(self, control: Packet, now: float) -> bool:
        flags = int(control.flags)
        is_stale = signed_difference(control.verno, self._receive_next) < 0 and flags != RSYN | ACK
        if flags & RSYN and not flags & RST and not is_stale and self.state in TRANSPORT_STATES:
            if not flags & ACK:
                self._rsyn_received(control, now)
                if flags & FIN:
                    self._fin_received(control, False, now)
                return True
            self._rsyn_ack_received(control)
        return super()._control_received(control, now)

    def _rsyn_received(self, control: Packet, now: float) -> None:
        if control.nonce != self._peer_nonce:
            self._counters["wrong_nonces"] += 1
            return
        self.migration = _AFTER_RSYN[self.migration]
        self._candidate = self._source
        self._receive_next = _next(control.verno)
        self._counters["rsyns_received"] += 1
        self._send_reliably(self._control(RSYN | ACK, self._send_next), self._send_next, now)

    def _rsyn_ack_received(self, control: Packet) -> None:
        if self.migration == "SENT":
            if control.ackno != _next(self._send_unacknowledged):
                self._counters["refused_rsyn_acks"] += 1
                return
            self.migration = "INITIAL"
            self._local_address, self._new_address = self._new_address, ""
            self._counters["migrations"] += 1
        elif self.migration == "SENT_RECV":
            # Its own new address is forgotten on this way.
            self.migration = "RECV"
            self._candidate = self._source
            self._new_address = ""
            self._counters["migrations_forgotten"] += 1
            self._forget_outstanding()
        self._send(self._control(ACK, self._send_next))

    def _acknowledgement_received(self, control: Packet, now: float) -> bool:
        if self.migration not in ("RECV", "SENT_RECV"):
            return super()._acknowledgement_received(control, now)
        if signed_difference(control.ackno, self._send_unacknowledged) < 0:
            return False
        self._send_unacknowledged = control.ackno
        if not int(control.flags) & RSYN:
            self._forget_outstanding()
            self.migration = "INITIAL" if self.migration == "RECV" else "SENT"
            self._peer_address = self._candidate
            self._counters["peer_migrations"] += 1
        return True

    def _forget_outstanding(self) -> None:
        self._outstanding = None
        self._retransmit_at = NEVER

    def _send_reliably(self, packet: Packet, verno: int, now: float) -> None:
        flags = wanted = int(packet[SAL].extension(SALControl).flags)
        if not flags & SYN:
            if self._outstanding is not None:
                wanted |= int(self._outstanding[SAL].extension(SALControl).flags)
            if flags & FIN and not flags & RSYN:
                wanted |= {"SENT": RSYN, "RECV": RSYN | ACK}.get(self.migration, 0)
            self._send_unacknowledged = verno
        super()._send_reliably(packet if wanted == flags else self._control(wanted, verno), verno, now)

    def _send(self, layers: Packet) -> None:
        control = layers[SAL].extension(SALControl)
        if control is None or not int(control.flags) & RSYN:
            super()._send(layers)
            return
        source = self._new_address or self._local_address
        destination = self._candidate if self.migration == "RECV" else self._peer_address
        self._wire.send(source, destination, layers)

    def _after_transport(self, now: float) -> None:
        super()._after_transport(now)
        started = self._counters["rsyns_sent"]
        if self.tcp is not None and started < len(self._behaviour.migrations) and self.migration == "INITIAL":
            after_bytes, address = self._behaviour.migrations[started]
            if self._received_bytes + self.tcp.acknowledged_bytes >= after_bytes:
                self.migrate(address, now)


def _next(number: int) -> int:
    return (number + 1) % SEQUENCE_NUMBERS
