"""How does an operator, or a policy, move live flows? By flow, by interface, by service; and what came of it.

`stack.migrations` finds the path that each flow is to take; moving is up to the SAL. A request of the stack socket
may wait for the outcomes: then it is answered by one line per flow, as they become known.

    migrate_flow       flow_id, interface (a name) or to (an own address), wait
    migrate_interface  interface, to_interface, wait          all flows that are on the first one
    migrate_service    service, interface or to, wait         all flows of a service or prefix, in either role
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection
from typing import NamedTuple, Protocol

import msgspec

from serval_core.errors import OurMistake
from serval_core.moves import LiveFlow
from serval_core.names import FlowID, ServicePrefix, format_address, parse_address, parse_service
from serval_core.nearest import nearest
from serval_core.paths import Interface, Path, PathFinder
from serval_core.sal import ServiceAccessLayer
from serval_core.service_events import Event, EventQueue, ServiceEvents
from serval_core.service_requests import checked
from serval_core.stack_socket_server import Handler


class OwnPaths(PathFinder, Protocol):
    """What is asked of the host's paths (`dataplane.addresses.KernelPaths`)."""

    def interface_of(self, address: int) -> Interface | None:
        """The interface that has this address, which need not be its first one."""


class Goal(NamedTuple):
    """Where flows are to go: an interface, and one of its addresses, or 0 for what routing chooses."""

    interface_index: int
    interface_name: str
    address: int = 0


class Begun(NamedTuple):
    """The flows that are on their way now, and why others are not."""

    migrating: list[FlowID]
    refused: dict[FlowID, str]


