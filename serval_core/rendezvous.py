"""Where is a peer that has moved while it could not tell us? The service table, and service routers, may know.

Both ends of a flow may lose their addresses at the same time. Then each announces its move to an address where
nobody is any more (SPEC 5.5). A server's new address becomes known all the same: it registers its services from
there. So a client whose RSYNs stay unanswered sends them to wherever a SYN for the service would go as well, with
the serviceID in them, and service routers pass them on to their instances. The right one is whoever has the flow
and knows its nonce; it answers as usual, and the source of that answer is where the peer is. The others are silent.

Only the end that has opened a flow can do that, since the other one does not know a service to ask for; and only
with a peer of ours, since a prototype answers with an RST to what names a service and no flow that it has.
"""

from __future__ import annotations

from serval_core.core import Core
from serval_core.flow import Flow
from serval_core.paths import Path
from serval_core.rules import RuleType

COPIES_LIMIT = 8
"""How many instances are asked at a time, here and at a service router: these packets multiply on their way."""


def seek(core: Core, flow: Flow, flags: int, path: Path) -> bool:
    """Send the RSYN of a flow, which has just gone to `flow.peer_address` in vain, on `path` to where its service
    may be; whether there is such a place.
    """
    if flow.listener is not None or flow.options.capabilities is None:
        return False
    asked = {flow.peer_address, path.source_address}
    sent = 0
    while sent < COPIES_LIMIT:
        rule_type, targets = core.table.resolve(flow.service_id, core.random.random, asked)
        if rule_type is not RuleType.FORWARD or not targets:
            break
        for target in targets:
            if target.broadcast and target.interface_index != path.interface_index:
                continue
            way = core.paths.path_to(target.address, path.interface_index)
            if target.broadcast or way is not None:
                verno = flow.send_next - 1 & 0xFFFFFFFF
                core.send_control_on(flow, flags, verno, path, target.address, None, flow.service_id)
                sent += 1
        if targets[0].broadcast:
            break
        asked |= {target.address for target in targets}
    core.counters["rendezvous_packets"] += sent
    return sent > 0
