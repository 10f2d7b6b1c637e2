"""Do our own stacks agree on proofs, ask for them on every control packet, and leave prototypes alone?"""

from __future__ import annotations

from errno import ECONNREFUSED
from itertools import pairwise

import pytest

from serval_core.control_authentication import KeyPair, KeyPairs, Proofs
from serval_core.dataplane.memory_network import MemoryHost, MemoryNetwork
from serval_core.dataplane.toy_transport import ToyTransport
from serval_core.errors import TheirMistake
from serval_core.names import FlowID, parse_address
from serval_core.rules import Rule
from serval_core.sal import SalSettings
from serval_core.sal_settings import Authenticate
from serval_core.wire import ipv4, sal
from serval_core.wire.sal import ACK, FIN, RST, RSYN, SYN, SalPacket
from tests.serval_core.exchanges import CLIENT_ADDRESS, SERVER_ADDRESS, SERVICE, Exchange, leftovers
from tests.serval_core.lone_host import OUR_OPTIONS, LoneHost, Peer

ELSEWHERE = parse_address("10.0.0.11")
ATTACKER = parse_address("10.0.0.66")
OFF, OFFER, REQUIRE = Authenticate.OFF, Authenticate.OFFER, Authenticate.REQUIRE


class Conversation:
    """A client with two interfaces, a server, one exchange, and all packets."""

    def __init__(self, client: Authenticate, server: Authenticate, client_waits: bool = True) -> None:
        self.network = MemoryNetwork(1)
        self.network.captured = []
        self.client = self.network.add_host(
            CLIENT_ADDRESS, SalSettings(authenticate=client, connect_timeout_s=2.0), [ELSEWHERE]
        )
        self.server = self.network.add_host(SERVER_ADDRESS, SalSettings(authenticate=server))
        self.client.table.add(Rule.forward(SERVICE, SERVER_ADDRESS))
        self.server.sal.listen(SERVICE, 16, self.network.now)
        self.exchange = Exchange(self.network, self.client, self.server, server_waits=True)
        self.exchange.client_waits = client_waits

    def open(self) -> None:
        self.exchange.start()
        self.network.run(self.network.now + 1.0)
        assert len(self.exchange.transports) == 2

    def move(self) -> None:
        (flow,) = self.client.sal.flows()
        path = self.client.paths.path_to(SERVER_ADDRESS, 3)
        assert path is not None
        self.client.sal.migrate(FlowID(int(str(flow["flow_id"]))), path, self.network.now)
        self.client.settle()

    def finish(self, seconds: float = 200.0) -> None:
        transport = self.exchange.transports["client"]

        def changed(changed: ToyTransport) -> None:
            if changed.end_of_stream:
                self.client.sal.release(changed.opened.flow_id, self.network.now)

        transport.on_change = changed
        transport.write(b"request")
        transport.finish()
        self.client.settle()
        self.network.run(self.network.now + seconds)

    def controls(self) -> list[tuple[int, SalPacket]]:
        """Flags of every control packet, and the packet."""
        assert self.network.captured is not None
        parsed = [sal.parse(ipv4.parse(packet).payload) for packet in self.network.captured]
        return [(each.control.flags, each) for each in parsed if each.control is not None]


@pytest.mark.parametrize("client", [OFFER, REQUIRE])
@pytest.mark.parametrize("server", [OFFER, REQUIRE])
def test_everything_after_the_syn_ack_is_proven(client: Authenticate, server: Authenticate) -> None:
    talk = Conversation(client, server)
    talk.open()
    talk.move()
    talk.network.run(talk.network.now + 1.0)
    talk.finish()
    kinds = [flags for flags, _ in talk.controls()]
    assert kinds == [SYN, SYN | ACK, ACK, RSYN, RSYN | ACK, ACK, FIN, ACK, FIN, ACK]
    (_, syn), (_, syn_ack), (_, first), *rest = talk.controls()
    assert (syn.key, syn.proof, syn_ack.proof) == (b"", b"", b"")
    assert len(syn_ack.key) == len(first.key) == 32
    proofs = [first.proof, *(each.proof for _, each in rest)]
    assert {len(proof) for proof in proofs} == {16}
    assert len(set(proofs)) == len(proofs)
    for host in (talk.client, talk.server):
        assert set(host.ended.values()) == {0}
        assert not any(leftovers(host).values())
        assert not [name for name in host.sal.counters if name.startswith("dropped_")]


