"""How large may packets be on the path of a flow, beyond what its first interface allows? (RFC 1191, RFC 4821)

Routers tell, by ICMP errors that quote a packet of ours; and where they do not, a flow that sends in vain tries
smaller ones. Anybody can send an ICMP error, so it has to know both flowIDs and where the flow's packets go, and
cannot make them tiny (compare RFC 5927). The next move forgets what was learned about the old path.
"""

from __future__ import annotations

from serval_core.core import Core
from serval_core.effects import LimitSegments
from serval_core.flow import Flow
from serval_core.wire.sal import PROTOCOL_SAL

MTU_MIN_BYTES = 552  # net.ipv4.route.min_pmtu, below which the kernel's TCP does not go either
PLATEAUS_BYTES = (9000, 4352, 1492, 1400, 1280, 1006, MTU_MIN_BYTES)
"""What a router that does not say may mean: sizes of links that exist (RFC 1191, 7.1)."""
TRIED_BYTES = (1500, 1280, MTU_MIN_BYTES)
"""What is tried where nobody says anything. Each step costs seconds, so there are few: what tunnels let through is
mostly no less than the second (RFC 8200, 5).
"""
_VERSION_AND_LENGTH = 0x45  # we send no IP options
_QUOTED_MIN_BYTES = 20 + 8


def reported(core: Core, quoted: bytes, mtu_bytes: int) -> None:
    """A router has not forwarded a packet, of which this is the beginning, because it is larger than `mtu_bytes`; 0
    if it does not say how large it might be.
    """
    if len(quoted) < _QUOTED_MIN_BYTES or quoted[0] != _VERSION_AND_LENGTH or quoted[9] != PROTOCOL_SAL:
        return
    flow = core.flows.by_id.get(int.from_bytes(quoted[20:24], "big"))
    if flow is None:
        return
    known = quoted[16:20] + quoted[24:28]
    if known != flow.peer_address.to_bytes(4, "big") + flow.peer_flow_id.to_bytes(4, "big"):
        core.drop("spoofed_icmp_error")
        return
    sent_bytes = int.from_bytes(quoted[2:4], "big")
    if not mtu_bytes:
        mtu_bytes = next((each for each in PLATEAUS_BYTES if each < sent_bytes), MTU_MIN_BYTES)
    elif mtu_bytes >= sent_bytes:
        core.drop("meaningless_icmp_error")
        return
    _limit(core, flow, mtu_bytes)


def suspected(core: Core, flow: Flow) -> None:
    """Nothing comes back on the flow's path: perhaps only what is large does not get through."""
    smaller = next((each for each in TRIED_BYTES if each < flow.mtu_bytes), None)
    if smaller is not None:
        core.counters["path_mtu_tried"] += 1
        _limit(core, flow, smaller)


def _limit(core: Core, flow: Flow, mtu_bytes: int) -> None:
    mtu_bytes = max(mtu_bytes, MTU_MIN_BYTES)
    if mtu_bytes < flow.mtu_bytes:
        flow.mtu_bytes = mtu_bytes
        core.counters["path_mtu_lowered"] += 1
        core.effects.append(LimitSegments(flow.flow_id, mtu_bytes))
