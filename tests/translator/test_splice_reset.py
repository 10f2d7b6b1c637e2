"""When one side fails, is the news passed on, and is nothing lost that could still be delivered?"""

from __future__ import annotations

import errno
import random
import socket
import threading

import pytest
from splice_pairs import (
    PATIENCE_S,
    Relayed,
    eventually,
    receive_all,
    receive_exactly,
    receive_until_reset,
    reset,
    send_until_stuck,
    unacknowledged_bytes,
)

from translator.splice_engine import CompletionReason, DirectionState, SpliceEngine


def outer_ends(pair: Relayed, side: str) -> tuple[socket.socket, socket.socket]:
    """The outer end on that side, and the one on the other."""
    return (pair.client, pair.server) if side == "left" else (pair.server, pair.client)


def reset_reason(side: str) -> CompletionReason:
    return CompletionReason.LEFT_RESET if side == "left" else CompletionReason.RIGHT_RESET


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reset_says_which_side_and_why(engine_class: type[SpliceEngine], side: str) -> None:
    with engine_class() as engine, Relayed(engine) as pair:
        pair.client.sendall(b"x")
        assert receive_exactly(pair.server, 1) == b"x"
        dying, _ = outer_ends(pair, side)
        reset(dying)
        completion = pair.completion()
        assert completion.reason is reset_reason(side)
        errnos = (completion.left_errno, completion.right_errno)
        assert errnos == ((errno.ECONNRESET, 0) if side == "left" else (0, errno.ECONNRESET))


def test_a_reset_before_the_pair_was_added(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine, start=False) as pair:
        pair.client.sendall(b"last words")
        eventually(lambda: unacknowledged_bytes(pair.client) == 0, "last words are in the left socket")
        reset(pair.client)
        pair.start()
        assert receive_exactly(pair.server, 10) == b"last words"
        assert pair.completion().reason is CompletionReason.LEFT_RESET


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [100, 50_000, 3_000_000])
def test_what_was_sent_before_a_reset_is_delivered_before_the_completion(
    engine_class: type[SpliceEngine], side: str, size: int
) -> None:
    """The caller may abort the other side when it has the completion: that must not destroy anything
    either."""
    data = random.Random(size).randbytes(size)
    with engine_class() as engine, Relayed(engine) as pair:
        dying, surviving = outer_ends(pair, side)
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(receive_until_reset(surviving)), daemon=True)
        reader.start()
        dying.sendall(data)
        eventually(lambda: unacknowledged_bytes(dying) == 0, "all is on its way")
        reset(dying)
        assert pair.completion().reason is reset_reason(side)
        reset(pair.right if side == "left" else pair.left)
        reader.join(PATIENCE_S)
        assert received == [data]


def test_a_survivor_that_reads_late_gets_everything(engine_class: type[SpliceEngine]) -> None:
    """The survivor's socket is full and the engine holds bytes: the completion waits until it has them
    all."""
    data = random.Random(8).randbytes(30_000)
    with engine_class() as engine, Relayed(engine, narrow_right=True) as pair:
        pair.client.sendall(data)
        eventually(lambda: unacknowledged_bytes(pair.client) == 0, "all is on its way")
        reset(pair.client)
        eventually(
            lambda: pair.counters().left_to_right_state is DirectionState.DRAINING, "the reset is known"
        )
        assert pair.counters().left_to_right_held_bytes > 0
        assert engine.completions() == []
        assert receive_exactly(pair.server, len(data)) == data
        assert pair.completion()[1:3] == (CompletionReason.LEFT_RESET, len(data))
        assert engine.counters()["undelivered_bytes"] == 0


def test_a_survivor_that_takes_nothing_is_given_up_after_its_fin_timeout(
    engine_class: type[SpliceEngine],
) -> None:
    with (
        engine_class(left_fin_timeout_s=0.01, right_fin_timeout_s=0.3) as engine,
        Relayed(engine) as pair,
    ):
        send_until_stuck(pair.client)
        reset(pair.client)
        completion = pair.completion()
        assert completion.reason is CompletionReason.LEFT_RESET
        assert completion.duration_s >= 0.3
        totals = engine.counters()
        assert totals["undelivered_bytes"] > 0
        assert totals["pipes_discarded"] == 1
        assert totals["pipes_lent"] == 0
        assert totals["pipes_open"] == 0


