"""How do our stack and a prototype meet? On two hosts with a wire between them.

One host runs our stack, the other a prototype played by scapy on a raw socket, which sees checksums left to
hardware and segments left to be cut. It counts what our side does wrong: `finished()` wants that to be nothing.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import NamedTuple

from playing import (
    OUR_SERVICE,
    THEIR_SERVICE,
    Playing,
)

from lab.hosts import Host
from lab.waiting import wait_for
from serval_core.sal_settings import SalSettings
from tests.peers.application import Behaviour, PeerResult
from tests.peers.prototype import PrototypeClient
from tests.peers.prototype_peer import Options, Peer
from tests.serval_core.stack_thread import Accepting, StackThread, Stream, send_in_background

OURS, THEIRS, EVERYBODY = "10.1.0.1", "10.1.0.2", "10.1.0.255"
QUICK = SalSettings(connect_timeout_s=8.0, time_wait_s=0.2, fin_wait2_s=0.5)
MEGABYTE = 1 << 20

End = Callable[[Stream], None]


class Wire(NamedTuple):
    """Our host with its stack and a listener, and the prototype's host."""

    stack: StackThread
    listener: Accepting
    ours: Host
    theirs: Host

    def client(self, behaviour: Behaviour, how: Options, destination: str = OURS) -> PrototypeClient:
        """A prototype client of our listener."""
        return PrototypeClient(OUR_SERVICE, destination, behaviour, how)


def assert_idle(stack: StackThread) -> None:
    """Wait until the stack has no flow, socket or map entry."""

    def busy() -> list[object]:
        counters = stack.counters()
        left = {name: counters[name] for name in ("open_transports", "flow_map_entries") if counters[name]}
        return [*stack.flows(), left] if left or stack.flows() else []

    wait_for(lambda: not busy(), "the stack to be idle")


def sha256(data: bytes) -> str:
    """In hex digits."""
    return hashlib.sha256(data).hexdigest()


def echo(stream: Stream) -> None:
    """What comes goes back; ends when the peer does."""
    while data := stream.socket.recv(1 << 16):
        stream.socket.sendall(data)


def serve(stream: Stream, how: End) -> threading.Thread:
    """Do something with a stream in the background, then release it."""

    def run() -> None:
        how(stream)
        stream.release()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def exchange_as_server(wire: Wire, peer: Peer, data: bytes) -> PeerResult:
    """A prototype client, which sends `data`, is served by our echo."""
    playing = Playing(wire.theirs, peer)
    server = serve(wire.listener.accept(), echo)
    result = playing.finished()
    server.join(20)
    (flow,) = result.flows
    assert (flow.received_bytes, flow.received_sha256) == (len(data), sha256(data))
    end = (flow.state, flow.error, flow.end_of_stream)
    assert end == ("TIMEWAIT", "", True), "\n".join(result.log[-60:])
    return result


def exchange_as_client(wire: Wire, peer: Peer, size_bytes: int, destination: str = "") -> PeerResult:
    """Our client sends to a prototype that echoes."""
    playing = Playing(wire.theirs, peer)
    stream = wire.stack.connect(str(THEIR_SERVICE), destination)
    sent = send_in_background(stream, size_bytes)
    received = stream.receive_all()
    stream.release()
    result = playing.finished()
    assert received == sent() == result.flows[0].received_sha256
    assert (result.flows[0].received_bytes, result.flows[0].error) == (size_bytes, "")
    assert (result.flows[0].state, result.flows[0].end_of_stream) == ("CLOSED", True)
    return result
