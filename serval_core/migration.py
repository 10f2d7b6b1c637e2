"""How does a live flow get to another address? RSYN, RSYN-ACK and ACK, in both roles (SPEC 5).

The end that moves sends RSYN from its new address. The other end answers to wherever that came from and stays
where it is; only the ACK of its answer makes it send data there. So both directions of a path have carried a
packet before the old one is given up, and nobody can send a flow to an address that does not want it.

What we do beyond the prototype, mostly as SPEC 5.7 advises:

- A repeated RSYN is answered by an RSYN-ACK, and RSYN-ACKs are repeated by timer. Bare ACKs never answer an
  RSYN, and none is sent while an answer is unconfirmed: a prototype would get stuck (SPEC 11.1, quirk 17).
- A move that fails is taken back: the old path is announced like a new one. Whatever the peer believed, it
  knows where we are afterwards, and we know whether the old path still works.
- Data is not held back meanwhile. It takes the old path, which mostly works; if not, TCP repeats it.

One packet with a version number of its own is unacknowledged at a time, as in the prototype (SPEC 3.3): while an
RSYN is out, a FIN goes with it. So `Flow.fin_verno`, and `Moves.first_verno` likewise, say from which version
number on everything that we sent had that flag, and any larger acknowledgement number covers it.

The two ends of a flow may move at the same time, so each half of a migration is on its own: `own_move`, `peer_move`.
"""

from __future__ import annotations

from serval_core.core import Core
from serval_core.own_move import OwnMoves
from serval_core.peer_move import PeerMoves


class Migration:
    """Both halves of the migration of all flows."""

    __slots__ = ("own", "peer")

    def __init__(self, core: Core) -> None:
        self.own = OwnMoves(core)
        self.peer = PeerMoves(core, self.own.peer_moved)
