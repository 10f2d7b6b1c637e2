"""Whatever the order of sends, reads, FINs and resets: is what arrives exactly what was sent, or the
beginning of it?"""

from __future__ import annotations

import contextlib
import random
import socket

import pytest
from splice_pairs import Relayed, reset, take_completions

from translator.splice_engine import Completion, CompletionReason, SpliceEngine

PAIRS = 4
STEPS = 60
RESETS = (CompletionReason.LEFT_RESET, CompletionReason.RIGHT_RESET)


class Talk:
    """One outer end of a pair that acts at random: what it has sent and received."""

    def __init__(self, end: socket.socket, chance: random.Random) -> None:
        end.setblocking(False)
        self.end = end
        self.chance = chance
        self.sent = bytearray()
        self.received = bytearray()
        self.fin_sent = False
        self.fin_received = False
        self.has_reset = False
        self.was_reset = False

    def send(self) -> None:
        size = int(2 ** self.chance.uniform(0, 19))
        with contextlib.suppress(BlockingIOError):
            data = self.chance.randbytes(size)
            self.sent += data[: self.end.send(data)]

    def receive(self, most_bytes: int) -> None:
        with contextlib.suppress(BlockingIOError):
            data = self.end.recv(most_bytes)
            self.received += data
            self.fin_received = not data

    def step(self) -> None:
        try:
            kind = self.chance.random()
            if kind < 0.5 and not self.fin_sent:
                self.send()
            elif kind < 0.97 and not self.fin_received:
                self.receive(int(2 ** self.chance.uniform(0, 19)))
            elif kind >= 0.97 and not self.fin_sent:
                self.end.shutdown(socket.SHUT_WR)
                self.fin_sent = True
        except (ConnectionResetError, BrokenPipeError):
            self.was_reset = True

    def is_over(self) -> bool:
        return self.has_reset or self.was_reset

    def finish(self) -> bool:
        """Send the FIN, read what is there. True when the stream has ended."""
        try:
            if not self.fin_sent:
                self.end.shutdown(socket.SHUT_WR)
                self.fin_sent = True
            if not self.fin_received:
                self.receive(1 << 20)
        except (ConnectionResetError, BrokenPipeError):
            self.was_reset = True
        except OSError:
            # ENOTCONN from shutdown: the reset has been reported before.
            self.was_reset = True
        return self.is_over() or self.fin_received


@pytest.mark.parametrize("with_resets", [False, True], ids=["orderly", "resets"])
@pytest.mark.parametrize("seed", range(20))
def test_random_interleavings(engine_class: type[SpliceEngine], seed: int, with_resets: bool) -> None:
    chance = random.Random(seed * 2 + with_resets)
    settings = {"pipe_bytes": chance.choice([1 << 20, 1 << 16, 4096, 0]), "threads": chance.choice([1, 2])}
    with engine_class(**settings) as engine, contextlib.ExitStack() as stack:
        talks: list[tuple[Talk, Talk]] = []
        relayed: list[Relayed] = []
        for number in range(PAIRS):
            buffer_bytes = chance.choice([None, 4096, 1 << 17])
            pair = Relayed(engine, number, buffer_bytes, buffer_bytes, narrow_right=chance.random() < 0.3)
            relayed.append(stack.enter_context(pair))
            talks.append((Talk(pair.client, chance), Talk(pair.server, chance)))
        for _ in range(STEPS * PAIRS):
            talk = chance.choice(chance.choice(talks))
            if talk.is_over():
                continue
            if with_resets and chance.random() < 0.01:
                reset(talk.end)
                talk.has_reset = True
            else:
                talk.step()
        completions: dict[int, Completion] = {}

        def note(taken: list[Completion]) -> None:
            for completion in taken:
                completions[completion.pair_id] = completion
                if completion.reason in RESETS:
                    # What the translator does: a reset in is a reset out.
                    reset(relayed[completion.pair_id].left)
                    reset(relayed[completion.pair_id].right)

        unfinished = [talk for both in talks for talk in both]
        while unfinished:
            unfinished = [talk for talk in unfinished if not talk.finish()]
            note(engine.completions())
        note(take_completions(engine, PAIRS - len(completions)))
        for number, (client, server) in enumerate(talks):
            completion = completions[number]
            assert client.sent.startswith(server.received)
            assert server.sent.startswith(client.received)
            if not client.is_over() and not server.is_over():
                assert completion.reason is CompletionReason.FINISHED
                assert (server.received, client.received) == (client.sent, server.sent)
            if completion.reason is CompletionReason.FINISHED:
                # Also where an end was reset after that: all had been delivered before.
                assert completion[2:4] == (len(client.sent), len(server.sent))
            else:
                assert completion.reason in RESETS
        totals = engine.counters()
        assert (totals["pipes_lent"], totals["pairs_active"], totals["epoll_errors"]) == (0, 0, 0)
