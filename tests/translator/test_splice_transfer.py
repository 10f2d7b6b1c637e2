"""Does every byte arrive, once, in order and unchanged?"""

from __future__ import annotations

import contextlib
import random
import socket
import threading

import pytest
from splice_pairs import (
    PATIENCE_S,
    Receiver,
    Relayed,
    Sender,
    eventually,
    receive_all,
    receive_exactly,
    send_until_stuck,
    take_completions,
    unacknowledged_bytes,
)

from translator.splice_engine import CompletionReason, SpliceEngine
from translator.splice_types import BUDGET_BYTES, COPY_BYTES


@pytest.mark.parametrize("pipe_bytes", [1 << 20, 64 << 10, 4096, 0])
def test_large_transfers_both_ways_at_once(engine_class: type[SpliceEngine], pipe_bytes: int) -> None:
    with engine_class(pipe_bytes=pipe_bytes) as engine, Relayed(engine) as pair:
        upload, download = 24_000_001, 16_000_003
        at_server, at_client = Receiver(pair.server), Receiver(pair.client)
        from_client = Sender(pair.client, upload, seed=1)
        from_server = Sender(pair.server, download, seed=2)
        assert at_server.digest() == from_client.digest
        assert at_client.digest() == from_server.digest
        completion = pair.completion()
        assert completion.reason is CompletionReason.FINISHED
        assert (completion.left_to_right_bytes, completion.right_to_left_bytes) == (upload, download)
        assert (completion.left_errno, completion.right_errno) == (0, 0)
        totals = engine.counters()
        assert totals["left_to_right_bytes"] == upload
        assert totals["right_to_left_bytes"] == download
        assert totals["spliced_bytes"] + totals["copied_bytes"] == upload + download
        if pipe_bytes:
            assert totals["spliced_bytes"] > totals["copied_bytes"]
        else:
            assert (totals["splice_calls"], totals["pipes_created"]) == (0, 0)
        assert totals["pipes_lent"] == 0


def test_small_socket_buffers_make_every_write_partial(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine, send_bytes=2048, receive_bytes=2048) as pair:
        at_server, at_client = Receiver(pair.server), Receiver(pair.client)
        from_client = Sender(pair.client, 700_001, seed=3, largest_piece=1 << 14)
        from_server = Sender(pair.server, 500_003, seed=4, largest_piece=1 << 14)
        assert at_server.digest() == from_client.digest
        assert at_client.digest() == from_server.digest
        assert pair.completion().reason is CompletionReason.FINISHED


def test_single_bytes_are_passed_on_one_by_one(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine) as pair:
        for number in range(1000):
            byte = bytes((number & 0xFF,))
            pair.client.sendall(byte)
            assert pair.server.recv(10) == byte
            pair.server.sendall(byte)
            assert pair.client.recv(10) == byte
        eventually(lambda: pair.counters()[:2] == (1000, 1000), "all counted")
        assert engine.counters()["splice_calls"] == 0


@pytest.mark.parametrize("seed", range(6))
def test_requests_and_answers_of_all_sizes(engine_class: type[SpliceEngine], seed: int) -> None:
    """Sizes around every threshold: the direction changes between copying and splicing again and again."""
    chance = random.Random(seed)
    edges = [1, 1448, 4096, 32767, 32768, 32769, 65535, 65536, 65537, 1 << 20, (1 << 20) + 1]
    with engine_class() as engine, Relayed(engine) as pair:
        for _ in range(40):
            size = chance.choice([*edges, chance.randrange(1, 300_000)])
            sender, receiver = chance.choice([(pair.client, pair.server), (pair.server, pair.client)])
            data = chance.randbytes(size)
            writer = threading.Thread(target=sender.sendall, args=(data,), daemon=True)
            writer.start()
            assert receive_exactly(receiver, size) == data
            writer.join(PATIENCE_S)


def test_bytes_that_came_before_the_pair_was_added(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine, start=False) as pair:
        pair.client.sendall(b"request")
        pair.server.sendall(b"banner")
        pair.start()
        assert receive_exactly(pair.server, 7) == b"request"
        assert receive_exactly(pair.client, 6) == b"banner"


def test_a_connection_that_was_over_before_the_pair_was_added(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine, start=False) as pair:
        pair.client.sendall(b"request")
        pair.client.shutdown(socket.SHUT_WR)
        pair.server.sendall(b"answer")
        pair.server.shutdown(socket.SHUT_WR)
        pair.start()
        assert receive_all(pair.server) == b"request"
        assert receive_all(pair.client) == b"answer"
        assert pair.completion()[1:4] == (CompletionReason.FINISHED, 7, 6)


