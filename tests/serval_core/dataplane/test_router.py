"""Does the router keep its fast paths in line with the service table, and its hands off when it cannot?"""

from __future__ import annotations

import subprocess
import sys
from asyncio import TimerHandle
from collections.abc import Callable, Iterator, Set
from typing import cast

import pytest

from serval_core.dataplane import router as router_module
from serval_core.dataplane import router_programs
from serval_core.dataplane.forward_batch import BatchForwarder
from serval_core.dataplane.memory_network import MemoryPaths
from serval_core.dataplane.neighbours import Key
from serval_core.dataplane.next_hops import Link
from serval_core.dataplane.router import Router
from serval_core.dataplane.router_programs import RouterPrograms
from serval_core.names import ServicePrefix, parse_address, parse_service
from serval_core.rules import Rule, RuleType
from serval_core.service_table import ServiceTable
from tests.serval_core.dataplane.test_fast_forwarding import ETHERNET, TC_REDIRECT, syn
from tests.serval_core.lone_host import LOCAL, OTHER, REMOTE, SERVICE


class Timer:
    """One that fires when the test says."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Host:
    """A router whose program is loaded and not attached; frames are handed to it by PROG_TEST_RUN."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, in_kernel: bool = True) -> None:
        self.table = ServiceTable()
        self.paths = MemoryPaths(LOCAL, 1500)
        self.forwarder: BatchForwarder | None = None
        self.on_link_change: Callable[[Key], None] | None = None
        self.attached: Set[int] = frozenset()
        self.links: dict[Key, Link] = {}
        self.timer = Timer(lambda: None)
        self.programs: list[RouterPrograms] = []

        def loaded() -> RouterPrograms:
            self.programs.append(RouterPrograms())
            return self.programs[-1]

        monkeypatch.setattr(router_module, "RouterPrograms", loaded)
        self.router = Router(self.table, self, self.call_later, in_kernel)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> TimerHandle:
        self.timer = Timer(callback)
        return cast(TimerHandle, self.timer)

    def forward_with(self, forwarder: BatchForwarder | None) -> None:
        self.forwarder = forwarder

    def use_next_hop(self, key: Key) -> Link | None:
        return self.links.get(key)

    def release_next_hops(self) -> None:
        self.links.clear()

    def attach_router(self, interface_indexes: Set[int], program_fd: int) -> None:
        self.attached = interface_indexes

    def in_kernel(self) -> bytes | None:
        """What the program makes of a SYN: the frame, or None if it leaves it alone."""
        verdict, frame, _ = self.programs[-1].test_run(ETHERNET + syn())
        return frame if verdict == TC_REDIRECT else None

    def in_batches(self) -> bytes | None:
        """The same of the receive loop, as a packet."""
        assert self.forwarder is not None
        result = self.forwarder.forwarded(syn())
        return None if result is None else result[0]

    def target(self) -> int | None:
        """Where both send a SYN; they agree."""
        kernel, batch = self.in_kernel(), self.in_batches()
        assert (None if kernel is None else kernel[14:]) == batch
        return None if batch is None else int.from_bytes(batch[16:20], "big")


