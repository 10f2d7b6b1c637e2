"""Where flows go when interfaces come and go, as decided for a host with three of them. Time is a number here."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from serval_core.migration_states import OwnMove
from serval_core.mobility import ALIVE_S, AVOID_S, STRANDED_RETRY_S, Decision, Mobility
from serval_core.mobility_settings import InterfaceEntry, MobilitySection, MobilitySettings
from serval_core.moves import LiveFlow
from serval_core.names import FlowID, parse_address, parse_service
from serval_core.path_choice import PathChoice
from serval_core.path_quality import PathQuality
from serval_core.paths import Interface, Path

SERVICE = parse_service("76568").service_id
PEER = parse_address("10.9.0.1")
ETH, WLAN, LTE = 2, 3, 4
NAMES = {1: "lo", ETH: "eth0", WLAN: "wlan0", LTE: "wwan0"}


def address_on(index: int, host: int = 1) -> int:
    return parse_address("127.0.0.1") if index == 1 else parse_address(f"10.0.{index}.{host}")


class Interfaces:
    """The interfaces of a host, which all lead to the peer unless `cut` says otherwise."""

    def __init__(self, *up: int) -> None:
        self.addresses = {index: address_on(index) for index in (1, *up)}
        self.cut: set[int] = set()

    def interfaces(self) -> list[Interface]:
        return [
            Interface(index, NAMES[index], address, 24, 0 if index == 1 else address | 255, 1500)
            for index, address in sorted(self.addresses.items())
        ]

    def has_address(self, address: int) -> bool:
        return address in self.addresses.values()

    def path_to(self, address: int, interface_index: int = 0) -> Path | None:
        usable = [index for index in sorted(self.addresses) if index != 1 and index not in self.cut]
        for index in usable:
            if interface_index in (0, index):
                return Path(index, NAMES[index], self.addresses[index], address, 1500)
        return None


class World:
    """A host, its policy, and one flow, which does at once what is decided."""

    def __init__(self, section: MobilitySection | None = None, *up: int) -> None:
        settings = MobilitySettings(section or MobilitySection())
        self.host = Interfaces(*(up or (ETH, WLAN, LTE)))
        self.mobility = Mobility(settings, self.host, PathChoice(settings, self.host, PathQuality()))
        self.flow = LiveFlow(FlowID(7), SERVICE, address_on(ETH), PEER, ETH, OwnMove.SETTLED, None)
        self.now = 1000.0

    def change(self, *, lost: Collection[int] = (), found: Collection[int] = ()) -> Decision | None:
        """Interfaces go and come; what is decided about the flow, and done."""
        for index in lost:
            del self.host.addresses[index]
        for index in found:
            self.host.addresses[index] = address_on(index)
        self.mobility.host_changed(self.now)
        return self.decide()

    def decide(self) -> Decision | None:
        decisions = self.mobility.decide([self.flow], self.now)
        if not decisions:
            return None
        (decision,) = decisions
        if decision.path is None:
            self.flow = self.flow._replace(migration=OwnMove.STRANDED, goal=None)
        else:
            self.flow = self.flow._replace(migration=OwnMove.MOVING, goal=decision.path)
        return decision

    def arrive(self) -> None:
        """The peer answers on the new path."""
        goal = self.flow.goal
        assert goal is not None
        assert self.flow.migration is OwnMove.MOVING
        self.flow = self.flow._replace(
            local_address=goal.source_address,
            interface_index=goal.interface_index,
            migration=OwnMove.SETTLED,
        )
        self.mobility.works(goal.interface_index, PEER)
        self.mobility.migrated(self.flow.flow_id, goal.interface_index, self.now)

    def wait(self) -> Decision | None:
        """Let time pass to when something else may be decided, and decide."""
        due = self.mobility.next_timeout()
        assert due is not None
        assert due > self.now
        self.now = due
        return self.decide()

    def place(self) -> str:
        return NAMES[self.flow.interface_index]


def goal_of(decision: Decision | None) -> str:
    assert decision is not None
    assert decision.path is not None
    return decision.path.interface_name


def test_a_flow_on_a_path_that_works_stays() -> None:
    world = World()
    assert world.change(lost=[WLAN]) is None
    assert world.mobility.next_timeout() is None


def test_a_lost_interface_sends_its_flow_to_the_best_that_is_left() -> None:
    world = World(MobilitySection(prefer=("wwan0",)), ETH, WLAN, LTE)
    assert goal_of(world.change(lost=[ETH])) == "wwan0"
    metered = World(MobilitySection(interface=(InterfaceEntry("wlan*", metered=True),)))
    assert goal_of(metered.change(lost=[ETH])) == "wwan0"
    assert goal_of(World().change(lost=[ETH])) == "wlan0"


def test_a_lost_route_counts_as_a_lost_interface() -> None:
    world = World()
    world.host.cut.add(ETH)
    assert goal_of(world.change()) == "wlan0"


def test_an_address_that_changes_moves_the_flow_within_its_interface() -> None:
    world = World()
    world.host.addresses[ETH] = address_on(ETH, 99)
    decision = world.change()
    assert decision is not None
    assert decision.path is not None
    assert (decision.path.interface_index, decision.path.source_address) == (ETH, address_on(ETH, 99))
    world.arrive()
    assert world.decide() is None
    assert not world.mobility._homes


def test_a_flow_returns_when_its_interface_has_been_good_for_a_while() -> None:
    world = World()
    world.change(lost=[ETH])
    world.arrive()
    assert world.change(found=[ETH]) is None
    back_at = world.now
    assert goal_of(world.wait()) == "eth0"
    assert world.now == back_at + 5.0
    world.arrive()
    assert world.decide() is None
    assert not world.mobility._homes


def test_an_interface_that_flaps_is_trusted_less_each_time() -> None:
    world = World()
    waits = []
    for _ in range(8):
        world.change(lost=[ETH])
        world.arrive()
        world.change(found=[ETH])
        before = world.now
        world.wait()
        waits.append(world.now - before)
        world.arrive()
        world.now += 1.0
    assert waits == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0]
    world.now += 10_000.0
    world.change(lost=[ETH])
    world.arrive()
    world.change(found=[ETH])
    before = world.now
    world.wait()
    assert world.now - before == 5.0


def test_a_preferred_interface_that_appears_wins_flows_only_after_the_wait() -> None:
    world = World(MobilitySection(prefer=("wlan0", "eth0")), ETH, LTE)
    assert world.change(found=[WLAN]) is None
    assert goal_of(world.wait()) == "wlan0"


def test_flows_leave_a_metered_interface_as_soon_as_there_is_another_that_lasts() -> None:
    section = MobilitySection(interface=(InterfaceEntry("wwan*", metered=True),))
    world = World(section, ETH, LTE)
    world.change(lost=[ETH])
    world.arrive()
    assert world.place() == "wwan0"
    assert world.change(found=[WLAN]) is None
    assert goal_of(world.wait()) == "wlan0"


def test_what_an_operator_has_placed_stays_and_returns() -> None:
    world = World(MobilitySection(prefer=("wlan0",)))
    world.mobility.placed([world.flow.flow_id])
    assert world.change() is None
    world.change(lost=[ETH])
    world.arrive()
    assert world.place() == "wlan0"
    world.change(found=[ETH])
    assert goal_of(world.wait()) == "eth0"


def test_without_any_path_a_flow_waits_and_goes_on_when_one_appears() -> None:
    world = World(None, ETH)
    decision = world.change(lost=[ETH])
    assert decision is not None
    assert decision.path is None
    assert world.change() is None
    assert goal_of(world.change(found=[LTE])) == "wwan0"


def test_a_flow_in_need_tries_one_path_after_the_other_and_each_once() -> None:
    world = World()
    tried = [goal_of(world.change(lost=[ETH]))]
    began = world.now
    tried.append(goal_of(world.wait()))
    assert tried == ["wlan0", "wwan0"]
    assert world.now == began + 3.0
    assert world.decide() is None
    assert world.mobility.next_timeout() is None
    world.flow = world.flow._replace(migration=OwnMove.STRANDED)
    assert world.decide() is None
    assert goal_of(world.wait()) in ("wlan0", "wwan0")
    assert world.now == began + 3.0 + STRANDED_RETRY_S


def test_notifications_that_change_nothing_do_not_make_a_flow_try_for_ever() -> None:
    world = World()
    world.change(lost=[ETH])
    world.wait()
    for _ in range(100):
        world.now += 5.0
        assert world.change() is None
    assert goal_of(world.change(found=[ETH])) == "eth0"


def test_a_goal_that_disappears_is_given_up() -> None:
    world = World()
    world.change(lost=[ETH])
    assert goal_of(world.change(lost=[WLAN])) == "wwan0"
    wished = World(MobilitySection(prefer=("wlan0",)))
    assert goal_of(wished.change()) == "wlan0"
    assert goal_of(wished.change(lost=[WLAN])) == "eth0"


def test_a_path_where_the_peer_does_not_answer_is_avoided_for_longer_each_time() -> None:
    world = World(MobilitySection(prefer=("wlan0",)))
    assert goal_of(world.decide()) == "wlan0"
    for times in range(3):
        world.flow = world.flow._replace(migration=OwnMove.SETTLED, goal=None)
        world.mobility.failed(WLAN, PEER, world.now)
        began = world.now
        assert world.decide() is None
        assert goal_of(world.wait()) == "wlan0"
        assert world.now == began + AVOID_S * 2**times
    world.mobility.works(WLAN, PEER)
    world.flow = world.flow._replace(migration=OwnMove.SETTLED, goal=None)
    assert goal_of(world.decide()) == "wlan0"


def test_a_flow_that_hears_nothing_tries_another_path_and_comes_back_later() -> None:
    world = World()
    decision = world.mobility.silent(world.flow, world.now)
    assert goal_of(decision) == "wlan0"
    assert decision is not None
    world.flow = world.flow._replace(migration=OwnMove.MOVING, goal=decision.path)
    world.arrive()
    began = world.now
    assert world.decide() is None
    assert goal_of(world.wait()) == "eth0"
    assert world.now == began + AVOID_S


def test_a_flow_that_hears_nothing_and_has_no_other_path_asks_for_a_sign_of_life() -> None:
    world = World(None, ETH)
    decision = world.mobility.silent(world.flow, world.now)
    assert goal_of(decision) == "eth0"
    assert decision is not None
    assert not world.mobility.is_alive(world.flow, world.now)
    world.flow = world.flow._replace(migration=OwnMove.MOVING, goal=decision.path)
    world.arrive()
    assert world.mobility.is_alive(world.flow, world.now)
    assert not world.mobility.is_alive(world.flow, world.now + ALIVE_S)
    assert world.mobility.silent(world.flow._replace(peer_is_ours=False), world.now) is None


def test_nothing_moves_by_itself_when_that_is_switched_off() -> None:
    world = World(MobilitySection(automatic=False))
    assert world.change(lost=[ETH]) is None
    assert world.mobility.silent(world.flow, world.now) is None


def test_flows_that_are_gone_are_forgotten() -> None:
    world = World()
    world.change(lost=[ETH])
    world.mobility.placed([FlowID(99)])
    assert len(world.mobility) == 2
    world.mobility.decide([], world.now)
    assert len(world.mobility) == 0


@pytest.mark.parametrize("up", [(ETH, WLAN), (ETH, WLAN, LTE)])
def test_a_flow_is_never_sent_where_it_is(up: tuple[int, ...]) -> None:
    world = World(MobilitySection(prefer=("eth0", "wlan0"), return_after_s=0.0), *up)
    for lost, found in (((WLAN,), ()), ((), (WLAN,)), ((ETH,), ()), ((), (ETH,))):
        while (decision := world.change(lost=lost, found=found)) is not None:
            assert goal_of(decision) != world.place()
            world.arrive()
            lost = found = ()
    assert world.place() == "eth0"
