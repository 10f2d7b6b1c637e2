"""What do both halves of a migration share? Which flows can move, and what follows from an end's being elsewhere."""

from __future__ import annotations

from serval_core.core import Core
from serval_core.effects import Happened, MovePath
from serval_core.flow import Flow
from serval_core.moves import Moves
from serval_core.names import format_address
from serval_core.states import State

SERIAL_MASK = 0xFFFFFFFF
MOVABLE = frozenset(
    {State.CONNECTED, State.CLOSEWAIT, State.FINWAIT1, State.FINWAIT2, State.CLOSING, State.LASTACK}
)
"""The states in which a flow can migrate (SPEC 5.1)."""


def moves_of(flow: Flow) -> Moves:
    """The record of the flow's moves, made when it is needed for the first time."""
    if flow.moves is None:
        flow.moves = Moves()
    return flow.moves


def move_path(core: Core, flow: Flow) -> None:
    """Have the flow's data go by the path that `flow` has now."""
    core.effects.append(
        MovePath(
            flow.flow_id,
            flow.local_address,
            flow.peer_address,
            flow.interface_index,
            flow.mtu_bytes,
            flow.outer_ports,
        )
    )


def report_move(core: Core, kind: str, flow: Flow, end: str, address: int, **more: object) -> None:
    """Tell that one end of a flow, "local" or "peer", is at `address` now, or could not get there."""
    fields: dict[str, object] = {
        "flow_id": flow.flow_id,
        "service": flow.service_id.text,
        "end": end,
        "address": format_address(address) if address else None,
        "interface_index": flow.interface_index,
    }
    core.effects.append(Happened(kind, fields | more))
