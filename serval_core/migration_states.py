"""How does a migration go from step to step? Two tables: this end's own move, and the peer's (SPEC 5).

The rules are those of `states`, with two additions:

1. The two halves know nothing of each other (SPEC 5.5). What the prototype calls INITIAL, SENT, RECV and SENT_RECV
   is read off both of them, see `prototype_name`.
2. They are orthogonal to the connection's state. Whether that one allows a move is decided before the tables
   are asked.

`python -m serval_core.migration_states` prints what ARCHITECTURE.md shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum, StrEnum
from typing import Any, NamedTuple

from serval_core.errors import OurMistake


class OwnMove(IntEnum):
    """How far this end has come in moving."""

    SETTLED = 0
    MOVING = 1  # the RSYN is out, on the new path; data still takes the old one
    RETURNING = 2  # the new path did not work: the same with the old one, which shows whether that does
    STRANDED = 3  # no path works, for a limited time


class OwnEvent(IntEnum):
    """What can happen to our own move."""

    MIGRATE = 0  # somebody wants the flow on another path
    ANSWERED = 1  # RSYN-ACK to an RSYN on the path that we are trying
    RETRANSMIT = 2  # the answer is overdue, and tries are left
    GAVE_UP = 3  # no tries are left
    NO_WAY_BACK = 4  # no tries are left, and this host has lost the old path as well
    PATH_LOST = 5  # the path in use is gone, and nobody knows another one
    PEER_MOVED = 6  # the peer can be reached elsewhere from now on
    CLOSED = 7  # both directions of the connection are closed and acknowledged


class PeerMove(IntEnum):
    """How far we have come in following the peer."""

    SETTLED = 0
    PROVING = 1  # its RSYN was answered: does the answer reach it?


class PeerEvent(IntEnum):
    """What can happen to the peer's move. Nonce and version number have been checked."""

    RSYN_RECEIVED = 0  # a new one, or a copy of one that was given up
    RSYN_REPEATED = 1  # a copy of the last one
    CONFIRMED = 2  # ACK: it has our RSYN-ACK
    RETRANSMIT = 3
    GAVE_UP = 4


class OwnAction(StrEnum):
    """What a step of our own move does besides changing the state."""

    ANNOUNCE = "send RSYN"
    REPEAT = "repeat RSYN"
    GO_BACK = "choose the old path"
    ADOPT = "adopt path"
    CONFIRM = "send ACK"
    RESUME_FIN = "go on with an unacknowledged FIN"
    WAIT = "limit how long the flow waits for a path"
    REPORT_MIGRATED = "report migrated"
    REPORT_FAILED = "report failure"
    GIVE_UP_FLOW = "give the connection up"


class PeerAction(StrEnum):
    """What a step of the peer's move does besides changing the state."""

    ANSWER = "send RSYN-ACK"
    ANSWER_ONCE = "send RSYN-ACK, without waiting for anything"
    FOLLOW = "adopt the peer's address"
    REPORT_MIGRATED = "report migrated"
    REPORT_FAILED = "report failure"


class OwnStep(NamedTuple):
    """What one event does to our own move."""

    next_state: OwnMove
    actions: tuple[OwnAction, ...] = ()


class PeerStep(NamedTuple):
    """What one event does to the peer's move."""

    next_state: PeerMove
    actions: tuple[PeerAction, ...] = ()


class ImpossibleMove(OurMistake):
    """An event came in a state that the table has no row for."""

    def __init__(self, state: OwnMove | PeerMove, event: OwnEvent | PeerEvent) -> None:
        super().__init__(f"event {event.name} cannot happen to a {type(state).__name__} in state {state.name}")


_GO = OwnStep(OwnMove.MOVING, (OwnAction.ANNOUNCE,))
_LOST = OwnStep(OwnMove.STRANDED, (OwnAction.REPORT_FAILED, OwnAction.WAIT))
_BACK = OwnStep(OwnMove.SETTLED, (OwnAction.ADOPT, OwnAction.CONFIRM, OwnAction.RESUME_FIN))
_CLOSED = OwnStep(OwnMove.SETTLED)

