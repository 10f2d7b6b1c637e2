"""How does this host open a connection? The client's half of the handshake (SPEC 3.5).

A SYN is resolved anew every time it is repeated, and at once when an instance refuses or cannot be reached
(`failover`). All copies carry the same flowID, nonce, version number and TCP sequence number: whichever is
answered first wins, and the other instances' answers do not match the flow any more.
"""

from __future__ import annotations

from errno import ECONNREFUSED, EHOSTUNREACH, ETIMEDOUT

from serval_core import handshake, transport_part
from serval_core.addresses import is_unicast
from serval_core.control_authentication import AUTHENTICATES, Proofs
from serval_core.core import Core
from serval_core.effects import Connected, ConnectFailed, SendPacket
from serval_core.errors import TheirMistake
from serval_core.failover import HOPELESS, Choice, Failover
from serval_core.flow import Flow, Search
from serval_core.framing import Framing
from serval_core.names import FlowID, ServiceID, format_address
from serval_core.reset import resets_request
from serval_core.retransmission import backed_off_s
from serval_core.sal_settings import Authenticate
from serval_core.states import Action, Event
from serval_core.wire import encapsulation
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import ACK, PROTOCOL_TCP, RST, SYN, SalPacket, emit_control
from serval_core.wire.tcp_segment import TcpSegment

# When the handshake ACK is repeated to a prototype: it never repeats its SYN-ACK, so a lost ACK would leave
# the connection hanging for ever (SPEC 11.1, quirk 10). Its request expires after 3 s.
_ACK_REPEAT_GAPS_S = (0.25, 0.5, 1.0)
# When a service router is asked again after an instance that it had chosen before has refused again.
_REFUSED_PAUSE_S = 0.025
_REFUSED_PAUSE_MAX_S = 0.5
_REFUSERS_LIMIT = 64


