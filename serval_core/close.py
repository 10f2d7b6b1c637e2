"""How does a connection end? Control packets of open flows, FIN, RST and TIMEWAIT (SPEC 3.4, 3.8, 3.9, 4.5).

Two layers cooperate: each direction ends with a TCP FIN, and when the peer's TCP has acknowledged that, the
SAL FIN follows. The data plane says when (`fin_acknowledged`). A flow stays in FINWAIT2 as long as its
application is interested, which makes half-close work; the 60 s timer runs only after `release`. Likewise
the transport is not taken down before `release`, since its socket may hold bytes that were not read yet.
"""

from __future__ import annotations

from errno import ECONNRESET, EPIPE, ETIMEDOUT

from serval_core import transport_part
from serval_core.connected_datagrams import ConnectedDatagrams
from serval_core.core import Core, covered, covered_by
from serval_core.effects import (
    CloseTransport,
    EndOfStream,
    ForgetExpected,
    InjectSegment,
    OpenDatagrams,
    OpenTransport,
    ResetTransport,
    SendPacket,
)
from serval_core.errors import TheirMistake
from serval_core.flow import Flow, TimeWait
from serval_core.handshake import transport_parameters
from serval_core.migration import Migration
from serval_core.names import after, before
from serval_core.nat_rebinding import NatRebinding
from serval_core.reset import resets_flow
from serval_core.retransmission import backed_off_s
from serval_core.sent_resets import SentResets
from serval_core.states import Action, Event, State
from serval_core.wire import encapsulation, tcp_segment
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import (
    ACK,
    FIN,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    RST,
    RSYN,
    SYN,
    Control,
    SalPacket,
    emit,
    parse,
)

_SERIAL_MASK = 0xFFFFFFFF


