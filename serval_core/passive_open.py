"""How does this host accept connections? Listeners and the server's half of the handshake (SPEC 3.6).

Beyond the prototype: the SYN-ACK is repeated by timer, and the handshake is completed by whatever proves
that the client has it: its ACK, a bare SAL ACK (what a prototype answers to a repeated SYN-ACK), or data.
"""

from __future__ import annotations

from errno import ECONNABORTED

from serval_core import handshake, transport_part
from serval_core.addresses import is_unicast
from serval_core.connected_datagrams import ConnectedDatagrams
from serval_core.control_authentication import AUTHENTICATES, KeyPair, Proofs
from serval_core.core import Core, covered_by
from serval_core.effects import Accepted, ExpectData, ForgetExpected, InjectSegment, SendPacket
from serval_core.errors import OurMistake, TheirMistake
from serval_core.flow import Flow, Listener, SynKey
from serval_core.names import FlowID, ServicePrefix
from serval_core.paths import Path
from serval_core.reset import answer_with_reset, resets_flow
from serval_core.retransmission import backed_off_s
from serval_core.rules import Rule
from serval_core.sal_settings import Authenticate
from serval_core.states import Action, Event, State
from serval_core.wire import encapsulation, tcp_segment
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import (
    ACK,
    MAX_SOURCE_ADDRESSES,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    RST,
    RSYN,
    SYN,
    SalPacket,
)
from serval_core.wire.tcp_segment import TcpSegment


