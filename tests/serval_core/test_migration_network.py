"""Do flows survive moves of either end, in any order, over networks of every badness? Thousands of seeds."""

from __future__ import annotations

from errno import ECONNRESET, ETIMEDOUT
from random import Random

import pytest

from serval_core.dataplane.memory_network import Faults, MemoryHost, MemoryNetwork
from serval_core.dataplane.toy_transport import ToyTransport
from serval_core.errors import OurMistake
from serval_core.names import FlowID, format_address, parse_address
from serval_core.rules import Rule
from serval_core.sal import SalSettings
from serval_core.wire import ipv4, sal
from serval_core.wire.sal import ACK, FIN, RST, RSYN
from tests.serval_core.exchanges import CLIENT_ADDRESS, SERVER_ADDRESS, SERVICE, leftovers

CLIENT_ADDRESSES = [CLIENT_ADDRESS, *map(parse_address, ("10.0.0.11", "10.0.0.21"))]
SERVER_ADDRESSES = [SERVER_ADDRESS, *map(parse_address, ("10.0.0.12", "10.0.0.22"))]
FORGER = parse_address("10.0.0.66")
SEEDS = 2000
SEEDS_PER_TEST = 100
QUIET_S = 200.0


class Moving:
    """A flow between two hosts with three interfaces each, while flows move and interfaces fail."""

    def __init__(self, seed: int, faults: Faults, settings: SalSettings | None = None) -> None:
        self.random = Random(seed)
        self.network = MemoryNetwork(seed, faults)
        self.client = self.network.add_host(CLIENT_ADDRESS, settings, CLIENT_ADDRESSES[1:])
        self.server = self.network.add_host(SERVER_ADDRESS, settings, SERVER_ADDRESSES[1:])
        self.client.table.add(Rule.forward(SERVICE, SERVER_ADDRESS))
        self.server.sal.listen(SERVICE, 16, self.network.now)
        self.transports: dict[str, ToyTransport] = {}
        self.written = {"client": b"", "server": b""}
        self.hosts = {"client": self.client, "server": self.server}

    def open(self) -> bool:
        """Open the flow; False if that did not work."""
        for name, host in self.hosts.items():
            host.on_open = lambda host, transport, name=name: self._opened(name, host, transport)
        self.client.sal.connect(SERVICE.service_id, self.network.now)
        self.client.settle()
        self.network.run(done=lambda: len(self.transports) == 2 or bool(self.client.failed))
        return len(self.transports) == 2

    def _opened(self, name: str, host: MemoryHost, transport: ToyTransport) -> None:
        self.transports[name] = transport

        def changed(transport: ToyTransport) -> None:
            if transport.end_of_stream:
                transport.finish()
                host.sal.release(transport.opened.flow_id, self.network.now)

        transport.on_change = changed

    def write(self, name: str, text: bytes) -> None:
        """Have an end say something, if it still can."""
        transport = self.transports[name]
        if transport.opened.flow_id in self.hosts[name].transports and not transport.end_of_stream:
            self.written[name] += text
            transport.write(text)

    def flow_of(self, host: MemoryHost) -> dict[str, object] | None:
        return next(iter(host.sal.flows()), None)

    def move(self, host: MemoryHost) -> None:
        """Move a host's end to a random one of its interfaces, if its flow can be moved."""
        flow = self.flow_of(host)
        if flow is None:
            return
        wire = self.random.choice(host.paths.wires)
        path = host.paths.path_to(parse_address(str(flow["peer_address"])), wire.index)
        if path is None:
            return
        try:
            host.sal.migrate(FlowID(int(str(flow["flow_id"]))), path, self.network.now)
        except OurMistake:
            assert flow["state"] in ("REQUEST", "RESPOND", "TIMEWAIT", "CLOSED")
        host.settle()

    def forge(self, host: MemoryHost) -> None:
        """Send a control packet to a host's flow: everything in it may be right but the nonce."""
        flow, random = self.flow_of(host), self.random
        if flow is None:
            return
        core_flow = host.sal._core.flows.by_id[FlowID(int(str(flow["flow_id"])))]
        control = sal.Control(
            random.choice((RSYN, RSYN | FIN, RSYN | ACK, RSYN | ACK | FIN, ACK, FIN, RST, RST | ACK)),
            core_flow.receive_next + random.choice((-1, 0, 0, 0, 1, 2)) & 0xFFFFFFFF,
            core_flow.send_next + random.choice((-1, 0, 0, 0, 1)) & 0xFFFFFFFF,
            random.choice((bytes(7) + b"\1", random.randbytes(8))),
        )
        packet = sal.SalPacket(core_flow.peer_flow_id, core_flow.flow_id, 6, control, (), (), b"")
        source = random.choice((FORGER, core_flow.peer_address))
        destination = random.choice([each.address for each in host.paths.wires])
        self.network.inject(host, ipv4.emit(source, destination, sal.PROTOCOL_SAL, sal.emit(packet)))

    def fail_or_repair(self, host: MemoryHost) -> None:
        """Take an interface down, or bring one up."""
        host.paths.down ^= {self.random.choice(host.paths.wires).index}
        host.sal.paths_changed(self.network.now)
        host.settle()

    def calm(self) -> None:
        """From now on the network and all interfaces work; everything that was begun comes to its end."""
        self.network.faults = Faults()
        for host in (self.client, self.server):
            host.paths.down.clear()
            host.sal.paths_changed(self.network.now)
            host.settle()
        self.network.run(self.network.now + QUIET_S)