def test_unacknowledged_bytes_are_waited_for_no_longer_than_the_fin_timeout(
    engine_class: type[SpliceEngine],
) -> None:
    """All bytes are in the survivor's socket, none is held, but its peer has a closed window."""
    with (
        engine_class(right_fin_timeout_s=0.3) as engine,
        Relayed(engine, send_bytes=1 << 18, receive_bytes=1 << 12) as pair,
    ):
        # More than the server's receive buffer, less than the right socket's send buffer.
        pair.client.sendall(bytes(60_000))
        eventually(lambda: pair.counters().left_to_right_bytes == 60_000, "all in the right socket")
        assert unacknowledged_bytes(pair.right) > 0
        reset(pair.client)
        eventually(
            lambda: pair.counters().left_to_right_state is DirectionState.DELIVERED, "delivered to the socket"
        )
        completion = pair.completion()
        assert completion.reason is CompletionReason.LEFT_RESET
        assert completion.duration_s >= 0.3
        assert completion.left_to_right_bytes == 60_000


def test_the_answer_that_came_with_a_reset_reaches_the_client(engine_class: type[SpliceEngine]) -> None:
    """A server refuses an upload: it answers, then resets because it has not read everything."""
    answer = b"413 too large" * 1000
    with engine_class() as engine, Relayed(engine) as pair:
        send_until_stuck(pair.client)
        pair.server.sendall(answer)
        eventually(lambda: unacknowledged_bytes(pair.server) == 0, "the answer is on its way")
        reset(pair.server)
        completion = pair.completion()
        assert completion.reason is CompletionReason.RIGHT_RESET
        assert completion.right_to_left_bytes == len(answer)
        assert engine.counters()["undelivered_bytes"] > 0
        reset(pair.left)
        assert receive_until_reset(pair.client) == answer


def test_writing_to_a_dead_side_ends_the_pair(engine_class: type[SpliceEngine]) -> None:
    """The server closed for good; the next bytes of the client meet a RST."""
    with engine_class() as engine, Relayed(engine) as pair:
        pair.server.close()
        assert receive_all(pair.client) == b""
        pair.client.sendall(b"to nobody")
        completion = pair.completion()
        assert completion.reason is CompletionReason.RIGHT_RESET
        assert completion.right_errno in (errno.ECONNRESET, errno.EPIPE)


def test_a_reset_after_a_fin(engine_class: type[SpliceEngine]) -> None:
    """The client has half-closed, and dies while the answer is on its way."""
    with engine_class() as engine, Relayed(engine) as pair:
        pair.client.shutdown(socket.SHUT_WR)
        assert receive_all(pair.server) == b""
        send_until_stuck(pair.server)
        reset(pair.client)
        completion = pair.completion()
        assert completion.reason is CompletionReason.LEFT_RESET
        assert completion.left_errno in (errno.ECONNRESET, errno.EPIPE)
        assert completion.right_errno == 0


def test_both_sides_reset(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine, start=False) as pair:
        reset(pair.client)
        reset(pair.server)
        pair.start()
        completion = pair.completion()
        assert completion.reason in (CompletionReason.LEFT_RESET, CompletionReason.RIGHT_RESET)
        assert errno.ECONNRESET in (completion.left_errno, completion.right_errno)


def test_a_timed_out_connection_is_reported_with_its_own_errno(engine_class: type[SpliceEngine]) -> None:
    """TCP_USER_TIMEOUT on a side whose peer keeps its window closed."""
    with engine_class() as engine, Relayed(engine, send_bytes=1 << 16, receive_bytes=1 << 12) as pair:
        pair.right.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 200)
        send_until_stuck(pair.client)
        completion = pair.completion()
        assert completion.reason is CompletionReason.RIGHT_RESET
        assert completion.right_errno == errno.ETIMEDOUT
