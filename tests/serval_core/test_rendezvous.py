"""Both ends lose their addresses at the same time: they meet again through the service, or the flow ends in bounded time."""

from __future__ import annotations

from collections.abc import Callable
from errno import ECONNRESET, ETIMEDOUT
from random import Random

import pytest

from serval_core.dataplane.memory_network import Faults, MemoryHost, MemoryNetwork
from serval_core.dataplane.toy_transport import ToyTransport
from serval_core.names import FlowID, format_address, parse_address
from serval_core.rules import Rule
from serval_core.sal import SalSettings
from serval_core.wire import ipv4, sal
from serval_core.wire.sal import ACK, PROTOCOL_SAL, RST, RSYN
from tests.serval_core.exchanges import CLIENT_ADDRESS, SERVER_ADDRESS, SERVICE, leftovers
from tests.serval_core.mobile_hosts import Policy

CLIENT_ADDRESSES = [CLIENT_ADDRESS, *map(parse_address, ("10.0.0.11", "10.0.0.21"))]
SERVER_ADDRESSES = [SERVER_ADDRESS, *map(parse_address, ("10.0.0.12", "10.0.0.22"))]
OTHER_ADDRESS = parse_address("10.0.0.3")
ROUTER_ADDRESS = parse_address("10.0.0.4")
STEP_S = 0.1


class Meeting:
    """A flow between two hosts with three interfaces each, a service router, and another instance of the service."""

    def __init__(self, seed: int, faults: Faults | None = None, router: bool = True) -> None:
        self.network = MemoryNetwork(seed, faults)
        self.client = self.network.add_host(CLIENT_ADDRESS, None, CLIENT_ADDRESSES[1:])
        self.server = self.network.add_host(SERVER_ADDRESS, None, SERVER_ADDRESSES[1:])
        self.other = self.network.add_host(OTHER_ADDRESS)
        self.router = self.network.add_host(ROUTER_ADDRESS, SalSettings(forwarding=True))
        self.registered = SERVER_ADDRESS
        self.router.table.add(Rule.forward(SERVICE, SERVER_ADDRESS))
        self.transports: dict[str, ToyTransport] = {}
        self.hosts = {"client": self.client, "server": self.server}
        self.server.sal.listen(SERVICE, 16, self.network.now)
        if router:
            self.client.table.add(Rule.forward(SERVICE, ROUTER_ADDRESS))
        for name, host in self.hosts.items():
            host.on_open = self._opened(name)
        self.flow_id = self.client.sal.connect(SERVICE.service_id, self.network.now, 0 if router else SERVER_ADDRESS)
        self.client.settle()
        self.network.run(self.network.now + 30.0, lambda: len(self.transports) == 2 or bool(self.client.failed))
        self.other.sal.listen(SERVICE, 16, self.network.now)
        self.router.table.add(Rule.forward(SERVICE, OTHER_ADDRESS))
        self.policies = {name: Policy(host) for name, host in self.hosts.items()}

    def _opened(self, name: str) -> Callable[[MemoryHost, ToyTransport], None]:
        def opened(host: MemoryHost, transport: ToyTransport) -> None:
            self.transports[name] = transport

        return opened

    def down(self, name: str, *numbers: int) -> None:
        """Interfaces of a host fail; a server registers from the first one that works."""
        self.policies[name].down(*numbers)
        usable = [each for each in self.hosts[name].paths.wires if each.index not in self.hosts[name].paths.down]
        if name == "server" and usable:
            self.router.table.remove_rule(SERVICE, Rule.forward(SERVICE, self.registered).type, self.registered)
            self.registered = usable[0].address
            self.router.table.add(Rule.forward(SERVICE, self.registered))

    def both_down(self, *numbers: int) -> None:
        """Interfaces of both hosts fail at the same time; what was on its way is lost."""
        for host in self.hosts.values():
            host.paths.down = {host.paths.wires[number].index for number in numbers}
        for name in self.hosts:
            self.down(name, *numbers)

    def run(self, seconds: float, done: Callable[[], bool] = lambda: False) -> None:
        end = self.network.now + seconds
        while self.network.now < end and not done():
            self.network.run(self.network.now + STEP_S)
            for policy in self.policies.values():
                policy.step()

    def flow(self, name: str) -> dict[str, object]:
        (flow,) = self.hosts[name].sal.flows()
        return flow

    def met(self) -> bool:
        """Whether both ends agree on where both are."""
        if any(len(host.sal.flows()) != 1 for host in self.hosts.values()):
            return False
        near, far = self.flow("client"), self.flow("server")
        settled = near["migration"] == far["migration"] == "INITIAL"
        return settled and (near["local_address"], near["peer_address"]) == (far["peer_address"], far["local_address"])

    def assert_data_flows(self) -> None:
        for name, other in (("client", "server"), ("server", "client")):
            text = f"{name} at {self.network.now}".encode()
            before = self.transports[other].received
            self.transports[name].write(text)
            self.hosts[name].settle()
            self.run(60.0, lambda: self.transports[other].received == before + text)  # noqa: B023
            assert self.transports[other].received == before + text

    def control_of(self, name: str) -> sal.Control:
        """A control packet that this end of the flow could send now, or a forger that knows it."""
        flow = self.hosts[name].sal._core.flows.by_id[FlowID(int(str(self.flow(name)["flow_id"])))]
        return sal.Control(ACK, flow.send_next, flow.receive_next, flow.local_nonce)

    def inject(self, name: str, source: int, control: sal.Control) -> None:
        """A packet for an end of the flow, from any address."""
        flow = self.flow(name)
        payload = sal.emit_control(
            int(str(flow["peer_flow_id"])), int(str(flow["flow_id"])), sal.PROTOCOL_TCP, *control
        )
        host = self.hosts[name]
        self.network.inject(host, ipv4.emit(source, host.address, PROTOCOL_SAL, payload))
        self.run(STEP_S)


