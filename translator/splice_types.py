"""What do a splice engine's users see? The types shared by the compiled engine and the pure Python one.

A *pair* is two connected TCP sockets, left and right, whose byte streams are passed on to each other. A
*direction* is one of its two streams. Each direction is in one `DirectionState`:

    state             bytes held  waits for             leaves it when
    SOURCE_EMPTY      none        EPOLLIN on the        bytes: passed on at once, or -> DESTINATION_FULL
                                  source                end of the source: -> SHUT
    SOURCE_READY      none        its next turn         as SOURCE_EMPTY (it had used up its byte budget)
    DESTINATION_FULL  some        EPOLLOUT on the       delivered: -> SOURCE_EMPTY
                                  destination           (the source is not read meanwhile)
    DRAINING          some        EPOLLOUT on the       as DESTINATION_FULL; the source's FIN or RST is here,
                                  destination           so -> SHUT or DELIVERED once all is passed on
    SHUT              none        -                     final: all delivered, FIN sent to the destination
    DELIVERED         none        acknowledgements of   final: the source was reset; all that it had sent is
                                  the destination       delivered, no FIN was sent
    CUT_OFF           discarded   -                     final: the destination was reset

Bytes are only taken from a source while the direction holds none. Hence EAGAIN from splice(2) into the pipe
always means that the source is empty, never that the pipe is full, and the reverse for splicing out of it.

Timeouts. An idle pair (no byte moved either way) ends after `idle_timeout_s`. Once one direction is SHUT the
pair is half-closed and waits for one side: for the destination of the other direction while bytes are held
for it, else for the source of that direction, which still has to send data or its FIN. If that side is silent
for its own fin timeout (`left_fin_timeout_s` or `right_fin_timeout_s`), the pair ends with LEFT_FIN_TIMEOUT
or RIGHT_FIN_TIMEOUT. Each byte moved starts the wait anew. This is what HAProxy's `timeout client-fin` (left)
and `timeout server-fin` (right) mean. The same timeouts bound how long a surviving side may take to accept
what a reset side had sent.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from serval_core.errors import OurMistake

# How many bytes a direction may move before other pairs get their turn.
BUDGET_BYTES = 1 << 20
# A direction copies through the thread's buffer until one read fills this many bytes; then it splices.
COPY_BYTES = 32 << 10
# Size of the thread's buffer: what is copied at once when no pipe can be had.
BUFFER_BYTES = 64 << 10
# A direction goes back to copying after this many consecutive drains below COPY_BYTES.
SMALL_DRAINS = 4
# Pipes kept empty for the next loan, per thread; further ones are closed when they come back.
IDLE_PIPES = 64
# Sizes to try after `pipe_bytes`; a pipe that cannot get even the last one is not worth having.
SMALLER_PIPE_BYTES = (256 << 10, 64 << 10)
# How long no new pipe is asked for after the kernel refused one.
PIPE_RETRY_S = 0.25
# How often the unacknowledged bytes of the survivor of a reset are looked at (there is no event for this).
LINGER_CHECK_S = 0.01


class CompletionReason(IntEnum):
    """Why a pair ended."""

    FINISHED = 0  # both directions reached EOF, everything is delivered, both FINs are sent
    LEFT_RESET = 1  # the left socket failed with left_errno; all that it had sent is delivered to the right
    RIGHT_RESET = 2
    IDLE_TIMEOUT = 3
    LEFT_FIN_TIMEOUT = 4  # half-closed, and the left side was silent for left_fin_timeout_s
    RIGHT_FIN_TIMEOUT = 5
    CANCELLED = 6  # cancel() or stop()
    FAILED = 7  # the engine itself could not go on (a bad descriptor, no memory): see left_errno, right_errno


class DirectionState(IntEnum):
    """Where one direction of a pair stands; the table is in the module docstring."""

    SOURCE_EMPTY = 0
    SOURCE_READY = 1
    DESTINATION_FULL = 2
    DRAINING = 3
    SHUT = 4
    DELIVERED = 5
    CUT_OFF = 6


class Completion(NamedTuple):
    """How a pair ended. Both descriptors are out of the engine and belong to the caller alone again.

    The byte counts are what the destination's socket has accepted. The errnos are 0 for a side that did not
    fail.
    """

    pair_id: int
    reason: CompletionReason
    left_to_right_bytes: int
    right_to_left_bytes: int
    left_errno: int
    right_errno: int
    duration_s: float


class PairCounters(NamedTuple):
    """A live pair: bytes delivered so far, bytes held in a pipe or buffer, and where each direction
    stands.
    """

    left_to_right_bytes: int
    right_to_left_bytes: int
    left_to_right_held_bytes: int
    right_to_left_held_bytes: int
    left_to_right_state: DirectionState
    right_to_left_state: DirectionState
    duration_s: float


# Names of the totals in counters(), in the order in which both engines keep them; "pairs_active" and one
# "completed_<reason>" per CompletionReason come on top.
COUNTER_NAMES = (
    "pairs_total",
    "left_to_right_bytes",
    "right_to_left_bytes",
    "undelivered_bytes",  # taken from a source and lost because the pair ended otherwise than FINISHED
    "spliced_bytes",
    "copied_bytes",
    "splice_calls",
    "copy_calls",  # recv and send
    "wakeups",  # returns from epoll_wait
    "budget_used_up",
    "false_ends",  # splice returned 0 and MSG_PEEK found that the stream had not ended
    "urgent_bytes",  # passed on as urgent data
    "pipes_open",
    "pipes_lent",
    "pipes_lent_high_water",
    "pipes_created",
    "pipes_discarded",  # closed because they were not empty when their pair ended
    "pipes_refused",  # the kernel would not give one: copied instead
    "epoll_errors",  # a borrowed descriptor could not be removed: the caller closed it too early
)


def check_settings(
    pipe_bytes: int,
    idle_timeout_s: float,
    left_fin_timeout_s: float,
    right_fin_timeout_s: float,
    threads: int,
) -> None:
    """Refuse engine settings that make no sense. Raises OurMistake."""
    if pipe_bytes < 0:
        raise OurMistake(f"pipe_bytes must be 0 (copy, never splice) or more, not {pipe_bytes}")
    for name, value in (
        ("idle_timeout_s", idle_timeout_s),
        ("left_fin_timeout_s", left_fin_timeout_s),
        ("right_fin_timeout_s", right_fin_timeout_s),
    ):
        if not value > 0:
            raise OurMistake(f"{name} must be above 0 (math.inf: never), not {value}")
    if threads < 1:
        raise OurMistake(f"threads must be 1 or more, not {threads}")


def pipe_sizes(pipe_bytes: int) -> list[int]:
    """The pipe sizes to try, in order; empty when the engine is to copy."""
    return [pipe_bytes, *(size for size in SMALLER_PIPE_BYTES if size < pipe_bytes)] if pipe_bytes else []
