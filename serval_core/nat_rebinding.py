"""What if an encapsulated peer suddenly sends from elsewhere? Its NAT has chosen another port or address for it.

The peer itself does not know. We announce our own, unchanged place to where its packets come from now, as in a migration
(SPEC 5): only the peer can answer with its nonce, and that proves that it is there. Until then data goes to the old place.
"""

from __future__ import annotations

from serval_core.addresses import is_unicast
from serval_core.core import Core
from serval_core.flow import Flow
from serval_core.migration import Migration
from serval_core.migration_states import OwnMove, PeerMove
from serval_core.moving import MOVABLE
from serval_core.nat_keepalive import keep_reachable
from serval_core.wire.ipv4 import OuterPorts


class NatRebinding:
    """Keeps encapsulated flows together with peers behind NATs."""

    __slots__ = ("_core", "_migration")

    def __init__(self, core: Core, migration: Migration) -> None:
        self._core = core
        self._migration = migration

    def keep(self, flow: Flow, now: float) -> None:
        """The flow has been opened."""
        keep_reachable(self._core, flow, now)

    def seen(self, flow: Flow, address: int, port: int, now: float) -> None:
        """A packet of the flow's peer came from this address and UDP port."""
        ports = flow.outer_ports
        if ports is None or (address, port) == (flow.peer_address, ports.peer) or flow.state not in MOVABLE:
            return
        moves = flow.moves
        if moves is not None and (moves.own is not OwnMove.SETTLED or moves.peer is not PeerMove.SETTLED):
            return  # that shows where the peer is, too
        if not is_unicast(address):
            return
        path = self._core.paths.path_to(address, flow.interface_index)
        if path is None:
            return
        self._core.counters["nat_rebindings"] += 1
        own = path._replace(source_address=flow.local_address)
        self._migration.own.migrate(flow, own, address, now, OuterPorts(ports.local, port))
