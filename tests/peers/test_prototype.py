"""Do the played client and server converse over a real wire, and do they see what is wrong with a packet?"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from scapy.packet import Packet

from lab.hosts import Host, Lab
from serval_core.wire.scapy_layers import IP, SAL, SALControl, SALService, ServalTCP
from tests.serval_core.wire.captures import CAPTURES

from .application import Behaviour, PeerResult
from .prototype import PrototypeClient, PrototypeServer, lose_at_random, lose_handshake_ack
from .prototype_flow import ACK, FIN, SYN
from .prototype_peer import Options, Peer
from .raw_wire import Direction, Loss

ROOT = Path(__file__).parents[2]
SERVICE = 76568
CLIENT_ADDRESS, SERVER_ADDRESS, BROADCAST_ADDRESS = "10.1.0.1", "10.1.0.2", "10.1.0.255"
SOON_S = 30.0


class Hosts(NamedTuple):
    """Two hosts with a wire between them."""

    client: Host
    server: Host


class Started:
    """A peer that plays in a thread of its own, inside a host."""

    def __init__(self, host: Host, peer: Peer) -> None:
        self._peer = peer
        self._results: list[PeerResult] = []
        self._thread = threading.Thread(target=lambda: self._results.append(host.call(peer.run)), daemon=True)
        self._thread.start()
        assert peer.ready.wait(SOON_S)

    def result(self) -> PeerResult:
        """What it says at its end."""
        self._thread.join(SOON_S)
        return self._results[0]

    def stop(self) -> PeerResult:
        """End it now."""
        self._peer.stop()
        return self.result()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Lab() as lab:
        client, server = lab.host("client"), lab.host("server")
        lab.connect(client, f"{CLIENT_ADDRESS}/24", server, f"{SERVER_ADDRESS}/24")
        yield Hosts(client, server)


def play(
    hosts: Hosts, client: PrototypeClient, server: PrototypeServer
) -> tuple[PeerResult, PeerResult]:
    """Both to their ends."""
    started = Started(hosts.server, server)
    client_result = hosts.client.call(client.run)
    return client_result, started.result()


def options(lose: Loss | None = None, **more: float) -> Options:
    """Options that make a test short."""
    chosen = {"timeout_s": SOON_S, "linger_s": 0.0, **more}
    return Options(**chosen) if lose is None else Options(lose=lose, **chosen)  # type: ignore[arg-type]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("destination", [SERVER_ADDRESS, BROADCAST_ADDRESS])
def test_an_echo_comes_back_whole(hosts: Hosts, destination: str) -> None:
    data = random.Random(1).randbytes(200_000)
    behaviour = Behaviour(data, close_when="received", expected_bytes=len(data))
    client, server = play(
        hosts,
        PrototypeClient(SERVICE, destination, behaviour, options()),
        PrototypeServer(SERVICE, Behaviour(echo=True), options()),
    )
    for result, state in ((client, "TIMEWAIT"), (server, "CLOSED")):
        (flow,) = result.flows
        assert (flow.received_sha256, flow.sent_bytes) == (sha256(data), len(data))
        assert (flow.state, flow.error, flow.end_of_stream) == (state, "", True)
        assert result.complaints == {}
        assert not result.timed_out
        assert result.counters["largest_packet_bytes"] == 20 + 12 + 20 + 1408
    assert server.flows[0].peer_address == CLIENT_ADDRESS
    assert client.flows[0].peer_address == SERVER_ADDRESS


def test_several_clients_are_served_and_their_data_kept_apart(hosts: Hosts) -> None:
    data = [random.Random(i).randbytes(20_000 + i) for i in range(3)]
    server = Started(hosts.server, PrototypeServer(SERVICE, Behaviour(echo=True), options(), connections=3))
    clients = [
        Started(
            hosts.client,
            PrototypeClient(
                SERVICE,
                SERVER_ADDRESS,
                Behaviour(written, close_when="received", expected_bytes=len(written)),
                Options(first_flow_id=100 + i, timeout_s=SOON_S, linger_s=0.0),
            ),
        )
        for i, written in enumerate(data)
    ]
    for client, written in zip(clients, data, strict=True):
        assert client.result().flows[0].received_sha256 == sha256(written)
    assert {flow.received_sha256 for flow in server.result().flows} == {sha256(written) for written in data}


class Shape(NamedTuple):
    """What matters of a packet, without the numbers that were drawn."""

    control: int
    extensions: tuple[str, ...]
    tcp_flags: str
    window: int
    options: str
    payload_bytes: int


def shape(packet: Packet) -> Shape:
    control = packet[SAL].extension(SALControl)
    tcp = packet.getlayer(ServalTCP)
    return Shape(
        int(control.flags) if control is not None else 0,
        tuple(type(extension).__name__ for extension in packet[SAL].extensions),
        str(tcp.flags) if tcp is not None else "",
        tcp.window if tcp is not None and control is not None else 0,
        str(tcp.options) if tcp is not None else "",
        len(tcp.payload) if tcp is not None else 0,
    )


def by_sender(packets: Sequence[Packet], client: str) -> tuple[list[Shape], list[Shape]]:
    return (
        [shape(packet) for packet in packets if packet.src == client],
        [shape(packet) for packet in packets if packet.src != client],
    )


def test_a_connection_has_the_packets_of_the_captured_one(hosts: Hosts) -> None:
    captured = [IP(packet) for packet in CAPTURES[0].packets()]
    payload = next(bytes(p[ServalTCP].payload) for p in captured if shape(p).payload_bytes)
    seen: list[Packet] = []

    def watch(direction: Direction, packet: Packet) -> bool:
        # A sender gets its own broadcast back.
        if direction == "sent" or packet.src != CLIENT_ADDRESS:
            seen.append(IP(bytes(packet)))
        return False

    play(
        hosts,
        PrototypeClient(SERVICE, BROADCAST_ADDRESS, options=options(watch, linger_s=0.2)),
        PrototypeServer(SERVICE, Behaviour(payload, close_when="sent"), options()),
    )
    assert by_sender(seen, CLIENT_ADDRESS) == by_sender(captured, captured[0].src)


@pytest.mark.parametrize("seed", range(3))
def test_data_survive_a_lossy_wire(hosts: Hosts, seed: int) -> None:
    data = random.Random(seed).randbytes(100_000)
    # The handshake's ACK comes through: its loss is another story, told below.
    at_random = lose_at_random(0.03, seed)

    def lose(direction: Direction, packet: Packet) -> bool:
        control = packet[SAL].extension(SALControl)
        is_ack = control is not None and packet[SAL].extension(SALService) is not None and control.flags & ACK
        return not is_ack and at_random(direction, packet)

    client, server = play(
        hosts,
        PrototypeClient(
            SERVICE, SERVER_ADDRESS, Behaviour(data), options(lose, initial_timeout_s=0.2, linger_s=2.0)
        ),
        PrototypeServer(
            SERVICE,
            Behaviour(data, close_when="received", expected_bytes=len(data)),
            options(initial_timeout_s=0.2, linger_s=2.0),
        ),
    )
    assert client.counters["sent_and_lost"] + client.counters["received_and_lost"] > 0
    for result in (client, server):
        assert result.flows[0].received_sha256 == sha256(data)
        assert result.flows[0].error == ""
        assert result.complaints == {}


def test_a_lost_handshake_ack_hangs_the_connection(hosts: Hosts) -> None:
    server = Started(hosts.server, PrototypeServer(SERVICE, options=options()))
    client = hosts.client.call(
        PrototypeClient(
            SERVICE, SERVER_ADDRESS, Behaviour(b"hello"), options(lose_handshake_ack(), timeout_s=0.5)
        ).run
    )
    assert client.timed_out
    assert (client.flows[0].state, client.flows[0].sent_bytes) == ("CONNECTED", 5)
    result = server.stop()
    assert result.flows == []
    assert result.counters["packets_for_no_flow"] >= 1


def lose_first_syn_ack() -> Loss:
    lost = False

    def lose(direction: Direction, packet: Packet) -> bool:
        nonlocal lost
        if lost or direction != "received":
            return False
        lost = True
        return True

    return lose


@pytest.mark.parametrize(("request_expiry_s", "same"), [(3.0, True), (0.05, False)])
def test_a_repeated_syn_gets_the_same_answer_until_the_request_expires(
    hosts: Hosts, request_expiry_s: float, same: bool
) -> None:
    client, server = play(
        hosts,
        PrototypeClient(
            SERVICE,
            SERVER_ADDRESS,
            Behaviour(close_when="sent"),
            options(lose_first_syn_ack(), initial_timeout_s=0.2),
        ),
        PrototypeServer(SERVICE, options=options(request_expiry_s=request_expiry_s)),
    )
    answers = [line for line in server.log if line.startswith("sent") and "ACK+SYN" in line]
    assert len(answers) == 2
    assert (answers[0] == answers[1]) == same
    assert server.counters.get("repeated_syns", 0) == same
    assert client.flows[0].counters["control_packets_sent_again"] == 1
    assert client.flows[0].peer_flow_id == (2 if same else 3)


def test_an_unknown_service_is_met_with_silence(hosts: Hosts) -> None:
    server = Started(hosts.server, PrototypeServer(SERVICE + 1, options=options()))
    client = hosts.client.call(
        PrototypeClient(SERVICE, SERVER_ADDRESS, options=options(initial_timeout_s=0.1, timeout_s=0.5)).run
    )
    assert (client.flows[0].state, client.timed_out) == ("REQUEST", True)
    # At 0, 0.1 and 0.3 s.
    assert client.counters["sent"] == 3
    assert "received" not in client.counters
    assert server.stop().counters["received"] == 3


def test_a_server_that_closes_with_unread_bytes_resets(hosts: Hosts) -> None:
    client, server = play(
        hosts,
        PrototypeClient(SERVICE, SERVER_ADDRESS, Behaviour(bytes(50_000)), options()),
        PrototypeServer(SERVICE, Behaviour(stop_reading_at=10_000), options()),
    )
    assert client.flows[0].error == "ECONNRESET"
    assert server.flows[0].counters["resets_sent"] == 1
    assert 10_000 <= server.flows[0].received_bytes < 50_000


def test_without_the_sal_fin_there_is_no_end_of_stream(hosts: Hosts) -> None:
    def lose_fins(direction: Direction, packet: Packet) -> bool:
        control = packet[SAL].extension(SALControl)
        return direction == "sent" and control is not None and bool(int(control.flags) & FIN)

    server = Started(
        hosts.server,
        PrototypeServer(SERVICE, Behaviour(b"all of it", close_when="sent"), options(lose_fins)),
    )
    client = hosts.client.call(
        PrototypeClient(SERVICE, SERVER_ADDRESS, options=options(timeout_s=0.5)).run
    )
    assert client.timed_out
    assert client.flows[0].received_bytes == len(b"all of it")
    assert not client.flows[0].end_of_stream
    assert server.stop().counters["sent_and_lost"] >= 1


def syn(**changes: object) -> Packet:
    """A SYN by hand."""
    fields = {"seq": 7, "flags": "S", "window": 0, "options": [("MSS", 1448)]} | changes
    extensions = [SALControl(flags=SYN, verno=1, nonce=b"12345678"), SALService.of(SERVICE)]
    return SAL(src_flowid=77, extensions=extensions) / ServalTCP(**fields)


def send_raw(*packets: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for packet in packets:
            raw.sendto(packet, (SERVER_ADDRESS, 0))


def test_a_server_counts_what_is_wrong_with_packets(hosts: Hosts) -> None:
    ip = IP(src=CLIENT_ADDRESS, dst=SERVER_ADDRESS)
    good = ip / syn()
    wrong_sal = ip / syn()
    wrong_sal[SAL].check = 1
    wrong_tcp = ip / syn(chksum=1)
    # What a kernel that leaves the checksum to hardware has in the field: the sum of the pseudo header.
    length = len(bytes(syn()[ServalTCP]))
    words = bytes([10, 1, 0, 1, 10, 1, 0, 2, 0, 6, 0, length])
    partial = ip / syn(chksum=sum(int.from_bytes(words[i : i + 2], "big") for i in range(0, 12, 2)) % 0xFFFF)
    malformed = bytes(IP(src=CLIENT_ADDRESS, dst=SERVER_ADDRESS, proto=144) / b"short")
    too_long = ip / SAL(dst_flowid=99) / ServalTCP() / bytes(1400)
    server = Started(hosts.server, PrototypeServer(SERVICE, options=options(mtu_bytes=1400)))
    packets = [bytes(packet) for packet in (wrong_sal, wrong_tcp, partial, malformed, too_long, good)]
    hosts.client.call(send_raw, *packets)
    # An answer to the good one, which came last, means that all were seen.
    client = hosts.client.call(
        PrototypeClient(SERVICE, SERVER_ADDRESS, Behaviour(close_when="sent"), options()).run
    )
    assert client.flows[0].error == ""
    result = server.result()
    assert result.complaints == {
        "wrong_sal_checksums": 1,
        "wrong_transport_checksums": 2,
        "malformed_packets": 1,
        "oversize_packets": 1,
    }
    assert sum("SAL 2 > 77 ACK+SYN" in line for line in result.log) == 1


def test_they_run_as_programs(hosts: Hosts, tmp_path: Path) -> None:
    data = random.Random(5).randbytes(30_000)
    (tmp_path / "data").write_bytes(data)
    program = [sys.executable, "-m", "tests.peers.prototype"]
    server = hosts.server.popen(
        [*program, "server", SERVICE, "--echo", "--timeout", 30, "--linger", 0],
        cwd=ROOT,
        stdout=-1,
    )
    assert server.stdout is not None
    assert json.loads(server.stdout.readline()) == {"ready": True}
    sending = ["--send-file", tmp_path / "data", "--close", "received", "--expect-bytes", len(data)]
    client = hosts.client.run(
        [*program, "client", SERVICE, BROADCAST_ADDRESS, *sending, "--linger", 0, "--log"], cwd=ROOT
    )
    for output in (client.stdout, server.stdout.read()):
        result = json.loads(output)
        assert result["flows"][0]["received_sha256"] == sha256(data)
        assert (result["complaints"], result["timed_out"]) == ({}, False)
    assert "SYN" in json.loads(client.stdout)["log"][0]
    assert server.wait(SOON_S) == 0