def test_ends_that_move_at_once_meet_through_a_service_router() -> None:
    meeting = Meeting(1)
    meeting.both_down(0)
    meeting.run(30.0, meeting.met)
    assert meeting.met()
    assert meeting.flow("client")["local_address"] == format_address(CLIENT_ADDRESSES[1])
    assert meeting.flow("client")["peer_address"] == format_address(SERVER_ADDRESSES[1])
    assert meeting.client.sal.counters["peers_found_again"] == 1
    assert meeting.other.sal.counters["resets_answered"] == 0
    meeting.assert_data_flows()


def test_ends_that_move_at_once_on_one_network_meet_by_broadcast() -> None:
    meeting = Meeting(2, router=False)
    wires = meeting.client.paths.wires
    meeting.client.table.replace_broadcast_rules(
        [Rule.broadcast_on(each.broadcast_address, each.index) for each in wires]
    )
    meeting.both_down(0, 1)
    meeting.run(30.0, meeting.met)
    assert meeting.met()
    assert meeting.flow("client")["peer_address"] == format_address(SERVER_ADDRESSES[2])
    meeting.assert_data_flows()


def test_an_end_that_moves_while_it_answers_a_move_is_not_lost() -> None:
    """The client's RSYN arrives when the server has just left, which answers from its new place."""
    meeting = Meeting(7)
    meeting.down("client", 0)
    meeting.down("server", 0)
    meeting.run(5.0, meeting.met)
    assert meeting.met()
    assert meeting.client.sal.counters["rendezvous_packets"] == 0
    meeting.assert_data_flows()


@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_ends_that_move_at_random_meet_on_every_network(first_seed: int) -> None:
    met = 0
    for seed in range(first_seed, first_seed + 50):
        random = Random(seed)
        faults = Faults(
            loss=random.choice((0.0, 0.05, 0.2)),
            duplication=random.choice((0.0, 0.1)),
            reordering=random.choice((0.0, 0.3)),
            delay_s=random.choice((0.001, 0.05)),
        )
        meeting = Meeting(seed, faults)
        if len(meeting.transports) < 2:
            continue
        for _ in range(random.randint(1, 4)):
            for name in random.sample(("client", "server"), random.randint(1, 2)):
                meeting.down(name, *random.sample(range(3), random.randint(0, 3)))
            meeting.run(random.choice((0.0, 0.3, 4.0, 15.0)))
        for name in meeting.hosts:
            meeting.down(name, *random.sample(range(3), random.randint(0, 2)))
        meeting.run(200.0, meeting.met)
        ended = {**meeting.client.ended, **meeting.server.ended}
        assert meeting.met() or set(ended.values()) <= {ETIMEDOUT, ECONNRESET}, (seed, ended)
        met += meeting.met()
        if meeting.met():
            meeting.assert_data_flows()
        assert meeting.other.sal.counters["resets_answered"] == 0
    assert met > 40