def test_many_pairs_at_once_keep_their_bytes_apart(engine_class: type[SpliceEngine]) -> None:
    with engine_class(threads=2) as engine, contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(Relayed(engine, number)) for number in range(40)]
        receivers = [(Receiver(pair.server), Receiver(pair.client)) for pair in pairs]
        senders = [
            (
                Sender(pair.client, 10_000 * pair.pair_id, seed=pair.pair_id),
                Sender(pair.server, 400_000 - 10_000 * pair.pair_id, seed=1000 + pair.pair_id),
            )
            for pair in pairs
        ]
        for received, sent in zip(receivers, senders, strict=True):
            assert [each.digest() for each in received] == [each.digest for each in sent]
        completions = take_completions(engine, len(pairs))
        assert {each.reason for each in completions} == {CompletionReason.FINISHED}
        assert sorted(each.left_to_right_bytes for each in completions) == [10_000 * n for n in range(40)]


def test_a_blocked_destination_does_not_hold_up_other_pairs(engine_class: type[SpliceEngine]) -> None:
    with (
        engine_class() as engine,
        Relayed(engine, 1) as blocked,
        Relayed(engine, 2) as busy,
        Relayed(engine, 3) as calm,
    ):
        sent = send_until_stuck(blocked.client)
        assert blocked.counters().left_to_right_held_bytes > 0
        stop = threading.Event()

        def flood() -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    busy.client.sendall(bytes(1 << 20))

        def swallow() -> None:
            while busy.server.recv(1 << 20):
                continue

        threads = [threading.Thread(target=each, daemon=True) for each in (flood, swallow)]
        for thread in threads:
            thread.start()
        for number in range(300):
            calm.client.sendall(b"%06d" % number)
            assert receive_exactly(calm.server, 6) == b"%06d" % number
        stop.set()
        threads[0].join(PATIENCE_S)
        busy.client.shutdown(socket.SHUT_WR)
        threads[1].join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in threads)
        blocked.client.shutdown(socket.SHUT_WR)
        assert len(receive_all(blocked.server)) == sent


def test_more_than_the_byte_budget_takes_several_turns(engine_class: type[SpliceEngine]) -> None:
    """No event announces the rest of what waits in the source: the engine has to come back to it by itself."""
    data = random.Random(9).randbytes(3 * BUDGET_BYTES)
    with engine_class() as engine, Relayed(engine, forced_bytes=4 * BUDGET_BYTES, start=False) as pair:
        pair.client.sendall(data)
        eventually(lambda: unacknowledged_bytes(pair.client) == 0, "all is in the left socket")
        pair.start()
        assert receive_exactly(pair.server, len(data)) == data
        assert engine.counters()["budget_used_up"] >= 2


def test_small_messages_are_copied_again_after_a_large_one(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine) as pair:

        def exchange(size: int) -> None:
            pair.client.sendall(bytes(size))
            receive_exactly(pair.server, size)

        def exchanges_without_splicing() -> bool:
            before = engine.counters()["splice_calls"]
            for _ in range(10):
                exchange(10)
            return engine.counters()["splice_calls"] == before

        exchange(COPY_BYTES * 8)
        assert engine.counters()["splice_calls"] > 0
        eventually(exchanges_without_splicing, "back to copying")


@pytest.mark.parametrize("around_bytes", [10, 200_000])
def test_urgent_data_arrives_as_urgent_data(engine_class: type[SpliceEngine], around_bytes: int) -> None:
    """Reads and splices stop at the mark of urgent data, and splice returns 0 there although more follows."""
    before, after = random.Random(5).randbytes(around_bytes), random.Random(6).randbytes(around_bytes)
    with engine_class() as engine, Relayed(engine) as pair:
        pair.client.sendall(before)
        pair.client.send(b"!", socket.MSG_OOB)
        pair.client.sendall(after)
        pair.client.shutdown(socket.SHUT_WR)
        assert receive_exactly(pair.server, len(before)) == before
        eventually(lambda: pair.counters().left_to_right_bytes == 2 * around_bytes + 1, "all passed on")
        assert pair.server.recv(1, socket.MSG_OOB) == b"!"
        assert receive_all(pair.server) == after
        assert engine.counters()["urgent_bytes"] == 1


def test_urgent_data_within_a_stream_loses_nothing(engine_class: type[SpliceEngine]) -> None:
    """Urgent bytes at random places of a fast stream: marks come up while the direction is splicing.

    Urgent data that is followed by more before it was fetched becomes ordinary (RFC 6093 section 3.2), so the
    receiver takes all in line."""
    chance = random.Random(7)
    pieces = [chance.randbytes(chance.randrange(1, 200_000)) for _ in range(120)]
    with engine_class() as engine, Relayed(engine) as pair:
        pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)

        def send() -> None:
            for piece in pieces:
                pair.client.sendall(piece)
                pair.client.send(b"U", socket.MSG_OOB)
            pair.client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        assert receive_all(pair.server) == b"".join(piece + b"U" for piece in pieces)
        sender.join(PATIENCE_S)
        assert engine.counters()["urgent_bytes"] > 0
