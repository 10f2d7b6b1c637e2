"""A client and a server that behave like the prototype, played by scapy over a raw socket.

    python -m tests.peers.prototype server 76568 --echo
    python -m tests.peers.prototype client 76568 10.0.0.255 --send-bytes 100000 --close received

They share no code with our stack but the scapy layers. Each prints one line of JSON at its end; a server also
{"ready": true} at its beginning, when a SYN would be heard. From Python: `PrototypeClient(...).run()`, in a
thread or process that is in the right network namespace.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from scapy.packet import Packet

from serval_core.wire.scapy_layers import IP, SAL, SALControl, SALService, SALSource, ServalTCP

from .application import Behaviour
from .prototype_flow import ACK, SYN, Flow, Identity, syn_ack
from .prototype_peer import DEFAULT_BEHAVIOUR, DEFAULT_OPTIONS, Options, Peer
from .prototype_receiver import NEVER, SEQUENCE_NUMBERS
from .raw_wire import Direction, Loss, RawWire, Received, lose_nothing, source_address


class Request(NamedTuple):
    """A SYN that was answered and whose ACK has not come yet."""

    identity: Identity
    syn: Packet
    local_address: str
    remote_address: str
    expires_at: float


class PrototypeClient(Peer):
    """Opens one flow to `service_id` at `destination`, a dotted address, possibly one to broadcast to."""

    def __init__(
        self,
        service_id: int | bytes,
        destination: str,
        behaviour: Behaviour = DEFAULT_BEHAVIOUR,
        options: Options = DEFAULT_OPTIONS,
    ) -> None:
        super().__init__(service_id, behaviour, options)
        self.destination = destination

    def _start(self, wire: RawWire, now: float) -> None:
        self._only_flow = self._flow(wire, self._identity())
        self._only_flow.connect(source_address(self.destination), self.destination, now)

    def _end_of_play(self) -> float:
        return self._gone_at(self._only_flow)

    def _service_packet(self, wire: RawWire, received: Received, now: float) -> None:
        # A broadcast comes back to its sender, where no such service exists.
        self._reply_reset(wire, received.packet)


class PrototypeServer(Peer):
    """Serves `service_id` until `connections` flows have ended; each is treated as `behaviour` says."""

    def __init__(
        self,
        service_id: int | bytes,
        behaviour: Behaviour = DEFAULT_BEHAVIOUR,
        options: Options = DEFAULT_OPTIONS,
        connections: int = 1,
    ) -> None:
        super().__init__(service_id, behaviour, options)
        self.connections = connections
        self._requests: dict[int, Request] = {}
        self._accepted: list[Flow] = []

    def _start(self, wire: RawWire, now: float) -> None:
        """A listener is there as soon as the socket is."""

    def _end_of_play(self) -> float:
        if len(self._accepted) < self.connections:
            return NEVER
        return max(self._gone_at(flow) for flow in self._accepted)

    def _service_packet(self, wire: RawWire, received: Received, now: float) -> None:
        packet = received.packet
        control = packet[SAL].extension(SALControl)
        flags = int(control.flags) if control is not None else 0
        if packet[SAL].extension(SALService).service_id != self.service_id:
            self._reply_reset(wire, packet)
        elif flags & SYN and not flags & ACK:
            self._syn(wire, received, now)
        elif flags & ACK:
            self._handshake_ack(wire, packet, control, now)
        else:
            self._reply_reset(wire, packet)

    def _syn(self, wire: RawWire, received: Received, now: float) -> None:
        syn = received.packet
        self._requests = {key: request for key, request in self._requests.items() if request.expires_at > now}
        if ServalTCP not in syn:
            self._counters["syns_without_tcp"] += 1
            return
        # The source flow ID alone tells a repeated SYN; addresses and nonces are not compared.
        for request in self._requests.values():
            if request.syn[SAL].src_flowid == syn[SAL].src_flowid:
                self._counters["repeated_syns"] += 1
                self._answer(wire, request)
                return
        source = syn[SAL].extension(SALSource)
        remote_address = syn[IP].src if source is None else source.addresses[0]
        expires_at = now + self.options.request_expiry_s
        request = Request(self._identity(), syn, received.reply_address, remote_address, expires_at)
        self._requests[request.identity.flow_id] = request
        self._answer(wire, request)

    def _answer(self, wire: RawWire, request: Request) -> None:
        layers = syn_ack(request.identity, request.syn, request.local_address)
        wire.send(request.local_address, request.remote_address, layers)

    def _handshake_ack(self, wire: RawWire, packet: Packet, control: Packet, now: float) -> None:
        request = self._requests.get(packet[SAL].dst_flowid)
        if request is None or request.expires_at <= now:
            self._counters["acks_for_no_request"] += 1
            return
        syn_control = request.syn[SAL].extension(SALControl)
        expected = (
            (syn_control.verno + 1) % SEQUENCE_NUMBERS,
            (request.identity.verno + 1) % SEQUENCE_NUMBERS,
            syn_control.nonce,
        )
        if (control.verno, control.ackno, control.nonce) != expected:
            self._counters["unfit_handshake_acks"] += 1
            return
        del self._requests[request.identity.flow_id]
        flow = self._flow(wire, request.identity)
        self._accepted.append(flow)
        flow.accept(request.local_address, request.syn, packet, now)


def lose_handshake_ack() -> Loss:
    """A wire on which the client's first packet with ACK and SERVICE gets lost."""
    lost = False

    def lose(direction: Direction, packet: Packet) -> bool:
        nonlocal lost
        if lost or direction != "sent" or packet[SAL].extension(SALService) is None:
            return False
        lost = bool(int(packet[SAL].extension(SALControl).flags) & ACK)
        return lost

    return lose


