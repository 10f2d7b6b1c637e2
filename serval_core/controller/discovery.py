"""Is there a service router on a network that this host is attached to? Both sides of the question.

A host solicits on every network now and then; routers answer, and are believed for as long as they say. An
answer must repeat the nonce of the last or the last but one round, so that only those on the network can
pretend to be a router; with `trusted_keys` only the owners of these can (as with DHCP, whoever is on the
network can answer otherwise). Knows no sockets; `now` is monotonic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

from serval_core.addresses import is_unicast
from serval_core.controller.flood_limits import SenderBuckets
from serval_core.controller.registration import Outgoing
from serval_core.core import RandomSource
from serval_core.errors import TheirMistake
from serval_core.identity import Identity, verify
from serval_core.wire.router_discovery import (
    NONCE_BYTES,
    SIGNATURE_BYTES,
    Announcement,
    emit_announcement,
    emit_solicitation,
    parse_announcement,
    parse_solicitation,
    signed_part,
)

WRONG_NONCE = "announcement_nonce"
WRONG_ADDRESS = "announcement_address"
UNKNOWN_KEY = "announcement_key"
WRONG_SIGNATURE = "announcement_signature"
TOO_MANY_ROUTERS = "announcement_too_many"
TOO_MANY_SOLICITATIONS = "too_many_solicitations"

ROUTERS_MAX = 8
_LIFETIME_MIN_S, _LIFETIME_MAX_S = 1, 600
# Answers get lost, and a router may start at the same moment as we do: the first rounds follow each other soon.
_ROUNDS_S = (1.0, 3.0)
_SOLICITATIONS_PER_HOST_S, _SOLICITATIONS_BURST = 5.0, 20.0


class Network(NamedTuple):
    """An attached network: the address that reaches everybody there, and ours."""

    broadcast: int
    address: int


class RouterFinder:
    """The host's side. `routers` are those that were heard of lately."""

    def __init__(self, interval_s: float, trusted_keys: Collection[bytes], random: RandomSource) -> None:
        self.counters: Counter[str] = Counter()
        self._interval_s = interval_s
        self._trusted_keys = frozenset(trusted_keys)
        self._random = random
        self._networks: tuple[Network, ...] = ()
        self._nonces: tuple[bytes, ...] = ()
        self._rounds = 0
        self._next_round: float | None = None
        self._expires_at: dict[int, float] = {}
        self._outgoing: list[Outgoing] = []

    @property
    def routers(self) -> tuple[int, ...]:
        """The addresses of the routers, sorted."""
        return tuple(sorted(self._expires_at))

    def set_networks(self, networks: Iterable[Network], now: float) -> None:
        """Look for routers there; at once if that is new."""
        wanted = tuple(networks)
        if wanted != self._networks:
            self._networks = wanted
            self._rounds = 0
            self._next_round = now if wanted else None

    def announcement_received(self, data: bytes, source: int, now: float) -> None:
        """An answer has come. TheirMistake, which is counted, when it is not believed."""
        try:
            self._accept(parse_announcement(data), data, source, now)
        except TheirMistake as mistake:
            self.counters[f"refused_{mistake.reason}"] += 1
            raise

    def _accept(self, message: Announcement, data: bytes, source: int, now: float) -> None:
        if message.nonce not in self._nonces:
            raise TheirMistake(WRONG_NONCE)
        if message.address != source or not is_unicast(source):
            raise TheirMistake(WRONG_ADDRESS)
        if self._trusted_keys:
            if message.public_key not in self._trusted_keys:
                raise TheirMistake(UNKNOWN_KEY)
            if not verify(message.public_key, message.signature, signed_part(data)):
                raise TheirMistake(WRONG_SIGNATURE)
        if source not in self._expires_at and len(self._expires_at) >= ROUTERS_MAX:
            raise TheirMistake(TOO_MANY_ROUTERS)
        lifetime_s = min(max(message.lifetime_s, _LIFETIME_MIN_S), _LIFETIME_MAX_S)
        self._expires_at[source] = now + lifetime_s
        self.counters["announcements"] += 1

    def next_timeout(self) -> float | None:
        """When `handle_timeouts` has something to do, None if never."""
        due = [] if self._next_round is None else [self._next_round]
        return min([*due, *self._expires_at.values()], default=None)

    def handle_timeouts(self, now: float) -> None:
        """Ask again, and let go of routers that have been silent for too long."""
        for address in [each for each, expires_at in self._expires_at.items() if expires_at <= now]:
            del self._expires_at[address]
        if self._next_round is None or self._next_round > now:
            return
        nonce = self._random.getrandbits(8 * NONCE_BYTES).to_bytes(NONCE_BYTES, "big")
        self._nonces = (nonce, *self._nonces[:1])
        self._outgoing += [Outgoing(emit_solicitation(nonce), each.broadcast) for each in self._networks]
        wait_s = _ROUNDS_S[self._rounds] if self._rounds < len(_ROUNDS_S) else self._interval_s
        self._rounds += 1
        self._next_round = now + min(wait_s, self._interval_s)

    def take_outgoing(self) -> list[Outgoing]:
        """What is to be sent to the discovery service, in order."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing


class Announcer:
    """The router's side. Announces itself for `lifetime_s`, and signs with `identity` if it has one."""

    def __init__(self, lifetime_s: float, identity: Identity | None) -> None:
        self.counters: Counter[str] = Counter()
        self._lifetime_s = max(_LIFETIME_MIN_S, int(lifetime_s))
        self._identity = identity
        self._buckets = SenderBuckets(_SOLICITATIONS_PER_HOST_S, _SOLICITATIONS_BURST)

    def answer(self, data: bytes, source: int, own_address: int, now: float) -> bytes:
        """The answer to a solicitation from `source`, to be sent from `own_address`.

        TheirMistake, which is counted, when it deserves none.
        """
        try:
            if not self._buckets.take(source, now):
                raise TheirMistake(TOO_MANY_SOLICITATIONS)
            nonce = parse_solicitation(data)
        except TheirMistake as mistake:
            self.counters[f"refused_{mistake.reason}"] += 1
            raise
        self.counters["solicitations"] += 1
        message = Announcement(nonce, self._lifetime_s, own_address)
        if self._identity is None:
            return emit_announcement(message)
        unsigned = message._replace(public_key=self._identity.public_key, signature=bytes(SIGNATURE_BYTES))
        data = emit_announcement(unsigned)
        return data[:-SIGNATURE_BYTES] + self._identity.sign(signed_part(data))