OWN_MOVE: dict[tuple[OwnMove, OwnEvent], OwnStep] = {
    (OwnMove.SETTLED, OwnEvent.MIGRATE): _GO,
    (OwnMove.SETTLED, OwnEvent.PEER_MOVED): OwnStep(OwnMove.SETTLED),
    (OwnMove.SETTLED, OwnEvent.PATH_LOST): _LOST,
    (OwnMove.SETTLED, OwnEvent.CLOSED): _CLOSED,
    # On the way. A newer wish replaces an older one.
    (OwnMove.MOVING, OwnEvent.MIGRATE): _GO,
    (OwnMove.MOVING, OwnEvent.ANSWERED): OwnStep(
        OwnMove.SETTLED,
        (OwnAction.ADOPT, OwnAction.CONFIRM, OwnAction.RESUME_FIN, OwnAction.REPORT_MIGRATED),
    ),
    (OwnMove.MOVING, OwnEvent.RETRANSMIT): OwnStep(OwnMove.MOVING, (OwnAction.REPEAT,)),
    (OwnMove.MOVING, OwnEvent.PEER_MOVED): OwnStep(OwnMove.MOVING, (OwnAction.REPEAT,)),
    (OwnMove.MOVING, OwnEvent.PATH_LOST): OwnStep(OwnMove.MOVING),
    (OwnMove.MOVING, OwnEvent.GAVE_UP): OwnStep(
        OwnMove.RETURNING, (OwnAction.REPORT_FAILED, OwnAction.GO_BACK, OwnAction.ANNOUNCE)
    ),
    (OwnMove.MOVING, OwnEvent.NO_WAY_BACK): _LOST,
    (OwnMove.MOVING, OwnEvent.CLOSED): _CLOSED,
    # The peer may believe that we have moved, so the old path is announced like a new one.
    (OwnMove.RETURNING, OwnEvent.MIGRATE): _GO,
    (OwnMove.RETURNING, OwnEvent.ANSWERED): _BACK,
    (OwnMove.RETURNING, OwnEvent.RETRANSMIT): OwnStep(OwnMove.RETURNING, (OwnAction.REPEAT,)),
    (OwnMove.RETURNING, OwnEvent.PEER_MOVED): OwnStep(OwnMove.RETURNING, (OwnAction.REPEAT,)),
    (OwnMove.RETURNING, OwnEvent.PATH_LOST): OwnStep(OwnMove.STRANDED, (OwnAction.WAIT,)),
    (OwnMove.RETURNING, OwnEvent.GAVE_UP): OwnStep(OwnMove.STRANDED, (OwnAction.WAIT,)),
    (OwnMove.RETURNING, OwnEvent.CLOSED): _CLOSED,
    # Nothing works. The last path is tried now and then; a new one, or the peer's own move, ends the wait.
    (OwnMove.STRANDED, OwnEvent.MIGRATE): _GO,
    (OwnMove.STRANDED, OwnEvent.ANSWERED): _BACK,
    (OwnMove.STRANDED, OwnEvent.RETRANSMIT): OwnStep(OwnMove.STRANDED, (OwnAction.REPEAT,)),
    (OwnMove.STRANDED, OwnEvent.PEER_MOVED): OwnStep(OwnMove.STRANDED, (OwnAction.REPEAT,)),
    (OwnMove.STRANDED, OwnEvent.PATH_LOST): OwnStep(OwnMove.STRANDED),
    (OwnMove.STRANDED, OwnEvent.GAVE_UP): OwnStep(OwnMove.SETTLED, (OwnAction.GIVE_UP_FLOW,)),
    (OwnMove.STRANDED, OwnEvent.CLOSED): _CLOSED,
}

PEER_MOVE: dict[tuple[PeerMove, PeerEvent], PeerStep] = {
    (PeerMove.SETTLED, PeerEvent.RSYN_RECEIVED): PeerStep(PeerMove.PROVING, (PeerAction.ANSWER,)),
    (PeerMove.SETTLED, PeerEvent.RSYN_REPEATED): PeerStep(PeerMove.SETTLED, (PeerAction.ANSWER_ONCE,)),
    # The peer's newest wish counts.
    (PeerMove.PROVING, PeerEvent.RSYN_RECEIVED): PeerStep(PeerMove.PROVING, (PeerAction.ANSWER,)),
    (PeerMove.PROVING, PeerEvent.RSYN_REPEATED): PeerStep(PeerMove.PROVING, (PeerAction.ANSWER,)),
    (PeerMove.PROVING, PeerEvent.RETRANSMIT): PeerStep(PeerMove.PROVING, (PeerAction.ANSWER,)),
    (PeerMove.PROVING, PeerEvent.CONFIRMED): PeerStep(
        PeerMove.SETTLED, (PeerAction.FOLLOW, PeerAction.REPORT_MIGRATED)
    ),
    (PeerMove.PROVING, PeerEvent.GAVE_UP): PeerStep(PeerMove.SETTLED, (PeerAction.REPORT_FAILED,)),
}


def prototype_name(own: OwnMove, peer: PeerMove) -> str:
    """Both halves in one word: SPEC 5.1's, or that of a state that the prototype does not have."""
    if own in (OwnMove.RETURNING, OwnMove.STRANDED):
        return own.name
    sent, received = own is OwnMove.MOVING, peer is PeerMove.PROVING
    return {(False, False): "INITIAL", (True, False): "SENT", (False, True): "RECV", (True, True): "SENT_RECV"}[
        sent, received
    ]


def _as_mermaid(table: Mapping[Any, Any]) -> str:
    lines = ["stateDiagram-v2", "    [*] --> SETTLED"]
    changes: dict[tuple[Enum, Enum], list[str]] = {}
    for (state, event), step in table.items():
        if step.next_state is not state:
            changes.setdefault((state, step.next_state), []).append(event.name)
    lines += [
        f"    {state.name} --> {next_state.name}: {', '.join(events)}"
        for (state, next_state), events in changes.items()
    ]
    return "\n".join(lines)


def _as_table(table: Mapping[Any, Any]) -> str:
    lines = ["| State | Event | Next state | Actions, in order |", "|---|---|---|---|"]
    lines += [
        f"| {state.name} | {event.name} | {step.next_state.name} | {'; '.join(step.actions) or 'none'} |"
        for (state, event), step in table.items()
    ]
    return "\n".join(lines)


def as_markdown() -> str:
    """What ARCHITECTURE.md holds between its markers `<!-- migration -->` and `<!-- /migration -->`."""
    return _as_section("This end's own move", OWN_MOVE) + "\n" + _as_section("The peer's move", PEER_MOVE)


def _as_section(title: str, table: Mapping[Any, Any]) -> str:
    return f"{title}:\n\n```mermaid\n{_as_mermaid(table)}\n```\n\n{_as_table(table)}\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
