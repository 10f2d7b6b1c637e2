"""Is a target that dies noticed, and one that returns, without its service seeing anything of it?"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from translator.health import HealthChecker, connect_errno
from translator.health_settings import HealthOfMap, HealthSection
from translator.legacy_side import SocketOptions
from translator.port_map import parse_reverse
from translator.targets import Target, TargetDialer, TargetHealth, TargetSet, resolve_targets

TIMEOUT_S = 10.0
OFTEN = HealthSection(interval_s=0.01, fast_interval_s=0.01, rise=2, fall=3)
RARELY = HealthSection(interval_s=1000, fast_interval_s=1000)
REFUSED = errno.ECONNREFUSED


def listen(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def targets_of(*listeners: socket.socket) -> TargetSet:
    places = ",".join(f"127.0.0.1:{each.getsockname()[1]}" for each in listeners)
    return resolve_targets(parse_reverse(f"1={places}", {}, "test"))


class Watched:
    """A checker at work. `changes` says after each change which targets were up."""

    def __init__(self, targets: TargetSet, settings: HealthSection) -> None:
        self.targets = targets
        self.changes: list[list[bool | None]] = []
        self.checker = HealthChecker("1", targets, settings, self._changed)

    def states(self) -> list[bool | None]:
        return [each.health.up for each in self.targets.targets]

    def _changed(self) -> None:
        self.changes.append(self.states())

    async def until(self, *states: bool | None) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while self.states() != list(states):
                await asyncio.sleep(0.001)


def watching(settings: HealthSection, *listeners: socket.socket) -> Watched:
    watched = Watched(targets_of(*listeners), settings)
    watched.checker.start()
    return watched


@pytest.mark.parametrize(
    ("results", "beliefs"),
    [
        ([0], [True]),
        ([REFUSED], [False]),
        ([0, REFUSED, REFUSED, 0, REFUSED, REFUSED], [True] * 6),
        ([0, REFUSED, REFUSED, REFUSED], [True, True, True, False]),
        ([REFUSED, 0, REFUSED, 0], [False] * 4),
        ([REFUSED, 0, 0, REFUSED], [False, False, True, True]),
    ],
    ids=["first success", "first failure", "not in a row", "fall", "not twice", "rise"],
)
def test_rise_and_fall(results: list[int], beliefs: list[bool]) -> None:
    health = TargetHealth()
    before: bool | None = None
    for code, believed in zip(results, beliefs, strict=True):
        changed = health.learn(code, 3 if health.up else 2)
        assert (health.up, changed) == (believed, before != believed)
        before = believed


def test_a_target_dies_and_returns_and_its_service_sees_no_check() -> None:
    async def run() -> None:
        with listen() as living:
            dying = listen()
            port = dying.getsockname()[1]
            watched = watching(OFTEN, living, dying)
            await watched.until(True, True)
            dying.close()
            await watched.until(True, False)
            assert watched.targets.targets[1].as_dict(0.0)["down_because"] == "Connection refused"
            with listen(port) as returned:
                await watched.until(True, True)
                watched.checker.stop()
                for each in (living, returned):
                    each.setblocking(False)
                    with pytest.raises(BlockingIOError):
                        each.accept()
            assert watched.changes == [[True, None], [True, True], [True, False], [True, True]]

    asyncio.run(run())


def test_a_silent_target_is_down() -> None:
    async def run() -> None:
        with ExitStack() as opened:
            silent = opened.enter_context(socket.socket())
            silent.bind(("127.0.0.1", 0))
            silent.listen(0)
            for _ in range(2):  # its queue is full
                filler = opened.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(silent.getsockname())
            (target,) = targets_of(silent).targets
            assert await connect_errno(target, 0.05) == errno.ETIMEDOUT

    asyncio.run(run())


def test_real_connections_that_fail_count_as_checks() -> None:
    async def run() -> None:
        dying, living = listen(), listen()
        with living:
            watched = watching(RARELY, dying, living)
            await watched.until(True, True)
            dying.close()
            dialer = TargetDialer(SocketOptions(), TIMEOUT_S)
            reached: list[Target] = []

            def take(connection: socket.socket, target: Target) -> None:
                connection.close()
                reached.append(target)

            for _ in range(3):
                watched.targets.targets[0].avoid_until_s = 0.0
                watched.targets._next = 0
                assert dialer.dial(watched.targets, take, pytest.fail) is None
            assert watched.states() == [False, True]
            failures = watched.targets.targets[0].failures
            for _ in range(4):
                dialer.dial(watched.targets, take, pytest.fail)
            assert (
                watched.targets.targets[0].failures == failures
            )  # a target that is down gets no connections
            assert reached == [watched.targets.targets[1]] * 7
            watched.checker.stop()

    asyncio.run(run())


def test_a_connection_that_succeeds_ends_a_row_of_failures() -> None:
    async def run() -> None:
        with listen() as living:
            watched = watching(RARELY, living)
            await watched.until(True)
            (target,) = watched.targets.targets
            for _ in range(3):
                target.failed(errno.ETIMEDOUT, 0.0)
                target.failed(errno.ETIMEDOUT, 0.0)
                target.connected()
            assert watched.states() == [True]
            watched.checker.stop()
            assert target.on_outcome is None

    asyncio.run(run())


def test_what_our_own_host_lacks_says_nothing_about_a_target() -> None:
    async def run() -> None:
        with listen() as living:
            watched = watching(RARELY, living)
            await watched.until(True)
            for _ in range(10):
                watched.targets.targets[0].failed(errno.EADDRNOTAVAIL, 0.0)
            assert watched.states() == [True]
            watched.checker.stop()

    asyncio.run(run())


def test_a_set_without_checks_is_usable_whatever_was_known() -> None:
    async def run() -> None:
        with listen() as living:
            watched = Watched(targets_of(living), HealthSection(check="none"))
            watched.targets.targets[0].health.learn(REFUSED, 1)
            watched.targets.health_changed()
            assert not watched.targets.usable
            watched.checker.start()
            assert watched.targets.usable
            assert not watched.targets.proven
            watched.checker.stop()

    asyncio.run(run())


def test_when_all_are_down_no_target_is_asked() -> None:
    async def run() -> None:
        with listen() as living:
            targets = targets_of(living)
            targets.targets[0].health.learn(REFUSED, 1)
            targets.health_changed()
            failures: list[int] = []
            not_taken: Callable[..., None] = lambda *_: pytest.fail("nothing was to be dialled")  # noqa: E731
            dialer = TargetDialer(SocketOptions(), TIMEOUT_S)
            assert dialer.dial(targets, not_taken, failures.append) is None
            assert failures == [errno.EHOSTUNREACH]
            assert targets.targets[0].failures == 0

    asyncio.run(run())


def test_a_map_says_only_what_differs() -> None:
    section = HealthSection(interval_s=7, fall=5)
    assert HealthOfMap().over(section) == section
    assert HealthOfMap(fall=1, check="none").over(section) == HealthSection(
        check="none", interval_s=7, fall=1
    )
