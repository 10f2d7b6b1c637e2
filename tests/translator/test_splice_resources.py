"""What does the engine use, does it give everything back, and what if there is not enough?"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from splice_pairs import (
    Receiver,
    Relayed,
    Sender,
    eventually,
    no_descriptor_left,
    open_descriptors,
    receive_exactly,
    reset,
    send_until_stuck,
    take_completions,
    unacknowledged_bytes,
)

from serval_core.errors import OurMistake
from translator import splice_ext, splice_fallback
from translator.splice_engine import CompletionReason, SpliceEngine
from translator.splice_types import COPY_BYTES, COUNTER_NAMES, IDLE_PIPES


def start_with_full_pipe(pair: Relayed, data: bytes) -> int:
    """Start a pair with a narrow right side while all of `data` waits in its left socket.

    The first COPY_BYTES of a stream are copied, so these are taken out at the server; more than the narrow sockets
    hold follows through a pipe. How many bytes are still to come at the server.
    """
    pair.client.sendall(data)
    eventually(lambda: unacknowledged_bytes(pair.client) == 0, "all is in the left socket")
    pair.start()
    taken = len(receive_exactly(pair.server, COPY_BYTES + 1))
    eventually(lambda: pair.counters().left_to_right_held_bytes > 0, "a full pipe")
    return len(data) - taken


def run_program(text: str) -> str:
    """What a Python program prints, run in a process of its own to its proper end."""
    ended = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False, cwd=os.getcwd()
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture
def room_for_10000_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= 10_000, "this test needs `ulimit -Hn` of 10000 or more"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 10_000), hard))


@pytest.mark.usefixtures("room_for_10000_descriptors")
def test_two_thousand_pairs_and_nothing_left(engine_class: type[SpliceEngine]) -> None:
    count = 2000
    with no_descriptor_left():
        engine = engine_class()
        with contextlib.ExitStack() as stack:
            pairs = [stack.enter_context(Relayed(engine, number)) for number in range(count)]
            for pair in pairs:
                pair.client.sendall(b"request %d" % pair.pair_id)
            for pair in pairs:
                assert pair.server.recv(100) == b"request %d" % pair.pair_id
                pair.server.sendall(b"answer %d" % pair.pair_id)
            for pair in pairs:
                assert pair.client.recv(100) == b"answer %d" % pair.pair_id
            totals = engine.counters()
            assert (totals["pairs_active"], totals["pairs_total"]) == (count, count)
            assert totals["pipes_open"] == 0
            for pair in pairs:
                if pair.pair_id % 2:
                    pair.client.close()
                    pair.server.close()
                else:
                    reset(pair.client)
            completions = take_completions(engine, count)
            assert len({each.pair_id for each in completions}) == count
            totals = engine.counters()
            assert totals["pairs_active"] == 0
            assert totals["completed_finished"] == totals["completed_left_reset"] == count // 2
            assert totals["epoll_errors"] == 0
            engine.stop()


def test_stop_cancels_what_is_active_and_leaves_no_descriptor(engine_class: type[SpliceEngine]) -> None:
    with no_descriptor_left(), contextlib.ExitStack() as stack:
        engine = engine_class(threads=3)
        threads_before = threading.active_count()
        pairs = [stack.enter_context(Relayed(engine, number)) for number in range(12)]
        for pair in pairs[:6]:
            send_until_stuck(pair.client)
        assert engine.counters()["pipes_lent"] == 6
        engine.stop()
        assert threading.active_count() == threads_before - 3
        completions = engine.completions()
        assert sorted(each.pair_id for each in completions) == list(range(12))
        assert {each.reason for each in completions} == {CompletionReason.CANCELLED}
        assert (engine.counters()["pipes_open"], engine.counters()["pipes_lent"]) == (0, 0)
        assert engine.notification_fd == -1
        engine.stop()
        with pytest.raises(OurMistake, match="stopped"):
            engine.add(99, pairs[0].left.fileno(), pairs[0].right.fileno())


def test_an_engine_that_is_never_stopped_does_not_keep_the_program_alive(
    engine_class: type[SpliceEngine],
) -> None:
    program = f"from {engine_class.__module__} import SpliceEngine; engine = SpliceEngine(); print('done')"
    assert run_program(program) == "done\n"


def test_pipes_are_lent_only_while_bytes_are_pending(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(Relayed(engine, number)) for number in range(20)]
        for pair in pairs:
            received, sent = Receiver(pair.server), Sender(pair.client, 300_000, seed=pair.pair_id)
            assert received.digest() == sent.digest
        totals = engine.counters()
        assert totals["spliced_bytes"] > 0
        assert totals["pipes_lent"] == 0
        assert totals["pipes_created"] == 1, "one after the other, all pairs share one pipe"
        assert totals["pairs_active"] == 20


def test_more_pipes_than_the_pool_keeps_are_closed_again(engine_class: type[SpliceEngine]) -> None:
    count = IDLE_PIPES + 8
    with engine_class() as engine, contextlib.ExitStack() as stack:
        pairs = [
            stack.enter_context(Relayed(engine, number, narrow_right=True, start=False))
            for number in range(count)
        ]
        rest = [start_with_full_pipe(pair, bytes(60_000)) for pair in pairs]
        assert engine.counters()["pipes_lent"] == count
        for pair, missing in zip(pairs, rest, strict=True):
            receive_exactly(pair.server, missing)
        eventually(lambda: engine.counters()["pipes_lent"] == 0, "all came back")
        totals = engine.counters()
        assert totals["pipes_open"] == IDLE_PIPES
        assert totals["pipes_lent_high_water"] == count
        assert totals["pipes_discarded"] == 0


def test_bytes_in_a_pipe_never_reach_another_connection(engine_class: type[SpliceEngine]) -> None:
    """Pairs die with full pipes; the pairs after them get pipes that hold nothing."""
    with engine_class() as engine:
        for generation in range(10):
            stamp = bytes((65 + generation,))
            with Relayed(engine, 1000 + generation, narrow_right=True, start=False) as dying:
                start_with_full_pipe(dying, stamp * 60_000)
                assert engine.counters()["pipes_lent"] == 1
                reset(dying.server)
                assert dying.completion().reason is CompletionReason.RIGHT_RESET
            with Relayed(engine, generation) as living:
                own = stamp.lower() * 400_000
                writer = threading.Thread(target=living.client.sendall, args=(own,), daemon=True)
                writer.start()
                assert receive_exactly(living.server, len(own)) == own
                writer.join()
                living.client.close()
                living.server.close()
                assert living.completion().reason is CompletionReason.FINISHED
        assert engine.counters()["pipes_discarded"] == 10


WITHOUT_PIPES = """
import resource, sys
sys.path.insert(0, {tests!r})
from splice_pairs import Receiver, Relayed, Sender, open_descriptors
from {module} import SpliceEngine
engine = SpliceEngine()
pairs = [Relayed(engine, number) for number in range(4)]
resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() - 1, 4096))
for pair in pairs:
    received, sent = Receiver(pair.server), Sender(pair.client, 3_000_000, seed=pair.pair_id)
    assert received.digest() == sent.digest
