"""How does a connection move from state to state? The connection state machine, as one table.

Rules of this file:

1. `CONNECTION` is the whole truth: (state, event) -> (next state, actions). Nothing else assigns a state.
2. A pair that is not in the table cannot happen: it raises ImpossibleEvent, which names both. There is no
   default. An event that may come and changes nothing has a row with no action.
3. Whether an event has happened (nonce, version number, acknowledgement, which timer) is decided before the
   table is asked. The table never looks at a packet.
4. The new state holds before the first action runs. Actions run in the order given; what they do is written
   where they are carried out: active_open, passive_open and close.
5. Not states: whether the application has released the flow (that only decides when the transport may be
   taken down), and a migration under way (orthogonal, SPEC 5).

The states are those of SPEC 3.1, with its numbers. Listeners have no state: they exist or they do not.
`python -m serval_core.states` prints what ARCHITECTURE.md shows.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import NamedTuple

from serval_core.errors import OurMistake


class State(IntEnum):
    """Where a flow is in its life (SPEC 3.1)."""

    INIT = 0
    CONNECTED = 1
    REQUEST = 2
    RESPOND = 3
    FINWAIT1 = 4
    FINWAIT2 = 5
    TIMEWAIT = 6
    CLOSED = 7
    CLOSEWAIT = 8
    LASTACK = 9
    CLOSING = 11


class Event(IntEnum):
    """What can happen to a flow. Packets have passed every check of theirs before they become an event."""

    CONNECT = 0  # the application wants a connection
    SYN_RECEIVED = 1  # from a new client, or again from one that has no answer yet
    SYN_ACK_RECEIVED = 2  # the first one, or again from the same server
    HANDSHAKE_COMPLETED = 3  # ACK, bare ACK or first data of the client
    TCP_FIN_ACKNOWLEDGED = 4  # the peer's TCP has everything that we sent, FIN included; UDP: we closed
    FIN_RECEIVED = 5  # SAL FIN that was not seen before
    FIN_ACKNOWLEDGED = 6  # the peer has our SAL FIN
    RESET_RECEIVED = 7
    RETRANSMIT = 8  # the retransmission timer ran out, and tries are left
    GAVE_UP = 9  # no tries are left, or the state lasted too long
    RELEASE = 10  # the application is finished with both directions
    ABORT = 11  # the application, or its socket, wants the connection gone


class Action(StrEnum):
    """What a step does besides changing the state."""

    SEND_SYN = "send SYN"
    EXPECT_DATA = "expect data"
    SEND_SYN_ACK = "send SYN-ACK"
    OPEN_TRANSPORT = "open transport"
    SEND_HANDSHAKE_ACK = "send handshake ACK"
    REPORT_CONNECTED = "report connected"
    REPORT_ACCEPTED = "report accepted"
    REPORT_FAILURE = "report failure"
    FORGET = "forget"
    TELL_EXPIRED = "tell a peer of ours that it expired"
    FORGET_HALF_OPEN = "forget half-open flow"
    SEND_FIN = "send FIN"
    REPEAT_FIN = "repeat FIN"
    SEND_ACK = "send ACK"
    SEND_RESET = "send RST"
    END_STREAM = "end stream"
    STOP_RETRANSMISSION = "stop retransmission"
    LIMIT_RELEASED = "limit how long a released flow stays"
    RESET_TRANSPORT = "reset transport"
    CLOSE_TRANSPORT = "close transport"
    END_FLOW = "end flow"
    FINISH_WHEN_RELEASED = "close transport and end flow when released"


class Step(NamedTuple):
    """What one event does."""

    next_state: State
    actions: tuple[Action, ...] = ()


class ImpossibleEvent(OurMistake):
    """An event came in a state that the table has no row for."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(f"event {event.name} cannot happen in state {state.name}")
        self.state = state
        self.event = event


_RESET_BY_PEER = Step(State.CLOSED, (Action.RESET_TRANSPORT, Action.END_FLOW))
_TIRED_OF_PEER = Step(State.CLOSED, (Action.RESET_TRANSPORT, Action.END_FLOW))
_TIRED_OF_DATA = Step(State.CLOSED, (Action.SEND_RESET, Action.RESET_TRANSPORT, Action.END_FLOW))
_ABORTED = Step(State.CLOSED, (Action.SEND_RESET, Action.CLOSE_TRANSPORT, Action.END_FLOW))
_FORGOTTEN = Step(State.CLOSED, (Action.FORGET,))
_EXPIRED = Step(State.CLOSED, (Action.FORGET_HALF_OPEN,))
_FAILED = Step(State.CLOSED, (Action.REPORT_FAILURE,))