@pytest.mark.parametrize("settings", [OFF, REQUIRE])
def test_a_client_that_moves_before_its_handshake_ack_has_arrived_stays_connected(settings: Authenticate) -> None:
    """The ACK is lost with the old path, so the RSYN is the first that the server hears, and has the key."""
    talk = Conversation(settings, settings)
    talk.client.on_open = lambda host, transport: host.paths.down.add(host.paths.wire.index)
    talk.server.on_open = lambda host, transport: None
    flow_id = talk.client.sal.connect(SERVICE.service_id, talk.network.now)
    talk.client.settle()
    talk.network.run(done=lambda: bool(talk.client.connected))
    assert talk.server.accepted == {}
    path = talk.client.paths.path_to(SERVER_ADDRESS)
    assert path is not None
    assert path.source_address == ELSEWHERE
    talk.client.sal.migrate(flow_id, path, talk.network.now)
    talk.client.settle()
    talk.network.run(talk.network.now + 1.0)
    (flow,) = talk.server.sal.flows()
    assert (flow["state"], flow["peer_address"]) == ("CONNECTED", "10.0.0.11")
    assert flow["authenticated"] is (settings is REQUIRE)
    keys = [flags for flags, said in talk.controls() if said.key]
    assert set(keys) == ({SYN | ACK, ACK, RSYN} if settings is REQUIRE else set())
    talk.network.captured = []
    talk.move()
    talk.network.run(talk.network.now + 1.0)
    assert not any(said.key for _, said in talk.controls())  # both have it
    for host in (talk.client, talk.server):
        assert not [name for name in host.sal.counters if name.startswith("dropped_")]


@pytest.mark.parametrize(("client", "server"), [(OFF, OFF), (OFF, OFFER), (OFFER, OFF)])
def test_who_is_not_asked_proves_nothing(client: Authenticate, server: Authenticate) -> None:
    talk = Conversation(client, server)
    talk.open()
    talk.finish()
    assert all(not each.key and not each.proof for _, each in talk.controls())
    assert set(talk.client.ended.values()) == {0}


def test_a_server_that_requires_proofs_refuses_others() -> None:
    talk = Conversation(OFF, REQUIRE)
    talk.exchange.start()
    talk.network.run()
    (failed,) = talk.client.failed.values()
    assert failed.errno == ECONNREFUSED
    assert talk.server.sal.counters["dropped_authentication_required"] > 0


def test_a_client_that_requires_proofs_refuses_others() -> None:
    talk = Conversation(REQUIRE, OFF)
    talk.exchange.start()
    talk.network.run()
    assert [failed.errno for failed in talk.client.failed.values()] == [ECONNREFUSED]
    assert talk.client.sal.counters["dropped_authentication_refused"] > 0


def test_a_prototype_client_sees_nothing_of_it() -> None:
    for settings in (OFF, OFFER):
        host = LoneHost(SalSettings(authenticate=settings))
        host.listen()
        peer = Peer()
        host.receive(peer.syn())
        answer = host.only_packet()
        assert (answer.sal.key, answer.segment and answer.segment.options.capabilities) == (b"", None)
        peer.learn(answer)
        host.receive(peer.handshake_ack())
        assert host.states() == ["CONNECTED"]


def test_a_prototype_server_is_used_when_proofs_are_only_offered() -> None:
    host = LoneHost(SalSettings(authenticate=OFFER))
    host.forward(SERVER_ADDRESS)
    host.connect()
    peer = Peer(address=SERVER_ADDRESS)
    peer.learn(host.only_packet())
    host.receive(peer.syn_ack())
    assert host.only_packet().sal.proof == b""
    assert host.states() == ["CONNECTED"]


