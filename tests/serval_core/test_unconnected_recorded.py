"""Do our unconnected datagrams look like those of the prototype, and do its datagrams reach us?"""

from __future__ import annotations

from random import Random

import pytest

from serval_core.dataplane.memory_network import WIRE_INDEX, MemoryPaths
from serval_core.effects import DeliverDatagram, SendPacket
from serval_core.names import FlowID, ServiceID, parse_address, parse_service
from serval_core.rules import Rule
from serval_core.sal import SalSettings, ServiceAccessLayer
from serval_core.service_table import ServiceTable
from serval_core.wire import ipv4, sal, udp
from serval_core.wire.sal import PROTOCOL_SAL
from tests.serval_core.wire.captures import CAPTURES, without_identification

(RECORDED,) = (list(each.packets()) for each in CAPTURES if each.name == "07_udp_unconnected.pcap")


class RecordedHost:
    """Our SAL at the address of a recorded prototype."""

    def __init__(self, address: str) -> None:
        table = ServiceTable()
        paths = MemoryPaths(parse_address(address), 1500)
        wire = paths.wire
        table.replace_broadcast_rules([Rule.broadcast_on(wire.broadcast_address, wire.index)])
        self.sal = ServiceAccessLayer(SalSettings(), table, paths, Random(1))

    def sends(self, service: str, flow_id: int, payload: bytes, destination: ServiceID) -> bytes:
        endpoint = self.sal.bind_datagrams(parse_service(service))
        endpoint.flow_id = FlowID(flow_id)
        assert self.sal.send_datagram(endpoint.endpoint_id, payload, destination, 1.0) == 0
        (effect,) = self.sal.take_effects()
        assert isinstance(effect, SendPacket)
        return effect.packet


@pytest.mark.parametrize("index", range(5))
def test_what_leaves_is_byte_for_byte_what_the_prototype_sent(index: int) -> None:
    recorded = RECORDED[index]
    packet = sal.parse(ipv4.parse(recorded).payload)
    payload = udp.parse(packet.transport, 0, 0, verify=False).payload
    host = RecordedHost("10.77.0.2" if recorded[15] == 2 else "10.77.0.1")
    service = str(int.from_bytes(packet.services[1][:4], "big"))
    sent = host.sends(service, packet.src_flow_id, payload, packet.services[0])
    assert without_identification(sent) == without_identification(recorded)


def test_recorded_datagrams_arrive() -> None:
    host = RecordedHost("10.77.0.2")
    endpoint = host.sal.bind_datagrams(parse_service("700"))
    for packet in RECORDED:
        host.sal.packet_received(packet, WIRE_INDEX, packet[19] == 255, 1.0)
    payloads = [
        (each.endpoint_id, each.datagram.payload, each.datagram.source_address)
        for each in host.sal.take_effects()
        if isinstance(each, DeliverDatagram)
    ]
    hello = (endpoint.endpoint_id, b"unconnected hello", parse_address("10.77.0.1"))
    assert payloads == [hello, hello, (endpoint.endpoint_id, b"nobody there", parse_address("10.77.0.1"))]


def test_our_refusal_is_the_recorded_one() -> None:
    """Apart from its IP source, which is the broadcast address in the recording: we do not refuse broadcasts."""
    offender, refusal = RECORDED[4], RECORDED[5]
    host = RecordedHost("10.77.0.2")
    unicast = ipv4.emit(
        parse_address("10.77.0.1"), parse_address("10.77.0.2"), PROTOCOL_SAL, ipv4.parse(offender).payload
    )
    host.sal.packet_received(offender, WIRE_INDEX, True, 1.0)
    assert host.sal.take_effects() == []
    host.sal.packet_received(unicast, WIRE_INDEX, False, 1.0)
    (answer,) = host.sal.take_effects()
    assert isinstance(answer, SendPacket)
    assert ipv4.parse(answer.packet).payload == ipv4.parse(refusal).payload
