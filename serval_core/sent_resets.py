"""Which RSTs of ours are said again, to whom, and until when?

Nothing acknowledges an RST (SPEC 3.9), and one that is lost leaves the peer waiting for its TCP to give up. The flow is
gone once it is sent, so a small record is kept of it for a while:

- A peer of ours gets three more copies. It believes an RST only if flowIDs, nonce and version number fit, so a copy that
  finds no flow, or another one, is ignored.
- A prototype gets none of these. It obeys every RST whose version number is not behind, whatever the nonce, and numbers its
  flows from 2 after each start (OBSERVED 1 and 2): a copy may meet a new flow under an old flowID.
- Whoever still sends control packets for the flow, with its nonce, is told again. As in SPEC 3.9, where a socket in
  CLOSED answers every packet; it is harmless to a prototype too, since it has just shown that the flow is still the same.
- A peer that sends an RST itself knows, and is told nothing any more.

Data is no such sign: it carries no nonce, much of it is under way when a flow is reset, and the raw socket's filter
stops what belongs to no flow.
"""

from __future__ import annotations

from serval_core.core import Core
from serval_core.effects import SendPacket
from serval_core.errors import TheirMistake
from serval_core.flow import Flow
from serval_core.timers import NO_TIMER
from serval_core.wire.sal import RST, SalPacket

REPEATS_S = (0.05, 0.5, 2.0)
"""When an RST is repeated, in seconds after it was sent."""
REMEMBERED_S = 10.0
LIMIT = 1024
"""How many are remembered at once; the oldest gives way. This also bounds what a burst of resets costs."""


class SentReset:
    """What is left of a flow that we have reset."""

    __slots__ = ("flow_id", "packet", "peer_nonce", "repeats", "sent_at", "timer")

    def __init__(self, flow: Flow, packet: SendPacket, now: float) -> None:
        self.flow_id = flow.flow_id
        self.peer_nonce = flow.peer_nonce
        self.packet = packet
        self.sent_at = now
        self.repeats = 0 if flow.options.capabilities is not None else len(REPEATS_S)
        self.timer = NO_TIMER


class SentResets:
    """The RSTs that were sent last, by the flowID of the flow that they ended."""

    __slots__ = ("_core", "_records")

    def __init__(self, core: Core) -> None:
        self._core = core
        self._records: dict[int, SentReset] = {}

    def __len__(self) -> int:
        return len(self._records)

    def remember(self, flow: Flow, packet: bytes, now: float) -> None:
        """The flow is over, and `packet` has just told its peer."""
        if len(self._records) >= LIMIT:
            self._forget(next(iter(self._records.values())))
        effect = SendPacket(packet, flow.peer_address, flow.interface_index)
        record = self._records[flow.flow_id] = SentReset(flow, effect, now)
        self._wait(record)

    def find(self, flow_id: int) -> SentReset | None:
        """The record of a flow that was reset not long ago."""
        return self._records.get(flow_id)

    def receive(self, record: SentReset, sal: SalPacket) -> None:
        """Process a packet for a flow that was reset. Always raises TheirMistake: it has no other effect than an answer."""
        control = sal.control
        if control is not None:
            if control.nonce != record.peer_nonce:
                raise TheirMistake("wrong_nonce")
            if control.flags & RST:
                self._forget(record)
            else:
                self._repeat(record)
        raise TheirMistake("already_reset")

    def _wait(self, record: SentReset) -> None:
        after_s = REPEATS_S[record.repeats] if record.repeats < len(REPEATS_S) else REMEMBERED_S
        record.timer = self._core.timers.start(record.sent_at + after_s, self._waited, record)

    def _waited(self, record: SentReset, now: float) -> None:
        if record.repeats == len(REPEATS_S):
            self._forget(record)
            return
        record.repeats += 1
        self._repeat(record)
        self._wait(record)

    def _repeat(self, record: SentReset) -> None:
        self._core.effects.append(record.packet)
        self._core.counters["resets_repeated"] += 1

    def _forget(self, record: SentReset) -> None:
        self._core.timers.cancel(record.timer)
        del self._records[record.flow_id]
