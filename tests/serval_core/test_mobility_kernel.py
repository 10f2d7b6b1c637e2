"""Hosts that lose and get interfaces and addresses under a live transfer: whatever was sent arrives, over what is left."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core.mobility_settings import InterfaceEntry, MobilitySection, MobilitySettings
from serval_core.names import FlowID, format_address
from serval_core.sal_settings import SalSettings
from serval_core.stack_mobility import CARRIES_PACKETS
from tests.serval_core.controller.controlled import Controlled, host_settings, router_settings
from tests.serval_core.stack_thread import StackThread, Stream
from tests.serval_core.two_paths import CLIENT, SERVER, Mover, Transfer, two_paths

SERVICE = "76568"
QUICK = SalSettings(connect_timeout_s=5.0, time_wait_s=0.2, fin_wait2_s=0.5, no_path_wait_s=30.0)
RETURNING_SOON = MobilitySettings(MobilitySection(return_after_s=0.2, silence_s=1.0))
ROOT = Path(__file__).parents[2]
STEP_BYTES = 1_000_000


class Ends:
    """Both stacks, and one flow between them that carries data from the server to the client."""

    def __init__(self, hosts: tuple[Host, Host, Host], client: StackThread, server: StackThread) -> None:
        self.client_host, self.server_host, self.router = hosts
        self.client, self.server = client, server
        self.listener = server.listen(SERVICE)
        client.forward(SERVICE, SERVER[0])
        self.near: Stream = client.connect(SERVICE)
        self.far: Stream = self.listener.accept()
        self.near_moves, self.far_moves = Mover(client), Mover(server)
        self.near_id, self.far_id = self.near.connection.flow_id, self.far.connection.flow_id
        self.transfer = self.begin()
        self.goes_on()

    def begin(self) -> Transfer:
        """Data that goes on until `finish`."""
        return Transfer(self.far, self.near)

    def goes_on(self) -> None:
        """Return once some more has arrived."""
        before = self.transfer.received_bytes
        wait_for(lambda: self.transfer.received_bytes > before + STEP_BYTES, "data to arrive", 30.0)

    def addresses(self) -> tuple[str, str]:
        """Where the two ends are, as the client sees it."""
        (flow,) = self.client.flows()
        return str(flow["local_address"]), str(flow["peer_address"])

    def finish(self) -> None:
        """The transfer ends, and nothing is left of it."""
        self.goes_on()
        assert self.transfer.finish() > 0
        self.near.release()
        self.far.release()
        for stack in (self.client, self.server):
            nothing_is_left(stack)


def nothing_is_left(stack: StackThread) -> None:
    """Return once the stack has no flow and nothing of one any more."""
    wait_for(lambda: stack.flows() == [], "all flows to be gone")
    wait_for(lambda: stack.counters()["open_transports"] == 0, "all transports to be closed")
    assert stack.counters()["flow_map_entries"] == 0
    assert not len(stack.stack._dataplane.neighbours._key_of)


def move_all(stack: StackThread) -> None:
    """Send every flow on the first interface to the second."""
    migrations = stack.stack.migrations
    stack.call(lambda: migrations.migrate_interface("eth0", migrations.goal("eth1")))


@pytest.fixture
def ends(lab: Lab) -> Iterator[Ends]:
    hosts = two_paths(lab)
    with (
        StackThread(hosts[0], sal=QUICK, mobility=RETURNING_SOON) as client,
        StackThread(hosts[1], sal=QUICK, mobility=RETURNING_SOON) as server,
    ):
        yield Ends(hosts, client, server)


def ip(host: Host, *words: object) -> None:
    host.run(["ip", *map(str, words)])


def default_route(host: Host, address: str, interface: str, metric: int) -> None:
    router = f"{address.rpartition('.')[0]}.1"
    ip(host, "route", "replace", "default", "via", router, "dev", interface, "metric", metric, "congctl", "cubic")


def test_an_address_is_deleted_at_either_end(ends: Ends) -> None:
    ip(ends.client_host, "address", "del", f"{CLIENT[0]}/24", "dev", "eth0")
    assert ends.near_moves.outcome(ends.near_id, "local")["address"] == CLIENT[1]
    ends.goes_on()
    ip(ends.server_host, "address", "del", f"{SERVER[0]}/24", "dev", "eth0")
    assert ends.far_moves.outcome(ends.far_id, "local")["address"] == SERVER[1]
    ends.goes_on()
    assert ends.addresses() == (CLIENT[1], SERVER[1])
    ends.finish()


def test_an_interface_goes_down_and_comes_back(ends: Ends) -> None:
    ip(ends.server_host, "link", "set", "eth0", "down")
    assert ends.far_moves.outcome(ends.far_id, "local")["address"] == SERVER[1]
    ends.goes_on()
    ip(ends.server_host, "link", "set", "eth0", "up")
    default_route(ends.server_host, SERVER[0], "eth0", 100)
    assert ends.far_moves.outcome(ends.far_id, "local")["address"] == SERVER[0]
    ends.finish()


def test_a_cable_is_pulled(ends: Ends) -> None:
    ip(ends.router, "link", "set", "eth0", "down")  # the client's first wire
    assert ends.near_moves.outcome(ends.near_id, "local")["address"] == CLIENT[1]
    ends.goes_on()
    ip(ends.router, "link", "set", "eth0", "up")
    assert ends.near_moves.outcome(ends.near_id, "local")["address"] == CLIENT[0]
    ends.finish()


def test_another_router_leads_to_the_peer(ends: Ends) -> None:
    """On the same network; the first one disappears, and with it the neighbour that packets went to."""
    ip(ends.router, "address", "add", "10.1.1.9/32", "dev", "eth0")
    new = ("via", "10.1.1.9", "dev", "eth0", "metric", 100, "congctl", "cubic")
    ip(ends.client_host, "route", "replace", "default", *new)
    wait_for(lambda: ends.client.counters()["flows_rerouted"] == 1, "the flow to take the other router")
    ip(ends.router, "address", "del", "10.1.1.1/24", "dev", "eth0")
    ip(ends.router, "route", "add", "10.1.1.0/24", "dev", "eth0")
    ip(ends.client_host, "neighbour", "flush", "dev", "eth0")
    ends.goes_on()
    assert ends.client.counters()["flows_sent_elsewhere"] == 0
    ends.finish()


def test_an_only_interface_gets_an_address_in_another_subnet(ends: Ends) -> None:
    ip(ends.server_host, "link", "set", "eth1", "down")
    ip(ends.router, "address", "add", "10.3.0.1/24", "dev", "eth2")
    ip(ends.server_host, "address", "del", f"{SERVER[0]}/24", "dev", "eth0")
    ip(ends.server_host, "address", "add", "10.3.0.2/24", "dev", "eth0")
    default_route(ends.server_host, "10.3.0.2", "eth0", 100)
    assert ends.near_moves.outcome(ends.near_id, "peer")["address"] == "10.3.0.2"
    ends.goes_on()
    ends.finish()


def test_a_flow_waits_until_there_is_a_path_again(ends: Ends) -> None:
    for interface in ("eth0", "eth1"):
        ip(ends.client_host, "link", "set", interface, "down")
    wait_for(lambda: ends.client.flows()[0]["migration"] == "STRANDED", "the flow to have no path")
    assert ends.client.counters()["flows_without_path"] == 1
    ip(ends.client_host, "link", "set", "eth1", "up")
    default_route(ends.client_host, CLIENT[1], "eth1", 101)
    wait_for(lambda: ends.addresses()[0] == CLIENT[1], "the flow to be on the other path")
    ends.finish()


def drop_all_of(router: Host, address: str) -> None:
    """The router still has its carrier, and forwards nothing to or from that address."""
    router.run(["nft", "add table ip f; add chain ip f c { type filter hook forward priority 0; }"])
    for word in ("saddr", "daddr"):
        router.run(["nft", f"add rule ip f c ip {word} {address} drop"])


def test_a_path_dies_without_a_sign(ends: Ends) -> None:
    drop_all_of(ends.router, SERVER[0])
    assert ends.far_moves.outcome(ends.far_id, "local")["address"] == SERVER[1]
    ends.goes_on()
    ends.finish()


def test_a_path_dies_soon_after_a_flow_has_come_to_it(ends: Ends) -> None:
    """Data of every size got through before, so the peer's answer to the move does not mean that packets are too large."""
    assert ends.far_moves.move(ends.far_id, "eth1")["address"] == SERVER[1]
    silence = ends.server.stack.mobility._silence
    wait_for(lambda: silence.answers(FlowID(ends.far_id)) >= CARRIES_PACKETS, "answers on the new path")
    drop_all_of(ends.router, SERVER[1])
    assert ends.far_moves.outcome(ends.far_id, "local")["address"] == SERVER[0]
    assert ends.server.counters().get("path_mtu_tried", 0) == 0
    ends.finish()


