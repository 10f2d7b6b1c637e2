"""Instances of one service, as a test wants them to answer: by hand to a lone host, or alive on a network."""

from __future__ import annotations

from serval_core.dataplane.memory_network import MemoryHost, MemoryNetwork
from serval_core.names import FlowID
from serval_core.rules import Rule
from serval_core.sal import SalSettings
from serval_core.wire.sal import ACK, RST
from tests.serval_core.exchanges import CLIENT_ADDRESS
from tests.serval_core.lone_host import OUR_OPTIONS, SERVICE, SERVICE_ID, LoneHost, Peer, Sent

REFUSING = SalSettings(refuse_unknown_services=True)


def refusal(host: LoneHost, syn: Sent, source: int | None = None) -> None:
    """Whoever the SYN went to (or `source`) answers that it does not have the service."""
    peer = Peer(syn.destination if source is None else source, options=OUR_OPTIONS)
    peer.learn(syn)
    peer.flow_id = 0
    host.receive(peer.control(RST | ACK, verno=0, ackno=peer.ackno, nonce=peer.host_nonce))


def answer(host: LoneHost, syn: Sent, source_addresses: tuple[int, ...] = (), address: int | None = None) -> None:
    peer = Peer(syn.destination if address is None else address, options=OUR_OPTIONS)
    peer.learn(syn)
    host.receive(peer.syn_ack(source_addresses=source_addresses))
    host.effects()


def down(host: LoneHost) -> dict[str, str]:
    """The addresses of targets that are marked, with the reasons."""
    found: dict[str, str] = {}
    for entry in host.table.snapshot():
        targets = entry["targets"]
        assert isinstance(targets, list)
        found |= {each["address"]: each["down"] for each in targets if each["down"]}
    return found


def instances(
    count: int, settings: SalSettings | None = None, seed: int = 1
) -> tuple[MemoryNetwork, MemoryHost, list[MemoryHost]]:
    """A client that knows `count` instances of the service, all listening."""
    network = MemoryNetwork(seed)
    client = network.add_host(CLIENT_ADDRESS, settings)
    servers = [network.add_host(CLIENT_ADDRESS + number, settings) for number in range(1, count + 1)]
    for server in servers:
        server.sal.listen(SERVICE, 64, network.now)
        client.table.add(Rule.forward(SERVICE, server.address))
    return network, client, servers


def connect(network: MemoryNetwork, client: MemoryHost) -> tuple[FlowID, float]:
    """Connect, and wait for the outcome; how long that took."""
    began = network.now
    flow_id = client.sal.connect(SERVICE_ID, network.now)
    client.settle()
    network.run(network.now + 30, lambda: flow_id in client.connected or flow_id in client.failed)
    return flow_id, network.now - began


def served_by(client: MemoryHost, flow_id: FlowID) -> int:
    return client.transports[flow_id].opened.peer_address