class PassiveOpen:
    """Accepts connections for the listeners of this stack."""

    __slots__ = ("_core", "_datagrams", "_listeners", "_refusing")

    def __init__(self, core: Core, datagrams: ConnectedDatagrams) -> None:
        self._core = core
        self._datagrams = datagrams
        self._listeners: dict[int, Listener] = {}
        self._refusing: dict[ServicePrefix, Listener] = {}
        core.register(
            {
                Action.EXPECT_DATA: self._expect_data,
                Action.SEND_SYN_ACK: self._send_syn_ack,
                Action.REPORT_ACCEPTED: self._report_accepted,
                Action.TELL_EXPIRED: self._tell_expired,
                Action.FORGET_HALF_OPEN: self._forget_half_open,
            }
        )

    def listen(self, prefix: ServicePrefix, backlog: int, protocol: int) -> int:
        """Accept TCP or UDP connections to the services under `prefix`; returns the listener's number.

        Raises OurMistake if that is being listened on already, or is no service to listen on.
        """
        if backlog < 1:
            raise OurMistake(f"a backlog of {backlog} would refuse every connection: give at least 1")
        if prefix in self._refusing:
            raise OurMistake(f"{prefix} is being listened on already, by a listener that refuses flows just now")
        listener_id = self._core.new_listener_id()
        self._core.table.add(Rule.demux(prefix, listener_id))
        self._listeners[listener_id] = Listener(listener_id, prefix, backlog, protocol)
        return listener_id

    def close_listener(self, listener_id: int, now: float) -> None:
        """Stop listening. Half-open flows are forgotten; those that nobody has taken are reset."""
        listener = self._listeners.pop(listener_id, None)
        if listener is None:
            raise OurMistake(f"there is no listener {listener_id}")
        self._core.table.remove_listener(listener_id)
        self._refusing.pop(listener.prefix, None)
        for flow in list(self._core.flows.by_syn.values()):
            if flow.listener is listener and (flow.state is State.RESPOND or flow.waits_in_backlog):
                flow.released = True
                flow.errno = ECONNABORTED
                self._core.step(flow, Event.ABORT, now)

    def set_refusing(self, listener_id: int, refusing: bool) -> None:
        """Begin no more flows, as if nothing listened, but tell clients of ours to ask another instance; or begin
        flows again. Those that have begun go on. OurMistake if the listener is unknown, or if what stands in the
        table meanwhile keeps it from coming back.
        """
        listener = self._listeners.get(listener_id)
        if listener is None:
            raise OurMistake(f"there is no listener {listener_id}")
        if refusing and listener.prefix not in self._refusing:
            self._core.table.remove_listener(listener_id)
            self._refusing[listener.prefix] = listener
        elif not refusing and listener.prefix in self._refusing:
            self._core.table.add(Rule.demux(listener.prefix, listener_id))
            del self._refusing[listener.prefix]

    def syn_received(
        self, ip: IPv4Packet, sal: SalPacket, interface_index: int, broadcast: bool, now: float
    ) -> None:
        """Process a SYN. Raises TheirMistake."""
        control = sal.control
        assert control is not None
        if not sal.services:
            raise TheirMistake("syn_without_service")
        if sal.src_flow_id == 0:
            raise TheirMistake("flow_id_zero")
        if len(sal.source_addresses) >= MAX_SOURCE_ADDRESSES:
            raise TheirMistake("source_full")
        peer_address = sal.source_addresses[0] if sal.source_addresses else ip.source
        core = self._core
        flow = core.flows.by_syn.get(SynKey(peer_address, sal.src_flow_id, control.nonce))
        if flow is not None:
            self._repeated_syn(flow, ip, control.verno, now)
            return
        if core.flows.half_open >= core.settings.request_queue_limit:
            raise TheirMistake("request_queue_full")
        target = core.table.resolve_local(sal.services[0], len(sal.transport))
        listener = None if target is None else self._listeners.get(target.listener_id)
        if listener is None:
            refusing = any(prefix.covers(sal.services[0]) for prefix in self._refusing)
            if refusing or core.settings.refuse_unknown_services:
                self._refuse(ip, sal, interface_index, broadcast)
            raise TheirMistake("listener_refuses" if refusing else "no_listener")
        if sal.protocol != listener.protocol:
            raise TheirMistake("wrong_protocol")
        if listener.waiting >= listener.backlog:
            raise TheirMistake("backlog_full")
        segment = transport_part.read_syn(ip, sal)
        proven = self._agrees_on_proofs(ip, sal, segment, interface_index, broadcast)
        path = self._path_back(peer_address, interface_index, bool(sal.source_addresses))
        local_address = ip.destination
        if broadcast or sal.source_addresses:
            local_address = self._own_address(interface_index, ip.destination, path)

        flow_id = core.flows.new_flow_id(core.random.getrandbits)
        flow = Flow(flow_id, sal.services[0], core.random.getrandbits(192), now)
        flow.protocol = sal.protocol
        flow.listener = listener
        flow.syn_key = SynKey(peer_address, sal.src_flow_id, control.nonce)
        flow.peer_flow_id = FlowID(sal.src_flow_id)
        flow.peer_nonce = control.nonce
        flow.receive_next = control.verno + 1 & 0xFFFFFFFF
        flow.local_address = local_address
        flow.peer_address = peer_address
        flow.interface_index = path.interface_index
        flow.mtu_bytes = path.mtu_bytes
        flow.offered_mss_bytes = handshake.mss_to_offer(path.mtu_bytes, core.settings.mss_cap)
        flow.options = segment.options
        flow.peer_initial_sequence = segment.sequence
        flow.peer_window_bytes = segment.window
        if sal.source_addresses:
            flow.source_addresses = (*sal.source_addresses, local_address)
        flow.timeout_s = core.round_trips.timeout_s(peer_address, core.settings.synack_timeout_s)
        flow.key_pair = core.key_pairs.current(now) if proven else None
        flow.outer_ports = ip.outer_ports
        flow.framing = core.framings.of_service(flow.service_id)
        if segment.options.native_port and core.flows.half_open < core.settings.native_half_open_limit:
            core.offer_native(flow)
        core.flows.add(flow)
        core.flows.half_open += 1
        core.restart_lifetime(flow, now + core.settings.request_expiry_s, self._expire)
        core.step(flow, Event.SYN_RECEIVED, now)

    def _agrees_on_proofs(
        self, ip: IPv4Packet, sal: SalPacket, segment: TcpSegment, interface_index: int, broadcast: bool
    ) -> bool:
        """Whether control packets of the new flow are to be authenticated. TheirMistake if they cannot and must."""
        wanted = self._core.settings.authenticate
        if wanted is Authenticate.OFF or sal.protocol != PROTOCOL_TCP:
            return False
        if (segment.options.capabilities or 0) & AUTHENTICATES:
            return True
        if wanted is Authenticate.REQUIRE:
            self._refuse(ip, sal, interface_index, broadcast)
            raise TheirMistake("authentication_required")
        return False

    def _refuse(self, ip: IPv4Packet, sal: SalPacket, interface_index: int, broadcast: bool) -> None:
        """Tell a client of ours that it had better ask another instance.

        A prototype would give up where it might have found another instance by asking again, and whoever
        broadcasts has asked others already.
        """
        core = self._core
        if broadcast:
            return
        segment = tcp_segment.parse(sal.transport, ip.source, ip.destination, ip.outer_ports is None)
        if segment.options.capabilities is not None:
            core.effects.append(SendPacket(answer_with_reset(ip, sal), ip.source, interface_index))
            core.counters["resets_answered"] += 1

    def receive(self, flow: Flow, ip: IPv4Packet, sal: SalPacket, now: float) -> None:
        """Process a packet for a flow in RESPOND. Raises TheirMistake."""
        control = sal.control
        if control is None:
            if flow.key_pair is not None:
                raise TheirMistake("proof_missing")  # the key comes with the ACK
            self._first_data(flow, ip, sal, now)
            return
        if control.flags & RST:
            if not resets_flow(flow, control, self._core.settings.version_gap_limit):
                raise TheirMistake("spoofed_reset")
            self._core.step(flow, Event.RESET_RECEIVED, now)
            return
        if control.nonce != flow.peer_nonce:
            raise TheirMistake("wrong_nonce")
        if control.flags not in (ACK, RSYN):
            raise TheirMistake("not_a_handshake_ack")
        if control.ackno != flow.send_next:
            raise TheirMistake("wrong_ackno")
        if control.verno != flow.receive_next:
            raise TheirMistake("wrong_verno")
        if flow.key_pair is not None:
            self._check_first_proof(flow, flow.key_pair, ip, sal)
        window_bytes = transport_part.read_handshake_ack(flow, ip, sal)
        flow.outer_ports = ip.outer_ports
        if control.flags == RSYN:
            # The ACK was lost, and the client is already elsewhere. Following it is the next step (`migration`).
            self._complete(flow, window_bytes, now)
            return
        if ip.source != flow.peer_address:
            # The nonce vouches for it, and the prototype goes by the address of the ACK as well.
            path = self._path_back(ip.source, flow.interface_index, False)
            flow.peer_address = ip.source
            flow.interface_index = path.interface_index
            flow.mtu_bytes = path.mtu_bytes
        if flow.retransmissions == 0:
            self._core.round_trips.sample(flow.peer_address, now - flow.first_sent_at)
        self._complete(flow, window_bytes, now)

    def _check_first_proof(self, flow: Flow, pair: KeyPair, ip: IPv4Packet, sal: SalPacket) -> None:
        """The client's key, and whether what came with it is right. Raises TheirMistake."""
        if not sal.key:
            raise TheirMistake("proof_missing")
        client = flow.peer_flow_id, flow.peer_nonce, sal.key
        server = flow.flow_id, flow.local_nonce, pair.public
        proofs = Proofs.agreed(pair.agree(sal.key), client, server, is_client=False)
        proofs.check(*covered_by(ip, sal), sal)
        flow.proofs = proofs

    def _first_data(self, flow: Flow, ip: IPv4Packet, sal: SalPacket, now: float) -> None:
        """Data that overtook the handshake ACK, or came in its place."""
        if flow.protocol == PROTOCOL_UDP:
            payload = self._datagrams.read(flow, ip, sal)
            self._complete(flow, 0, now)
            self._datagrams.deliver(flow, ip, payload)
            return
        if sal.src_flow_id != flow.peer_flow_id:
            raise TheirMistake("wrong_peer_flow")
        if sal.protocol != PROTOCOL_TCP:
            raise TheirMistake("wrong_protocol")
        # Behind a veth the kernel leaves the checksum of its segments to be completed.
        transport = transport_part.to_inject(ip, sal)
        if tcp_segment.checksum_state(transport, ip.source, ip.destination) == "wrong":
            raise TheirMistake(tcp_segment.WRONG_CHECKSUM)
        segment = tcp_segment.parse(sal.transport, ip.source, ip.destination, verify=False)
        flow.outer_ports = ip.outer_ports
        window_bytes = self._core.settings.receive_window_bytes
        if not handshake.first_segment_is_acceptable(flow, segment, window_bytes):
            raise TheirMistake("handshake_segment")
        self._complete(flow, handshake.scaled_window(flow, segment), now)
        self._core.effects.append(InjectSegment(flow.flow_id, transport, ip.source, ip.destination))

    def _complete(self, flow: Flow, peer_window_bytes: int, now: float) -> None:
        flow.key_pair = None
        flow.peer_window_bytes = peer_window_bytes
        flow.send_unacknowledged = flow.send_next
        self._core.step(flow, Event.HANDSHAKE_COMPLETED, now)

    def _repeated_syn(self, flow: Flow, ip: IPv4Packet, verno: int, now: float) -> None:
        if flow.state is not State.RESPOND:
            raise TheirMistake("repeated_syn")
        if verno + 1 & 0xFFFFFFFF != flow.receive_next:
            raise TheirMistake("wrong_verno")
        flow.outer_ports = ip.outer_ports  # the client tries all ways, and one may work in its direction only
        # The client may answer either copy of the SYN-ACK, so its round trip cannot be measured (Karn).
        flow.retransmissions += 1
        self._core.step(flow, Event.SYN_RECEIVED, now)

    def _path_back(self, peer_address: int, interface_index: int, unproven: bool) -> Path:
        """The path to a peer. `unproven`: the address is not the source that the kernel has let pass."""
        paths = self._core.paths
        if not is_unicast(peer_address) or (
            unproven and any(each.broadcast_address == peer_address for each in paths.interfaces())
        ):
            raise TheirMistake("not_unicast")
        path = paths.path_to(peer_address, interface_index) or paths.path_to(peer_address)
        if path is None:
            raise TheirMistake("no_path_back")
        return path

    def _own_address(self, interface_index: int, destination: int, path: Path) -> int:
        """The receiving interface's own address: the one the packet came to, if it is one (SPEC 3.6)."""
        own = [each.address for each in self._core.paths.interfaces() if each.index == interface_index]
        if destination in own:
            return destination
        return own[0] if own else path.source_address

    def _expect_data(self, flow: Flow, now: float) -> None:
        self._core.effects.append(ExpectData(flow.flow_id))

    def _send_syn_ack(self, flow: Flow, now: float) -> None:
        core = self._core
        packet = core.control_packet(
            flow,
            SYN | ACK,
            flow.initial_verno,
            source_addresses=flow.source_addresses,
            transport=transport_part.of_syn_ack(flow, core.settings),
            key=b"" if flow.key_pair is None else flow.key_pair.public,
        )
        if flow.outer_ports is not None and flow.source_addresses:
            # The client's NAT expects an answer of the service router that the SYN went to (SPEC 8, 3.6).
            source, said = flow.source_addresses[1], encapsulation.payload_of(packet)
            packet = encapsulation.emit(source, flow.peer_address, flow.outer_ports, said)
        core.effects.append(SendPacket(packet, flow.peer_address, flow.interface_index))
        wait_s = backed_off_s(flow.timeout_s, flow.retransmissions, core.settings.request_expiry_s)
        core.restart_retransmission(flow, now + wait_s, self._repeat_syn_ack)

    def _repeat_syn_ack(self, flow: Flow, now: float) -> None:
        flow.retransmissions += 1
        self._core.step(flow, Event.RETRANSMIT, now)

    def _tell_expired(self, flow: Flow, now: float) -> None:
        """A client whose ACKs were all lost believes that it is connected: an RST saves it from waiting for
        ever. One of ours that is still in REQUEST does not know the nonce and ignores it, whereas a prototype
        would give up instead of repeating its SYN, so that one is told nothing (SPEC 3.6).
        """
        if flow.options.capabilities is not None:
            self._core.send_control(flow, RST | ACK, flow.send_next)

    def _forget_half_open(self, flow: Flow, now: float) -> None:
        self._core.flows.half_open -= 1
        self._core.forget(flow, now)
        self._core.effects.append(ForgetExpected(flow.flow_id))

    def _expire(self, flow: Flow, now: float) -> None:
        self._core.step(flow, Event.GAVE_UP, now)

    def _report_accepted(self, flow: Flow, now: float) -> None:
        listener = flow.listener
        assert listener is not None
        listener.waiting += 1
        flow.waits_in_backlog = True
        self._core.flows.half_open -= 1
        self._core.effects.append(Accepted(listener.listener_id, flow.flow_id, flow.service_id))