def test_a_flow_whose_peer_is_gone_ends_in_bounded_time() -> None:
    meeting = Meeting(3)
    meeting.down("client", 0)
    meeting.server.paths.up = False
    began = meeting.network.now
    meeting.run(400.0, lambda: bool(meeting.client.ended))
    assert set(meeting.client.ended.values()) == {ETIMEDOUT}
    settings = SalSettings()
    assert meeting.network.now - began < 60.0 + settings.no_path_wait_s + settings.time_wait_s
    meeting.run(30.0)
    assert not leftovers(meeting.client)["timers"]
    meeting.policies["client"].step()
    meeting.policies["client"]._act()
    assert len(meeting.policies["client"].mobility) == 0


def test_the_reset_of_another_instance_does_not_count_while_the_peer_is_looked_for() -> None:
    """A prototype, say, answers whatever names a service and no flow that it has; with our own nonce."""
    meeting = Meeting(4)
    meeting.down("client", 0)
    meeting.server.paths.up = False
    meeting.run(5.0)
    assert meeting.client.sal.counters["rendezvous_packets"] > 0
    mine = meeting.control_of("client")
    meeting.inject("client", OTHER_ADDRESS, mine._replace(flags=RST | ACK, verno=0, ackno=mine.verno - 1))
    assert meeting.client.sal.counters["dropped_reset_by_other_instance"] == 1
    assert not meeting.client.ended
    meeting.server.paths.up = True
    meeting.run(30.0, meeting.met)
    assert meeting.met()


def test_nobody_without_the_nonce_is_taken_for_the_peer() -> None:
    meeting = Meeting(5)
    meeting.down("client", 0)
    meeting.server.paths.up = False
    meeting.run(5.0)
    mine = meeting.control_of("client")
    answer = mine._replace(flags=RSYN | ACK, verno=mine.ackno, ackno=mine.verno)
    meeting.inject("client", OTHER_ADDRESS, answer._replace(nonce=b"guessed!"))
    assert meeting.client.sal.counters["dropped_wrong_nonce"] == 1
    assert meeting.flow("client")["peer_address"] == format_address(SERVER_ADDRESS)


def test_a_service_router_multiplies_an_rsyn_within_limits() -> None:
    meeting = Meeting(6)
    for number in range(50, 90):
        meeting.router.table.add(Rule.forward(SERVICE, parse_address(f"10.0.0.{number}")))
    meeting.down("client", 0)
    meeting.server.paths.up = False
    meeting.network.captured = []
    meeting.run(1.7)
    rsyns = [
        packet
        for packet in meeting.network.captured
        if sal.parse(packet[20:]).services and int.from_bytes(packet[12:16], "big") == CLIENT_ADDRESSES[1]
    ]
    to_router = [packet for packet in rsyns if int.from_bytes(packet[16:20], "big") == ROUTER_ADDRESS]
    assert len(to_router) >= 1
    assert len(rsyns) - len(to_router) == 8 * len(to_router)


def test_service_routers_that_know_each_other_do_not_multiply_an_rsyn_without_end() -> None:
    """Anybody can send one, from any address."""
    network = MemoryNetwork(8)
    addresses = [parse_address(f"10.0.0.{number}") for number in range(100, 107)]
    routers = [network.add_host(each, SalSettings(forwarding=True)) for each in addresses]
    for router in routers:
        for other in addresses:
            if other != router.address:
                router.table.add(Rule.forward(SERVICE, other))
    asked = sal.emit_control(1, 2, sal.PROTOCOL_TCP, RSYN, 3, 4, bytes(8), SERVICE.service_id)
    network.inject(routers[0], ipv4.emit(CLIENT_ADDRESS, addresses[0], PROTOCOL_SAL, asked))
    network.run(network.now + 10.0)
    forwarded = [router.sal.counters["packets_forwarded"] for router in routers]
    assert forwarded[0] == 6, "the first one asks all that it knows"
    assert sum(forwarded) <= 64 * len(routers)