def test_both_ends_move_at_once_and_meet_through_the_service_router(lab: Lab) -> None:
    """With a second instance of the service, which must not take part."""
    client_host, server_host, router_host = two_paths(lab)
    other_host = lab.host("other")
    lab.connect(other_host, "10.4.0.2/24", router_host, "10.4.0.1/24")
    other_host.add_route("default", "10.4.0.1")
    registering = {
        client_host: host_settings(routers=("10.1.1.1",), discover=False),
        server_host: host_settings(routers=("10.2.1.1",), discover=False),
        other_host: host_settings(routers=("10.4.0.1",), discover=False),
    }
    with (
        Controlled(router_host, router_settings()) as router,
        Controlled(server_host, registering[server_host]) as server,
        Controlled(client_host, registering[client_host]) as client,
        Controlled(other_host, registering[other_host]) as other,
    ):
        listener = server.listen(SERVICE)
        router.wait_rules((SERVICE, SERVER[0], 1))
        near, far = client.connect(SERVICE), listener.accept()
        other.listen(SERVICE)
        router.wait_rules((SERVICE, SERVER[0], 1), (SERVICE, "10.4.0.2", 1))
        transfer = Transfer(far, near)
        wait_for(lambda: transfer.received_bytes > STEP_BYTES, "data to arrive")
        # Nothing reaches an old address any more, so it does not matter which end is a moment faster.
        router_host.run(["nft", "add table ip f; add chain ip f c { type filter hook forward priority 0; }"])
        router_host.run(["nft", f"add rule ip f c ip daddr {{ {CLIENT[0]}, {SERVER[0]} }} drop"])
        for host in (client_host, server_host):
            ip(host, "link", "set", "eth0", "down")

        def meet() -> bool:
            (flow,) = client.flows()
            return (flow["local_address"], flow["peer_address"]) == (CLIENT[1], SERVER[1])

        wait_for(meet, "the ends to meet again", 40.0)
        before = transfer.received_bytes
        wait_for(lambda: transfer.received_bytes > before + STEP_BYTES, "data to arrive again", 40.0)
        assert transfer.finish() > 0
        assert client.counters()["peers_found_again"] >= 1
        assert other.counters().get("resets_answered", 0) == 0
        near.release()
        far.release()


