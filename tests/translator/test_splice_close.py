"""How does a pair end without an error: half-close, timeouts, cancel?"""

from __future__ import annotations

import math
import socket

import pytest
from splice_pairs import (
    Receiver,
    Relayed,
    Sender,
    eventually,
    receive_all,
    receive_exactly,
    send_until_stuck,
    take_completions,
)

from translator.splice_engine import CompletionReason, DirectionState, SpliceEngine


def first_and_second(pair: Relayed, first: str) -> tuple[socket.socket, socket.socket]:
    """The end that closes first, and the other."""
    return (pair.client, pair.server) if first == "left" else (pair.server, pair.client)


@pytest.mark.parametrize("first", ["left", "right"])
@pytest.mark.parametrize("size", [1, 1_000_000])
def test_data_flows_one_way_after_the_other_has_ended(
    engine_class: type[SpliceEngine], first: str, size: int
) -> None:
    with engine_class() as engine, Relayed(engine) as pair:
        one, other = first_and_second(pair, first)
        one.sendall(b"request")
        one.shutdown(socket.SHUT_WR)
        assert receive_all(other) == b"request"
        answer = Receiver(one)
        sent = Sender(other, size, seed=size)
        assert answer.digest() == sent.digest
        completion = pair.completion()
        assert completion.reason is CompletionReason.FINISHED
        assert sorted(completion[2:4]) == sorted((7, size))
        assert completion.duration_s > 0


def test_one_direction_is_shut_and_the_other_open_in_between(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine) as pair:
        pair.client.shutdown(socket.SHUT_WR)
        assert receive_all(pair.server) == b""
        eventually(lambda: pair.counters().left_to_right_state is DirectionState.SHUT, "left to right shut")
        assert pair.counters().right_to_left_state is DirectionState.SOURCE_EMPTY
        assert engine.completions() == []
        pair.server.close()
        assert receive_all(pair.client) == b""
        assert pair.completion().reason is CompletionReason.FINISHED


def test_a_fin_does_not_overtake_what_was_sent_before(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine, send_bytes=1 << 16, receive_bytes=1 << 16) as pair:
        sent = send_until_stuck(pair.client)
        pair.client.shutdown(socket.SHUT_WR)
        # The FIN itself waits behind the full window of the left socket; the engine must not invent an end
        # before.
        assert pair.counters().left_to_right_state in (
            DirectionState.DESTINATION_FULL,
            DirectionState.DRAINING,
        )
        assert len(receive_all(pair.server)) == sent
        pair.server.close()
        assert pair.completion().left_to_right_bytes == sent


def test_an_end_behind_a_full_destination_is_draining(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine, narrow_right=True) as pair:
        pair.client.sendall(bytes(30_000))
        eventually(
            lambda: pair.counters().left_to_right_bytes + pair.counters().left_to_right_held_bytes == 30_000,
            "the engine has taken everything",
        )
        assert pair.counters().left_to_right_state is DirectionState.DESTINATION_FULL
        pair.client.shutdown(socket.SHUT_WR)
        eventually(lambda: pair.counters().left_to_right_state is DirectionState.DRAINING, "draining")
        assert len(receive_all(pair.server)) == 30_000
        eventually(lambda: pair.counters().left_to_right_state is DirectionState.SHUT, "shut")


def test_an_idle_pair_ends_and_its_sockets_stay_as_they_were(engine_class: type[SpliceEngine]) -> None:
    with engine_class(idle_timeout_s=0.1) as engine, Relayed(engine) as pair:
        completion = pair.completion()
        assert completion.reason is CompletionReason.IDLE_TIMEOUT
        assert completion.duration_s >= 0.1
        # Nothing was shut or closed: the borrowed sockets still work in both directions.
        pair.left.sendall(b"to the client")
        assert receive_exactly(pair.client, 13) == b"to the client"
        pair.server.sendall(b"to the right")
        pair.right.settimeout(5)
        assert receive_exactly(pair.right, 12) == b"to the right"


def test_activity_either_way_keeps_a_pair_from_idling(engine_class: type[SpliceEngine]) -> None:
    idle_timeout_s = 1.0
    with (
        engine_class(idle_timeout_s=idle_timeout_s) as engine,
        Relayed(engine, 1) as talking,
        Relayed(engine, 2) as silent,
    ):
        completions = []
        while not completions:
            talking.server.sendall(b"tick")
            assert receive_exactly(talking.client, 4) == b"tick"
            completions = engine.completions()
        assert [each.pair_id for each in completions] == [silent.pair_id]
        assert completions[0].duration_s >= idle_timeout_s