CONNECTION: dict[tuple[State, Event], Step] = {
    # Nothing has been sent yet.
    (State.INIT, Event.CONNECT): Step(State.REQUEST, (Action.SEND_SYN,)),
    (State.INIT, Event.SYN_RECEIVED): Step(State.RESPOND, (Action.EXPECT_DATA, Action.SEND_SYN_ACK)),
    # Active open: our SYN is out.
    (State.REQUEST, Event.RETRANSMIT): Step(State.REQUEST, (Action.SEND_SYN,)),
    (State.REQUEST, Event.SYN_ACK_RECEIVED): Step(
        State.CONNECTED, (Action.OPEN_TRANSPORT, Action.SEND_HANDSHAKE_ACK, Action.REPORT_CONNECTED)
    ),
    (State.REQUEST, Event.RESET_RECEIVED): _FAILED,
    (State.REQUEST, Event.GAVE_UP): _FAILED,
    (State.REQUEST, Event.RELEASE): _FORGOTTEN,
    (State.REQUEST, Event.ABORT): _FORGOTTEN,
    # Passive open: our SYN-ACK is out.
    (State.RESPOND, Event.SYN_RECEIVED): Step(State.RESPOND, (Action.SEND_SYN_ACK,)),
    (State.RESPOND, Event.RETRANSMIT): Step(State.RESPOND, (Action.SEND_SYN_ACK,)),
    (State.RESPOND, Event.HANDSHAKE_COMPLETED): Step(
        State.CONNECTED, (Action.OPEN_TRANSPORT, Action.REPORT_ACCEPTED)
    ),
    (State.RESPOND, Event.RESET_RECEIVED): _EXPIRED,
    (State.RESPOND, Event.GAVE_UP): Step(State.CLOSED, (Action.TELL_EXPIRED, Action.FORGET_HALF_OPEN)),
    (State.RESPOND, Event.ABORT): _EXPIRED,
    # Both directions are open.
    (State.CONNECTED, Event.SYN_ACK_RECEIVED): Step(State.CONNECTED, (Action.SEND_HANDSHAKE_ACK,)),
    (State.CONNECTED, Event.RETRANSMIT): Step(State.CONNECTED, (Action.SEND_HANDSHAKE_ACK,)),
    (State.CONNECTED, Event.TCP_FIN_ACKNOWLEDGED): Step(State.FINWAIT1, (Action.SEND_FIN,)),
    (State.CONNECTED, Event.FIN_RECEIVED): Step(
        State.CLOSEWAIT, (Action.STOP_RETRANSMISSION, Action.SEND_ACK, Action.END_STREAM)
    ),
    (State.CONNECTED, Event.RELEASE): Step(State.CONNECTED, (Action.LIMIT_RELEASED,)),
    (State.CONNECTED, Event.GAVE_UP): _TIRED_OF_DATA,
    (State.CONNECTED, Event.RESET_RECEIVED): _RESET_BY_PEER,
    (State.CONNECTED, Event.ABORT): _ABORTED,
    # The peer has closed, we have not.
    (State.CLOSEWAIT, Event.FIN_RECEIVED): Step(State.CLOSEWAIT, (Action.SEND_ACK,)),
    (State.CLOSEWAIT, Event.TCP_FIN_ACKNOWLEDGED): Step(State.LASTACK, (Action.SEND_FIN,)),
    (State.CLOSEWAIT, Event.RELEASE): Step(State.CLOSEWAIT, (Action.LIMIT_RELEASED,)),
    (State.CLOSEWAIT, Event.GAVE_UP): _TIRED_OF_DATA,
    (State.CLOSEWAIT, Event.RESET_RECEIVED): _RESET_BY_PEER,
    (State.CLOSEWAIT, Event.ABORT): _ABORTED,
    # Our FIN is out, the peer has not closed.
    (State.FINWAIT1, Event.FIN_ACKNOWLEDGED): Step(
        State.FINWAIT2, (Action.STOP_RETRANSMISSION, Action.LIMIT_RELEASED)
    ),
    (State.FINWAIT1, Event.FIN_RECEIVED): Step(State.CLOSING, (Action.SEND_ACK, Action.END_STREAM)),
    (State.FINWAIT1, Event.RETRANSMIT): Step(State.FINWAIT1, (Action.REPEAT_FIN,)),
    (State.FINWAIT1, Event.TCP_FIN_ACKNOWLEDGED): Step(State.FINWAIT1),
    (State.FINWAIT1, Event.RELEASE): Step(State.FINWAIT1),
    (State.FINWAIT1, Event.GAVE_UP): _TIRED_OF_PEER,
    (State.FINWAIT1, Event.RESET_RECEIVED): _RESET_BY_PEER,
    (State.FINWAIT1, Event.ABORT): _ABORTED,
    # The peer has our FIN and may go on sending.
    (State.FINWAIT2, Event.FIN_RECEIVED): Step(
        State.TIMEWAIT, (Action.SEND_ACK, Action.END_STREAM, Action.FINISH_WHEN_RELEASED)
    ),
    (State.FINWAIT2, Event.TCP_FIN_ACKNOWLEDGED): Step(State.FINWAIT2),
    (State.FINWAIT2, Event.RELEASE): Step(State.FINWAIT2, (Action.LIMIT_RELEASED,)),
    (State.FINWAIT2, Event.GAVE_UP): Step(State.CLOSED, (Action.CLOSE_TRANSPORT, Action.END_FLOW)),
    (State.FINWAIT2, Event.RESET_RECEIVED): _RESET_BY_PEER,
    (State.FINWAIT2, Event.ABORT): _ABORTED,
    # Both FINs are out, the peer does not have ours. It closed when we did (CLOSING) or before (LASTACK).
    (State.CLOSING, Event.FIN_ACKNOWLEDGED): Step(
        State.TIMEWAIT, (Action.STOP_RETRANSMISSION, Action.FINISH_WHEN_RELEASED)
    ),
    (State.CLOSING, Event.FIN_RECEIVED): Step(State.CLOSING, (Action.SEND_ACK,)),
    (State.CLOSING, Event.RETRANSMIT): Step(State.CLOSING, (Action.REPEAT_FIN,)),
    (State.CLOSING, Event.TCP_FIN_ACKNOWLEDGED): Step(State.CLOSING),
    (State.CLOSING, Event.RELEASE): Step(State.CLOSING),
    (State.CLOSING, Event.GAVE_UP): _TIRED_OF_PEER,
    (State.CLOSING, Event.RESET_RECEIVED): _RESET_BY_PEER,
    (State.CLOSING, Event.ABORT): _ABORTED,
    (State.LASTACK, Event.FIN_ACKNOWLEDGED): Step(
        State.CLOSED, (Action.STOP_RETRANSMISSION, Action.FINISH_WHEN_RELEASED)
    ),
    (State.LASTACK, Event.FIN_RECEIVED): Step(State.LASTACK, (Action.SEND_ACK,)),
    (State.LASTACK, Event.RETRANSMIT): Step(State.LASTACK, (Action.REPEAT_FIN,)),
    (State.LASTACK, Event.TCP_FIN_ACKNOWLEDGED): Step(State.LASTACK),
    (State.LASTACK, Event.RELEASE): Step(State.LASTACK),
    (State.LASTACK, Event.GAVE_UP): _TIRED_OF_PEER,
    (State.LASTACK, Event.RESET_RECEIVED): _RESET_BY_PEER,
    (State.LASTACK, Event.ABORT): _ABORTED,
    # Both FINs are out and acknowledged. A flow that the application has not released waits here for that,
    # since its socket may hold bytes to be read.
    (State.TIMEWAIT, Event.FIN_RECEIVED): Step(State.TIMEWAIT, (Action.SEND_ACK,)),
    (State.TIMEWAIT, Event.TCP_FIN_ACKNOWLEDGED): Step(State.TIMEWAIT),
    (State.TIMEWAIT, Event.RESET_RECEIVED): Step(State.TIMEWAIT),
    (State.TIMEWAIT, Event.RELEASE): Step(State.TIMEWAIT, (Action.FINISH_WHEN_RELEASED,)),
    (State.TIMEWAIT, Event.ABORT): Step(State.TIMEWAIT, (Action.FINISH_WHEN_RELEASED,)),
    (State.TIMEWAIT, Event.GAVE_UP): Step(State.CLOSED),
    (State.CLOSED, Event.FIN_RECEIVED): Step(State.CLOSED, (Action.SEND_ACK,)),
    (State.CLOSED, Event.TCP_FIN_ACKNOWLEDGED): Step(State.CLOSED),
    (State.CLOSED, Event.RESET_RECEIVED): Step(State.CLOSED),
    (State.CLOSED, Event.RELEASE): Step(State.CLOSED, (Action.FINISH_WHEN_RELEASED,)),
    (State.CLOSED, Event.ABORT): Step(State.CLOSED, (Action.FINISH_WHEN_RELEASED,)),
}


def as_mermaid() -> str:
    """The state changes as a Mermaid diagram. Rows that stay in their state are left to `as_table`."""
    lines = ["stateDiagram-v2", "    [*] --> INIT"]
    changes: dict[tuple[State, State], list[str]] = {}
    for (state, event), step in CONNECTION.items():
        if step.next_state is not state:
            changes.setdefault((state, step.next_state), []).append(event.name)
    lines += [
        f"    {state.name} --> {next_state.name}: {', '.join(events)}"
        for (state, next_state), events in changes.items()
    ]
    return "\n".join([*lines, "    CLOSED --> [*]"])


def as_table() -> str:
    """Every row as a Markdown table."""
    lines = ["| State | Event | Next state | Actions, in order |", "|---|---|---|---|"]
    lines += [
        f"| {state.name} | {event.name} | {step.next_state.name} | {'; '.join(step.actions) or 'none'} |"
        for (state, event), step in CONNECTION.items()
    ]
    return "\n".join(lines)


def as_markdown() -> str:
    """What ARCHITECTURE.md holds between its markers `<!-- states -->` and `<!-- /states -->`."""
    return f"```mermaid\n{as_mermaid()}\n```\n\n{as_table()}\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
