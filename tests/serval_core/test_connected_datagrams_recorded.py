"""Does connected Serval UDP say what the prototype was recorded saying, byte for byte?"""

from __future__ import annotations

import pytest

from serval_core.dataplane.memory_network import MemoryPaths
from serval_core.effects import (
    Accepted,
    Connected,
    DeliverFlowDatagram,
    FlowEnded,
    ForgetExpected,
    SendPacket,
)
from serval_core.names import FlowID, parse_address, parse_service
from serval_core.rules import Rule
from serval_core.wire import ipv4, sal
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import (
    PROTOCOL_UDP,
    SalPacket,
)
from tests.serval_core.lone_host import LoneHost
from tests.serval_core.wire.captures import CAPTURES, without_identification

(RECORDED,) = (list(each.packets()) for each in CAPTURES if each.name == "06_udp_connected.pcap")
PROTOTYPE_CLIENT, PROTOTYPE_SERVER = parse_address("10.77.0.1"), parse_address("10.77.0.2")
ECHO = parse_service("16385")
SENT_BY_CLIENT = (b"hello udp", b"second message", b"quit")
SENT_BY_SERVER = tuple(each.upper() for each in SENT_BY_CLIENT)


def recorded(index: int) -> tuple[IPv4Packet, SalPacket]:
    ip = ipv4.parse(RECORDED[index])
    return ip, sal.parse(ip.payload)


class Replay:
    """Our SAL in the place of one end of the recording, with that end's numbers, so that bytes can be compared."""

    def __init__(self, address: int, handshake_packet: int) -> None:
        _, packet = recorded(handshake_packet)
        assert packet.control is not None
        self.host = LoneHost(paths=MemoryPaths(address, 1500))
        self.host.sal._core.random = Numbers(
            packet.src_flow_id, int.from_bytes(packet.control.nonce, "big") | packet.control.verno << 64
        )

    def hear(self, *indexes: int) -> None:
        for index in indexes:
            packet = RECORDED[index]
            self.host.receive(packet, broadcast=packet[19] == 255)

    def expect(self, *indexes: int) -> None:
        """We must have sent exactly these packets, byte for byte but for what the kernel fills in."""
        sent = [each.packet for each in self.host.effects() if isinstance(each, SendPacket)]
        assert list(map(without_identification, sent)) == [without_identification(RECORDED[index]) for index in indexes]


class Numbers:
    """Hands out the recorded end's flowID and secrets instead of random ones."""

    def __init__(self, flow_id: int, secrets: int) -> None:
        self._flow_id = flow_id
        self._secrets = secrets

    def getrandbits(self, k: int, /) -> int:
        return self._flow_id if k == 32 else self._secrets

    def random(self) -> float:
        return 0.0


def no_port_rule(flow_id: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prototype's flowIDs are small numbers, which ours never are."""
    monkeypatch.setattr(
        "serval_core.flow_table.FlowTable.new_flow_id", lambda _table, _random_bits: FlowID(flow_id)
    )


def test_a_client_says_byte_for_byte_what_the_prototype_said(monkeypatch: pytest.MonkeyPatch) -> None:
    no_port_rule(2, monkeypatch)
    replay = Replay(PROTOTYPE_CLIENT, 0)
    host = replay.host
    wire = host.paths.wire
    host.table.replace_broadcast_rules([Rule.broadcast_on(wire.broadcast_address, wire.index)])
    flow_id = host.sal.connect(ECHO.service_id, host.now, protocol=PROTOCOL_UDP)
    replay.expect(0)
    replay.hear(1)
    replay.expect(2)
    assert host.news(Connected) == [Connected(flow_id)]
    for payload, outgoing, incoming in zip(SENT_BY_CLIENT, (3, 5, 7), (4, 6, 8), strict=True):
        assert host.sal.send_on_flow(flow_id, payload) == 0
        replay.expect(outgoing)
        replay.hear(incoming)
    assert [each.payload for each in host.news(DeliverFlowDatagram)] == list(SENT_BY_SERVER)
    # In the recording both ends close at once: the FINs cross.
    host.sal.release(flow_id, host.now)
    replay.expect(10)
    replay.hear(9)
    replay.expect(12)
    assert host.states() == ["CLOSING"]
    replay.hear(11)
    assert host.news(FlowEnded) == [FlowEnded(flow_id, 0)]
    assert len(host.sal._core.flows.time_wait) == 1


def test_a_server_says_byte_for_byte_what_the_prototype_said(monkeypatch: pytest.MonkeyPatch) -> None:
    no_port_rule(3, monkeypatch)
    replay = Replay(PROTOTYPE_SERVER, 1)
    host = replay.host
    host.sal.listen(ECHO, 16, host.now, PROTOCOL_UDP)
    replay.hear(0)
    replay.expect(1)
    replay.hear(2)
    replay.expect()
    ((flow_id, service_id),) = [(each.flow_id, each.service_id) for each in host.news(Accepted)]
    assert service_id == ECHO.service_id
    for incoming, payload, outgoing in zip((3, 5, 7), SENT_BY_SERVER, (4, 6, 8), strict=True):
        replay.hear(incoming)
        host.sal.send_on_flow(flow_id, payload)
        replay.expect(outgoing)
    assert [each.payload for each in host.news(DeliverFlowDatagram)] == list(SENT_BY_CLIENT)
    host.sal.release(flow_id, host.now)
    replay.expect(9)
    replay.hear(10)
    replay.expect(11)
    replay.hear(12)
    assert host.news(FlowEnded) == [FlowEnded(flow_id, 0)]
    assert host.news(ForgetExpected) == [ForgetExpected(flow_id)]