def random_faults(random: Random) -> Faults:
    return Faults(
        loss=random.choice((0.0, 0.02, 0.15, 0.3)),
        duplication=random.choice((0.0, 0.05, 0.3)),
        reordering=random.choice((0.0, 0.1, 0.5)),
        delay_s=random.choice((0.0001, 0.005, 0.08, 0.25)),
        jitter_s=random.choice((0.0, 0.001, 0.05)),
        reordering_s=random.choice((0.001, 0.1, 0.6)),
    )


def run_moves(seed: int, outages: bool) -> Moving:
    random = Random(-1 - seed)
    moving = Moving(seed, random_faults(random))
    if not moving.open():
        return moving
    for _ in range(random.randint(1, 12)):
        name = random.choice(("client", "server"))
        host = moving.hosts[name]
        chance = random.random()
        if chance < 0.5:
            moving.move(host)
        elif chance < 0.6:
            moving.forge(host)
        elif chance < 0.8 and outages:
            moving.fail_or_repair(host)
        else:
            moving.write(name, random.randbytes(random.choice((1, 4000))))
        moving.network.run(moving.network.now + random.choice((0.0, 0.001, 0.01, 0.3, 5.0)))
    moving.calm()
    return moving


def finish(moving: Moving) -> None:
    """Close both directions, and whatever does not close by itself."""
    for host in moving.hosts.values():
        for transport in list(host.transports.values()):
            transport.finish()
            host.settle()
    moving.network.run(moving.network.now + QUIET_S)
    for host in moving.hosts.values():
        for flow_id in list(host.transports):
            host.sal.abort(flow_id, moving.network.now)
            host.settle()
    moving.network.run()


def assert_nothing_is_left(moving: Moving) -> None:
    for host in moving.hosts.values():
        assert not any(leftovers(host).values()), leftovers(host)
        assert set(host.ended) == set(host.accepted) | set(host.connected)
        assert all(fields["address"] != format_address(FORGER) for _, fields in host.happened)


@pytest.mark.parametrize("first_seed", range(0, SEEDS, SEEDS_PER_TEST))
def test_moves_without_outages_converge(first_seed: int) -> None:
    """Both ends agree on where both are in the end, everything arrives, and nothing ends but by its application."""
    moved = 0
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        moving = run_moves(seed, outages=False)
        if len(moving.transports) < 2:
            continue
        near, far = moving.flow_of(moving.client), moving.flow_of(moving.server)
        assert near is not None, seed
        assert far is not None, seed
        assert (near["migration"], far["migration"]) == ("INITIAL", "INITIAL"), seed
        assert near["local_address"] == far["peer_address"], seed
        assert near["peer_address"] == far["local_address"], seed
        moved += int(str(near["migrations"]))
        assert moving.transports["client"].received == moving.written["server"], seed
        assert moving.transports["server"].received == moving.written["client"], seed
        finish(moving)
        assert set(moving.client.ended.values()) | set(moving.server.ended.values()) == {0}, seed
        assert_nothing_is_left(moving)
    assert moved > SEEDS_PER_TEST


@pytest.mark.parametrize("first_seed", range(SEEDS, 2 * SEEDS, SEEDS_PER_TEST))
def test_moves_while_interfaces_fail_converge_or_end_cleanly(first_seed: int) -> None:
    """Once everything works again, data flows both ways and the flow closes in order, or it has timed out before."""
    survived = 0
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        moving = run_moves(seed, outages=True)
        if len(moving.transports) < 2:
            continue
        alive = bool(moving.client.transports) and bool(moving.server.transports)
        survived += alive
        if alive:
            moving.write("client", b"still there?")
            moving.write("server", b"yes")
            for host in moving.hosts.values():
                host.settle()
            moving.network.run(moving.network.now + QUIET_S)
            assert moving.transports["client"].received == moving.written["server"], seed
            assert moving.transports["server"].received == moving.written["client"], seed
        finish(moving)
        reasons = {*moving.client.ended.values(), *moving.server.ended.values()}
        assert reasons == {0} if alive else reasons & {ETIMEDOUT, ECONNRESET}, (seed, reasons)
        assert_nothing_is_left(moving)
    assert survived > SEEDS_PER_TEST // 2
