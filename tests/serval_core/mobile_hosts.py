"""Hosts of the memory network whose flows are moved by the mobility policy, as the running stack moves them."""

from __future__ import annotations

from serval_core.dataplane.memory_network import MemoryHost
from serval_core.mobility import Mobility
from serval_core.mobility_settings import MobilitySection, MobilitySettings
from serval_core.names import FlowID, parse_address
from serval_core.path_choice import PathChoice


class Policy:
    """The policy of one host. Call `step` whenever some time has passed."""

    def __init__(self, host: MemoryHost, section: MobilitySection | None = None) -> None:
        self.host = host
        settings = MobilitySettings(section or MobilitySection())
        choice = PathChoice(settings, host.paths, host.sal.path_quality, lambda: host.network.now)
        self.mobility = Mobility(settings, host.paths, choice)
        self._told = 0

    def down(self, *numbers: int) -> None:
        """Only these of the host's wires do not work from now on."""
        self.host.paths.down = {self.host.paths.wires[number].index for number in numbers}
        self.mobility.host_changed(self.host.network.now)
        self._act()
        self.host.sal.paths_changed(self.host.network.now)
        self.host.settle()

    def step(self) -> None:
        """Take notice of what has happened, and do what is due."""
        news, self._told = self.host.happened[self._told :], len(self.host.happened)
        for kind, fields in news:
            flow = self.host.sal.live_flow(FlowID(int(str(fields.get("flow_id", 0)))))
            if flow is None or fields.get("end") != "local":
                continue
            if kind == "flow_migrated":
                self.mobility.works(flow.interface_index, flow.peer_address)
                self.mobility.migrated(flow.flow_id, flow.interface_index, self.host.network.now)
            elif kind == "migration_failed" and fields["address"] is not None:
                wanted = self.host.paths.wire_of(parse_address(str(fields["address"])))
                if wanted is not None:
                    self.mobility.failed(wanted.index, flow.peer_address, self.host.network.now)
        due = self.mobility.next_timeout()
        if news or (due is not None and due <= self.host.network.now):
            self._act()

    def _act(self) -> None:
        now = self.host.network.now
        for flow_id, path, _ in self.mobility.decide(self.host.sal.live_flows(), now):
            if path is None:
                self.host.sal.path_lost(flow_id, now)
            else:
                self.host.sal.migrate(flow_id, path, now)
        self.host.settle()
