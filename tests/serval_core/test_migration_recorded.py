"""Does our SAL migrate, octet for octet, as either end of the recorded migrations did? (captures 10 and 11)"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest

from serval_core.dataplane.memory_network import MemoryPaths
from serval_core.effects import MovePath
from serval_core.flow import Flow
from serval_core.names import FlowID
from serval_core.states import State
from serval_core.wire import ipv4, sal
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import ACK, FIN, PROTOCOL_TCP, RSYN, SYN, Control, SalPacket
from tests.serval_core.lone_host import SERVICE_ID, LoneHost
from tests.serval_core.wire.captures import CAPTURES, Capture

RECORDED = [each for each in CAPTURES if "_mig_" in each.name]


class Recorded(NamedTuple):
    ip: IPv4Packet
    sal: SalPacket
    control: Control
    packet: bytes


def controls(capture: Capture) -> list[Recorded]:
    """The control packets of a capture."""
    found = []
    for packet in capture.packets():
        ip = ipv4.parse(packet)
        parsed = sal.parse(ip.payload)
        if parsed.control is not None:
            found.append(Recorded(ip, parsed, parsed.control, packet))
    return found


def host_in_place_of(end: Recorded, other: Recorded, addresses: list[int]) -> tuple[LoneHost, Flow]:
    """A host with the recorded flow in CONNECTED. `end` and `other`: SYN and SYN-ACK, or the other way round."""
    host = LoneHost(paths=MemoryPaths(addresses[0], 1500, addresses[1:]))
    flow = Flow(FlowID(end.sal.src_flow_id), SERVICE_ID, end.control.verno << 64, host.now)
    flow.state = State.CONNECTED
    flow.protocol = end.sal.protocol
    flow.local_nonce, flow.peer_nonce = end.control.nonce, other.control.nonce
    flow.send_unacknowledged = flow.send_next
    flow.receive_next = other.control.verno + 1
    flow.peer_flow_id = FlowID(other.sal.src_flow_id)
    flow.local_address, flow.peer_address = addresses[0], other.ip.source
    host.sal._core.flows.add(flow)
    return host, flow


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("capture", RECORDED, ids=lambda each: each.name)
def test_either_end_of_a_recorded_migration(capture: Capture, role: str) -> None:
    """We take one end's part: what it sent by itself we are made to send, and what it answered we have to answer."""
    syn, syn_ack, handshake_ack, *rest = controls(capture)
    assert (syn.control.flags, syn_ack.control.flags, handshake_ack.control.flags) == (SYN, SYN | ACK, ACK)
    # The SYN was a broadcast; the ACK has the addresses.
    client = syn._replace(ip=handshake_ack.ip)
    end, other = (client, syn_ack) if role == "client" else (syn_ack, client)
    ours = [each for each in rest if each.sal.src_flow_id == end.sal.src_flow_id]
    addresses = list(dict.fromkeys([end.ip.source, *(each.ip.source for each in ours)]))
    host, flow = host_in_place_of(end, other, addresses)

    sent = []
    for each in rest:
        if each not in ours:
            host.receive(each.packet)
        elif each.control.flags == RSYN:
            wire = host.paths.wires[addresses.index(each.ip.source)]
            path = host.paths.path_to(flow.peer_address, wire.index)
            assert path is not None
            host.sal.migrate(flow.flow_id, path, host.now)
        elif each.control.flags == FIN and flow.protocol == PROTOCOL_TCP:
            host.sal.fin_acknowledged(flow.flow_id, host.now)
        elif each.control.flags == FIN:
            host.sal.release(flow.flow_id, host.now)
        sent += host.packets()
    assert [(packet.source, packet.destination) for packet in sent] == [
        (each.ip.source, each.ip.destination) for each in ours
    ]
    assert [packet.packet[20:] for packet in sent] == [each.packet[20:] for each in ours]

    moves = [(each.local_address, each.peer_address) for each in host.news(MovePath)]
    confirmations = [
        each
        for before, each in itertools.pairwise(rest)
        if before.control.flags == RSYN | ACK and each.control.flags == ACK
    ]
    assert moves == [
        (each.ip.source, each.ip.destination) if each in ours else (each.ip.destination, each.ip.source)
        for each in confirmations
    ]
    assert moves
