"""How does a live flow get to another address? RSYN, RSYN-ACK and ACK, in both roles (SPEC 5).

The end that moves sends RSYN from its new address. The other end answers to wherever that came from and stays
where it is; only the ACK of its answer makes it send data there. So both directions of a path have carried a
packet before the old one is given up, and nobody can send a flow to an address that does not want it.

What we do beyond the prototype, mostly as SPEC 5.7 advises:

- A repeated RSYN is answered by an RSYN-ACK, and RSYN-ACKs are repeated by timer. Bare ACKs never answer an
  RSYN, and none is sent while an answer is unconfirmed: a prototype would get stuck (SPEC 11.1, quirk 17).
- A move that fails is taken back: the old path is announced like a new one. Whatever the peer believed, it
  knows where we are afterwards, and we know whether the old path still works.
- Data is not held back meanwhile. It takes the old path, which mostly works; if not, TCP repeats it.

One packet with a version number of its own is unacknowledged at a time, as in the prototype (SPEC 3.3): while an
RSYN is out, a FIN goes with it. So `Flow.fin_verno`, and `Moves.first_verno` likewise, say from which version
number on everything that we sent had that flag, and any larger acknowledgement number covers it.
"""

from __future__ import annotations

from errno import ETIMEDOUT

from serval_core.addresses import is_unicast
from serval_core.core import Core
from serval_core.effects import Happened, MovePath
from serval_core.errors import OurMistake, TheirMistake
from serval_core.flow import Flow
from serval_core.migration_states import (
    OWN_MOVE,
    PEER_MOVE,
    ImpossibleMove,
    OwnAction,
    OwnEvent,
    OwnMove,
    PeerAction,
    PeerEvent,
    PeerMove,
)
from serval_core.moves import Moves
from serval_core.names import after, format_address
from serval_core.paths import Path
from serval_core.rendezvous import seek
from serval_core.retransmission import backed_off_s
from serval_core.states import Event, State
from serval_core.timers import NO_TIMER
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import ACK, FIN, RSYN, Control

_SERIAL_MASK = 0xFFFFFFFF
MOVABLE = frozenset(
    {State.CONNECTED, State.CLOSEWAIT, State.FINWAIT1, State.FINWAIT2, State.CLOSING, State.LASTACK}
)
"""The states in which a flow can migrate (SPEC 5.1)."""


