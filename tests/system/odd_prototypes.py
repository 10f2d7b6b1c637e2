"""How do peers behave that close in another way than the prototype, speak HTTP, or forward for others?

The first two were tried on the prototype by hand and are fine with it (OBSERVED 2, "EOF semantics").
"""

from __future__ import annotations

import os
import select
import socket
import threading
from types import TracebackType
from typing import Self

from lab.hosts import Host
from serval_core.wire.scapy_layers import IP, SAL, SALControl, SALSource, ServalTCP
from tests.peers.application import Behaviour
from tests.peers.prototype import PrototypeClient, PrototypeServer
from tests.peers.prototype_flow import FIN, SYN, TRANSPORT_STATES, Flow, Identity
from tests.peers.prototype_peer import Options, Peer
from tests.peers.prototype_receiver import SEQUENCE_NUMBERS
from tests.peers.raw_wire import LARGEST_PACKET_BYTES, SAL_PROTOCOL, RawWire


class ImpatientFlow(Flow):
    """Closes with a TCP FIN and sends the SAL's at once, without waiting for the TCP's acknowledgement."""

    def _after_transport(self, now: float) -> None:
        super()._after_transport(now)
        if self._closed_by_application and not self._fin_sent and self.state in TRANSPORT_STATES:
            self._send_sal_fin(now)

    def _send_sal_fin(self, now: float) -> None:
        self._fin_sent = True
        fin, verno = self._control(FIN, self._send_next), self._send_next
        self._send_next = (verno + 1) % SEQUENCE_NUMBERS
        self._send_reliably(fin, verno, now)


class SalFinFlow(ImpatientFlow):
    """Closes with a SAL FIN alone: its TCP never sends one."""

    def _close(self, now: float) -> None:
        self._closed_by_application = True
        self.state = "LASTACK" if self.state == "CLOSEWAIT" else "FINWAIT1"


class RememberingFlow(Flow):
    """Keeps what it receives."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.received = bytearray()

    def _deliver(self, data: bytes) -> None:
        super()._deliver(data)
        self.received += data


class HttpFlow(RememberingFlow):
    """Answers one HTTP request, once its head and its body are here, with `Behaviour.send`, and closes."""

    def _become_connected(self, now: float) -> None:
        self._answer, self._behaviour = self._behaviour.send, Behaviour(close_when="end_of_stream")
        super()._become_connected(now)

    def _application(self, now: float) -> None:
        assert self.tcp is not None
        if self._answer and self._request_is_here():
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(self._answer)}\r\nConnection: close\r\n\r\n"
            self.tcp.write(head.encode() + self._answer, now)
            self._answer = b""
            self._behaviour = Behaviour(close_when="acknowledged")
        super()._application(now)

    def _request_is_here(self) -> bool:
        head, found, body = bytes(self.received).partition(b"\r\n\r\n")
        lines = [line.partition(b":") for line in head.lower().split(b"\r\n")]
        length = next((int(value) for name, _, value in lines if name == b"content-length"), 0)
        return found != b"" and len(body) >= length


class _WithFlows(Peer):
    """A peer whose flows are of another kind; `played` has them all."""

    flow_class: type[Flow]
    played: list[Flow]

    def _flow(self, wire: RawWire, identity: Identity) -> Flow:
        flow = self.flow_class(
            wire, self.behaviour, identity, self.service_id, self.options.initial_timeout_s
        )
        self._flows[identity.flow_id] = flow
        self.played.append(flow)
        return flow


class OddClient(_WithFlows, PrototypeClient):
    """A prototype client with flows of `flow_class`."""

    def __init__(
        self, flow_class: type[Flow], service: int, destination: str, behaviour: Behaviour, options: Options
    ) -> None:
        super().__init__(service, destination, behaviour, options)
        self.flow_class = flow_class
        self.played = []


class OddServer(_WithFlows, PrototypeServer):
    """A prototype server with flows of `flow_class`."""

    def __init__(
        self,
        flow_class: type[Flow],
        service: int,
        behaviour: Behaviour,
        options: Options,
        connections: int = 1,
    ) -> None:
        super().__init__(service, behaviour, options, connections)
        self.flow_class = flow_class
        self.played = []


class SalRouter:
    """Forwards every SYN that comes to its host to `next_address`, as the prototype does (OBSERVED 2, SAL forwarding).

    The source address stays, the destination is rewritten, SOURCE lists the originator and each forwarder. A
    context manager.
    """

    def __init__(self, host: Host, next_address: str) -> None:
        self.forwarded = 0
        self._next_address = next_address
        self._socket = host.call(socket.socket, socket.AF_INET, socket.SOCK_RAW, SAL_PROTOCOL)
        self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(target=self._forward_all, name=f"router-{host.name}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._socket.close()
        os.close(self._wake)

    def _forward_all(self) -> None:
        sources: list[int] = [self._socket.fileno(), self._wake]
        while self._wake not in select.select(sources, [], [])[0]:
            self._forward(IP(self._socket.recv(LARGEST_PACKET_BYTES)))

    def _forward(self, packet: IP) -> None:
        control = packet[SAL].extension(SALControl)
        if control is None or int(control.flags) != SYN:
            return
        source = packet[SAL].extension(SALSource)
        passed = [packet.src] if source is None else source.addresses
        extensions = [extension for extension in packet[SAL].extensions if extension is not source]
        # Only what is not set anew is computed anew: lengths and all three checksums.
        transport = packet[ServalTCP].copy()
        transport.chksum = None
        header = SAL(
            src_flowid=packet[SAL].src_flowid,
            extensions=[*extensions, SALSource(addresses=[*passed, packet.dst])],
        )
        ip = IP(src=packet.src, dst=self._next_address, ttl=packet.ttl - 1, flags=0)
        self._socket.sendto(bytes(ip / header / transport), (self._next_address, 0))
        self.forwarded += 1