class ActiveOpen:
    """Opens connections on behalf of the application."""

    __slots__ = ("_core", "_failover")

    def __init__(self, core: Core) -> None:
        self._core = core
        self._failover = Failover(core, self._resume, self._end_delay)
        core.register(
            {
                Action.SEND_SYN: self._send_syn,
                Action.SEND_HANDSHAKE_ACK: self._send_handshake_ack,
                Action.REPORT_CONNECTED: self._report_connected,
                Action.REPORT_FAILURE: self._report_failure,
            }
        )

    def connect(self, service_id: ServiceID, advisory_address: int, protocol: int, now: float) -> FlowID:
        """Begin to open a TCP or UDP connection to `service_id`, at `advisory_address` unless that is 0."""
        core = self._core
        flow_id = core.flows.new_flow_id(core.random.getrandbits)
        flow = Flow(flow_id, service_id, core.random.getrandbits(192), now)
        flow.protocol = protocol
        flow.advisory_address = advisory_address
        flow.search = Search()
        choice = self._failover.choose(flow, flow.search, now)
        if choice in HOPELESS:
            core.effects.append(ConnectFailed(flow_id, *HOPELESS[choice]))
            return flow_id
        flow.framing = core.framings.of_service(service_id)
        core.offer_native(flow)
        core.flows.add(flow)
        core.restart_lifetime(flow, now + core.settings.connect_timeout_s, self._give_up)
        core.step(flow, Event.CONNECT, now)
        return flow_id

    def paths_changed(self, flow: Flow, now: float) -> None:
        """A flow in REQUEST that found no way to any instance tries again at once."""
        if not flow.ways and _search(flow).parked is None:
            self._repeat_syn(flow, now)

    def unreachable(self, flow: Flow, address: int, why: str, now: float) -> None:
        """A SYN of a flow in REQUEST could not be brought to `address`: the next instance is asked."""
        search = _search(flow)
        if search.broadcast or not flow.ways or address in search.asked:
            return  # it went to others as well, or the next one is already being asked
        flow.errno, flow.failure = EHOSTUNREACH, f"{format_address(address)} cannot be reached: {why}"
        if any(way.destination == address for way in flow.ways):
            self._failover.unreachable(flow, search, address, now)
            self._ask_next(flow, search, now)
        else:
            self._failed_behind_router(flow, search, address, now)

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
            self._refused(flow, ip.source, now)
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
        # The SYN goes on being repeated after a refused SYN-ACK, where the prototype gets stuck (quirk 14).
        segment = transport_part.read_syn_ack(flow, ip, sal)
        paths = self._core.paths
        path = paths.path_to(peer_address, interface_index) or paths.path_to(peer_address)
        if path is None:
            raise TheirMistake("no_path_back")
        self._agree_on_proofs(flow, ip, sal, segment, now)

        asked = sal.source_addresses[1] if sal.source_addresses else ip.source
        self._answered(flow, asked, peer_address, path.interface_index, now)
        flow.peer_flow_id = FlowID(sal.src_flow_id)
        flow.peer_nonce = control.nonce
        flow.receive_next = control.verno + 1 & 0xFFFFFFFF
        flow.send_unacknowledged = flow.send_next
        core = self._core
        if flow.framing is Framing.AUTO:
            core.framings.answered(asked, ip.outer_ports is not None, now)
        flow.outer_ports = ip.outer_ports
        flow.local_address = ip.destination
        flow.peer_address = peer_address
        flow.interface_index = path.interface_index
        flow.mtu_bytes = path.mtu_bytes
        flow.peer_initial_sequence = segment.sequence
        flow.peer_window_bytes = segment.window
        flow.options = segment.options
        flow.errno, flow.failure = 0, ""
        flow.ways = ()
        flow.search = None
        self._core.step(flow, Event.SYN_ACK_RECEIVED, now)

    def _agree_on_proofs(
        self, flow: Flow, ip: IPv4Packet, sal: SalPacket, segment: TcpSegment, now: float
    ) -> None:
        """What a SYN-ACK says of the authentication of control packets. Raises TheirMistake."""
        core = self._core
        wanted = core.settings.authenticate
        if wanted is Authenticate.OFF or sal.protocol != PROTOCOL_TCP:
            return
        if sal.key and (segment.options.capabilities or 0) & AUTHENTICATES:
            assert sal.control is not None
            pair = core.key_pairs.current(now)
            client = flow.flow_id, flow.local_nonce, pair.public
            server = sal.src_flow_id, sal.control.nonce, sal.key
            flow.proofs = Proofs.agreed(pair.agree(sal.key), client, server, is_client=True)
            flow.key_pair = pair
        elif wanted is Authenticate.REQUIRE:
            self._refused(flow, ip.source, now)
            raise TheirMistake("authentication_refused")

    def _answered(self, flow: Flow, asked: int, peer_address: int, interface_index: int, now: float) -> None:
        """A SYN that went to `asked` was answered by `peer_address`, another one if a service router was asked."""
        search = _search(flow)
        core = self._core
        core.liveness.answered(flow.service_id, asked)
        # Karn: an answer tells the time only of a SYN that was sent once.
        if search.rounds == 0 and search.refusals == 0 and search.sent_at is not None and asked not in search.asked:
            core.round_trips.sample(peer_address, now - search.sent_at)
            core.path_quality.answered((interface_index, peer_address), now - search.sent_at, now)
            if asked != peer_address:
                core.round_trips.sample(asked, now - search.sent_at)

    def _refused(self, flow: Flow, source: int, now: float) -> None:
        """An RST to the SYN, sent by somebody who knows its nonce. Raises TheirMistake."""
        search = _search(flow)
        if search.broadcast:
            raise TheirMistake("refusal_of_broadcast")  # others may have the service
        why = f"refused by {format_address(source)}"
        if any(way.destination == source for way in flow.ways):
            flow.errno, flow.failure = ECONNREFUSED, why
            self._failover.refused(flow, search, source, now)
            self._ask_next(flow, search, now)
        elif source in search.asked:  # late: the next one is already being asked
            self._failover.refused(flow, search, source, now)
        elif flow.ways:
            flow.errno, flow.failure = ECONNREFUSED, why
            self._failed_behind_router(flow, search, source, now)

    def _failed_behind_router(self, flow: Flow, search: Search, source: int, now: float) -> None:
        """A service router chose an instance that does not have the service or cannot be reached: it is asked
        again, since it may choose another one. That it ran out of them shows when the same ones fail again.
        """
        search.refusals += 1
        if source not in search.refusers and len(search.refusers) < _REFUSERS_LIMIT:
            search.refusers.add(source)
            self._ask_again(flow, now)
            return
        pause_s = backed_off_s(_REFUSED_PAUSE_S, search.refusals - len(search.refusers), _REFUSED_PAUSE_MAX_S)
        self._core.restart_retransmission(flow, now + pause_s, self._ask_again)

    def _send_syn(self, flow: Flow, now: float) -> None:
        core = self._core
        settings = core.settings
        search = _search(flow)
        timeout_s = settings.syn_initial_timeout_s
        repetitions = search.rounds
        if search.parked is not None:
            flow.errno, flow.failure = ETIMEDOUT, "a DELAY rule holds the service, and nobody said where it is"
            core.stop_retransmission(flow, now)
            return
        if flow.ways:
            if search.sent_at is None:  # the first SYN that has somewhere to go
                flow.first_sent_at = now
                flow.retransmissions = 0
            search.sent_at = now
            last = flow.ways[-1].destination
            if not search.refusals:
                flow.errno = ETIMEDOUT
                flow.failure = f"no answer to the SYNs, the last of them to {format_address(last)}"
            flow.offered_mss_bytes = handshake.mss_to_offer(
                min(way.path.mtu_bytes for way in flow.ways), settings.mss_cap
            )
            for destination, path in flow.ways:
                source = path.source_address
                payload = emit_control(
                    flow.flow_id,
                    0,
                    flow.protocol,
                    SYN,
                    flow.initial_verno,
                    0,
                    flow.local_nonce,
                    flow.service_id,
                    (),
                    transport_part.of_syn(flow, settings, source, destination),
                )
                for ports in core.framings.ways_of_syn(flow.framing, destination, search.rounds > 0, now):
                    packet = encapsulation.emit(source, destination, ports, payload)
                    core.effects.append(SendPacket(packet, destination, path.interface_index))
                    self._failover.syn_bytes = len(packet)
            if len(flow.ways) == 1:
                timeout_s = core.round_trips.timeout_s(last, timeout_s)
        else:
            repetitions = flow.retransmissions
            if not flow.errno:
                flow.errno, flow.failure = EHOSTUNREACH, "no path to any instance"
        timeout_s = backed_off_s(timeout_s, repetitions, settings.syn_timeout_max_s)
        core.restart_retransmission(flow, now + timeout_s, self._repeat_syn)

    def _repeat_syn(self, flow: Flow, now: float) -> None:
        """The answer is overdue, or there was no instance to ask."""
        search = _search(flow)
        if flow.ways:
            last = flow.ways[-1].destination
            flow.errno = ETIMEDOUT
            flow.failure = f"no answer to the SYNs, the last of them to {format_address(last)}"
        self._failover.silent(flow, search, now)
        self._ask_again(flow, now)

    def _ask_next(self, flow: Flow, search: Search, now: float) -> None:
        """An instance will not answer: the next one is asked, and if there is none in this round, later on."""
        if self._failover.choose(flow, search, now) is not Choice.ROUND_OVER:
            flow.retransmissions += 1
            self._core.step(flow, Event.RETRANSMIT, now)
        elif self._failover.all_refused(search):
            self._core.step(flow, Event.RESET_RECEIVED, now)
        else:
            settings = self._core.settings
            pause_s = backed_off_s(settings.syn_initial_timeout_s, search.rounds, settings.syn_timeout_max_s)
            self._core.restart_retransmission(flow, now + pause_s, self._ask_again)

    def _ask_again(self, flow: Flow, now: float) -> None:
        """The next SYN. Without a way now a connection in progress waits for one: rules come and go while
        interfaces do, and if it fails in the end, then for the reason it had before.
        """
        search = _search(flow)
        flow.retransmissions += 1
        if self._failover.choose(flow, search, now) is Choice.ROUND_OVER:
            search.next_round()
            self._failover.choose(flow, search, now)
        self._core.step(flow, Event.RETRANSMIT, now)

    def _resume(self, flow: Flow, now: float) -> None:
        """The service was resolved, as far as the releaser knows."""
        search = _search(flow)
        search.parked = None
        choice = self._failover.choose(flow, search, now)
        if choice in HOPELESS:
            flow.errno, flow.failure = HOPELESS[choice]
            self._core.step(flow, Event.GAVE_UP, now)
        else:
            flow.errno, flow.failure = 0, ""
            self._core.step(flow, Event.RETRANSMIT, now)

    def _end_delay(self, flow: Flow, reason: str, now: float) -> None:
        """The service was not resolved."""
        _search(flow).parked = None
        flow.errno, flow.failure = EHOSTUNREACH, f"the resolution of the service failed: {reason}"
        self._core.step(flow, Event.GAVE_UP, now)

    def _give_up(self, flow: Flow, now: float) -> None:
        self._core.step(flow, Event.GAVE_UP, now)

    def _report_failure(self, flow: Flow, now: float) -> None:
        self._core.forget(flow, now)
        self._core.effects.append(ConnectFailed(flow.flow_id, flow.errno, flow.failure))

    def _send_handshake_ack(self, flow: Flow, now: float) -> None:
        core = self._core
        core.send_control(
            flow,
            ACK,
            flow.send_next,
            flow.service_id,
            transport=transport_part.of_handshake_ack(flow, core.settings, now),
            key=b"" if flow.key_pair is None else flow.key_pair.public,
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


def _search(flow: Flow) -> Search:
    """Every flow in REQUEST has one."""
    assert flow.search is not None
    return flow.search