totals = engine.counters()
assert totals["pipes_refused"] > 0, totals
assert totals["spliced_bytes"] == 0, totals
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
"""


WITHOUT_PIPE_PAGES = """
import contextlib, fcntl, os, sys
sys.path.insert(0, {tests!r})
from splice_pairs import Receiver, Relayed, Sender
from {module} import SpliceEngine
os.setuid(65534)  # without privileges: pipe-user-pages-soft counts
hoard = [os.pipe()]
while fcntl.fcntl(hoard[-1][1], fcntl.F_GETPIPE_SZ) > 8192:  # what a pipe has when the user's pages are used up
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(hoard[-1][1], fcntl.F_SETPIPE_SZ, 1 << 20)
    hoard.append(os.pipe())
    assert len(hoard) < 400, "this user may have as many pipe pages as it likes"
with SpliceEngine() as engine, Relayed(engine) as pair:
    received, sent = Receiver(pair.server), Sender(pair.client, 3_000_000, seed=1)
    assert received.digest() == sent.digest
    totals = engine.counters()
    assert totals["pipes_refused"] > 0, totals
    assert totals["pipes_open"] == 0, totals
    assert totals["spliced_bytes"] == 0, totals
"""


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("program", [WITHOUT_PIPES, WITHOUT_PIPE_PAGES], ids=["descriptors", "pages"])
def test_when_no_pipe_can_be_had_it_copies(engine_class: type[SpliceEngine], program: str) -> None:
    program = program.format(tests=str(Path(__file__).parent), module=engine_class.__module__)
    run_program(program)


def test_a_pipe_size_that_the_kernel_refuses_is_replaced_by_a_smaller_one(
    engine_class: type[SpliceEngine],
) -> None:
    """2 GiB and more is refused whoever asks."""
    with engine_class(pipe_bytes=(1 << 31) - 1) as engine, Relayed(engine) as pair:
        received, sent = Receiver(pair.server), Sender(pair.client, 1_000_000, seed=1)
        assert received.digest() == sent.digest
        totals = engine.counters()
        assert totals["spliced_bytes"] > 0
        assert (totals["pipes_created"], totals["pipes_refused"]) == (1, 0)


def test_notification_is_readable_exactly_while_completions_wait(engine_class: type[SpliceEngine]) -> None:
    def readable() -> bool:
        return bool(select.select([engine.notification_fd], [], [], 0)[0])

    with engine_class() as engine:
        for pair_id in range(3):
            with Relayed(engine, pair_id) as pair:
                assert not readable()
                pair.client.close()
                pair.server.close()
                eventually(readable, "the notification")
                assert readable()
                assert engine.pair_counters(pair_id) is not None
                assert len(engine.completions()) == 1
                assert not readable()
                assert engine.completions() == []
                assert engine.pair_counters(pair_id) is None


def test_sockets_are_out_of_the_epoll_when_the_completion_arrives(engine_class: type[SpliceEngine]) -> None:
    """The same sockets, still open, may be given to the engine again."""
    with engine_class() as engine, Relayed(engine, 1) as pair:
        for _ in range(3):
            pair.client.sendall(b"again")
            assert receive_exactly(pair.server, 5) == b"again"
            engine.cancel(1)
            assert pair.completion().reason is CompletionReason.CANCELLED
            pair.start()
        assert engine.counters()["epoll_errors"] == 0


def test_descriptors_that_are_no_sockets_fail_the_pair_only(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine, 1) as good, tempfile.TemporaryFile() as file:
        os.set_blocking(file.fileno(), False)
        outer, inner = socket.socketpair()
        with outer, inner:
            inner.setblocking(False)
            engine.add(2, inner.fileno(), file.fileno())
            (completion,) = take_completions(engine)
            assert completion[:2] == (2, CompletionReason.FAILED)
            assert completion.left_errno == 0
            assert completion.right_errno != 0
        good.client.sendall(b"still here")
        assert receive_exactly(good.server, 10) == b"still here"


def test_misuse_is_refused_with_a_reason(engine_class: type[SpliceEngine]) -> None:
    with engine_class() as engine, Relayed(engine, 1) as pair:
        left, right = pair.left.fileno(), pair.right.fileno()
        with pytest.raises(OurMistake, match="exists already"):
            engine.add(1, left, right)
        with pytest.raises(OurMistake, match="both sides"):
            engine.add(2, left, left)
        with pytest.raises(OurMistake, match="blocking"):
            engine.add(2, left, pair.client.fileno() if pair.client.setblocking(True) is None else -1)
        with pytest.raises(OurMistake, match="not open"):
            engine.add(2, -1, right)
        assert engine.cancel(2) is False
        assert engine.pair_counters(2) is None
        assert engine.counters()["pairs_total"] == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"pipe_bytes": -1},
        {"idle_timeout_s": 0.0},
        {"left_fin_timeout_s": -1.0},
        {"right_fin_timeout_s": float("nan")},
        {"threads": 0},
    ],
)
def test_senseless_settings_are_refused(
    engine_class: type[SpliceEngine], settings: dict[str, float | int]
) -> None:
    before = open_descriptors()
    with pytest.raises(OurMistake, match=next(iter(settings))):
        engine_class(**settings)  # type: ignore[arg-type]
    assert open_descriptors() == before


def test_counters_have_the_documented_names(engine_class: type[SpliceEngine]) -> None:
    expected = {
        *COUNTER_NAMES,
        "pairs_active",
        *(f"completed_{each.name.lower()}" for each in CompletionReason),
    }
    with engine_class() as engine:
        assert set(engine.counters()) == expected
        assert not any(value for name, value in engine.counters().items() if name != "wakeups")


def test_both_engines_offer_the_same() -> None:
    def public(kind: type[object]) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(splice_ext.SpliceEngine) == public(splice_fallback.SpliceEngine)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_pure_engine_is_used_where_the_compiled_one_is_missing(compiled: bool) -> None:
    program = (
        ("" if compiled else "import sys; sys.modules['translator.splice_ext'] = None\n")
        + "from translator import splice_engine as chosen\n"
        + "print(chosen.SpliceEngine.__module__, chosen.FALLBACK_BECAUSE is None)"
    )
    expected = "translator.splice_ext True" if compiled else "translator.splice_fallback False"
    assert run_program(program).strip() == expected
