"""What is known about a flow that moves, or has moved? One record per flow that ever did; see `migration`."""

from __future__ import annotations

from typing import NamedTuple

from serval_core.migration_states import OwnMove, PeerMove, prototype_name
from serval_core.names import FlowID, ServiceID
from serval_core.paths import Path
from serval_core.timers import NO_TIMER
from serval_core.wire.ipv4 import OuterPorts


class Moves:
    """Both halves of a flow's migration. Addresses in host order, times in seconds of the caller's clock."""

    __slots__ = (
        "answer_timeout_s",
        "answer_timer",
        "answered_from",
        "answered_ports",
        "answers",
        "answers_since",
        "candidate_address",
        "candidate_local",
        "candidate_path",
        "candidate_ports",
        "completed",
        "destination",
        "destination_ports",
        "failure",
        "first_verno",
        "own",
        "path",
        "peer",
        "peer_confirmed",
        "peer_verno",
        "repeats",
        "seeking",
        "sent_at",
        "started_at",
        "stranded_until",
        "timeout_s",
        "timer",
    )

    def __init__(self) -> None:
        self.completed = 0
        """How often this end, or the peer, has moved."""
        self.failure = ""
        """Why the last move of this end failed, a clause."""

        # Our own move. `first_verno` is that of the first RSYN on this path: whatever acknowledges more is an
        # answer to it. `destination` 0: to where the peer is.
        self.own = OwnMove.SETTLED
        self.path: Path | None = None
        self.destination = 0
        self.destination_ports: OuterPorts | None = None
        self.first_verno = 0
        self.started_at = 0.0
        self.answered_from = 0  # where the last RSYN-ACK came from
        self.answered_ports: OuterPorts | None = None
        self.sent_at: float | None = None  # of an RSYN that was sent once
        self.repeats = 0
        self.seeking = False  # the RSYN has also gone to where else the peer may be (`rendezvous`)
        self.timeout_s = 0.0
        self.stranded_until = 0.0
        self.timer = NO_TIMER

        # The peer's move. `peer_verno` is that of its last RSYN, and `candidate_*` say where that one came
        # from and to. None: it has never sent one.
        self.peer = PeerMove.SETTLED
        self.peer_verno: int | None = None
        self.peer_confirmed = False
        self.candidate_address = 0
        self.candidate_ports: OuterPorts | None = None
        self.candidate_local = 0
        self.candidate_path: Path | None = None
        self.answers = 0
        self.answers_since = 0.0
        self.answer_timeout_s = 0.0
        self.answer_timer = NO_TIMER

    @property
    def name(self) -> str:
        """The migration state, for people."""
        return prototype_name(self.own, self.peer)


class LiveFlow(NamedTuple):
    """A flow that could be migrated, and where it is. `migration`: its own half; `goal`: where that leads."""

    flow_id: FlowID
    service_id: ServiceID
    local_address: int
    peer_address: int
    interface_index: int
    migration: OwnMove
    goal: Path | None
    peer_is_ours: bool = True

    @property
    def is_settled(self) -> bool:
        """Whether it is not moving at present."""
        return self.migration is OwnMove.SETTLED

    def is_on(self, path: Path) -> bool:
        """Whether its data takes this path at present."""
        return (self.local_address, self.interface_index) == (path.source_address, path.interface_index)
