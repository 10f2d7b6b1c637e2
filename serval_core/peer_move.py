"""How is a peer followed to another address? RSYN-ACK until it has confirmed that, and who is believed.

See `migration`.
"""

from __future__ import annotations

from collections.abc import Callable

from serval_core.addresses import is_unicast
from serval_core.core import Core
from serval_core.effects import ExpectPeer
from serval_core.errors import TheirMistake
from serval_core.flow import Flow
from serval_core.migration_states import PEER_MOVE, ImpossibleMove, OwnMove, PeerAction, PeerEvent, PeerMove
from serval_core.moving import MOVABLE, SERIAL_MASK, move_path, moves_of, report_move
from serval_core.retransmission import backed_off_s
from serval_core.timers import NO_TIMER
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import ACK, RSYN, Control


class PeerMoves:
    """Follows the other end of flows. `followed` is told of each flow whose peer is elsewhere."""

    __slots__ = ("_actions", "_core", "_followed")

    def __init__(self, core: Core, followed: Callable[[Flow, float], None]) -> None:
        self._core = core
        self._followed = followed
        self._actions = {
            PeerAction.ANSWER: self._answer,
            PeerAction.ANSWER_ONCE: self._answer_once,
            PeerAction.FOLLOW: self._follow,
            PeerAction.REPORT_MIGRATED: self._report_migrated,
            PeerAction.REPORT_FAILED: self._report_failed,
        }

    # What the peer says. Its nonce has been checked.

    def rsyn_received(
        self, flow: Flow, ip: IPv4Packet, control: Control, interface_index: int, now: float
    ) -> None:
        """The peer wants to move to where this packet came from. Raises TheirMistake."""
        ahead = control.verno - flow.receive_next & SERIAL_MASK
        known = None if flow.moves is None else flow.moves.peer_verno
        if ahead > self._core.settings.version_gap_limit and control.verno != known:
            raise TheirMistake("old_migration")
        if not is_unicast(ip.source):
            raise TheirMistake("not_unicast")
        paths = self._core.paths
        path = paths.path_to(ip.source, interface_index) or paths.path_to(ip.source)
        if path is None:
            raise TheirMistake("no_path_back")
        moves = moves_of(flow)
        repeated = control.verno == known
        if not (repeated and moves.peer_confirmed):
            if not repeated:
                moves.peer_verno = control.verno
                moves.peer_confirmed = False
                flow.receive_next = control.verno + 1 & SERIAL_MASK
            if moves.peer is PeerMove.SETTLED or not repeated:
                moves.answers = 0
                moves.answers_since = now
        moves.candidate_address = ip.source
        moves.candidate_ports = ip.outer_ports
        if moves.own is OwnMove.SETTLED and paths.has_address(flow.local_address):
            # It may have been sent to where we were, or to where our service is: here we are.
            moves.candidate_local = flow.local_address
            path = paths.path_to(ip.source, flow.interface_index) or path
        elif paths.has_address(ip.destination):
            moves.candidate_local = ip.destination
        else:
            moves.candidate_local = path.source_address  # it was a broadcast
        moves.candidate_path = path
        if flow.native_port and ip.source != flow.peer_address:
            self._core.effects.append(ExpectPeer(flow.flow_id, ip.source))
        done = repeated and moves.peer_confirmed
        self._step(flow, PeerEvent.RSYN_REPEATED if done else PeerEvent.RSYN_RECEIVED, now)

    def acknowledged(self, flow: Flow, source: int, control: Control, now: float) -> None:
        """A bare ACK came from address `source` that acknowledges nothing new: it may confirm our RSYN-ACK.

        It need not come from where the peer wants to be (SPEC 5.7). With a proof it does, and says so: whoever
        has the RSYN sent again from somewhere else gains nothing.
        """
        moves = flow.moves
        if moves is None or moves.peer is not PeerMove.PROVING or moves.peer_verno is None:
            return
        if flow.proofs is not None and moves.candidate_ports is None and source != moves.candidate_address:
            return
        ahead = control.verno - moves.peer_verno - 1 & SERIAL_MASK
        if ahead <= self._core.settings.version_gap_limit:
            moves.peer_confirmed = True
            self._step(flow, PeerEvent.CONFIRMED, now)

    def answers_instead(self, flow: Flow, now: float) -> bool:
        """Whether an RSYN-ACK takes the place of an ACK that we owe: nothing else may overtake it."""
        moves = flow.moves
        if moves is None or moves.peer is PeerMove.SETTLED:
            return False
        self._answer_once(flow, now)
        return True

    # The clockwork.

    def _step(self, flow: Flow, event: PeerEvent, now: float) -> None:
        moves = moves_of(flow)
        step = PEER_MOVE.get((moves.peer, event))
        if step is None:
            raise ImpossibleMove(moves.peer, event)
        moves.peer = step.next_state
        if moves.peer is PeerMove.SETTLED:
            self._core.timers.cancel(moves.answer_timer)
            moves.answer_timer = NO_TIMER
        for action in step.actions:
            self._actions[action](flow, now)

    def _due(self, flow: Flow, now: float) -> None:
        """The confirmation of our RSYN-ACK is overdue."""
        moves = moves_of(flow)
        moves.answer_timer = NO_TIMER
        if moves.answers > self._core.settings.migration_retransmissions or flow.state not in MOVABLE:
            self._step(flow, PeerEvent.GAVE_UP, now)
        else:
            self._step(flow, PeerEvent.RETRANSMIT, now)

    # Actions.

    def _answer(self, flow: Flow, now: float) -> None:
        core, moves = self._core, moves_of(flow)
        if moves.answers == 0:
            moves.answer_timeout_s = core.round_trips.timeout_s(
                moves.candidate_address, core.settings.migration_initial_timeout_s
            )
        longest_s = core.settings.migration_timeout_max_s
        wait_s = backed_off_s(moves.answer_timeout_s, moves.answers, longest_s)
        moves.answers += 1
        core.timers.cancel(moves.answer_timer)
        moves.answer_timer = core.timers.start(now + wait_s, self._due, flow)
        self._answer_once(flow, now)

    def _answer_once(self, flow: Flow, now: float) -> None:
        moves = moves_of(flow)
        path = moves.candidate_path
        assert path is not None
        answering = path._replace(source_address=moves.candidate_local)
        address, ports = moves.candidate_address, moves.candidate_ports
        self._core.send_control_on(flow, RSYN | ACK, flow.send_next, answering, address, ports)

    def _follow(self, flow: Flow, now: float) -> None:
        moves = moves_of(flow)
        paths = self._core.paths
        address = moves.candidate_address
        path = paths.path_to(address, flow.interface_index) or moves.candidate_path
        assert path is not None
        flow.peer_address = address
        flow.outer_ports = moves.candidate_ports
        flow.interface_index = path.interface_index
        flow.mtu_bytes = path.mtu_bytes
        move_path(self._core, flow)
        self._followed(flow, now)

    def _report_migrated(self, flow: Flow, now: float) -> None:
        moves = moves_of(flow)
        moves.completed += 1
        self._core.counters["peers_migrated"] += 1
        duration_s = now - moves.answers_since
        report_move(self._core, "flow_migrated", flow, "peer", flow.peer_address, duration_s=duration_s)

    def _report_failed(self, flow: Flow, now: float) -> None:
        self._core.counters["migrations_failed"] += 1
        address = moves_of(flow).candidate_address
        report_move(self._core, "migration_failed", flow, "peer", address, reason="the peer does not confirm it")
