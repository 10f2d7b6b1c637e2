"""Through which interface new flows begin: by preference, cost, and what was measured before."""

from __future__ import annotations

import pytest

from serval_core.dataplane.memory_network import MemoryHost, MemoryNetwork
from serval_core.mobility_settings import (
    Choice,
    InterfaceEntry,
    MobilitySection,
    MobilitySettings,
    ServiceMobility,
)
from serval_core.names import format_address, parse_address, parse_service
from serval_core.path_choice import PathChoice
from serval_core.path_quality import RECORDS_LIMIT, STALE_S, PathQuality
from serval_core.rules import Rule
from tests.serval_core.exchanges import SERVER_ADDRESS, SERVICE
from tests.serval_core.test_mobility import ETH, LTE, PEER, WLAN, Interfaces

OTHER = parse_service("0x02:8")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Chooser:
    """A host with three interfaces, and what it has measured."""

    def __init__(self, section: MobilitySection, *services: ServiceMobility) -> None:
        self.clock = Clock()
        self.host = Interfaces(ETH, WLAN, LTE)
        self.quality = PathQuality()
        settings = MobilitySettings(section, services)
        self.choice = PathChoice(settings, self.host, self.quality, self.clock)

    def chosen(self, service: str = "76568") -> str:
        path = self.choice.of(parse_service(service).service_id).path_to(PEER)
        assert path is not None
        return path.interface_name

    def measured(self, **round_trips_s: float) -> None:
        indexes = {"eth0": ETH, "wlan0": WLAN, "wwan0": LTE}
        for name, seconds in round_trips_s.items():
            self.quality.answered((indexes[name], PEER), seconds, self.clock.now)


def test_without_a_word_the_routing_table_decides() -> None:
    chooser = Chooser(MobilitySection())
    assert chooser.chosen() == "eth0"
    assert chooser.choice.of(SERVICE.service_id) is chooser.host


def test_preferences_and_metered_interfaces_hold_for_new_flows() -> None:
    assert Chooser(MobilitySection(prefer=("wwan*",))).chosen() == "wwan0"
    assert Chooser(MobilitySection(interface=(InterfaceEntry("eth*", metered=True),))).chosen() == "wlan0"


def test_the_cheapest_interface() -> None:
    costs = (InterfaceEntry("eth0", cost=5), InterfaceEntry("wlan0", cost=2), InterfaceEntry("wwan0", cost=9))
    assert Chooser(MobilitySection(choose="cost", interface=costs)).chosen() == "wlan0"
    assert Chooser(MobilitySection(interface=costs)).chosen() == "eth0"


def test_one_service_may_choose_differently() -> None:
    chooser = Chooser(MobilitySection(), ServiceMobility(OTHER, None, ("wlan0",)))
    assert (chooser.chosen(), chooser.chosen("0x0203")) == ("eth0", "wlan0")


def test_what_was_not_measured_is_tried_before_the_fastest() -> None:
    chooser = Chooser(MobilitySection(choose="rtt"))
    tried = []
    for seconds in (0.080, 0.020, 0.050):
        tried.append(chooser.chosen())
        chooser.measured(**{tried[-1]: seconds})
    assert sorted(tried) == ["eth0", "wlan0", "wwan0"]
    assert chooser.chosen() == tried[1]
    chooser.clock.now += STALE_S
    assert chooser.chosen() == "eth0"


def test_a_little_faster_is_not_worth_another_way_than_the_route() -> None:
    chooser = Chooser(MobilitySection(choose="rtt"))
    chooser.measured(eth0=0.020, wlan0=0.016, wwan0=0.050)
    assert chooser.chosen() == "eth0"
    for _ in range(20):
        chooser.measured(wlan0=0.001)
    assert chooser.chosen() == "wlan0"


@pytest.mark.parametrize("choose", ["rtt", "loss"])
def test_a_path_whose_packets_are_lost_is_not_chosen(choose: Choice) -> None:
    chooser = Chooser(MobilitySection(choose=choose))
    chooser.quality.silent((ETH, PEER), chooser.clock.now)
    chooser.quality.silent((LTE, PEER), chooser.clock.now)
    assert chooser.chosen() == "wlan0"
    chooser.measured(wlan0=0.5)
    assert chooser.chosen() == "wlan0"


def test_losses_that_are_about_the_same_leave_it_to_the_round_trip() -> None:
    chooser = Chooser(MobilitySection(choose="loss"))
    for index, seconds, lost in ((ETH, 0.05, 2), (WLAN, 0.01, 3), (LTE, 0.001, 100)):
        chooser.quality.measured((index, PEER), seconds, 1000, lost, chooser.clock.now)
    assert chooser.chosen() == "wlan0"


def test_preferences_come_before_measurements() -> None:
    chooser = Chooser(MobilitySection(choose="rtt", prefer=("wwan0",)))
    chooser.measured(eth0=0.001, wlan0=0.001, wwan0=1.0)
    assert chooser.chosen() == "wwan0"


def test_an_interface_that_was_asked_for_is_not_replaced() -> None:
    chooser = Chooser(MobilitySection(prefer=("wwan0",)))
    path = chooser.choice.of(SERVICE.service_id).path_to(PEER, WLAN)
    assert path is not None
    assert path.interface_name == "wlan0"


def test_what_is_remembered_is_bounded() -> None:
    quality = PathQuality()
    for address in range(RECORDS_LIMIT + 10):
        quality.answered((2, address), 0.1, 1000.0)
    assert len(quality) == RECORDS_LIMIT
    assert quality.round_trip_s((2, 0), 1000.0) is None
    assert quality.round_trip_s((2, RECORDS_LIMIT), 1000.0) == pytest.approx(0.1)


def connected(network: MemoryNetwork, host: MemoryHost) -> dict[str, object]:
    """The next flow, once it stands."""
    flow_id = host.sal.connect(SERVICE.service_id, network.now)
    host.settle()
    network.run(network.now + 30.0, lambda: flow_id in host.connected or flow_id in host.failed)
    assert flow_id in host.connected
    return next(each for each in host.sal.flows() if each["flow_id"] == flow_id)


def test_connects_learn_from_each_other_which_interface_answers() -> None:
    """The first of two interfaces leads nowhere, which this host can only find out."""
    network = MemoryNetwork(1)
    second = parse_address("10.0.0.11")
    client = network.add_host(parse_address("10.0.0.1"), None, [second])
    server = network.add_host(SERVER_ADDRESS)
    client.table.add(Rule.forward(SERVICE, SERVER_ADDRESS))
    server.sal.listen(SERVICE, 16, network.now)
    settings = MobilitySettings(MobilitySection(choose="rtt"))
    client.sal.choose_paths(
        PathChoice(settings, client.paths, client.sal.path_quality, lambda: network.now).of
    )
    first_wire = client.paths.wires[0].index
    carry = network.transmit

    def transmit(sender: MemoryHost, packet: bytes, destination: int, interface_index: int) -> None:
        if sender is not client or interface_index != first_wire:
            carry(sender, packet, destination, interface_index)

    network.transmit = transmit  # type: ignore[method-assign]
    found = [connected(network, client)["local_address"] for _ in range(3)]
    assert found == [format_address(second)] * 3