def test_an_infinite_timeout_is_never_over(engine_class: type[SpliceEngine]) -> None:
    with (
        engine_class(idle_timeout_s=math.inf, left_fin_timeout_s=math.inf) as engine,
        Relayed(engine) as pair,
    ):
        pair.client.sendall(b"x")
        assert receive_exactly(pair.server, 1) == b"x"
        pair.server.shutdown(socket.SHUT_WR)
        assert receive_all(pair.client) == b""
        pair.client.close()
        assert pair.completion().reason is CompletionReason.FINISHED


@pytest.mark.parametrize("silent", ["left", "right"])
def test_a_side_that_never_sends_its_fin_times_out(engine_class: type[SpliceEngine], silent: str) -> None:
    """Only the fin timeout of the side that is waited for counts: the other one would be over at once."""
    left_s, right_s = (0.2, 0.01) if silent == "left" else (0.01, 0.2)
    with (
        engine_class(left_fin_timeout_s=left_s, right_fin_timeout_s=right_s) as engine,
        Relayed(engine) as pair,
    ):
        _, closing = first_and_second(pair, silent)
        closing.shutdown(socket.SHUT_WR)
        completion = pair.completion()
        assert completion.duration_s >= 0.2
        expected = (
            CompletionReason.LEFT_FIN_TIMEOUT if silent == "left" else CompletionReason.RIGHT_FIN_TIMEOUT
        )
        assert completion.reason is expected
        assert (completion.left_errno, completion.right_errno) == (0, 0)


@pytest.mark.parametrize("silent", ["left", "right"])
def test_a_half_closed_side_that_takes_nothing_times_out(
    engine_class: type[SpliceEngine], silent: str
) -> None:
    """It has sent its FIN, but no longer reads what the other side sends."""
    left_s, right_s = (0.3, 60.0) if silent == "left" else (60.0, 0.3)
    with (
        engine_class(left_fin_timeout_s=left_s, right_fin_timeout_s=right_s) as engine,
        Relayed(engine) as pair,
    ):
        taker, giver = first_and_second(pair, silent)
        send_until_stuck(giver)
        taker.shutdown(socket.SHUT_WR)
        assert receive_all(giver) == b""
        expected = (
            CompletionReason.LEFT_FIN_TIMEOUT if silent == "left" else CompletionReason.RIGHT_FIN_TIMEOUT
        )
        assert pair.completion().reason is expected
        assert engine.counters()["undelivered_bytes"] > 0
        assert engine.counters()["pipes_lent"] == 0


def test_each_byte_starts_the_fin_timeout_anew(engine_class: type[SpliceEngine]) -> None:
    fin_timeout_s = 1.0
    with (
        engine_class(right_fin_timeout_s=fin_timeout_s) as engine,
        Relayed(engine, 1) as talking,
        Relayed(engine, 2) as silent,
    ):
        for pair in (talking, silent):
            pair.client.shutdown(socket.SHUT_WR)
            assert receive_all(pair.server) == b""
        completions = []
        while not completions:
            talking.server.sendall(b"tick")
            assert receive_exactly(talking.client, 4) == b"tick"
            completions = engine.completions()
        assert [each[:2] for each in completions] == [(silent.pair_id, CompletionReason.RIGHT_FIN_TIMEOUT)]


def test_cancel_ends_a_pair_without_touching_its_sockets(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine) as pair:
        pair.client.sendall(b"before")
        assert receive_exactly(pair.server, 6) == b"before"
        assert engine.cancel(pair.pair_id) is True
        completion = pair.completion()
        assert completion.reason is CompletionReason.CANCELLED
        assert completion.left_to_right_bytes == 6
        assert engine.cancel(pair.pair_id) is False
        pair.client.sendall(b"after")
        pair.left.settimeout(5)
        assert receive_exactly(pair.left, 5) == b"after"


def test_cancel_at_once_and_twice(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine:
        for pair_id in range(200):
            with Relayed(engine, pair_id) as pair:
                assert engine.cancel(pair_id)
                assert engine.cancel(pair_id)
                assert pair.completion().reason is CompletionReason.CANCELLED
        assert engine.counters()["completed_cancelled"] == 200


def test_cancel_after_the_end_changes_nothing(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine) as pair:
        pair.client.close()
        pair.server.close()
        eventually(lambda: engine.counters()["completed_finished"] == 1, "finished")
        assert engine.cancel(pair.pair_id) is True
        assert take_completions(engine)[0].reason is CompletionReason.FINISHED