class Migrations:
    """Moves the flows of one stack. Belongs to its loop."""

    def __init__(
        self,
        sal: ServiceAccessLayer,
        paths: OwnPaths,
        events: ServiceEvents,
        run_effects: Callable[[], None],
    ) -> None:
        self._sal = sal
        self._paths = paths
        self._events = events
        self._run_effects = run_effects
        self.on_placed: Callable[[Collection[FlowID]], None] = lambda flow_ids: None
        """Told of flows that are to stay where they are being sent."""

    def migrate_flow(self, flow_id: FlowID, goal: Goal) -> Begun:
        """Move one flow. OurMistake when that cannot be begun; nothing has changed then."""
        flow = next((each for each in self._sal.live_flows() if each.flow_id == flow_id), None)
        if flow is None:
            raise OurMistake(f"there is no flow {flow_id} that could be migrated: see `serval flows`")
        begun = self.migrate_all([flow], goal)
        if begun.refused:
            raise OurMistake(f"flow {flow_id} cannot be migrated: {begun.refused[flow_id]}")
        return begun

    def migrate_interface(self, interface: str, goal: Goal) -> Begun:
        """Move every flow that is on `interface`. OurMistake if there is none of that name."""
        index = self.goal(interface).interface_index
        if index == goal.interface_index:
            raise OurMistake(f"the flows of {interface} are there already: give two different interfaces")
        return self.migrate_all([each for each in self._sal.live_flows() if each.interface_index == index], goal)

    def migrate_service(self, prefix: ServicePrefix, goal: Goal) -> Begun:
        """Move every flow of a service, whether this host serves it or uses it."""
        flows = [each for each in self._sal.live_flows() if prefix.covers(each.service_id)]
        return self.migrate_all(flows, goal)

    def migrate_all(self, flows: Collection[LiveFlow], goal: Goal) -> Begun:
        """Move these flows. One that is there already is left alone, and counts as refused."""
        begun = Begun([], {})
        for flow in flows:
            path = self.path_for(flow, goal)
            if path is None:
                begun.refused[flow.flow_id] = (
                    f"no route leads to {format_address(flow.peer_address)} through {goal.interface_name}"
                )
            elif flow.is_settled and flow.is_on(path):
                begun.refused[flow.flow_id] = f"it is on {goal.interface_name} already"
            else:
                self._sal.migrate(flow.flow_id, path, time.monotonic())
                begun.migrating.append(flow.flow_id)
        self.on_placed(begun.migrating)
        self._run_effects()
        return begun

    def path_for(self, flow: LiveFlow, goal: Goal) -> Path | None:
        """The path that a flow would take to its goal."""
        path = self._paths.path_to(flow.peer_address, goal.interface_index)
        if path is None or not goal.address:
            return path
        return path._replace(source_address=goal.address)

    def goal(self, interface: str = "", address: int = 0) -> Goal:
        """The goal that is meant by an interface's name, or an address of this host. OurMistake if there is none."""
        if address:
            found = self._paths.interface_of(address)
            if found is None:
                own = [format_address(each.address) for each in self._paths.interfaces()]
                text = format_address(address)
                raise OurMistake(f"{text} is no address of an interface that is up{nearest(text, own)}")
            return Goal(found.index, found.name, address)
        for each in self._paths.interfaces():
            if each.name == interface:
                return Goal(each.index, each.name)
        names = [each.name for each in self._paths.interfaces()]
        raise OurMistake(f"there is no interface {interface} that is up and has an address{nearest(interface, names)}")

    async def outcomes(self, begun: Begun, queue: EventQueue, some: asyncio.Event) -> AsyncGenerator[object, None]:
        """What became of each flow, as it becomes known."""
        for refused, why in begun.refused.items():
            yield {"flow_id": refused, "outcome": "refused", "why": why}
        waiting = set(begun.migrating)
        while waiting:
            await some.wait()
            some.clear()
            for event in queue.take():
                flow_id = event.fields.get("flow_id")
                if flow_id in waiting and event.fields.get("end", "local") == "local":
                    waiting.discard(FlowID(int(str(flow_id))))
                    yield _outcome(event)

    # Requests of the stack socket.

    def handlers(self) -> dict[str, Handler]:
        """By the names under which they are asked for."""
        return {
            "migrate_flow": checked(_MigrateFlow, self._asked_for_flow),
            "migrate_interface": checked(_MigrateInterface, self._asked_for_interface),
            "migrate_service": checked(_MigrateService, self._asked_for_service),
        }

    def _asked_for_flow(self, asked: _MigrateFlow) -> object:
        goal = self._asked_goal(asked.interface, asked.to)
        return self._begin(lambda: self.migrate_flow(FlowID(asked.flow_id), goal), asked.wait)

    def _asked_for_interface(self, asked: _MigrateInterface) -> object:
        goal = self.goal(asked.to_interface)
        return self._begin(lambda: self.migrate_interface(asked.interface, goal), asked.wait)

    def _asked_for_service(self, asked: _MigrateService) -> object:
        goal = self._asked_goal(asked.interface, asked.to)
        return self._begin(lambda: self.migrate_service(parse_service(asked.service), goal), asked.wait)

    def _asked_goal(self, interface: str | None, to: str | None) -> Goal:
        if (interface is None) == (to is None):
            raise OurMistake("say where to migrate to: either the name of an interface, or an address of this host")
        return self.goal(interface or "", 0 if to is None else parse_address(to))

    def _begin(self, begin: Callable[[], Begun], wait: bool) -> object:
        if not wait:
            begun = begin()
            refused = [{"flow_id": flow_id, "why": why} for flow_id, why in begun.refused.items()]
            return {"migrating": begun.migrating, "refused": refused}
        return self.until_known(begin)

    def until_known(self, begin: Callable[[], Begun]) -> AsyncGenerator[object, None]:
        """Begin at once, raising what that raises, and then tell what became of each flow."""
        some = asyncio.Event()
        queue = EventQueue(some.set)
        unsubscribe = self._events.subscribe(queue.put, ("flow_migrated", "migration_failed", "flow_ended"))
        try:
            begun = begin()
        except BaseException:
            unsubscribe()
            raise

        async def outcomes() -> AsyncGenerator[object, None]:
            try:
                async for outcome in self.outcomes(begun, queue, some):
                    yield outcome
            finally:
                unsubscribe()

        return outcomes()


class _MigrateFlow(msgspec.Struct, forbid_unknown_fields=True):
    flow_id: int
    interface: str | None = None
    to: str | None = None
    wait: bool = False


class _MigrateInterface(msgspec.Struct, forbid_unknown_fields=True):
    interface: str
    to_interface: str
    wait: bool = False


class _MigrateService(msgspec.Struct, forbid_unknown_fields=True):
    service: str
    interface: str | None = None
    to: str | None = None
    wait: bool = False


def _outcome(event: Event) -> dict[str, object]:
    fields = {name: value for name, value in event.fields.items() if name not in ("end", "service")}
    kinds = {"flow_migrated": "migrated", "migration_failed": "failed", "flow_ended": "ended"}
    if "reason" in fields:
        fields["why"] = fields.pop("reason")
    return {"outcome": kinds[event.kind], **fields}
