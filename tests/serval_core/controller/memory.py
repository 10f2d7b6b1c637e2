"""Host roles and a router role in memory: payloads go from one to the other, time moves when a test says so."""

from __future__ import annotations

from random import Random
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from serval_core.controller.authentication import Signer
from serval_core.controller.directory import IN_MEMORY, Directory, SqliteDirectory
from serval_core.controller.policy import PrefixPolicy, RegistrationPolicy, Requirement
from serval_core.controller.registration import HostRole, Outgoing, Way
from serval_core.controller.router import RegistrationRouter, RouterLimits
from serval_core.identity import Identity
from serval_core.names import ServiceID, ServicePrefix, format_address, parse_address, parse_service
from serval_core.service_table import ServiceTable
from serval_core.wire.control_messages import MessageType, Registration, emit_registration

CLIENT_ID = ServiceID.from_number(55555)
ROUTER_ID = ServiceID.from_number(88888)
ROUTER = parse_address("10.0.0.254")
UPSTREAM = parse_address("10.9.9.254")
HOST = parse_address("10.0.0.1")
OTHER = parse_address("10.0.0.2")
SERVICE = parse_service("76568")
START = 1000.0
WALL = 1_800_000_000.0


class Router:
    """A router role with its table. `news` are the events it has published."""

    def __init__(
        self,
        *policy: PrefixPolicy,
        default: Requirement = Requirement.OPEN,
        directory: Directory | None = None,
        shortest_prefix_bits: int = 8,
        **limits: Any,
    ) -> None:
        self.now = START
        self.clock_error_s = 0.0
        self.table = ServiceTable()
        self.directory = directory or SqliteDirectory(IN_MEMORY)
        self.news: list[tuple[str, dict[str, object]]] = []
        self.weights: list[tuple[ServicePrefix, int]] = []
        self.role = RegistrationRouter(
            self.table,
            self.directory,
            RegistrationPolicy(policy, default, shortest_prefix_bits),
            RouterLimits(**limits),
            CLIENT_ID,
            (CLIENT_ID, ROUTER_ID),
            lambda: (ROUTER,),
            lambda: (UPSTREAM,),
            lambda kind, **fields: self.news.append((kind, fields)),
            lambda prefix, weight: self.weights.append((prefix, weight)),
            self.now,
        )

    @property
    def wall(self) -> float:
        return WALL + self.now - START + self.clock_error_s

    def receive(self, payload: bytes, source: int = HOST, source_service: ServiceID = CLIENT_ID) -> None:
        self.role.message_received(payload, source_service, source, self.now, self.wall)

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while (due := self.role.registrations.next_timeout()) is not None and due <= until:
            self.now = max(self.now, due)
            self.role.registrations.handle_timeouts(self.now, self.wall)
        self.now = until

    def rules(self) -> set[tuple[str, str, int, int]]:
        """Prefix, address, priority and weight of every rule."""
        return {
            (str(rule.prefix), format_address(rule.address), rule.priority, rule.weight)
            for rule in self.table.rules()
        }

    def refusals(self) -> dict[str, int]:
        """How often which reason was given; what was published must agree."""
        counted = {
            name.removeprefix("refused_"): count
            for name, count in self.role.counters.items()
            if name.startswith("refused_")
        }
        published = [fields["reason"] for kind, fields in self.news if kind == "registration_refused"]
        assert {reason: published.count(reason) for reason in counted} == counted
        assert len(published) == sum(counted.values())
        return counted


class Host:
    """A host role at one address with one way to the router."""

    def __init__(self, address: int = HOST, signer: Signer | None = None, lifetime_s: float = 50.0) -> None:
        self.now = START
        self.clock_error_s = 0.0
        self.role = HostRole(20.0, lifetime_s, signer, Random(1), self.now)
        self.move(address)

    @property
    def wall(self) -> float:
        return WALL + self.now - START

    def move(self, address: int) -> None:
        self.address = address
        self.role.set_ways([Way(ROUTER, ROUTER, address)], self.now)

    def offer(self, prefix: ServicePrefix = SERVICE, priority: int = 1, weight: int = 1) -> None:
        self.role.offer(prefix, priority, weight, self.now)

    def withdraw(self, prefix: ServicePrefix = SERVICE) -> None:
        self.role.withdraw(prefix)

    def outgoing(self) -> list[Outgoing]:
        return self.role.take_outgoing(self.now, self.wall + self.clock_error_s)

    def payloads(self) -> list[bytes]:
        return [outgoing.payload for outgoing in self.outgoing()]

    def advance(self, seconds: float) -> list[tuple[float, Outgoing]]:
        """Let time pass. What was sent, with the seconds since the start of the call."""
        start, until = self.now, self.now + seconds
        sent = [(0.0, outgoing) for outgoing in self.outgoing()]
        while (due := self.role.next_timeout()) is not None and due <= until:
            self.now = max(self.now, due)
            self.role.handle_timeouts(self.now)
            sent += [(self.now - start, outgoing) for outgoing in self.outgoing()]
        self.now = until
        return sent


def register(
    prefix: ServicePrefix = SERVICE, *, refresh: bool = False, old_address: int = 0, transaction_id: int = 1
) -> bytes:
    """A REGISTER of the prototype."""
    return emit_registration(Registration(MessageType.REGISTER, transaction_id, prefix, refresh, old_address))


def unregister(prefix: ServicePrefix = SERVICE) -> bytes:
    """An UNREGISTER of the prototype."""
    return emit_registration(Registration(MessageType.UNREGISTER, 2, prefix))


def new_identity() -> Identity:
    """A key that is in no file."""
    return Identity(Ed25519PrivateKey.generate())
