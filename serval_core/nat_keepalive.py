"""How does a flow inside UDP stay reachable for a peer that NATs stand before? (SPEC 8)

A NAT forgets a mapping that nothing has used for a while. So whoever has opened the flow sends an ACK now and then that
says nothing new. Nothing is expected in return.
"""

from __future__ import annotations

from serval_core.core import Core
from serval_core.flow import Flow
from serval_core.framing import Framing
from serval_core.migration_states import PeerMove
from serval_core.timers import NO_TIMER
from serval_core.wire.sal import ACK


def keep_reachable(core: Core, flow: Flow, now: float) -> None:
    """From now on, if the flow travels inside UDP and this host has opened it."""
    if flow.keepalive_timer != NO_TIMER:
        core.timers.cancel(flow.keepalive_timer)
        flow.keepalive_timer = NO_TIMER
    if flow.outer_ports is None or flow.listener is not None:
        return

    def due(flow: Flow, now: float) -> None:
        flow.keepalive_timer = NO_TIMER
        # Nothing may overtake an RSYN-ACK that a prototype has not acknowledged (SPEC 11.1, quirk 17).
        if flow.moves is None or flow.moves.peer is PeerMove.SETTLED:
            core.send_control(flow, ACK, flow.send_next)
            core.counters["keepalives"] += 1
        keep_reachable(core, flow, now)

    flow.keepalive_timer = core.timers.start(now + core.settings.nat_keepalive_s, due, flow)


def may_change_to_udp(core: Core, flow: Flow) -> bool:
    """Whether packets of the flow that protocol 144 does not bring to the peer may be tried inside UDP."""
    return (
        core.framings.can_encapsulate
        and flow.framing is Framing.AUTO
        and flow.options.capabilities is not None
    )
