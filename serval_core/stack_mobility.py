"""When does the running stack ask where its flows should be, and who carries it out? `mobility` on the stack's loop.

Asked whenever interfaces, addresses or routes change, when a hysteresis is over, and when a flow sends in vain. Packet
counters of some flows at a time, and where round-trip times or losses decide about new flows, what the kernel's TCP
measures, are looked at twice a second. A flow that sends in vain although its peer answers tries smaller packets.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import structlog

from serval_core.connection import Connection
from serval_core.dataplane.kernel import FlowCounters
from serval_core.dataplane.neighbours import Neighbours
from serval_core.dataplane.tcp_info import TcpInfo, tcp_info
from serval_core.migration_states import OwnMove
from serval_core.mobility import Decision, Mobility
from serval_core.mobility_settings import MobilitySettings
from serval_core.moves import LiveFlow
from serval_core.names import FlowID, parse_address
from serval_core.path_choice import PathChoice
from serval_core.sal import ServiceAccessLayer
from serval_core.service_events import Event, ServiceEvents
from serval_core.silence import SilenceWatch
from serval_core.stack_migration import OwnPaths

log = structlog.get_logger("serval_core.mobility")

GATHER_S = 0.1
LOOK_INTERVAL_S = 0.5
LOOK_FLOWS = 1000  # counters that are read at a time, some 2 µs each
MEASURED_FLOWS = 64  # sockets that are asked at a time
CARRIES_PACKETS = 16  # received on a path, they show that it carried data of every size, so that silence has another reason
SETTLING_S = 2.0  # after a move, TCP's measurements are still those of the old path


class AutomaticMobility:
    """Moves the flows of one stack by itself. Belongs to its loop; `close` ends it."""

    def __init__(
        self,
        settings: MobilitySettings,
        sal: ServiceAccessLayer,
        paths: OwnPaths,
        events: ServiceEvents,
        connections: dict[int, Connection],
        neighbours: Neighbours,
        flow_counters: Callable[[FlowID], FlowCounters],
        run_effects: Callable[[], None],
    ) -> None:
        self.choice = PathChoice(settings, paths, sal.path_quality)
        self.mobility = Mobility(settings, paths, self.choice)
        self.counters: Counter[str] = Counter(
            flows_sent_elsewhere=0, flows_without_path=0, flows_rerouted=0
        )
        self._sal = sal
        self._paths = paths
        self._connections = connections
        self._neighbours = neighbours
        self._flow_counters = flow_counters
        self._run_effects = run_effects
        self._loop = asyncio.get_running_loop()
        self._silence = SilenceWatch()
        self._measured: dict[FlowID, TcpInfo] = {}
        self._moved_at: dict[FlowID, float] = {}
        self._to_look_at: list[FlowID] = []
        self._timer: asyncio.TimerHandle | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._unsubscribe = events.subscribe(self._happened, ("flow_migrated", "migration_failed"))
        sal.choose_paths(self.choice.of)
        self._look_soon()

    @property
    def settings(self) -> MobilitySettings:
        """What the operator wants. May be replaced at any time."""
        return self.mobility.settings

    @settings.setter
    def settings(self, settings: MobilitySettings) -> None:
        self.mobility.settings = self.choice.settings = settings
        self._act_soon()
        self._look_soon()

    def close(self) -> None:
        """Move nothing any more."""
        self._closed = True
        self._unsubscribe()
        for timer in (self._timer, self._look_timer):
            if timer is not None:
                timer.cancel()

    def host_changed(self) -> None:
        """Interfaces, addresses or routes are others: `paths` has new answers."""
        self.mobility.host_changed(time.monotonic())
        flows = self._sal.live_flows()
        for flow in flows:
            hop = self._neighbours.key_of(flow.flow_id)
            path = None if hop is None else self._paths.path_to(flow.peer_address, flow.interface_index)
            if path is not None and hop != (path.interface_index, path.next_hop):
                self._sal.reroute(flow.flow_id)
                self.counters["flows_rerouted"] += 1
        self._decide(flows)
        self._look_soon()

    # -- moving -------------------------------------------------------------------------------------------------------

    def _act(self) -> None:
        self._decide(self._sal.live_flows())

    def _decide(self, flows: list[LiveFlow]) -> None:
        now = time.monotonic()
        self._carry_out(self.mobility.decide(flows, now), now)
        self._run_effects()
        self._act_later(self.mobility.next_timeout())

    def _act_later(self, due: float | None) -> None:
        """Act at that time, and not before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is not None and not self._closed:
            self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._act)

    def _act_soon(self) -> None:
        """Once for many flows that move at the same time."""
        if self._timer is None or self._timer.when() > self._loop.time() + GATHER_S:
            self._act_later(time.monotonic() + GATHER_S)

    def _carry_out(self, decisions: list[Decision], now: float) -> None:
        reasons: Counter[str] = Counter()
        for flow_id, path, why in decisions:
            if path is None:
                self._sal.path_lost(flow_id, now)
                self.counters["flows_without_path"] += 1
            else:
                self._sal.migrate(flow_id, path, now)
                self.counters["flows_sent_elsewhere"] += 1
            reasons[why] += 1
        for why, count in reasons.items():
            log.info("flows move", flows=count, because=why)

    def _happened(self, event: Event) -> None:
        """One end of a flow has moved, or could not."""
        fields, now = event.fields, time.monotonic()
        flow_id = FlowID(int(str(fields["flow_id"])))
        self._silence.restart(flow_id)
        self._moved_at[flow_id] = now
        flow = self._sal.live_flow(flow_id)
        if fields["end"] != "local" or flow is None:
            return
        if event.kind == "flow_migrated":
            self.mobility.works(flow.interface_index, flow.peer_address)
            self.mobility.migrated(flow_id, flow.interface_index, now)
        elif fields["address"] is not None:
            wanted = self._paths.interface_of(parse_address(str(fields["address"])))
            if wanted is not None:
                self.mobility.failed(wanted.index, flow.peer_address, now)
        self._act_soon()

    # -- looking ------------------------------------------------------------------------------------------------------

    def _look_soon(self) -> None:
        if self._look_timer is None and self.settings.section.automatic and not self._closed:
            self._look_timer = self._loop.call_later(LOOK_INTERVAL_S, self._look)

    def _look(self) -> None:
        self._look_timer = None
        now = time.monotonic()
        if not self._to_look_at:
            self._to_look_at = self._sal.flow_ids()
            self._forget_others(set(self._to_look_at))
        looked_at, self._to_look_at = self._to_look_at[:LOOK_FLOWS], self._to_look_at[LOOK_FLOWS:]
        silence_s = self.settings.section.silence_s
        decisions = []
        for flow_id in looked_at:
            counted = self._flow_counters(flow_id)
            if self._silence.looked(
                flow_id, counted.packets_out, counted.packets_in, silence_s or float("inf"), now
            ):
                flow = self._sal.live_flow(flow_id)
                if flow is None:
                    continue
                if self.mobility.is_alive(flow, now) and self._silence.answers(flow_id) < CARRIES_PACKETS:
                    self._sal.try_smaller_packets(flow_id)
                elif (decision := self.mobility.silent(flow, now)) is not None:
                    decisions.append(decision)
        if self.settings.measures:
            for flow_id in looked_at[:MEASURED_FLOWS]:
                self._measure(flow_id, now)
        self._carry_out(decisions, now)
        self._run_effects()
        self._look_soon()

    def _measure(self, flow_id: FlowID, now: float) -> None:
        """Let the choice among interfaces know what TCP thinks of a flow's path."""
        connection, flow = self._connections.get(flow_id), self._sal.live_flow(flow_id)
        if connection is None or connection.fd < 0 or flow is None or flow.migration is not OwnMove.SETTLED:
            return
        before, measured = self._measured.get(flow_id), tcp_info(connection.fd)
        self._measured[flow_id] = measured
        if measured.round_trip_s is None or now - self._moved_at.get(flow_id, -SETTLING_S) < SETTLING_S:
            return
        sent = repeated = 0
        if before is not None:
            sent = measured.segments_out - before.segments_out
            repeated = measured.segments_repeated - before.segments_repeated
            if not sent:
                return
        self._sal.path_quality.measured(
            (flow.interface_index, flow.peer_address), measured.round_trip_s, sent, repeated, now
        )

    def _forget_others(self, flow_ids: set[FlowID]) -> None:
        self.mobility.keep_only(flow_ids)
        self._silence.keep_only(flow_ids)
        for memory in (self._measured, self._moved_at):
            for gone in [each for each in memory if each not in flow_ids]:
                memory.pop(gone)
