"""Are legacy services reached, in turn, and left out for a while when they do not answer?"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from serval_core.config_file import Misconfigured
from translator.legacy_side import SocketOptions
from translator.port_map import parse_reverse
from translator.targets import AVOID_S, Dial, Target, TargetDialer, TargetSet, resolve_targets

TIMEOUT_S = 10.0


class Caller:
    """Dials and remembers what came of it."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.dialer = TargetDialer(SocketOptions(), timeout_s)
        self.reached: list[tuple[socket.socket, Target]] = []
        self.failures: list[int] = []

    def dial(self, targets: TargetSet) -> Dial | None:
        return self.dialer.dial(targets, self._reached, self.failures.append)

    def _reached(self, connection: socket.socket, target: Target) -> None:
        self.reached.append((connection, target))

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self.dialer.sweep(self.dialer.time())
                await asyncio.sleep(0.001)

    def close(self) -> None:
        for connection, _ in self.reached:
            connection.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def server(stack: ExitStack) -> socket.socket:
    return stack.enter_context(socket.create_server(("127.0.0.1", 0)))


def place(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def silent_place(stack: ExitStack) -> str:
    """Where a connection attempt gets no answer: the accept queue is full."""
    listener = stack.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    for _ in range(2):
        filler = stack.enter_context(socket.socket())
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
    return place(listener)


def refusing_place() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return place(listener)


def targets(*places: str) -> TargetSet:
    return resolve_targets(parse_reverse(f"1={','.join(places)}", {}, "--reverse"))


def test_a_target_on_this_host_is_reached_without_the_loop(stack: ExitStack) -> None:
    async def run() -> None:
        caller, listener = Caller(), server(stack)
        assert caller.dial(targets(place(listener))) is None
        stack.callback(caller.close)
        connection, target = caller.reached[0]
        assert target.connections == 1
        assert connection.gettimeout() == 0
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        peer, _ = listener.accept()
        connection.send(b"x")
        assert peer.recv(1) == b"x"
        peer.close()

    asyncio.run(run())


def test_targets_take_turns(stack: ExitStack) -> None:
    async def run() -> None:
        caller = Caller()
        stack.callback(caller.close)
        three = targets(*[place(server(stack)) for _ in range(3)])
        for _ in range(9):
            caller.dial(three)
        await caller.until(lambda: len(caller.reached) == 9)  # a loopback connection may wait for ksoftirqd
        assert [target.connections for target in three.targets] == [3, 3, 3]

    asyncio.run(run())


def test_a_refusal_leads_to_the_next_target_and_is_remembered(stack: ExitStack) -> None:
    async def run() -> None:
        caller = Caller()
        stack.callback(caller.close)
        two = targets(refusing_place(), place(server(stack)))
        for number in range(4):
            caller.dial(two)
            await caller.until(lambda expected=number + 1: len(caller.reached) == expected)
        assert two.targets[0].failures == 1  # once, then it was left out
        assert two.targets[0].as_dict(caller.dialer.time())["avoided"]
        assert not two.targets[0].as_dict(caller.dialer.time() + AVOID_S)["avoided"]
        two.targets[0].avoid_until_s = 0.0
        for _ in range(2):
            caller.dial(two)
        assert two.targets[0].failures == 2  # and tried again later

    asyncio.run(run())


def test_all_refuse(stack: ExitStack) -> None:
    async def run() -> None:
        caller = Caller()
        dead = targets(refusing_place(), refusing_place())
        assert caller.dial(dead) is None
        assert caller.dial(dead) is None  # avoided ones are the last resort, not left out for good
        assert caller.failures == [errno.ECONNREFUSED, errno.ECONNREFUSED]
        assert [target.failures for target in dead.targets] == [2, 2]
        assert caller.dialer.waiting == 0

    asyncio.run(run())


def test_a_silent_target_costs_only_its_share_of_the_time(stack: ExitStack) -> None:
    async def run() -> None:
        caller = Caller(timeout_s=0.2)
        stack.callback(caller.close)
        two = targets(silent_place(stack), place(server(stack)))
        dial = caller.dial(two)
        assert dial is not None
        assert dial.deadline_s < dial.last_s
        await caller.until(lambda: caller.reached)
        assert caller.reached[0][1] is two.targets[1]
        assert caller.dialer.waiting == 0

    asyncio.run(run())


def test_nobody_answers(stack: ExitStack) -> None:
    async def run() -> None:
        caller = Caller(timeout_s=0.1)
        assert caller.dial(targets(silent_place(stack), silent_place(stack))) is not None
        await caller.until(lambda: caller.failures)
        assert caller.failures == [errno.ETIMEDOUT]
        assert caller.dialer.waiting == 0

    asyncio.run(run())


def test_a_late_answer_is_taken(stack: ExitStack) -> None:
    """The queue becomes free while we wait: the kernel's own retransmission gets through."""

    async def run() -> None:
        caller = Caller()
        stack.callback(caller.close)
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [stack.enter_context(socket.socket()) for _ in range(2)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        assert caller.dial(targets(place(listener))) is not None
        for _ in fillers:
            stack.enter_context(listener.accept()[0])
            listener.settimeout(TIMEOUT_S)
        await caller.until(lambda: caller.reached)
        assert caller.dialer.waiting == 0

    asyncio.run(run())


def test_cancelling_leaves_nothing(stack: ExitStack) -> None:
    async def run() -> None:
        caller = Caller(timeout_s=0.05)
        dial = caller.dial(targets(silent_place(stack)))
        assert dial is not None
        dial.cancel()
        assert caller.dialer.waiting == 0
        caller.dialer.sweep(caller.dialer.time() + 1)
        assert (caller.reached, caller.failures) == ([], [])

    asyncio.run(run())


def test_host_names_are_looked_up_and_listed_once() -> None:
    found = resolve_targets(parse_reverse("1=localhost:81,127.0.0.1:81,localhost:82", {}, "x"))
    addresses = [target.socket_address[:2] for target in found.targets]
    assert len(addresses) == len(set(addresses))
    assert {("127.0.0.1", 81), ("127.0.0.1", 82)} <= set(addresses)


def test_a_host_name_without_address() -> None:
    with pytest.raises(
        Misconfigured, match=r"--reverse 1: the host name of target nowhere\.invalid:80 has no address"
    ):
        resolve_targets(parse_reverse("1=nowhere.invalid:80", {}, "--reverse 1"))
