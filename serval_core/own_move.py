"""How does this end of a flow get to another address? RSYN until the peer has answered, and what if it does not.

See `migration`.
"""

from __future__ import annotations

from errno import ETIMEDOUT

from serval_core.addresses import is_unicast
from serval_core.core import Core
from serval_core.errors import OurMistake, TheirMistake
from serval_core.flow import Flow
from serval_core.migration_states import OWN_MOVE, ImpossibleMove, OwnAction, OwnEvent, OwnMove
from serval_core.moving import MOVABLE, SERIAL_MASK, move_path, moves_of, report_move
from serval_core.names import after
from serval_core.nat_keepalive import keep_reachable, may_change_to_udp
from serval_core.paths import Path
from serval_core.rendezvous import seek
from serval_core.retransmission import backed_off_s
from serval_core.states import Event, State
from serval_core.timers import NO_TIMER
from serval_core.wire.encapsulation import ACTIVE_PORTS
from serval_core.wire.ipv4 import IPv4Packet, OuterPorts
from serval_core.wire.sal import ACK, FIN, RSYN, Control

_REPEATS_BEFORE_UDP = 2  # of an RSYN that protocol 144 may not bring to its destination


class OwnMoves:
    """Moves this host's end of flows."""

    __slots__ = ("_actions", "_core")

    def __init__(self, core: Core) -> None:
        self._core = core
        self._actions = {
            OwnAction.ANNOUNCE: self._announce,
            OwnAction.REPEAT: self._repeat,
            OwnAction.GO_BACK: self._go_back,
            OwnAction.ADOPT: self._adopt,
            OwnAction.CONFIRM: self._confirm,
            OwnAction.RESUME_FIN: self._resume_fin,
            OwnAction.WAIT: self._wait,
            OwnAction.REPORT_MIGRATED: self._report_migrated,
            OwnAction.REPORT_FAILED: self._report_failed,
            OwnAction.GIVE_UP_FLOW: self._give_up_flow,
        }

    # What this host wants.

    def migrate(
        self,
        flow: Flow,
        path: Path,
        destination: int,
        now: float,
        destination_ports: OuterPorts | None = None,
    ) -> None:
        """Begin to move to `path`, in place of a move that is under way.

        `destination`, unless it is 0, is where the peer is to be found from now on, if it proves to be there;
        inside UDP if there are `destination_ports`.
        OurMistake when the connection's state forbids it.
        """
        if flow.state not in MOVABLE:
            why = "is still being opened" if flow.state in (State.REQUEST, State.RESPOND) else "is closed already"
            raise OurMistake(f"flow {flow.flow_id} cannot migrate: it {why}")
        moves = moves_of(flow)
        moves.path = path
        moves.destination = destination
        moves.destination_ports = destination_ports
        moves.started_at = now
        self._step(flow, OwnEvent.MIGRATE, now)

    def path_lost(self, flow: Flow, now: float) -> None:
        """The path of the flow is gone, and there is no other one: it waits for one, for a limited time."""
        if flow.state not in MOVABLE:
            return
        moves = moves_of(flow)
        if moves.own is OwnMove.SETTLED:
            moves.started_at = now
            moves.failure = "no path is left"
        if moves.own in (OwnMove.SETTLED, OwnMove.RETURNING):
            moves.path = None
            moves.destination = 0
            moves.first_verno = flow.send_next  # nothing that is out answers for a path that is yet to come
        self._step(flow, OwnEvent.PATH_LOST, now)

    def paths_changed(self, flow: Flow, now: float) -> None:
        """Interfaces, addresses or routes are others: a flow that waits for a path may have one."""
        moves = flow.moves
        if moves is not None and moves.own is OwnMove.STRANDED:
            path = self._core.paths.path_to(flow.peer_address)
            if path is not None and flow.state in MOVABLE:
                self.migrate(flow, path, 0, now)

    def reroute(self, flow: Flow) -> None:
        """Another next hop leads to the peer. That needs nobody's consent."""
        path = self._core.paths.path_to(flow.peer_address, flow.interface_index)
        if path is not None:
            flow.mtu_bytes = path.mtu_bytes
            move_path(self._core, flow)

    def takes_fin(self, flow: Flow, now: float) -> bool:
        """Whether our FIN, which has just got its version number or is to be repeated, goes with an RSYN."""
        moves = flow.moves
        if moves is None or moves.own is OwnMove.SETTLED:
            return False
        self._core.stop_retransmission(flow, now)
        flow.retransmissions = 1  # no measurement of the round trip: the RSYN has been sent before
        if moves.own is not OwnMove.STRANDED:
            moves.repeats = 0
            self._repeat(flow, now)
        return True

    # What the peer says. Its nonce has been checked.

    def rsyn_ack_received(self, flow: Flow, ip: IPv4Packet, control: Control, now: float) -> None:
        """The peer answers an RSYN of ours from where this packet came from, or seems to. Raises TheirMistake."""
        source = ip.source
        limit = self._core.settings.version_gap_limit
        if control.verno - flow.receive_next + limit & SERIAL_MASK > 2 * limit:
            raise TheirMistake("version_gap")
        moves = flow.moves
        if moves is None:
            raise TheirMistake("unexpected_rsyn_ack")
        if after(control.ackno, flow.send_next):
            raise TheirMistake("wrong_ackno")
        moves.answered_from = source
        moves.answered_ports = ip.outer_ports
        if moves.own is OwnMove.SETTLED:
            # Its ACK was lost: the peer goes on asking until it has it.
            self._confirm(flow, now)
        elif after(control.ackno, moves.first_verno):
            if moves.sent_at is not None:
                self._core.round_trips.sample(flow.peer_address, now - moves.sent_at)
                if moves.path is not None:
                    key = moves.path.interface_index, flow.peer_address
                    self._core.path_quality.answered(key, now - moves.sent_at, now)
            if moves.seeking and source != flow.peer_address and is_unicast(source):
                moves.destination = source
                self._core.counters["peers_found_again"] += 1
            self._step(flow, OwnEvent.ANSWERED, now)
        else:
            raise TheirMistake("old_migration")

    def peer_moved(self, flow: Flow, now: float) -> None:
        """The peer is elsewhere: what goes to it goes there."""
        moves = moves_of(flow)
        moves.repeats = 0  # of the RSYNs to where it is now
        moves.seeking = False
        self._step(flow, OwnEvent.PEER_MOVED, now)

    # The clockwork.

    def _step(self, flow: Flow, event: OwnEvent, now: float) -> None:
        moves = moves_of(flow)
        step = OWN_MOVE.get((moves.own, event))
        if step is None:
            raise ImpossibleMove(moves.own, event)
        moves.own = step.next_state
        if moves.own is OwnMove.SETTLED:
            moves.stranded_until = 0.0
            self._core.timers.cancel(moves.timer)
            moves.timer = NO_TIMER
        for action in step.actions:
            self._actions[action](flow, now)

    def _due(self, flow: Flow, now: float) -> None:
        """The timer of our own move ran out."""
        moves, settings = moves_of(flow), self._core.settings
        moves.timer = NO_TIMER
        if flow.state not in MOVABLE:
            self._step(flow, OwnEvent.CLOSED, now)
        elif moves.own is OwnMove.STRANDED:
            waited = now >= moves.stranded_until
            self._step(flow, OwnEvent.GAVE_UP if waited else OwnEvent.RETRANSMIT, now)
        elif moves.own is OwnMove.MOVING and moves.repeats >= settings.migration_retransmissions:
            moves.failure = "the peer does not answer on the new path"
            returns = self._old_path(flow) is not None
            self._step(flow, OwnEvent.GAVE_UP if returns else OwnEvent.NO_WAY_BACK, now)
        elif moves.own is OwnMove.RETURNING and moves.repeats >= settings.return_retransmissions:
            self._step(flow, OwnEvent.GAVE_UP, now)
        else:
            moves.repeats += 1
            self._step(flow, OwnEvent.RETRANSMIT, now)

    # Actions.

    def _announce(self, flow: Flow, now: float) -> None:
        core, moves = self._core, moves_of(flow)
        if flow.fin_verno is not None:
            core.stop_retransmission(flow, now)
            flow.retransmissions = 1  # no measurement of the round trip: the FIN has been sent before
        moves.first_verno = flow.send_next
        flow.send_next = flow.send_next + 1 & SERIAL_MASK
        moves.repeats = 0
        moves.seeking = False
        moves.sent_at = now
        moves.timeout_s = core.round_trips.timeout_s(
            moves.destination or flow.peer_address, core.settings.migration_initial_timeout_s
        )
        self._transmit(flow, now)

    def _repeat(self, flow: Flow, now: float) -> None:
        moves = moves_of(flow)
        moves.sent_at = None
        paths = self._core.paths
        if moves.path is None:
            moves.path = paths.path_to(flow.peer_address)
            if moves.path is not None:
                self._announce(flow, now)
                return
        elif not moves.destination:
            # The peer may have moved meanwhile.
            path = paths.path_to(flow.peer_address, moves.path.interface_index)
            if path is not None:
                moves.path = path._replace(source_address=moves.path.source_address)
        self._transmit(flow, now)

    def _transmit(self, flow: Flow, now: float) -> None:
        """Send the RSYN, with our FIN if that is unacknowledged, and wait for the answer."""
        core, moves = self._core, moves_of(flow)
        longest_s = core.settings.migration_timeout_max_s
        if moves.path is not None:
            flags = RSYN if flow.fin_verno is None else RSYN | FIN
            destination = moves.destination or flow.peer_address
            ports = moves.destination_ports if moves.destination else flow.outer_ports
            verno = flow.send_next - 1 & SERIAL_MASK
            core.send_control_on(flow, flags, verno, moves.path, destination, ports)
            if ports is None and moves.repeats >= _REPEATS_BEFORE_UDP and may_change_to_udp(core, flow):
                core.send_control_on(flow, flags, verno, moves.path, destination, ACTIVE_PORTS)
            if moves.repeats >= core.settings.rendezvous_after and seek(core, flow, flags, moves.path):
                moves.seeking = True
        if moves.own is OwnMove.STRANDED:
            deadline = min(now + longest_s, moves.stranded_until)
        else:
            deadline = now + backed_off_s(moves.timeout_s, moves.repeats, longest_s)
        self._restart(flow, deadline)

    def _restart(self, flow: Flow, deadline: float) -> None:
        moves = moves_of(flow)
        self._core.timers.cancel(moves.timer)
        moves.timer = self._core.timers.start(deadline, self._due, flow)

    def _old_path(self, flow: Flow) -> Path | None:
        """The path that the flow is on, None when this host does not have it any more."""
        path = self._core.paths.path_to(flow.peer_address, flow.interface_index)
        return None if path is None else path._replace(source_address=flow.local_address)

    def _go_back(self, flow: Flow, now: float) -> None:
        moves = moves_of(flow)
        moves.path = self._old_path(flow)
        moves.destination = 0

    def _adopt(self, flow: Flow, now: float) -> None:
        moves = moves_of(flow)
        path = moves.path
        assert path is not None
        flow.local_address = path.source_address
        flow.interface_index = path.interface_index
        flow.mtu_bytes = path.mtu_bytes
        if moves.destination:
            flow.peer_address = moves.destination
        flow.outer_ports = moves.answered_ports
        keep_reachable(self._core, flow, now)
        move_path(self._core, flow)

    def _confirm(self, flow: Flow, now: float) -> None:
        """To where the answer came from, which need not be where we believe the peer to be: if it moves as well, it
        has left there, and waits for this before it tells us.
        """
        source = moves_of(flow).answered_from
        if source not in (0, flow.peer_address):
            path = self._core.paths.path_to(source, flow.interface_index)
            if path is not None:
                own = path._replace(source_address=flow.local_address)
                ports = moves_of(flow).answered_ports
                self._core.send_control_on(flow, ACK, flow.send_next, own, source, ports)
        self._core.send_control(flow, ACK, flow.send_next)

    def _resume_fin(self, flow: Flow, now: float) -> None:
        if flow.fin_verno is not None and not after(flow.send_unacknowledged, flow.fin_verno):
            self._core.step(flow, Event.RETRANSMIT, now)

    def _wait(self, flow: Flow, now: float) -> None:
        core, moves = self._core, moves_of(flow)
        if flow.fin_verno is not None:
            core.stop_retransmission(flow, now)
        # From the first time on, however often another path is tried in between.
        moves.stranded_until = moves.stranded_until or now + core.settings.no_path_wait_s
        core.counters["flows_stranded"] += 1
        self._restart(flow, min(now + core.settings.migration_timeout_max_s, moves.stranded_until))

    def _report_migrated(self, flow: Flow, now: float) -> None:
        moves = moves_of(flow)
        moves.completed += 1
        self._core.counters["flows_migrated"] += 1
        duration_s = now - moves.started_at
        report_move(self._core, "flow_migrated", flow, "local", flow.local_address, duration_s=duration_s)

    def _report_failed(self, flow: Flow, now: float) -> None:
        moves = moves_of(flow)
        self._core.counters["migrations_failed"] += 1
        wanted = 0 if moves.path is None else moves.path.source_address
        report_move(self._core, "migration_failed", flow, "local", wanted, reason=moves.failure)

    def _give_up_flow(self, flow: Flow, now: float) -> None:
        flow.errno = ETIMEDOUT
        self._core.step(flow, Event.GAVE_UP, now)