def test_live_flows_are_spread_over_two_interfaces(ends: Ends) -> None:
    """The server has four flows on its first interface; afterwards both carry some, and nobody has lost a byte."""
    more = [(ends.client.connect(SERVICE), ends.listener.accept()) for _ in range(3)]
    transfers = [Transfer(far, near) for near, far in more]
    for transfer in transfers:
        wait_for(lambda transfer=transfer: transfer.received_bytes > STEP_BYTES, "data to arrive")

    def serval(*words: str) -> Any:
        command = (sys.executable, "-c", "from serval_core.cli import main; main()", *words, "--json")
        return json.loads(ends.server_host.run(command, cwd=ROOT).stdout)

    planned = serval("balance", "eth0", "eth1", "--measure", "0.2", "--dry-run")
    assert [each["flows"] for each in planned["interfaces"]] == [4, 0]
    assert planned["flows"] == []
    balanced = serval("balance", "eth0", "eth1", "--measure", "0.2")
    assert {each["outcome"] for each in balanced["flows"]} == {"migrated"}
    moved = len(balanced["flows"])
    assert [each["flows_wanted"] for each in balanced["interfaces"]] == [4 - moved, moved]
    assert sorted(str(flow["local_address"]) for flow in ends.server.flows()) == sorted(
        [SERVER[0]] * (4 - moved) + [SERVER[1]] * moved
    )
    for transfer, (near, far) in zip(transfers, more, strict=True):
        assert transfer.finish() > 0
        near.release()
        far.release()
    ends.finish()


def test_nothing_is_left_of_many_flows_that_have_moved(ends: Ends) -> None:
    """They end while they move, and while they have moved; every second one is reset."""
    for turn in range(6):
        flows = [(ends.client.connect(SERVICE), ends.listener.accept()) for _ in range(20)]
        host = (ends.client, ends.server)[turn % 2]
        move_all(host)
        for number, (near, far) in enumerate(flows):
            if number % 2:
                near.abort()
                assert far.ended.get(timeout=20.0) != 0
                far.release()
            else:
                near.release()
                far.receive_all()
                far.release()
    ends.finish()
    for stack in (ends.client, ends.server):
        wait_for(lambda stack=stack: len(stack.stack.mobility.mobility) == 0, "all flows to be forgotten")


def test_what_an_operator_prefers_holds_for_new_flows_and_at_once_for_live_ones(ends: Ends) -> None:
    for preferred, expected in (("eth1", CLIENT[1]), ("eth0", CLIENT[0])):
        settings = MobilitySettings(MobilitySection(prefer=(preferred,)))
        ends.client.call(lambda settings=settings: setattr(ends.client.stack.mobility, "settings", settings))
        assert ends.near_moves.outcome(ends.near_id, "local")["address"] == expected
        near, far = ends.client.connect(SERVICE), ends.listener.accept()
        assert format_address(near.connection.local_address) == expected
        near.release()
        far.release()
    ends.finish()


def test_a_metered_interface_is_used_only_while_there_is_nothing_else(ends: Ends) -> None:
    metered = (InterfaceEntry("eth1", metered=True),)
    settings = MobilitySettings(MobilitySection(return_after_s=0.2, interface=metered))
    ends.client.call(lambda: setattr(ends.client.stack.mobility, "settings", settings))
    ip(ends.client_host, "link", "set", "eth0", "down")
    assert ends.near_moves.outcome(ends.near_id, "local")["address"] == CLIENT[1]
    ends.client.call(lambda: ends.client.stack.mobility.mobility.keep_only(()))  # where it was does not matter
    ip(ends.client_host, "link", "set", "eth0", "up")
    default_route(ends.client_host, CLIENT[0], "eth0", 100)
    assert ends.near_moves.outcome(ends.near_id, "local")["address"] == CLIENT[0]
    ends.finish()