def forged(host: MemoryHost, flags: int, verno_ahead: int = 0) -> SalPacket:
    """A control packet to a host's flow by somebody who sees everything: all is right but the proof."""
    (flow,) = host.sal._core.flows.by_id.values()
    verno = flow.receive_next + verno_ahead & 0xFFFFFFFF
    control = sal.Control(flags, verno, flow.send_next, flow.peer_nonce)
    return SalPacket(flow.peer_flow_id, flow.flow_id, 6, control, (), (), b"")


@pytest.mark.parametrize("flags", [RSYN, RSYN | FIN, RSYN | ACK, FIN, RST, RST | ACK, ACK])
def test_who_only_sees_everything_changes_nothing(flags: int) -> None:
    """Without proofs each of these would move, close or reset the flow: see the end of this test."""
    for settings in (REQUIRE, OFF):
        talk = Conversation(settings, settings)
        talk.open()
        said = forged(talk.server, flags)
        before = talk.server.sal.flows()
        for proof in (b"", bytes(16)):
            payload = sal.emit(said._replace(proof=proof))
            talk.network.inject(talk.server, ipv4.emit(ATTACKER, SERVER_ADDRESS, 144, payload))
        assert talk.network.captured is not None
        talk.network.captured.clear()
        talk.network.run(talk.network.now + 0.001)
        if settings is REQUIRE:
            assert talk.server.sal.flows() == before
            assert talk.network.captured == []
            assert talk.server.sal.counters["dropped_proof_missing"] == 1
            assert talk.server.sal.counters["dropped_proof_wrong"] == 1
        elif flags not in (ACK, RSYN | ACK, RST):
            assert talk.server.sal.flows() != before or talk.network.captured


def test_a_proven_packet_says_nothing_from_another_address() -> None:
    """An RSYN that is caught and sent again by somebody else does not take the flow to him."""
    talk = Conversation(REQUIRE, REQUIRE)
    talk.open()
    assert talk.network.captured is not None
    talk.network.captured.clear()
    talk.move()
    (rsyn,) = talk.network.captured
    talk.client.paths.down = {3}
    talk.network.inject(talk.server, ipv4.emit(ATTACKER, SERVER_ADDRESS, 144, ipv4.parse(rsyn).payload))
    talk.network.run(talk.network.now + 0.001)
    assert talk.server.sal.counters["dropped_proof_wrong"] == 1
    assert {flow["migration"] for flow in talk.server.sal.flows()} == {"INITIAL"}


def test_only_the_right_ack_completes_the_handshake() -> None:
    host = LoneHost(SalSettings(authenticate=REQUIRE))
    host.listen()
    peer = Peer(options=OUR_OPTIONS._replace(capabilities=1))
    host.receive(peer.syn())
    answer = host.only_packet()
    peer.learn(answer)
    assert answer.sal.key
    for packet in (peer.handshake_ack(), peer.data(), peer.control(RSYN), peer.handshake_ack(bare=True)):
        host.receive(packet)
    assert host.dropped("proof_missing") == 4
    pair = KeyPair(5)
    said = sal.parse(ipv4.parse(peer.handshake_ack()).payload)._replace(key=pair.public)
    for key, reason in ((bytes(32), "weak_key"), (pair.public, "proof_wrong")):
        payload = sal.emit(said._replace(key=key, proof=bytes(16)))
        host.receive(ipv4.emit(peer.address, peer.host_address, 144, payload))
        assert host.dropped(reason) == 1
    assert host.states() == ["RESPOND"]
    client = peer.flow_id, peer.nonce, pair.public
    server = peer.host_flow_id, peer.host_nonce, answer.sal.key
    proofs = Proofs.agreed(pair.agree(answer.sal.key), client, server, is_client=True)
    proof = proofs.make(peer.address, peer.host_address, said)
    host.receive(ipv4.emit(peer.address, peer.host_address, 144, sal.emit(said._replace(proof=proof))))
    assert host.states() == ["CONNECTED"]


