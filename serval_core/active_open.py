"""How does this host open a connection? The client's half of the handshake (SPEC 3.5).

A SYN is resolved anew every time it is repeated, so that a silent instance or a changed table costs one
timeout. All copies carry the same flowID, nonce, version number and TCP sequence number: whichever is
answered first wins, and the other instances' answers do not match the flow any more.
"""

from __future__ import annotations

from errno import EADDRNOTAVAIL, ECONNREFUSED, EHOSTUNREACH, ETIMEDOUT

from serval_core import handshake
from serval_core.addresses import is_unicast
from serval_core.core import Core
from serval_core.effects import Connected, ConnectFailed, SendPacket
from serval_core.errors import TheirMistake
from serval_core.flow import Flow
from serval_core.names import FlowID, ServiceID, format_address
from serval_core.reset import resets_request
from serval_core.retransmission import backed_off_s
from serval_core.rules import RuleType
from serval_core.states import Action, Event
from serval_core.ways import ways_of, ways_to
from serval_core.wire import ipv4, tcp_segment
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import ACK, PROTOCOL_SAL, PROTOCOL_TCP, RST, SYN, SalPacket, emit_control

# When the handshake ACK is repeated to a prototype: it never repeats its SYN-ACK, so a lost ACK would leave
# the connection hanging for ever (SPEC 11.1, quirk 10). Its request expires after 3 s.
_ACK_REPEAT_GAPS_S = (0.25, 0.5, 1.0)


