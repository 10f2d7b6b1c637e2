"""How does a prototype's stack run? One raw socket, its flows, and what happens to the packets of none."""

from __future__ import annotations

import os
import random
import select
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass

from scapy.packet import Packet

from serval_core.wire.scapy_layers import IP, SAL, SALControl, SALService

from .application import Behaviour, FlowResult, PeerResult
from .prototype_flow import ACK, FIN, RST, SYN, Flow, Identity
from .prototype_mover import MovingFlow
from .prototype_receiver import NEVER, SEQUENCE_NUMBERS
from .raw_wire import Loss, RawWire, Received, lose_nothing

PACKETS_PER_TURN = 64


@dataclass(frozen=True)
class Options:
    """How a peer is run. Times are in seconds.

    `timeout_s` ends the play in any case. `linger_s` is how long a flow in TIMEWAIT is kept.
    `initial_timeout_s` is the retransmission timeout before a round trip was measured; the prototype's is 3.
    `request_expiry_s` is how long a server remembers a SYN whose ACK has not come. Packets longer than
    `mtu_bytes` are counted as oversize. `lose` decides what the wire loses. `seed` makes the chosen numbers
    repeatable.
    """

    timeout_s: float = 60.0
    linger_s: float = 0.5
    initial_timeout_s: float = 3.0
    request_expiry_s: float = 3.0
    mtu_bytes: int = 1500
    lose: Loss = lose_nothing
    first_flow_id: int = 2
    seed: int | None = None


DEFAULT_OPTIONS = Options()
DEFAULT_BEHAVIOUR = Behaviour()


class Peer(ABC):
    """What client and server share: the loop, and what happens to packets without a flow."""

    def __init__(self, service_id: int | bytes, behaviour: Behaviour, options: Options) -> None:
        if isinstance(service_id, int):
            service_id = service_id.to_bytes(4, "big").ljust(32, b"\0")
        self.service_id = service_id
        self.behaviour = behaviour
        self.options = options
        self.ready = threading.Event()
        self._next_flow_id = options.first_flow_id
        self._numbers = random.Random(options.seed)
        self._flows: dict[int, Flow] = {}
        self._ended: list[FlowResult] = []
        self._counters: Counter[str] = Counter()
        self._stop = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def stop(self) -> None:
        """Make `run` return soon, from another thread."""
        self._stop.set()
        os.eventfd_write(self._wake, 1)

    def run(self) -> PeerResult:
        """Play, once, in the network namespace of the calling thread, until the flows have ended."""
        wire = RawWire(self.options.mtu_bytes, self.options.lose)
        try:
            deadline = time.monotonic() + self.options.timeout_s
            self._start(wire, time.monotonic())
            self.ready.set()
            while not self._stop.is_set():
                now = time.monotonic()
                wake_at = min(deadline, self._end_of_play(), *self._timeouts())
                if now >= min(deadline, self._end_of_play()):
                    break
                select.select([wire.socket.fileno(), self._wake], [], [], max(0.0, wake_at - now))
                self._turn(wire)
            timed_out = time.monotonic() >= deadline
        finally:
            wire.close()
            os.close(self._wake)
        flows = [*self._ended, *(flow.result() for flow in self._flows.values())]
        return PeerResult(flows, dict(wire.counters + self._counters), timed_out, wire.log)

    @abstractmethod
    def _start(self, wire: RawWire, now: float) -> None:
        """Open what is to be opened."""

    @abstractmethod
    def _end_of_play(self) -> float:
        """When there is nothing left to do, NEVER for as long as there is."""

    @abstractmethod
    def _service_packet(self, wire: RawWire, received: Received, now: float) -> None:
        """A packet for no flow of ours that names a service."""

    def _timeouts(self) -> list[float]:
        return [NEVER, *(flow.next_timeout() for flow in self._flows.values())]

    def _turn(self, wire: RawWire) -> None:
        for _ in range(PACKETS_PER_TURN):
            received = wire.receive()
            if received is None:
                break
            self._packet(wire, received, time.monotonic())
        now = time.monotonic()
        for flow in list(self._flows.values()):
            if now >= flow.next_timeout():
                flow.handle_timeout(now)
        for flow_id in [flow_id for flow_id, flow in self._flows.items() if flow.state == "CLOSED"]:
            self._ended.append(self._flows.pop(flow_id).result())

    def _packet(self, wire: RawWire, received: Received, now: float) -> None:
        sal = received.packet[SAL]
        flow = self._flows.get(sal.dst_flowid)
        if flow is not None and flow.state != "CLOSED":
            flow.packet_received(received.packet, now)
        elif sal.extension(SALService) is not None:
            self._service_packet(wire, received, now)
        else:
            self._counters["packets_for_no_flow"] += 1

    def _flow(self, wire: RawWire, identity: Identity) -> Flow:
        flow = MovingFlow(wire, self.behaviour, identity, self.service_id, self.options.initial_timeout_s)
        self._flows[identity.flow_id] = flow
        return flow

    def _gone_at(self, flow: Flow) -> float:
        """When nothing more is to be expected of a flow."""
        return flow.ended_at + (0.0 if flow.state == "CLOSED" else self.options.linger_s)

    def _identity(self) -> Identity:
        flow_id = self._next_flow_id
        self._next_flow_id += 1
        numbers = self._numbers
        return Identity(flow_id, numbers.randbytes(8), numbers.getrandbits(32), numbers.getrandbits(32))

    def _reply_reset(self, wire: RawWire, packet: Packet) -> None:
        """Answer a packet for an unknown service, unless it is a SYN or a reset."""
        control = packet[SAL].extension(SALControl)
        flags = int(control.flags) if control is not None else 0
        if flags & RST or flags & (SYN | ACK) == SYN:
            return
        if flags & ACK:
            reset = SALControl(flags=RST, verno=control.ackno, ackno=0, nonce=control.nonce)
        else:
            verno = control.verno if control is not None else 0
            nonce = control.nonce if control is not None else bytes(8)
            # A FIN should count as 1; the prototype adds something else.
            ackno = verno + (1 if flags & SYN else 0) + (32 if flags & FIN else 0)
            reset = SALControl(flags=RST | ACK, verno=0, ackno=ackno % SEQUENCE_NUMBERS, nonce=nonce)
        layer = SAL(
            src_flowid=packet[SAL].dst_flowid,
            dst_flowid=packet[SAL].src_flowid,
            protocol=packet[SAL].protocol,
            extensions=[reset],
        )
        self._counters["reply_resets"] += 1
        wire.send(packet[IP].dst, packet[IP].src, layer)
