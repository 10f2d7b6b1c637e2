"""Who said this? Proofs on the control packets of a flow, agreed upon in its handshake. Only between our own stacks.

    client  SYN       AUTHENTICATES in our TCP option
    server  SYN-ACK   AUTHENTICATES, KEY
    client  ACK       KEY, PROOF           from here on every control packet of the flow has a PROOF

The KEYs are ephemeral public keys of X25519 (RFC 7748). What they agree on, with nonces and flowIDs of both ends,
makes one key per direction (HKDF, RFC 5869), and the proof is an HMAC-SHA256 (RFC 2104), cut to 16 bytes, of the two
addresses and all that the SAL says: flowIDs, protocol, CONTROL, SERVICE, KEY, and the transport part. SOURCE is not
in it, as forwarders add to it.

Whoever was not in the middle of the handshake, changing its packets, can neither make nor change a control packet of
the flow, even if he sees them all; nor say it again from another address. An attacker who did change the handshake
can take the keys out of it, which a peer that requires them refuses, or put his own in: nothing vouches for whose they are.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from hashlib import sha256
from struct import Struct

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from serval_core.errors import TheirMistake
from serval_core.wire.sal import KEY_BYTES, PROOF_BYTES, Control, SalPacket

AUTHENTICATES = 1
"""The flag in our capabilities option: wants proofs, and can make them."""

KEY_LIFETIME_S = 600.0
_CONTEXT = b"serval control packets"
_SAID = Struct("!IIIIBB II8s B")
_KEY_OF_DIRECTION_BYTES = 32
_NO_CONTROL = Control(0, 0, 0, bytes(8))


class KeyPair:
    """A private key that is good for one handshake. `public` is what KEY holds."""

    __slots__ = ("_private", "public")

    def __init__(self, random_bits: int) -> None:
        """`random_bits`: 256 that nobody can guess."""
        self._private = X25519PrivateKey.from_private_bytes(random_bits.to_bytes(KEY_BYTES, "big"))
        self.public = self._private.public_key().public_bytes_raw()

    def agree(self, peer_public: bytes) -> bytes:
        """What both ends can compute. TheirMistake when the peer's key makes it something that anybody knows."""
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(peer_public))
        except ValueError:
            raise TheirMistake("weak_key") from None


class KeyPairs:
    """The key pair that handshakes use at present. One serves many: nonces make each flow's keys its own."""

    __slots__ = ("_current", "_random_bits", "_until")

    def __init__(self, random_bits: Callable[[int], int]) -> None:
        self._random_bits = random_bits
        self._current: KeyPair | None = None
        self._until = 0.0

    def current(self, now: float) -> KeyPair:
        """It is forgotten after a while, and with it what could tell the keys of flows that are over."""
        if self._current is None or now >= self._until:
            self._current = KeyPair(self._random_bits(8 * KEY_BYTES))
            self._until = now + KEY_LIFETIME_S
        return self._current


class Proofs:
    """Makes the proofs of one end of a flow, and checks those of the other."""

    __slots__ = ("_receiving", "_sending")

    def __init__(self, sending: bytes, receiving: bytes) -> None:
        self._sending = hmac.new(sending, digestmod=sha256)
        self._receiving = hmac.new(receiving, digestmod=sha256)

    @classmethod
    def agreed(cls, shared: bytes, client: tuple[int, bytes, bytes], server: tuple[int, bytes, bytes], is_client: bool) -> Proofs:
        """From what both ends computed; `client` and `server`: flowID, nonce and public key of each."""
        info = _CONTEXT + b"".join(
            flow_id.to_bytes(4, "big") + public for flow_id, _, public in (client, server)
        )
        keys = HKDF(SHA256(), 2 * _KEY_OF_DIRECTION_BYTES, client[1] + server[1], info).derive(shared)
        of_client, of_server = keys[:_KEY_OF_DIRECTION_BYTES], keys[_KEY_OF_DIRECTION_BYTES:]
        return cls(of_client, of_server) if is_client else cls(of_server, of_client)

    def make(self, source: int, destination: int, said: SalPacket) -> bytes:
        """The proof that goes with a packet of ours. Addresses are those of the IP header; 0 leaves one out."""
        return _proof(self._sending, source, destination, said)

    def check(self, source: int, destination: int, said: SalPacket) -> None:
        """Whether the peer has said this. Raises TheirMistake."""
        if not said.proof:
            raise TheirMistake("proof_missing")
        if not hmac.compare_digest(_proof(self._receiving, source, destination, said), said.proof):
            raise TheirMistake("proof_wrong")


def _proof(keyed: hmac.HMAC, source: int, destination: int, said: SalPacket) -> bytes:
    control = said.control or _NO_CONTROL
    digest = keyed.copy()
    digest.update(
        _SAID.pack(
            source,
            destination,
            said.src_flow_id,
            said.dst_flow_id,
            said.protocol,
            control.flags,
            control.verno,
            control.ackno,
            control.nonce,
            len(said.services) << 1 | (said.key != b""),
        )
    )
    digest.update(b"".join(said.services) + said.key + said.transport)
    return digest.digest()[:PROOF_BYTES]
