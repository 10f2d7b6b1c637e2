"""Is this registration what its signer said, where and when it was said, and said for the first time?

The host's half signs (`Signer`), the router's half checks (`Authenticator`). What a key may register is the
business of `policy`. A message is bound to the address it was made for and to a moment: the signer's clock and
a counter only grow, the router remembers the latest pair of each (key, address, prefix) for as long as older
messages would still pass as fresh, and refuses what is not newer. Each prefix has a memory of its own, so that
messages about different ones may overtake each other on the way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from serval_core.identity import Identity, certifies, verify
from serval_core.names import SERVICE_ID_BITS, ServicePrefix
from serval_core.wire.control_messages import Registration, emit_registration
from serval_core.wire.registration_offer import SIGNATURE_BYTES, Offer, Proof, emit_extension, signed_part

WRONG_ADDRESS = "wrong_address"
STALE = "stale"
FROM_THE_FUTURE = "from_the_future"
REPLAYED = "replayed"
WRONG_SIGNATURE = "wrong_signature"

_US = 1_000_000
# Twice what routers tolerate: whoever believed something later than this had a wrong clock himself.
_SET_BACK_AT_MOST_US = 120 * _US
_NO_SIGNATURE = bytes(SIGNATURE_BYTES)


class Signed(NamedTuple):
    """Of what the latest message is remembered."""

    public_key: bytes
    address: int
    prefix: ServicePrefix


class Moment(NamedTuple):
    """When a message was made: later ones are larger."""

    timestamp_us: int
    counter: int


class Signer:
    """Signs a host's registrations. The first of `identities` signs what no other certifies."""

    def __init__(self, identities: Sequence[Identity]) -> None:
        self._identities = tuple(identities)
        self._timestamp_us = 0
        self._counter = 0

    def sign(self, message: Registration, offer: Offer, address: int, wall: float) -> bytes:
        """The whole payload, for a datagram that leaves from `address`. `wall`: seconds since 1970."""
        identity = self._identity(message.prefix)
        # A clock that was set back must not make us look like a replay of ourselves. But what was said in the far future
        # was believed by nobody, and one wrong moment of the clock must not silence us until then.
        now_us = int(wall * _US)
        if now_us > self._timestamp_us or self._timestamp_us > now_us + _SET_BACK_AT_MOST_US:
            self._timestamp_us = now_us
        self._counter = (self._counter + 1) & 0xFFFFFFFF
        if not self._counter:
            self._timestamp_us += 1
        proof = Proof(address, self._timestamp_us, self._counter, identity.public_key, _NO_SIGNATURE)
        unsigned = emit_registration(message) + emit_extension(offer, proof)
        return unsigned[:-SIGNATURE_BYTES] + identity.sign(signed_part(unsigned))

    def _identity(self, prefix: ServicePrefix) -> Identity:
        if prefix.bits == SERVICE_ID_BITS:
            for identity in self._identities:
                if certifies(identity.public_key, prefix.service_id):
                    return identity
        return self._identities[0]


class Authenticator:
    """Checks signatures on arrival. `tolerance_s`: how far a signer's clock may be from ours."""

    def __init__(self, tolerance_s: float) -> None:
        self._tolerance_us = int(tolerance_s * _US)
        self._latest: OrderedDict[Signed, Moment] = OrderedDict()

    def refusal(
        self, payload: bytes, prefix: ServicePrefix, proof: Proof, source: int, wall: float
    ) -> str | None:
        """Why the message is not believed; None if it is. The signature, which costs most, comes last."""
        now_us = int(wall * _US)
        if proof.address != source:
            return WRONG_ADDRESS
        if proof.timestamp_us < now_us - self._tolerance_us:
            return STALE
        if proof.timestamp_us > now_us + self._tolerance_us:
            return FROM_THE_FUTURE
        latest = self._latest.get(Signed(proof.public_key, source, prefix))
        if latest is not None and proof.sequence <= latest and self._protects(latest, now_us):
            return REPLAYED
        if not verify(proof.public_key, proof.signature, signed_part(payload)):
            return WRONG_SIGNATURE
        return None

    def remember(self, prefix: ServicePrefix, proof: Proof, wall: float) -> None:
        """The message was accepted: nothing older will be, from now on."""
        signed = Signed(proof.public_key, proof.address, prefix)
        self._latest[signed] = Moment(*proof.sequence)
        self._latest.move_to_end(signed)
        self._forget(wall)

    def restore(self, remembered: Iterable[tuple[Signed, Moment]]) -> None:
        """Know again what was known before a restart, oldest first."""
        self._latest.update(remembered)

    def __len__(self) -> int:
        return len(self._latest)

    def _forget(self, wall: float) -> None:
        now_us = int(wall * _US)
        while self._latest:
            signed, latest = next(iter(self._latest.items()))
            if self._protects(latest, now_us):
                return
            del self._latest[signed]

    def _protects(self, latest: Moment, now_us: int) -> bool:
        """Not what is older than any message that would pass as fresh, and not what is from the far future: that was
        believed when our own clock was wrong, and says nothing about what comes now.
        """
        return now_us - self._tolerance_us <= latest.timestamp_us <= now_us + 2 * self._tolerance_us