def test_a_repeated_fin_is_still_proven_in_time_wait() -> None:
    talk = Conversation(REQUIRE, REQUIRE)
    talk.open()
    talk.finish(seconds=5.0)
    assert talk.network.captured is not None
    waiting = talk.client if talk.client.sal._core.flows.time_wait else talk.server
    fins = [each for each in talk.network.captured if _is_fin_to(waiting, each)]
    talk.network.captured.clear()
    talk.network.inject(waiting, fins[-1])
    damaged = sal.parse(ipv4.parse(fins[-1]).payload)._replace(proof=bytes(16))
    ip = ipv4.parse(fins[-1])
    talk.network.inject(waiting, ipv4.emit(ip.source, ip.destination, 144, sal.emit(damaged)))
    talk.network.run(talk.network.now + 0.001)
    (answer,) = talk.network.captured
    assert sal.parse(ipv4.parse(answer).payload).proof
    assert waiting.sal.counters["dropped_proof_wrong"] == 1


def _is_fin_to(host: MemoryHost, packet: bytes) -> bool:
    ip = ipv4.parse(packet)
    control = sal.parse(ip.payload).control
    return control is not None and control.flags & FIN != 0 and host.paths.has_address(ip.destination)


# The pieces.


def test_both_ends_compute_the_same_and_directions_differ() -> None:
    near, far = KeyPair(1), KeyPair(2)
    client, server = (7, b"nonce--1", near.public), (8, b"nonce--2", far.public)
    ours = Proofs.agreed(near.agree(far.public), client, server, is_client=True)
    theirs = Proofs.agreed(far.agree(near.public), client, server, is_client=False)
    said = SalPacket(7, 8, 6, sal.Control(RSYN, 1, 2, b"nonce--1"), (), (), b"")
    proof = ours.make(1, 2, said)
    theirs.check(1, 2, said._replace(proof=proof))
    with pytest.raises(TheirMistake, match="proof_wrong"):
        ours.check(1, 2, said._replace(proof=proof))  # reflected
    variants = [
        said._replace(src_flow_id=9),
        said._replace(dst_flow_id=9),
        said._replace(protocol=17),
        said._replace(control=sal.Control(FIN, 1, 2, b"nonce--1")),
        said._replace(control=sal.Control(RSYN, 2, 2, b"nonce--1")),
        said._replace(control=sal.Control(RSYN, 1, 3, b"nonce--1")),
        said._replace(control=sal.Control(RSYN, 1, 2, b"nonce--2")),
        said._replace(services=(SERVICE.service_id,)),
        said._replace(key=near.public),
        said._replace(transport=b"x"),
    ]
    for variant in variants:
        with pytest.raises(TheirMistake, match="proof_wrong"):
            theirs.check(1, 2, variant._replace(proof=proof))
    for ends in ((1, 3), (3, 2)):
        with pytest.raises(TheirMistake, match="proof_wrong"):
            theirs.check(*ends, said._replace(proof=proof))


def test_key_pairs_are_forgotten() -> None:
    numbers = iter(range(1, 10))
    pairs = KeyPairs(lambda bits: next(numbers))
    made = [pairs.current(now).public for now in (0.0, 599.0, 600.0, 1300.0)]
    assert [before == after for before, after in pairwise(made)] == [True, False, False]


def test_an_rsyn_that_a_service_router_passed_on_is_believed() -> None:
    """Its addresses were changed on the way, and the router's is in it now (`rendezvous`)."""
    talk = Conversation(REQUIRE, REQUIRE)
    talk.open()
    core = talk.client.sal._core
    (flow,) = core.flows.by_id.values()
    said = core.proven_control(flow, RSYN, flow.send_next, 0, 0, SERVICE.service_id)
    forwarded = sal.append_source(said, ELSEWHERE, ATTACKER)
    talk.network.inject(talk.server, ipv4.emit(ELSEWHERE, SERVER_ADDRESS, 144, forwarded))
    talk.network.run(talk.network.now + 0.001)
    assert [flow["migration"] for flow in talk.server.sal.flows()] == ["RECV"]
