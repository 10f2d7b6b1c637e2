"""What is left of a thousand flows that have migrated and closed? Nothing in our tables or the kernel, and no descriptor."""

from __future__ import annotations

import gc
import os
from collections import deque
from dataclasses import dataclass, replace

import pytest

from lab.hosts import Lab
from lab.waiting import wait_for
from serval_core.framing import Framing
from serval_core.names import parse_service
from tests.serval_core.stack_thread import Accepting, StackThread, Stream
from tests.serval_core.test_migration_kernel import QUICK
from tests.serval_core.test_stack import assert_no_traces
from tests.serval_core.two_paths import SERVER, two_paths

SERVICE = "76568"
FLOWS = 1000
AT_ONCE = 50
FRAMINGS = (Framing.SAL, Framing.UDP, Framing.NATIVE)
MESSAGE = b"where are you?"
KNOWLEDGE = {"_cache", "_quality", "path_quality", "round_trips"}  # about ways, not flows: bounded by how many there are


def kept(found: object) -> dict[str, int]:
    """How much is in each container that a stack's objects hold, by the way that leads there."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = [("stack", found)]
    while waiting:
        name, each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, dict | list | set | deque):
            sizes[name] = len(each)
        elif type(each).__module__.startswith("serval_core."):
            slots = [slot for kind in type(each).__mro__ for slot in getattr(kind, "__slots__", ())]
            names = {*getattr(each, "__dict__", {}), *slots} - KNOWLEDGE
            waiting += [(f"{name}.{one}", getattr(each, one)) for one in names if hasattr(each, one)]
    return sizes


@dataclass(frozen=True)
class Kept:
    """What there is at one moment on a host with a stack."""

    tables: dict[str, int]
    kernel: dict[str, str]
    native_ports: int
    flow_map: int
    descriptors: int


def look(stack: StackThread) -> Kept:
    """Whatever could be left behind."""
    gc.collect()  # of tests before this one, which had descriptors
    dataplane = stack.stack._dataplane
    return Kept(
        stack.call(lambda: kept(stack.stack)),
        {
            what: stack.host.run(["ip", "-4", "-o", what, *more]).stdout
            for what, more in (("address", ()), ("link", ()), ("rule", ()), ("route", ("show", "table", "all")))
        }
        | {
            "neighbours": "\n".join(
                sorted(line.split(" lladdr")[0] for line in stack.host.run(["ip", "-4", "neigh"]).stdout.splitlines())
            ),
            "sockets": stack.host.run(["ss", "-4Hantu", "exclude", "time-wait"]).stdout,
            "filters": stack.host.run(["nft", "list", "ruleset"]).stdout,
        },
        len(dataplane.native_ports),
        stack.call(dataplane.entries),
        len(os.listdir("/proc/self/fd")),
    )


def some_flows(client: StackThread, server: StackThread, listener: Accepting, number: int) -> None:
    """Open that many at once, move both ends of all, say something both ways, close."""
    outcomes = [client.begin_connect(SERVICE) for _ in range(number)]
    near = [outcome.get(timeout=20) for outcome in outcomes]
    assert all(isinstance(each, Stream) for each in near)
    far = [listener.accept() for _ in range(number)]
    wanted = [stack.counters().get("flows_migrated", 0) + number for stack in (client, server)]
    for stack in (client, server):
        stack.call(lambda stack=stack: move_all(stack))
    for stack, migrated in zip((client, server), wanted, strict=True):
        wait_for(lambda of=stack, n=migrated: of.counters().get("flows_migrated") == n, "all have moved")
    for senders, receivers in ((near, far), (far, near)):
        for stream in senders:
            stream.socket.sendall(MESSAGE)
        for stream in receivers:
            assert stream.socket.recv(100) == MESSAGE
    for stream in (*near, *far):
        stream.release()


def move_all(stack: StackThread) -> None:
    """Begin to move all flows of a stack to its other interface."""
    migrations = stack.stack.migrations
    begun = migrations.migrate_service(parse_service(SERVICE), migrations.goal("eth1"))
    assert not begun.refused


@pytest.mark.timeout(180)
def test_a_thousand_flows_that_migrated_leave_nothing_behind(lab: Lab) -> None:
    """A third in each framing. First a few, since what is known of ways and peers, which is bounded, is to stay."""
    hosts = two_paths(lab)
    for framing in FRAMINGS:
        sal = replace(QUICK, framing=framing)
        with StackThread(hosts[0], sal=sal) as client, StackThread(hosts[1], sal=sal) as server:
            both = client, server
            listener = server.listen(SERVICE)
            client.forward(SERVICE, SERVER[0])
            some_flows(client, server, listener, AT_ONCE)
            before = all_idle(both)
            for _ in range(FLOWS // len(FRAMINGS) // AT_ONCE + 1):
                some_flows(client, server, listener, AT_ONCE)
            for stack, first in zip(both, before, strict=True):
                last = idle(stack)
                for name in ("tables", "kernel", "native_ports", "flow_map"):
                    assert getattr(last, name) == getattr(first, name)
                assert last.descriptors < first.descriptors + AT_ONCE  # other tests of this process have some, too
    for host in hosts[:2]:
        assert_no_traces(host)


def all_idle(stacks: tuple[StackThread, ...]) -> list[Kept]:
    """Both are in one process, so what one of them is closing still counts among the descriptors of the other."""
    for stack in stacks:
        idle(stack)
    return [idle(stack) for stack in stacks]


def idle(stack: StackThread) -> Kept:
    """What there is when nothing goes on any more, TIMEWAIT included."""
    core = stack.stack._sal._core
    wait_for(lambda: stack.counters()["open_transports"] == 0, "all transports are closed")
    wait_for(lambda: stack.call(lambda: not core.flows.by_id and not core.flows.time_wait), "TIMEWAIT is over")
    return look(stack)
