"""What may a flow's packets look like on the wire, and what is known about the paths to its peer? (DESIGN 2.1)

Framing is a property of the sender: a receiver takes every framing of a flow that it knows, at any time, and
`sal` works for all of our flows. Whether native data gets through is found out by sending it, which the data plane
watches; this remembers for a while, by address, what came of it. Time is an argument, in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from serval_core.names import FlowID, ServiceID, ServicePrefix
from serval_core.wire.encapsulation import ACTIVE_PORTS
from serval_core.wire.ipv4 import OuterPorts

NATIVE_PAUSE_S = 10.0
NATIVE_PAUSE_MAX_S = 600.0
ENCAPSULATED_S = 600.0
ADDRESSES_LIMIT = 4096
_PLAIN: tuple[OuterPorts | None, ...] = (None,)
_ENCAPSULATED: tuple[OuterPorts | None, ...] = (ACTIVE_PORTS,)
_BOTH: tuple[OuterPorts | None, ...] = (None, ACTIVE_PORTS)


class Framing(StrEnum):
    """What an operator can ask for. AUTO: native where both ends offer it and it gets through, else sal, else udp."""

    AUTO = "auto"
    SAL = "sal"
    UDP = "udp"
    NATIVE = "native"


class ServiceFraming(NamedTuple):
    """The framing of the services under a prefix, where it is another one than that of all others."""

    prefix: ServicePrefix
    framing: Framing


class NativePath(NamedTuple):
    """The two ports that stand for the flowIDs in framing `native`.

    `sending`: we send natively from the beginning, else only to try it later. `tell_proof`: it is news if that gets through.
    """

    local_port: int
    peer_port: int
    sending: bool
    tell_proof: bool


class NativePorts(Protocol):
    """Where ports for framing `native` come from: of this host, and of no other socket of it."""

    def take(self) -> int:
        """A port that no flow has, or 0 when there is none left."""

    def release(self, port: int) -> None:
        """The flow that had this port is gone."""

    def flow_of(self, port: int) -> FlowID | None:
        """The flow that a port belongs to."""


class NoNativePorts:
    """For a host without framing `native`."""

    def take(self) -> int:
        """None left."""
        return 0

    def release(self, port: int) -> None:
        """Nobody has taken one."""

    def flow_of(self, port: int) -> FlowID | None:
        """None has any."""
        return None


class _Doubt(NamedTuple):
    until: float
    pause_s: float


class Framings:
    """The choice for each flow."""

    __slots__ = ("_default", "_doubts", "_encapsulated", "_services", "can_encapsulate")

    def __init__(self, default: Framing, services: Sequence[ServiceFraming] = ()) -> None:
        self._default = default
        self._services = sorted(services, key=lambda each: -each.prefix.bits)
        self._doubts: dict[int, _Doubt] = {}
        self._encapsulated: dict[int, float] = {}
        self.can_encapsulate = False
        """Whether this host can receive what is inside UDP."""

    def of_service(self, service_id: ServiceID) -> Framing:
        """What is wanted for a service: the longest prefix decides."""
        for prefix, framing in self._services:
            if prefix.covers(service_id):
                return framing
        return self._default

    def native_path(self, local_port: int, peer_port: int, peer_address: int, now: float) -> NativePath | None:
        """How a flow uses framing `native`; None unless both ends have offered a port."""
        if not local_port or not peer_port:
            return None
        doubt = self._doubts.get(peer_address)
        return NativePath(local_port, peer_port, doubt is None or doubt.until <= now, doubt is not None)

    def native_doubted(self, peer_address: int, now: float) -> None:
        """Native data to this address was repeated, and none has got through: flows begin without it for a while.

        A lost packet looks the same, so the first pause is short, and a proof ends it.
        """
        doubt = self._doubts.pop(peer_address, None)
        if doubt is not None and doubt.until > now:
            self._doubts[peer_address] = doubt
            return
        pause_s = NATIVE_PAUSE_S if doubt is None else min(2 * doubt.pause_s, NATIVE_PAUSE_MAX_S)
        self._doubts[peer_address] = _Doubt(now + pause_s, pause_s)
        _forget_oldest(self._doubts)

    def native_proved(self, peer_address: int) -> None:
        """Native data to this address gets through."""
        self._doubts.pop(peer_address, None)

    def ways_of_syn(self, wanted: Framing, address: int, repeated: bool, now: float) -> tuple[OuterPorts | None, ...]:
        """How a SYN goes to an address: inside UDP, behind IP alone, or both. The first answer wins.

        A SYN that is not `repeated` goes the way that was answered the last time.
        """
        if not self.can_encapsulate or wanted in (Framing.SAL, Framing.NATIVE):
            return _PLAIN
        if wanted is Framing.UDP:
            return _ENCAPSULATED
        if repeated:
            return _BOTH
        return _ENCAPSULATED if self._encapsulated.get(address, now) > now else _PLAIN

    def answered(self, address: int, encapsulated: bool, now: float) -> None:
        """A SYN to this address was answered, inside UDP or not."""
        self._encapsulated.pop(address, None)
        if encapsulated:
            self._encapsulated[address] = now + ENCAPSULATED_S
            _forget_oldest(self._encapsulated)


def _forget_oldest(memory: dict[int, _Doubt] | dict[int, float]) -> None:
    if len(memory) > ADDRESSES_LIMIT:
        del memory[next(iter(memory))]