@pytest.fixture
def host(root: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host(monkeypatch)
    host.router.start()
    yield host
    host.router.stop()
    assert host.attached == frozenset()


def test_rules_are_followed(host: Host) -> None:
    assert host.target() is None
    host.table.add(Rule.forward(SERVICE, REMOTE))
    assert host.target() == REMOTE
    host.table.add(Rule.forward(SERVICE, OTHER, priority=2))
    assert host.target() == OTHER
    host.table.mark_down(OTHER, 1.0)
    assert host.target() is None
    host.table.mark_up(OTHER)
    assert host.target() == OTHER
    host.table.modify(SERVICE, OTHER, Rule.forward(SERVICE, REMOTE + 5, priority=2))
    assert host.target() == REMOTE + 5
    host.table.remove(SERVICE, RuleType.FORWARD, REMOTE + 5)
    assert host.target() == REMOTE
    narrow = ServicePrefix.of(SERVICE.service_id, 200)
    host.table.remove(SERVICE, RuleType.FORWARD, REMOTE)
    host.table.add(Rule.forward(narrow, OTHER))
    assert host.target() == OTHER
    host.table.add(Rule.demux(SERVICE, 1))
    assert host.target() is None


def test_rules_that_were_there_before(host: Host) -> None:
    host.router.stop()
    assert host.forwarder is None
    host.table.add(Rule.forward(SERVICE, REMOTE))
    host.router.start()
    assert host.target() == REMOTE


def test_paths_are_followed(host: Host) -> None:
    host.table.add(Rule.forward(SERVICE, REMOTE))
    host.paths.up = False
    host.router.host_changed()
    assert host.in_batches() is None
    host.paths.up = True
    host.router.host_changed()
    assert host.target() == REMOTE


def test_link_addresses_are_followed(host: Host) -> None:
    host.table.add(Rule.forward(SERVICE, REMOTE))
    frame = host.in_kernel()
    assert frame is not None
    assert frame[:6] == bytes(6)
    key = host.paths.wire.index, REMOTE
    host.links[key] = Link(b"\2\0\0\0\0\1", b"\2\0\0\0\0\2")
    assert host.on_link_change is not None
    host.on_link_change(key)
    frame = host.in_kernel()
    assert frame is not None
    assert frame[:12] == b"\2\0\0\0\0\1\2\0\0\0\0\2"


def test_counts_reach_the_table(host: Host) -> None:
    host.table.add(Rule.forward(SERVICE, REMOTE))
    for _ in range(3):
        host.target()
    assert host.timer.callback is not None
    host.timer.callback()
    (rule,) = host.table.snapshot()
    size = len(syn()) - 20 - 68
    assert (rule["packets_resolved"], rule["bytes_resolved"]) == (6, 6 * size)
    host.target()
    host.table.remove(SERVICE, RuleType.FORWARD, REMOTE)
    counters = host.router.counters()
    assert (counters["forwarded_in_kernel"], counters["forwarded_in_batches"]) == (4, 4)


def test_lease_ends_when_the_loop_stands_still(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.table.add(Rule.forward(SERVICE, REMOTE))
    programs = host.programs[-1]
    programs.end_lease()
    assert host.in_kernel() is None
    assert host.timer.callback is not None
    host.timer.callback()
    assert host.in_kernel() is not None


def test_table_that_does_not_fit_is_left_to_user_space(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix that the program does not know might hide one that it does."""
    monkeypatch.setattr(router_module, "PREFIXES_MAX", 2)
    host.table.add(Rule.forward(SERVICE, REMOTE))
    others = [parse_service(str(number)) for number in (1, 2)]
    for each in others:
        host.table.add(Rule.forward(each, OTHER))
    assert host.timer.callback is not None
    host.timer.callback()
    assert host.in_kernel() is None
    assert host.in_batches() is not None
    host.table.remove(others[0], RuleType.FORWARD, OTHER)
    host.timer.callback()
    assert host.target() == REMOTE


def test_without_the_program(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, in_kernel=False)
    host.router.start()
    host.table.add(Rule.forward(SERVICE, REMOTE))
    assert host.in_batches() is not None
    assert host.programs == []
    host.router.stop()


def test_invented_services_take_no_memory(host: Host) -> None:
    """Anybody may send SYNs for services that only a short prefix covers: each costs what the first one did."""
    host.table.add(Rule.forward(ServicePrefix.of(SERVICE.service_id, 16), REMOTE))
    assert host.forwarder is not None
    decide = host.router._decide
    decisions = [decide(SERVICE.service_id[:2] + number.to_bytes(30, "big")) for number in range(100)]
    assert decisions[0] is not None
    assert all(each is decisions[0] for each in decisions)
    assert host.in_batches() is not None
    assert host.router.counters()["forwarded_in_batches"] == 1
    assert [each["packets_resolved"] for each in host.table.snapshot()] == [1]


def test_next_hops_that_are_not_used_any_more_make_room(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts come and go at ever new addresses: the program goes on forwarding."""
    monkeypatch.setattr(router_programs, "LINKS_MAX", 20)
    host.router.stop()
    host.router.start()
    stays = parse_service("5")
    host.table.add(Rule.forward(stays, OTHER))
    for number in range(60):
        host.table.add(Rule.forward(SERVICE, REMOTE + 10 + number))
        assert host.target() == REMOTE + 10 + number
        host.table.remove(SERVICE, RuleType.FORWARD, REMOTE + 10 + number)
    programs = host.programs[-1]
    assert programs._links[host.paths.wire.index, OTHER] == 0, "what is used stays where it is"
    others = [parse_service(str(number)) for number in range(10, 40)]
    for number, each in enumerate(others):
        host.table.add(Rule.forward(each, REMOTE + 100 + number))
    host.table.add(Rule.forward(SERVICE, REMOTE))
    assert host.in_kernel() is None, "there is no room, so user space does it"
    assert host.in_batches() is not None


def test_own_addresses_are_never_targets(host: Host) -> None:
    host.table.add(Rule.forward(SERVICE, LOCAL))
    assert host.target() is None
    host.table.modify(SERVICE, LOCAL, Rule.forward(SERVICE, parse_address("10.0.0.255")))
    assert host.target() is None


def test_program_loads_with_the_capabilities_of_the_service(root: None) -> None:
    """Without CAP_PERFMON the verifier is stricter; the unit of servald does not give it."""
    few = "-all,+net_admin,+net_raw,+bpf"
    load = "from serval_core.dataplane.router_programs import RouterPrograms; RouterPrograms().close()"
    command = ["setpriv", "--bounding-set", few, "--inh-caps", few, sys.executable, "-c", load]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
