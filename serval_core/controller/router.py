"""What does a service router do with the messages of hosts? It believes them or not.

Takes payloads of Serval datagrams (SPEC 7.4, `wire.control_messages`, `wire.registration_offer`) and the time. What
follows from a registration is the business of `registrations`, who may register what that of `policy`, whether a
message is genuine that of `authentication`. Whatever is refused is counted and published with the reason, and
changes nothing. Knows no sockets.

`now` is monotonic and decides about expiry; `wall` is seconds since 1970, for the directory and for signatures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from serval_core.addresses import is_unicast
from serval_core.controller.authentication import Authenticator, Moment, Signed
from serval_core.controller.directory import Directory, Instance
from serval_core.controller.flood_limits import SenderBuckets, TokenBucket
from serval_core.controller.policy import NOT_SIGNED, UNKNOWN_KEY, RegistrationPolicy
from serval_core.controller.registrations import Publish, Record, Registrations
from serval_core.errors import TheirMistake
from serval_core.names import ServiceID, ServicePrefix, format_address
from serval_core.rules import FORWARD_PRIORITY, FORWARD_WEIGHT
from serval_core.service_table import ServiceTable
from serval_core.wire.control_messages import MessageType, Registration, parse_registration
from serval_core.wire.registration_offer import Offer, Proof, parse_extension

WRONG_SOURCE_SERVICE = "wrong_source_service"
WRONG_SOURCE_ADDRESS = "wrong_source_address"
FROM_UPSTREAM = "from_upstream_router"
TOO_MANY_MESSAGES = "too_many_messages"
TOO_MANY_FROM_HOST = "too_many_registrations_of_host"
TOO_MANY_OF_PREFIX = "too_many_registrations_of_prefix"
TOO_MANY = "too_many_registrations"
TOO_MANY_NEW = "too_many_new_registrations"
DEFAULT_PREFIX_REASON = "default_prefix"
PRIORITY_TOO_HIGH = "priority_too_high"
WEIGHT_TOO_HIGH = "weight_too_high"
CONFLICT = "conflicting_rule"

LIFETIME_MIN_S = 1.0
# A host may refresh everything it has at once (after an address change) without being taken for a flood.
BURST_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLimits:
    """How much a router takes. Times in seconds; see `settings.RouterSection`."""

    expiry_s: float = 50.0
    lifetime_max_s: float = 300.0
    priority_max: int = 1000
    weight_max: int = 1000
    registrations_max: int = 100_000
    registrations_per_host: int = 2048
    registrations_per_prefix: int = 1024
    messages_per_host_s: float = 200.0
    new_registrations_s: float = 1000.0
    clock_tolerance_s: float = 60.0


class RegistrationRouter:
    """The router role of one stack. `control_services` are those of the control plane itself, which nobody
    registers to any effect; `own_addresses` tells those of this host, `upstream_routers` the routers it registers
    with, whose registrations would lead packets round in a circle. `publish` gets news; `prefix_changed`
    is called with a prefix and the sum of its instances' weights (0: none left).
    """

    def __init__(
        self,
        table: ServiceTable,
        directory: Directory,
        policy: RegistrationPolicy,
        limits: RouterLimits,
        client_id: ServiceID,
        control_services: Collection[ServiceID],
        own_addresses: Callable[[], Collection[int]],
        upstream_routers: Callable[[], Collection[int]],
        publish: Publish,
        prefix_changed: Callable[[ServicePrefix, int], None],
        now: float,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._table = table
        self._directory = directory
        self._client_id = client_id
        self._control_services = frozenset(control_services)
        self._own_addresses = own_addresses
        self._upstream_routers = upstream_routers
        self._publish = publish
        self.registrations = Registrations(
            table, directory, publish, prefix_changed, limits.clock_tolerance_s, now
        )
        self._authenticator = Authenticator(limits.clock_tolerance_s)
        self.set_policy(policy, limits, now)

    def restore(self, now: float, wall: float) -> int:
        """Take over what the directory remembers and the policy allows; returns how many registrations there
        are. Raises DirectoryFailed.
        """
        since_us = int((wall - self._limits.clock_tolerance_s) * 1_000_000)
        self._authenticator.restore(self._directory.moments(since_us))
        for stored in self._directory.registrations(wall):
            refused = self._policy.refusal(stored.prefix, stored.address, stored.public_key or None)
            if refused or not self.registrations.restore(stored, now, wall):
                self.registrations.discard(stored, now)
                self.counters["not_restored"] += 1
        return len(self.registrations)

    def set_policy(self, policy: RegistrationPolicy, limits: RouterLimits, now: float) -> None:
        """Ask for something else from now on. Registrations that `policy` refuses end; `limits` are for new ones.

        `clock_tolerance_s` stays what it was at the beginning.
        """
        self._policy = policy
        self._limits = limits
        self._buckets = SenderBuckets(
            limits.messages_per_host_s,
            max(limits.messages_per_host_s * BURST_S, limits.registrations_per_host),
        )
        self._new = TokenBucket(limits.new_registrations_s, limits.new_registrations_s * BURST_S, now)
        self.registrations.refuse(
            lambda record: policy.refusal(record.prefix, record.address, record.public_key or None), now
        )

    # -- messages --------------------------------------------------------------------------------------------

    def message_received(
        self, payload: bytes, source_service: ServiceID, source: int, now: float, wall: float
    ) -> None:
        """A datagram has arrived at the router's service."""
        self.counters["messages"] += 1
        if source in self._own_addresses():
            self.counters["own_messages"] += 1  # a broadcast comes back to its sender
            return
        if source_service != self._client_id:
            self._refuse(WRONG_SOURCE_SERVICE, source)
        elif not is_unicast(source):
            self._refuse(WRONG_SOURCE_ADDRESS, source)
        elif source in self._upstream_routers():
            self._refuse(FROM_UPSTREAM, source)
        elif not self._buckets.take(source, now):
            self._refuse(TOO_MANY_MESSAGES, source)
        else:
            self._control_message(payload, source, now, wall)

    def _control_message(self, payload: bytes, source: int, now: float, wall: float) -> None:
        try:
            message = parse_registration(payload)
            offer, proof = parse_extension(payload)
        except TheirMistake as mistake:
            self._refuse(mistake.reason, source)
            return
        prefix = message.prefix
        if prefix.service_id in self._control_services:
            self.counters["control_services"] += 1  # every prototype registers its own
        elif message.kind is MessageType.REGISTER:
            offer = self._clamped(offer)
            if reason := self._register(payload, message, offer, proof, source, now, wall):
                self._refuse(reason, source, prefix)
        elif reason := self._unregister(payload, prefix, proof, source, now, wall):
            self._refuse(reason, source, prefix)

    def _clamped(self, offer: Offer | None) -> Offer:
        """What a message offers, with the defaults of one that does not say."""
        if offer is None:
            return Offer(FORWARD_PRIORITY, FORWARD_WEIGHT, int(self._limits.expiry_s))
        lifetime_s = min(max(offer.lifetime_s, LIFETIME_MIN_S), self._limits.lifetime_max_s)
        return Offer(offer.priority, max(offer.weight, 1), int(lifetime_s))

    def _register(
        self,
        payload: bytes,
        message: Registration,
        offer: Offer,
        proof: Proof | None,
        source: int,
        now: float,
        wall: float,
    ) -> str | None:
        """Why it is refused, None if it is not."""
        prefix = message.prefix
        if not prefix.bits:
            return DEFAULT_PREFIX_REASON
        if offer.priority > self._limits.priority_max:
            return PRIORITY_TOO_HIGH
        if offer.weight > self._limits.weight_max:
            return WEIGHT_TOO_HIGH
        public_key = proof.public_key if proof is not None else None
        if reason := self._policy.refusal(prefix, source, public_key):
            return reason
        record = self.registrations.get(prefix, source)
        moved = None
        if message.refresh and message.old_address not in (0, source):
            moved = self.registrations.get(prefix, message.old_address)
        for affected in (record, moved):
            if affected is not None and (reason := _ownership(affected, public_key)):
                return reason
        if record is None and (reason := self._room(prefix, source, moved is None)):
            return reason
        if proof is not None and (
            reason := self._authenticator.refusal(payload, prefix, proof, source, wall)
        ):
            return reason
        if record is None and moved is None and not self._new.take(now):
            return TOO_MANY_NEW
        if not self.registrations.put(Instance(prefix, source), offer, public_key or b"", moved, now, wall):
            return CONFLICT
        if not message.refresh:
            self._table.mark_up(source, prefix)  # it has just been started, whatever happened to it before
        if proof is not None:
            self._remember(prefix, proof, now, wall)
        return None

    def _unregister(
        self,
        payload: bytes,
        prefix: ServicePrefix,
        proof: Proof | None,
        source: int,
        now: float,
        wall: float,
    ) -> str | None:
        """Why it is refused, None if it is not."""
        public_key = proof.public_key if proof is not None else None
        record = self.registrations.get(prefix, source)
        if record is None:
            self.counters["unregistered_unknown"] += 1
            return None
        if reason := _ownership(record, public_key):
            return reason
        if proof is not None:
            if reason := self._authenticator.refusal(payload, prefix, proof, source, wall):
                return reason
            self._remember(prefix, proof, now, wall)
        self.registrations.forget(record, "unregistered", now)
        return None

    def _room(self, prefix: ServicePrefix, source: int, one_more: bool) -> str | None:
        if self.registrations.of_host(source) >= self._limits.registrations_per_host:
            return TOO_MANY_FROM_HOST
        if one_more and self.registrations.of_prefix(prefix) >= self._limits.registrations_per_prefix:
            return TOO_MANY_OF_PREFIX
        if one_more and len(self.registrations) >= self._limits.registrations_max:
            return TOO_MANY
        return None

    def _refuse(self, reason: str, source: int, prefix: ServicePrefix | None = None) -> None:
        self.counters[f"refused_{reason}"] += 1
        named = {} if prefix is None else {"prefix": str(prefix)}
        self._publish("registration_refused", reason=reason, address=format_address(source), **named)

    def _remember(self, prefix: ServicePrefix, proof: Proof, now: float, wall: float) -> None:
        self._authenticator.remember(prefix, proof, wall)
        signed = Signed(proof.public_key, proof.address, prefix)
        self.registrations.note_moment(signed, Moment(*proof.sequence), now)


def _ownership(record: Record, public_key: bytes | None) -> str | None:
    """Why a message with this key may not touch the record, None if it may."""
    if not record.public_key or public_key == record.public_key:
        return None
    return NOT_SIGNED if public_key is None else UNKNOWN_KEY