class ActiveOpen:
    """Opens connections on behalf of the application."""

    __slots__ = ("_core", "_syn_bytes")

    def __init__(self, core: Core) -> None:
        self._core = core
        self._syn_bytes = 0
        core.register(
            {
                Action.SEND_SYN: self._send_syn,
                Action.SEND_HANDSHAKE_ACK: self._send_handshake_ack,
                Action.REPORT_CONNECTED: self._report_connected,
                Action.REPORT_FAILURE: self._report_failure,
            }
        )

    def connect(self, service_id: ServiceID, advisory_address: int, now: float) -> FlowID:
        """Begin to open a connection to `service_id`, at `advisory_address` unless that is 0."""
        core = self._core
        flow_id = core.flows.new_flow_id(core.random.getrandbits)
        flow = Flow(flow_id, service_id, core.random.getrandbits(192), now)
        flow.advisory_address = advisory_address
        if not self._find_ways(flow) and flow.errno:
            core.effects.append(ConnectFailed(flow_id, flow.errno, flow.failure))
            return flow_id
        core.flows.add(flow)
        core.restart_lifetime(flow, now + core.settings.connect_timeout_s, self._give_up)
        core.step(flow, Event.CONNECT, now)
        return flow_id

    def paths_changed(self, flow: Flow, now: float) -> None:
        """A flow in REQUEST that found no way to any instance tries again at once."""
        if not flow.ways:
            self._repeat_syn(flow, now)

    def receive(
        self, flow: Flow, ip: IPv4Packet, sal: SalPacket, interface_index: int, broadcast: bool, now: float
    ) -> None:
        """Process a packet for a flow in REQUEST. Raises TheirMistake."""
        control = sal.control
        if control is None:
            raise TheirMistake("data_before_handshake")
        if control.flags & RST:
            if not resets_request(flow, control):
                raise TheirMistake("spoofed_reset")
            flow.errno, flow.failure = ECONNREFUSED, f"refused by {format_address(ip.source)}"
            self._core.step(flow, Event.RESET_RECEIVED, now)
            return
        if control.flags != SYN | ACK:
            raise TheirMistake("not_a_syn_ack")
        if control.ackno != flow.send_next:
            raise TheirMistake("wrong_ackno")
        if sal.src_flow_id == 0:
            raise TheirMistake("flow_id_zero")
        peer_address = sal.source_addresses[-1] if sal.source_addresses else ip.source
        if broadcast or not is_unicast(peer_address):
            raise TheirMistake("not_unicast")
        segment = tcp_segment.parse(sal.transport, ip.source, ip.destination)
        # The SYN goes on being repeated after a refused SYN-ACK, where the prototype gets stuck (quirk 14).
        if not handshake.syn_ack_is_acceptable(flow, segment):
            raise TheirMistake("handshake_segment")
        paths = self._core.paths
        path = paths.path_to(peer_address, interface_index) or paths.path_to(peer_address)
        if path is None:
            raise TheirMistake("no_path_back")

        if flow.retransmissions == 0:
            self._core.round_trips.sample(peer_address, now - flow.first_sent_at)
        flow.peer_flow_id = FlowID(sal.src_flow_id)
        flow.peer_nonce = control.nonce
        flow.receive_next = control.verno + 1 & 0xFFFFFFFF
        flow.send_unacknowledged = flow.send_next
        flow.local_address = ip.destination
        flow.peer_address = peer_address
        flow.interface_index = path.interface_index
        flow.mtu_bytes = path.mtu_bytes
        flow.peer_initial_sequence = segment.sequence
        flow.peer_window_bytes = segment.window
        flow.options = segment.options
        flow.errno, flow.failure = 0, ""
        flow.ways = ()
        flow.silent_addresses = set()
        self._core.step(flow, Event.SYN_ACK_RECEIVED, now)

    def _find_ways(self, flow: Flow) -> bool:
        """Choose where the next SYN goes; whether there is a way.

        Sets the errno if there is none for another reason than a missing path.
        """
        flow.ways = ()
        if flow.advisory_address:
            flow.ways = ways_to(self._core.paths, flow.advisory_address)
            return bool(flow.ways)
        unreachable: set[int] = set()
        while True:
            exclude = flow.silent_addresses | unreachable
            rule_type, targets = self._core.table.resolve(
                flow.service_id, self._core.random.random, exclude, self._syn_bytes
            )
            if not targets:
                if flow.silent_addresses:
                    # Every instance has been asked once: begin again.
                    flow.silent_addresses = set()
                    continue
                if rule_type is None:
                    flow.errno, flow.failure = EADDRNOTAVAIL, "no rule covers the service"
                elif rule_type is RuleType.DROP:
                    flow.errno, flow.failure = EHOSTUNREACH, "a DROP rule refuses the service"
                return False
            flow.ways = ways_of(self._core.paths, targets)
            addresses = {target.address for target in targets}
            if flow.ways or addresses <= unreachable | {0}:
                return bool(flow.ways)
            unreachable |= addresses

    def _send_syn(self, flow: Flow, now: float) -> None:
        core = self._core
        settings = core.settings
        timeout_s = settings.syn_initial_timeout_s
        if flow.ways:
            if flow.errno != ETIMEDOUT:  # the first SYN that has somewhere to go
                flow.first_sent_at = now
                flow.retransmissions = 0
            last = flow.ways[-1].destination
            flow.errno = ETIMEDOUT
            flow.failure = f"no answer to the SYNs, the last of them to {format_address(last)}"
            flow.offered_mss_bytes = handshake.mss_to_offer(
                min(way.path.mtu_bytes for way in flow.ways), settings.mss_cap
            )
            segment = handshake.syn_segment(flow, settings, flow.first_sent_at)
            for destination, path in flow.ways:
                source = path.source_address
                payload = emit_control(
                    flow.flow_id,
                    0,
                    PROTOCOL_TCP,
                    SYN,
                    flow.initial_verno,
                    0,
                    flow.local_nonce,
                    flow.service_id,
                    (),
                    tcp_segment.emit(segment, source, destination),
                )
                packet = ipv4.emit(source, destination, PROTOCOL_SAL, payload)
                core.effects.append(SendPacket(packet, destination, path.interface_index))
                self._syn_bytes = len(packet)
            if len(flow.ways) == 1:
                timeout_s = core.round_trips.timeout_s(last, timeout_s)
        elif flow.errno != ETIMEDOUT:
            flow.errno, flow.failure = EHOSTUNREACH, "no path to any instance"
        timeout_s = backed_off_s(timeout_s, flow.retransmissions, settings.syn_timeout_max_s)
        core.restart_retransmission(flow, now + timeout_s, self._repeat_syn)

    def _repeat_syn(self, flow: Flow, now: float) -> None:
        flow.retransmissions += 1
        flow.silent_addresses |= {way.destination for way in flow.ways}
        errno, failure = flow.errno, flow.failure
        self._find_ways(flow)
        # Rules come and go while interfaces do: without a way now, a connection in progress waits for one,
        # and if it fails in the end, then for the reason it had before.
        flow.errno, flow.failure = errno, failure
        self._core.step(flow, Event.RETRANSMIT, now)

    def _give_up(self, flow: Flow, now: float) -> None:
        self._core.step(flow, Event.GAVE_UP, now)

    def _report_failure(self, flow: Flow, now: float) -> None:
        self._core.forget(flow, now)
        self._core.effects.append(ConnectFailed(flow.flow_id, flow.errno, flow.failure))

    def _send_handshake_ack(self, flow: Flow, now: float) -> None:
        core = self._core
        segment = handshake.ack_segment(flow, core.settings, now)
        core.send_control(
            flow,
            ACK,
            flow.send_next,
            flow.service_id,
            transport=tcp_segment.emit(segment, flow.local_address, flow.peer_address),
        )
        # Ours repeats its SYN-ACK; and whoever has our ACK is left alone once that shows (close.receive).
        if flow.options.capabilities is None and flow.retransmissions < len(_ACK_REPEAT_GAPS_S):
            gap_s = _ACK_REPEAT_GAPS_S[flow.retransmissions]
            core.restart_retransmission(flow, now + gap_s, self._repeat_handshake_ack)

    def _repeat_handshake_ack(self, flow: Flow, now: float) -> None:
        flow.retransmissions += 1
        self._core.step(flow, Event.RETRANSMIT, now)

    def _report_connected(self, flow: Flow, now: float) -> None:
        self._core.effects.append(Connected(flow.flow_id))