def lose_at_random(share: float, seed: int) -> Loss:
    """A wire on which each packet, either way, gets lost with this probability."""
    numbers = random.Random(seed)
    return lambda _direction, _packet: numbers.random() < share


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.peers.prototype")
    parser.add_argument("role", choices=["client", "server"])
    parser.add_argument("service", type=int, help="the serviceID as a decimal number")
    parser.add_argument("destination", nargs="?", help="where a client sends its SYN")
    parser.add_argument("--send-bytes", type=int, default=0, help="send that many bytes made from --seed")
    parser.add_argument("--send-file", type=Path)
    parser.add_argument("--echo", action="store_true")
    parser.add_argument(
        "--close", choices=["end_of_stream", "sent", "acknowledged", "received"], default="end_of_stream"
    )
    parser.add_argument("--expect-bytes", type=int, default=0)
    parser.add_argument("--stop-reading-at", type=int)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--first-flow-id", type=int, default=DEFAULT_OPTIONS.first_flow_id)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds")
    parser.add_argument("--linger", type=float, default=0.5, help="seconds in TIMEWAIT")
    parser.add_argument("--initial-timeout", type=float, default=3.0, help="seconds")
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets to lose, either way")
    parser.add_argument("--lose-handshake-ack", action="store_true")
    parser.add_argument("--log", action="store_true", help="with the list of all packets")
    return parser.parse_args()


def main() -> None:
    """The entry point of `python -m tests.peers.prototype`."""
    arguments = _arguments()
    data = random.Random(arguments.seed).randbytes(arguments.send_bytes)
    if arguments.send_file is not None:
        data = arguments.send_file.read_bytes()
    behaviour = Behaviour(
        data, arguments.echo, arguments.close, arguments.expect_bytes, arguments.stop_reading_at
    )
    lose = lose_at_random(arguments.loss, arguments.seed) if arguments.loss else lose_nothing
    options = Options(
        timeout_s=arguments.timeout,
        linger_s=arguments.linger,
        initial_timeout_s=arguments.initial_timeout,
        mtu_bytes=arguments.mtu,
        lose=lose_handshake_ack() if arguments.lose_handshake_ack else lose,
        first_flow_id=arguments.first_flow_id,
    )
    peer: Peer
    if arguments.role == "server":
        peer = PrototypeServer(arguments.service, behaviour, options, arguments.connections)
        threading.Thread(target=_announce, args=(peer,), daemon=True).start()
    elif arguments.destination is not None:
        peer = PrototypeClient(arguments.service, arguments.destination, behaviour, options)
    else:
        sys.exit("a client needs a destination")
    result = peer.run()
    answer = dataclasses.asdict(result) | {"complaints": result.complaints}
    if not arguments.log:
        del answer["log"]
    print(json.dumps(answer), flush=True)


def _announce(peer: Peer) -> None:
    peer.ready.wait()
    print(json.dumps({"ready": True}), flush=True)


if __name__ == "__main__":
    main()