class Close:
    """Processes what happens to flows after their handshake, and ends them."""

    __slots__ = ("_core", "_datagrams", "_migration", "_nat", "_sent_resets")

    def __init__(
        self, core: Core, sent_resets: SentResets, datagrams: ConnectedDatagrams, migration: Migration
    ) -> None:
        self._core = core
        self._migration = migration
        self._nat = NatRebinding(core, migration)
        self._datagrams = datagrams
        self._sent_resets = sent_resets
        core.register(
            {
                Action.OPEN_TRANSPORT: self._open_transport,
                Action.SEND_FIN: self._send_fin,
                Action.REPEAT_FIN: self._transmit_fin,
                Action.SEND_ACK: self._send_ack,
                Action.SEND_RESET: self._send_reset,
                Action.END_STREAM: self._end_stream,
                Action.STOP_RETRANSMISSION: core.stop_retransmission,
                Action.LIMIT_RELEASED: self._limit_released,
                Action.RESET_TRANSPORT: self._reset_transport,
                Action.CLOSE_TRANSPORT: self._close_transport,
                Action.FINISH_WHEN_RELEASED: self._finish_when_released,
                Action.FORGET: core.forget,
                Action.END_FLOW: core.end_flow,
            }
        )

    # What the application and the data plane say.

    def peer_seen(self, flow: Flow, address: int, port: int, now: float) -> None:
        """Encapsulated data of the peer came from this address and UDP port."""
        self._nat.seen(flow, address, port, now)

    def fin_acknowledged(self, flow: Flow, now: float) -> None:
        """The peer's TCP has acknowledged our TCP FIN."""
        self._core.step(flow, Event.TCP_FIN_ACKNOWLEDGED, now)

    def release(self, flow: Flow, now: float) -> None:
        """The application is finished with both directions."""
        if not flow.released:
            flow.released = True
            self._core.leave_backlog(flow)
            if flow.protocol == PROTOCOL_UDP and flow.state in (State.CONNECTED, State.CLOSEWAIT):
                self._core.step(flow, Event.TCP_FIN_ACKNOWLEDGED, now)  # nothing else is to come before the FIN
            self._core.step(flow, Event.RELEASE, now)

    def unattend(self, flow: Flow, now: float) -> None:
        """The transport's socket belongs to somebody else, who will close it and say nothing."""
        flow.unattended = True
        self._core.leave_backlog(flow)
        if flow.state in (State.TIMEWAIT, State.CLOSED):
            self._core.step(flow, Event.RELEASE, now)

    def abort(self, flow: Flow, errno: int, now: float) -> None:
        """The application or its socket wants the connection gone; the peer gets an RST."""
        flow.released = True
        if flow.state not in (State.TIMEWAIT, State.CLOSED):
            flow.errno = errno
        self._core.step(flow, Event.ABORT, now)

    # What the peer says.

    def receive(
        self, flow: Flow, ip: IPv4Packet, sal: SalPacket, interface_index: int, now: float
    ) -> None:
        """Process a packet for a flow whose handshake is over. Raises TheirMistake."""
        control = sal.control
        if control is None and flow.protocol == PROTOCOL_UDP:
            self._datagrams.receive(flow, ip, sal, now)
            return
        if control is None:
            # Data that was on its way up while the transport was being opened, or that came in fragments.
            if sal.src_flow_id != flow.peer_flow_id:
                raise TheirMistake("wrong_peer_flow")
            if sal.protocol != PROTOCOL_TCP:
                raise TheirMistake("wrong_protocol")
            if len(sal.transport) < tcp_segment.HEADER_BYTES:
                raise TheirMistake(tcp_segment.TRUNCATED)
            segment = transport_part.to_inject(ip, sal)
            self._core.effects.append(InjectSegment(flow.flow_id, segment, ip.source, ip.destination))
            return
        flags = control.flags
        if flags != SYN | ACK:  # of a server that does not have our key yet
            self._core.check_proof(flow, ip, sal)
            flow.key_pair = None  # who can prove anything has our key
        if flags & RST:
            self._reset_received(flow, ip.source, control, now)
            return
        if control.nonce != flow.peer_nonce:
            raise TheirMistake("wrong_nonce")
        if flow.state is State.CONNECTED:
            if flags == SYN | ACK and flow.listener is None:
                self._repeated_syn_ack(flow, control, now)
                return
            # The peer's answer shows that it has our handshake ACK.
            self._core.stop_retransmission(flow, now)
        if flags & RSYN:
            self._migration_received(flow, ip, control, interface_index, now)
            return
        if ip.outer_ports is not None:
            self._nat.seen(flow, ip.source, ip.outer_ports.peer, now)
        ahead = control.verno - flow.receive_next & _SERIAL_MASK
        if flags != ACK and ahead > self._core.settings.version_gap_limit:
            if before(control.verno, flow.receive_next):
                self._send_ack(flow, now)
                raise TheirMistake("repeated_control")
            raise TheirMistake("version_gap")
        if flags & SYN or not flags & (ACK | FIN):
            raise TheirMistake("meaningless_control")
        brings_news = after(control.ackno, flow.send_unacknowledged)
        if not self._acknowledge(flow, control.ackno, now) and not flags & FIN:
            raise TheirMistake("wrong_ackno")
        if flags & FIN:
            self._fin_received(flow, control, now)
        elif not brings_news:
            self._migration.peer.acknowledged(flow, ip.source, control, now)

    def _migration_received(
        self, flow: Flow, ip: IPv4Packet, control: Control, interface_index: int, now: float
    ) -> None:
        """RSYN or RSYN-ACK, perhaps with a FIN, which is processed after it (SPEC 5.3). Raises TheirMistake."""
        flags = control.flags
        if flags & SYN:
            raise TheirMistake("meaningless_control")
        limit = self._core.settings.version_gap_limit
        fin_is_new = flags & FIN and control.verno - flow.receive_next & _SERIAL_MASK <= limit
        self._acknowledge(flow, control.ackno, now)
        if flow.flow_id not in self._core.flows.by_id:
            return  # that was the end of it
        if flags & ACK:
            self._migration.own.rsyn_ack_received(flow, ip, control, now)
        else:
            self._migration.peer.rsyn_received(flow, ip, control, interface_index, now)
        if fin_is_new:
            self._fin_received(flow, control, now)

    def _fin_received(self, flow: Flow, control: Control, now: float) -> None:
        flow.receive_next = control.verno + 1 & _SERIAL_MASK
        self._core.step(flow, Event.FIN_RECEIVED, now)

    def time_wait_received(self, record: TimeWait, ip: IPv4Packet, sal: SalPacket) -> None:
        """Process a packet for a flow in TIMEWAIT: only a repeated FIN is answered. Raises TheirMistake."""
        control = sal.control
        if control is None or not control.flags & FIN:
            raise TheirMistake("time_wait")
        if control.nonce != record.peer_nonce:
            raise TheirMistake("wrong_nonce")
        if record.proofs is not None:
            record.proofs.check(*covered_by(ip, sal), sal)
        # To where the peer is now: it may have moved since.
        packet, interface_index = record.acknowledgement, record.interface_index
        if ip.source != record.destination or ip.outer_ports is not None:
            said = parse(encapsulation.payload_of(packet))
            if record.proofs is not None:
                ends = covered(ip.outer_ports, ip.destination, ip.source)
                said = said._replace(proof=record.proofs.make(*ends, said))
            packet, interface_index = encapsulation.answer(ip, emit(said)), 0
        self._core.effects.append(SendPacket(packet, ip.source, interface_index))
        raise TheirMistake("repeated_control")

    def _repeated_syn_ack(self, flow: Flow, control: Control, now: float) -> None:
        """Our handshake ACK was lost: answer with all of it, SERVICE included (SPEC 3.6)."""
        if control.verno + 1 & _SERIAL_MASK != flow.receive_next or control.ackno != flow.send_next:
            raise TheirMistake("wrong_verno")
        self._core.step(flow, Event.SYN_ACK_RECEIVED, now)

    def _acknowledge(self, flow: Flow, ackno: int, now: float) -> bool:
        """Take an acknowledgement; whether it is acceptable.

        A FIN's counts even without ACK flag: `ackno` is always filled in, and the ACK of our own FIN may have
        been lost, never to be repeated. If it is outdated the FIN stands all the same: a prototype repeats
        the FIN's first bytes for ever.
        """
        if before(ackno, flow.send_unacknowledged) or after(ackno, flow.send_next):
            return False
        flow.send_unacknowledged = ackno
        if flow.fin_verno is not None and after(ackno, flow.fin_verno):
            if flow.retransmissions == 0:
                self._core.round_trips.sample(flow.peer_address, now - flow.first_sent_at)
            flow.fin_verno = None
            self._core.step(flow, Event.FIN_ACKNOWLEDGED, now)
        return True

    def _reset_received(self, flow: Flow, source: int, control: Control, now: float) -> None:
        if (
            flow.moves is not None
            and flow.moves.seeking
            and control.nonce != flow.peer_nonce
            and source != flow.peer_address
        ):
            raise TheirMistake("reset_by_other_instance")  # it was asked whether it has the flow, and has not
        if not resets_flow(flow, control, self._core.settings.version_gap_limit):
            raise TheirMistake("spoofed_reset")
        if flow.state not in (State.TIMEWAIT, State.CLOSED):
            flow.errno = EPIPE if flow.state is State.CLOSEWAIT else ECONNRESET
        self._core.step(flow, Event.RESET_RECEIVED, now)

    # Actions.

    def _open_transport(self, flow: Flow, now: float) -> None:
        core = self._core
        core.stop_timers(flow, now)
        self._nat.keep(flow, now)
        if flow.protocol == PROTOCOL_UDP:
            core.effects.append(
                OpenDatagrams(flow.flow_id, flow.local_address, flow.peer_address, flow.interface_index)
            )
            return
        core.effects.append(
            OpenTransport(
                flow.flow_id,
                flow.peer_flow_id,
                flow.local_address,
                flow.peer_address,
                flow.interface_index,
                transport_parameters(flow, core.settings, now),
                flow.options.capabilities is not None,
                core.framings.native_path(
                    flow.native_port, flow.options.native_port, flow.peer_address, now
                )
                if flow.outer_ports is None  # whatever stops protocol 144 or translates addresses
                else None,
                flow.outer_ports,
            )
        )

    def _send_fin(self, flow: Flow, now: float) -> None:
        core = self._core
        core.stop_timers(flow, now)
        flow.fin_verno = flow.send_next
        flow.send_next = flow.send_next + 1 & _SERIAL_MASK
        flow.first_sent_at = now
        flow.timeout_s = core.round_trips.timeout_s(
            flow.peer_address, core.settings.control_initial_timeout_s
        )
        self._transmit_fin(flow, now)

    def _transmit_fin(self, flow: Flow, now: float) -> None:
        core = self._core
        assert flow.fin_verno is not None
        if self._migration.own.takes_fin(flow, now):
            return
        # Not always `fin_verno`: RSYNs may have carried it since.
        core.send_control(flow, FIN, flow.send_next - 1 & _SERIAL_MASK)
        wait_s = backed_off_s(flow.timeout_s, flow.retransmissions, core.settings.control_timeout_max_s)
        core.restart_retransmission(flow, now + wait_s, self._fin_unanswered)

    def _fin_unanswered(self, flow: Flow, now: float) -> None:
        settings = self._core.settings
        limit = settings.released_retransmissions if flow.released else settings.control_retransmissions
        if flow.retransmissions < limit:
            flow.retransmissions += 1
            self._core.step(flow, Event.RETRANSMIT, now)
        else:
            flow.errno = ETIMEDOUT
            self._core.step(flow, Event.GAVE_UP, now)

    def _send_ack(self, flow: Flow, now: float) -> None:
        core = self._core
        if self._migration.peer.answers_instead(flow, now):
            flow.last_acknowledgement = core.control_packet(flow, ACK, flow.send_next)
        else:
            flow.last_acknowledgement = core.send_control(flow, ACK, flow.send_next)

    def _send_reset(self, flow: Flow, now: float) -> None:
        packet = self._core.send_control(flow, RST | ACK, flow.send_next)
        self._sent_resets.remember(flow, packet, now)

    def _end_stream(self, flow: Flow, now: float) -> None:
        self._core.effects.append(EndOfStream(flow.flow_id))

    def _limit_released(self, flow: Flow, now: float) -> None:
        if flow.released:
            settings = self._core.settings
            limit_s = settings.fin_wait2_s if flow.state is State.FINWAIT2 else settings.release_timeout_s
            self._core.restart_lifetime(flow, now + limit_s, self._released_too_long)

    def _released_too_long(self, flow: Flow, now: float) -> None:
        if flow.state is not State.FINWAIT2:
            flow.errno = ETIMEDOUT
        self._core.step(flow, Event.GAVE_UP, now)

    def _reset_transport(self, flow: Flow, now: float) -> None:
        if flow.protocol == PROTOCOL_UDP:
            self._core.effects.append(ForgetExpected(flow.flow_id))
        else:
            self._core.effects.append(ResetTransport(flow.flow_id, flow.errno))

    def _close_transport(self, flow: Flow, now: float) -> None:
        if flow.protocol == PROTOCOL_UDP:
            self._core.effects.append(ForgetExpected(flow.flow_id))
        else:
            self._core.effects.append(CloseTransport(flow.flow_id))

    def _finish_when_released(self, flow: Flow, now: float) -> None:
        if not flow.released and not flow.unattended:
            return
        self._close_transport(flow, now)
        self._core.end_flow(flow, now)
        if flow.state is State.TIMEWAIT:
            # The last ACK that was sent acknowledged the peer's FIN, and nothing changes any more.
            record = TimeWait(
                flow.peer_nonce,
                flow.last_acknowledgement,
                flow.peer_address,
                flow.interface_index,
                flow.proofs,
            )
            self._core.flows.keep_in_time_wait(flow.flow_id, record, now)
