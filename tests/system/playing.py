"""How does a test let a prototype play on a host, lose chosen packets of it, and see what passed its wire?"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable

from scapy.packet import Packet

from lab.hosts import Host
from serval_core.wire.scapy_layers import SAL, SALControl, ServalTCP
from tests.peers.application import PeerResult
from tests.peers.prototype_flow import ACK, FIN, RST, SYN
from tests.peers.prototype_peer import Options, Peer
from tests.peers.raw_wire import Direction, Loss, lose_nothing

OUR_SERVICE, THEIR_SERVICE, NOBODYS_SERVICE = 76568, 76569, 76570
SOON_S = 20.0
TCP_FIN = 0x01
FLOW_IDS_EACH = 1000

Kind = Callable[[Packet], bool]

# A prototype numbers its flows from 2. Here each play has numbers of its own: what is still under way for a flow of an
# earlier play must not meet one of this.
_first_flow_ids = itertools.count(2, FLOW_IDS_EACH)


class Playing:
    """A prototype that plays in a thread of its own, inside a host, from now on."""

    def __init__(self, host: Host, peer: Peer) -> None:
        self.peer = peer
        self._results: list[PeerResult] = []
        self._thread = threading.Thread(target=self._play, args=(host,), daemon=True)
        self._thread.start()
        assert peer.ready.wait(SOON_S)

    def _play(self, host: Host) -> None:
        self._results.append(host.call(self.peer.run))

    def result(self) -> PeerResult:
        """What it says at its end."""
        self._thread.join(SOON_S + 10)
        (result,) = self._results
        return result

    def finished(self) -> PeerResult:
        """The same, of a play in which nothing was wrong with us and every flow came to its end."""
        result = self.result()
        log = "\n".join(result.log[-40:])
        assert result.complaints == {}, log
        assert not result.timed_out, log
        return result

    def stop(self) -> PeerResult:
        """End it now."""
        self.peer.stop()
        return self.result()


def options(lose: Loss = lose_nothing, **more: float) -> Options:
    """Options that make a test short: the timeout before the first round trip is a tenth of the prototype's."""
    chosen: dict[str, float] = {"timeout_s": SOON_S, "linger_s": 0.1, "initial_timeout_s": 0.3, **more}
    return Options(lose=lose, first_flow_id=next(_first_flow_ids), **chosen)  # type: ignore[arg-type]


def random_data(size_bytes: int, seed: int = 1) -> bytes:
    """Bytes that follow from the seed."""
    return random.Random(seed).randbytes(size_bytes)


def control_flags(packet: Packet) -> int:
    """The flags of a packet's CONTROL extension, 0 without one."""
    control = packet[SAL].extension(SALControl)
    return 0 if control is None else int(control.flags)


def is_syn(packet: Packet) -> bool:
    return control_flags(packet) == SYN


def is_syn_ack(packet: Packet) -> bool:
    return control_flags(packet) == SYN | ACK


def is_acknowledgement(packet: Packet) -> bool:
    """The one that completes the handshake, or one of a FIN."""
    return control_flags(packet) == ACK


def is_fin(packet: Packet) -> bool:
    return control_flags(packet) & FIN != 0


def is_reset(packet: Packet) -> bool:
    return control_flags(packet) & RST != 0


def is_tcp_fin(packet: Packet) -> bool:
    return ServalTCP in packet and int(packet[ServalTCP].flags) & TCP_FIN != 0


class LoseFirst:
    """A wire that loses the first packet of a kind in one direction, as the prototype sees it. `lost` counts."""

    def __init__(self, direction: Direction, kind: Kind, how_many: int = 1) -> None:
        self.lost = 0
        self._direction = direction
        self._kind = kind
        self._how_many = how_many

    def __call__(self, direction: Direction, packet: Packet) -> bool:
        if self.lost == self._how_many or direction != self._direction or SAL not in packet:
            return False
        if self._kind(packet):
            self.lost += 1
            return True
        return False


class Tap:
    """A wire that keeps every packet that passes, and loses none."""

    def __init__(self) -> None:
        self.packets: list[tuple[Direction, Packet]] = []

    def __call__(self, direction: Direction, packet: Packet) -> bool:
        self.packets.append((direction, packet))
        return False

    def first(self, direction: Direction, kind: Kind) -> Packet:
        """The first packet of that kind."""
        return next(packet for way, packet in self.packets if way == direction and kind(packet))