class Migration:
    """Moves flows, and follows peers that move."""

    __slots__ = ("_core", "_own_actions", "_peer_actions")

    def __init__(self, core: Core) -> None:
        self._core = core
        self._own_actions = {
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
        self._peer_actions = {
            PeerAction.ANSWER: self._answer,
            PeerAction.ANSWER_ONCE: self._answer_once,
            PeerAction.FOLLOW: self._follow,
            PeerAction.REPORT_MIGRATED: self._report_peer_migrated,
            PeerAction.REPORT_FAILED: self._report_peer_failed,
        }

    # What this host wants.

    def migrate(self, flow: Flow, path: Path, destination: int, now: float) -> None:
        """Begin to move to `path`, in place of a move that is under way.

        `destination`, unless it is 0, is where the peer is to be found from now on, if it proves to be there.
        OurMistake when the connection's state forbids it.
        """
        if flow.state not in MOVABLE:
            why = "is still being opened" if flow.state in (State.REQUEST, State.RESPOND) else "is closed already"
            raise OurMistake(f"flow {flow.flow_id} cannot migrate: it {why}")
        moves = _moves(flow)
        moves.path = path
        moves.destination = destination
        moves.started_at = now
        self._own_step(flow, OwnEvent.MIGRATE, now)

    def path_lost(self, flow: Flow, now: float) -> None:
        """The path of the flow is gone, and there is no other one: it waits for one, for a limited time."""
        if flow.state not in MOVABLE:
            return
        moves = _moves(flow)
        if moves.own is OwnMove.SETTLED:
            moves.started_at = now
            moves.failure = "no path is left"
        if moves.own in (OwnMove.SETTLED, OwnMove.RETURNING):
            moves.path = None
            moves.destination = 0
            moves.first_verno = flow.send_next  # nothing that is out answers for a path that is yet to come
        self._own_step(flow, OwnEvent.PATH_LOST, now)

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
            self._move_path(flow)

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

    def answers_instead(self, flow: Flow, now: float) -> bool:
        """Whether an RSYN-ACK takes the place of an ACK that we owe: nothing else may overtake it."""
        moves = flow.moves
        if moves is None or moves.peer is PeerMove.SETTLED:
            return False
        self._answer_once(flow, now)
        return True

    # What the peer says. Its nonce has been checked.

    def rsyn_received(
        self, flow: Flow, ip: IPv4Packet, control: Control, interface_index: int, now: float
    ) -> None:
        """The peer wants to move to where this packet came from. Raises TheirMistake."""
        ahead = control.verno - flow.receive_next & _SERIAL_MASK
        known = None if flow.moves is None else flow.moves.peer_verno
        if ahead > self._core.settings.version_gap_limit and control.verno != known:
            raise TheirMistake("old_migration")
        if not is_unicast(ip.source):
            raise TheirMistake("not_unicast")
        paths = self._core.paths
        path = paths.path_to(ip.source, interface_index) or paths.path_to(ip.source)
        if path is None:
            raise TheirMistake("no_path_back")
        moves = _moves(flow)
        repeated = control.verno == known
        if not (repeated and moves.peer_confirmed):
            if not repeated:
                moves.peer_verno = control.verno
                moves.peer_confirmed = False
                flow.receive_next = control.verno + 1 & _SERIAL_MASK
            if moves.peer is PeerMove.SETTLED or not repeated:
                moves.answers = 0
                moves.answers_since = now
        moves.candidate_address = ip.source
        if moves.own is OwnMove.SETTLED and paths.has_address(flow.local_address):
            # It may have been sent to where we were, or to where our service is: here we are.
            moves.candidate_local = flow.local_address
            path = paths.path_to(ip.source, flow.interface_index) or path
        elif paths.has_address(ip.destination):
            moves.candidate_local = ip.destination
        else:
            moves.candidate_local = path.source_address  # it was a broadcast
        moves.candidate_path = path
        done = repeated and moves.peer_confirmed
        self._peer_step(flow, PeerEvent.RSYN_REPEATED if done else PeerEvent.RSYN_RECEIVED, now)

    def rsyn_ack_received(self, flow: Flow, source: int, control: Control, now: float) -> None:
        """The peer answers an RSYN of ours from address `source`, or seems to. Raises TheirMistake."""
        limit = self._core.settings.version_gap_limit
        if control.verno - flow.receive_next + limit & _SERIAL_MASK > 2 * limit:
            raise TheirMistake("version_gap")
        moves = flow.moves
        if moves is None:
            raise TheirMistake("unexpected_rsyn_ack")
        if after(control.ackno, flow.send_next):
            raise TheirMistake("wrong_ackno")
        moves.answered_from = source
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
            self._own_step(flow, OwnEvent.ANSWERED, now)
        else:
            raise TheirMistake("old_migration")

    def acknowledged(self, flow: Flow, source: int, control: Control, now: float) -> None:
        """A bare ACK came from address `source` that acknowledges nothing new: it may confirm our RSYN-ACK.

        It need not come from where the peer wants to be (SPEC 5.7). With a proof it does, and says so: whoever
        has the RSYN sent again from somewhere else gains nothing.
        """
        moves = flow.moves
        if moves is None or moves.peer is not PeerMove.PROVING or moves.peer_verno is None:
            return
        if flow.proofs is not None and flow.outer_ports is None and source != moves.candidate_address:
            return
        ahead = control.verno - moves.peer_verno - 1 & _SERIAL_MASK
        if ahead <= self._core.settings.version_gap_limit:
            moves.peer_confirmed = True
            self._peer_step(flow, PeerEvent.CONFIRMED, now)

    # The clockwork.

    def _own_step(self, flow: Flow, event: OwnEvent, now: float) -> None:
        moves = _moves(flow)
        step = OWN_MOVE.get((moves.own, event))
        if step is None:
            raise ImpossibleMove(moves.own, event)
        moves.own = step.next_state
        if moves.own is OwnMove.SETTLED:
            moves.stranded_until = 0.0
            self._core.timers.cancel(moves.timer)
            moves.timer = NO_TIMER
        for action in step.actions:
            self._own_actions[action](flow, now)

    def _peer_step(self, flow: Flow, event: PeerEvent, now: float) -> None:
        moves = _moves(flow)
        step = PEER_MOVE.get((moves.peer, event))
        if step is None:
            raise ImpossibleMove(moves.peer, event)
        moves.peer = step.next_state
        if moves.peer is PeerMove.SETTLED:
            self._core.timers.cancel(moves.answer_timer)
            moves.answer_timer = NO_TIMER
        for action in step.actions:
            self._peer_actions[action](flow, now)

    def _own_due(self, flow: Flow, now: float) -> None:
        """The timer of our own move ran out."""
        moves, settings = _moves(flow), self._core.settings
        moves.timer = NO_TIMER
        if flow.state not in MOVABLE:
            self._own_step(flow, OwnEvent.CLOSED, now)
        elif moves.own is OwnMove.STRANDED:
            waited = now >= moves.stranded_until
            self._own_step(flow, OwnEvent.GAVE_UP if waited else OwnEvent.RETRANSMIT, now)
        elif moves.own is OwnMove.MOVING and moves.repeats >= settings.migration_retransmissions:
            moves.failure = "the peer does not answer on the new path"
            returns = self._old_path(flow) is not None
            self._own_step(flow, OwnEvent.GAVE_UP if returns else OwnEvent.NO_WAY_BACK, now)
        elif moves.own is OwnMove.RETURNING and moves.repeats >= settings.return_retransmissions:
            self._own_step(flow, OwnEvent.GAVE_UP, now)
        else:
            moves.repeats += 1
            self._own_step(flow, OwnEvent.RETRANSMIT, now)

    def _answer_due(self, flow: Flow, now: float) -> None:
        """The confirmation of our RSYN-ACK is overdue."""
        moves = _moves(flow)
        moves.answer_timer = NO_TIMER
        if moves.answers > self._core.settings.migration_retransmissions or flow.state not in MOVABLE:
            self._peer_step(flow, PeerEvent.GAVE_UP, now)
        else:
            self._peer_step(flow, PeerEvent.RETRANSMIT, now)

    # Actions of our own move.

    def _announce(self, flow: Flow, now: float) -> None:
        core, moves = self._core, _moves(flow)
        if flow.fin_verno is not None:
            core.stop_retransmission(flow, now)
            flow.retransmissions = 1  # no measurement of the round trip: the FIN has been sent before
        moves.first_verno = flow.send_next
        flow.send_next = flow.send_next + 1 & _SERIAL_MASK
        moves.repeats = 0
        moves.seeking = False
        moves.sent_at = now
        moves.timeout_s = core.round_trips.timeout_s(
            moves.destination or flow.peer_address, core.settings.migration_initial_timeout_s
        )
        self._transmit(flow, now)

    def _repeat(self, flow: Flow, now: float) -> None:
        moves = _moves(flow)
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
        core, moves = self._core, _moves(flow)
        longest_s = core.settings.migration_timeout_max_s
        if moves.path is not None:
            flags = RSYN if flow.fin_verno is None else RSYN | FIN
            destination = moves.destination or flow.peer_address
            core.send_control_on(flow, flags, flow.send_next - 1 & _SERIAL_MASK, moves.path, destination)
            if moves.repeats >= core.settings.rendezvous_after and seek(core, flow, flags, moves.path):
                moves.seeking = True
        if moves.own is OwnMove.STRANDED:
            deadline = min(now + longest_s, moves.stranded_until)
        else:
            deadline = now + backed_off_s(moves.timeout_s, moves.repeats, longest_s)
        self._restart(flow, deadline)

    def _restart(self, flow: Flow, deadline: float) -> None:
        moves = _moves(flow)
        self._core.timers.cancel(moves.timer)
        moves.timer = self._core.timers.start(deadline, self._own_due, flow)

    def _old_path(self, flow: Flow) -> Path | None:
        """The path that the flow is on, None when this host does not have it any more."""
        path = self._core.paths.path_to(flow.peer_address, flow.interface_index)
        return None if path is None else path._replace(source_address=flow.local_address)

    def _go_back(self, flow: Flow, now: float) -> None:
        moves = _moves(flow)
        moves.path = self._old_path(flow)
        moves.destination = 0

    def _adopt(self, flow: Flow, now: float) -> None:
        moves = _moves(flow)
        path = moves.path
        assert path is not None
        flow.local_address = path.source_address
        flow.interface_index = path.interface_index
        flow.mtu_bytes = path.mtu_bytes
        if moves.destination:
            flow.peer_address = moves.destination
        self._move_path(flow)

    def _move_path(self, flow: Flow) -> None:
        self._core.effects.append(
            MovePath(
                flow.flow_id, flow.local_address, flow.peer_address, flow.interface_index, flow.mtu_bytes
            )
        )

    def _confirm(self, flow: Flow, now: float) -> None:
        """To where the answer came from, which need not be where we believe the peer to be: if it moves as well, it
        has left there, and waits for this before it tells us.
        """
        source = _moves(flow).answered_from
        if source not in (0, flow.peer_address):
            path = self._core.paths.path_to(source, flow.interface_index)
            if path is not None:
                own = path._replace(source_address=flow.local_address)
                self._core.send_control_on(flow, ACK, flow.send_next, own, source)
        self._core.send_control(flow, ACK, flow.send_next)

    def _resume_fin(self, flow: Flow, now: float) -> None:
        if flow.fin_verno is not None and not after(flow.send_unacknowledged, flow.fin_verno):
            self._core.step(flow, Event.RETRANSMIT, now)

    def _wait(self, flow: Flow, now: float) -> None:
        core, moves = self._core, _moves(flow)
        if flow.fin_verno is not None:
            core.stop_retransmission(flow, now)
        # From the first time on, however often another path is tried in between.
        moves.stranded_until = moves.stranded_until or now + core.settings.no_path_wait_s
        core.counters["flows_stranded"] += 1
        self._restart(flow, min(now + core.settings.migration_timeout_max_s, moves.stranded_until))

    def _report_migrated(self, flow: Flow, now: float) -> None:
        moves = _moves(flow)
        moves.completed += 1
        self._core.counters["flows_migrated"] += 1
        self._happened(
            "flow_migrated", flow, "local", flow.local_address, duration_s=now - moves.started_at
        )

    def _report_failed(self, flow: Flow, now: float) -> None:
        moves = _moves(flow)
        self._core.counters["migrations_failed"] += 1
        wanted = 0 if moves.path is None else moves.path.source_address
        self._happened("migration_failed", flow, "local", wanted, reason=moves.failure)

    def _give_up_flow(self, flow: Flow, now: float) -> None:
        flow.errno = ETIMEDOUT
        self._core.step(flow, Event.GAVE_UP, now)

    # Actions of the peer's move.

    def _answer(self, flow: Flow, now: float) -> None:
        core, moves = self._core, _moves(flow)
        if moves.answers == 0:
            moves.answer_timeout_s = core.round_trips.timeout_s(
                moves.candidate_address, core.settings.migration_initial_timeout_s
            )
        longest_s = core.settings.migration_timeout_max_s
        wait_s = backed_off_s(moves.answer_timeout_s, moves.answers, longest_s)
        moves.answers += 1
        core.timers.cancel(moves.answer_timer)
        moves.answer_timer = core.timers.start(now + wait_s, self._answer_due, flow)
        self._answer_once(flow, now)

    def _answer_once(self, flow: Flow, now: float) -> None:
        moves = _moves(flow)
        path = moves.candidate_path
        assert path is not None
        answering = path._replace(source_address=moves.candidate_local)
        self._core.send_control_on(flow, RSYN | ACK, flow.send_next, answering, moves.candidate_address)

    def _follow(self, flow: Flow, now: float) -> None:
        moves = _moves(flow)
        paths = self._core.paths
        address = moves.candidate_address
        path = paths.path_to(address, flow.interface_index) or moves.candidate_path
        assert path is not None
        flow.peer_address = address
        flow.interface_index = path.interface_index
        flow.mtu_bytes = path.mtu_bytes
        self._move_path(flow)
        moves.repeats = 0  # of the RSYNs to where it is now
        moves.seeking = False
        self._own_step(flow, OwnEvent.PEER_MOVED, now)

    def _report_peer_migrated(self, flow: Flow, now: float) -> None:
        moves = _moves(flow)
        moves.completed += 1
        self._core.counters["peers_migrated"] += 1
        self._happened(
            "flow_migrated", flow, "peer", flow.peer_address, duration_s=now - moves.answers_since
        )

    def _report_peer_failed(self, flow: Flow, now: float) -> None:
        self._core.counters["migrations_failed"] += 1
        address = _moves(flow).candidate_address
        self._happened("migration_failed", flow, "peer", address, reason="the peer does not confirm it")

    def _happened(self, kind: str, flow: Flow, end: str, address: int, **more: object) -> None:
        """Tell that one end of a flow, "local" or "peer", is at `address` now, or could not get there."""
        fields: dict[str, object] = {
            "flow_id": flow.flow_id,
            "service": flow.service_id.text,
            "end": end,
            "address": format_address(address) if address else None,
            "interface_index": flow.interface_index,
        }
        self._core.effects.append(Happened(kind, fields | more))


def _moves(flow: Flow) -> Moves:
    """The record of the flow's moves, made when it is needed for the first time."""
    if flow.moves is None:
        flow.moves = Moves()
    return flow.moves
