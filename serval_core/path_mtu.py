"""How large may packets be on the path of a flow, beyond what its first interface allows? (RFC 1191, RFC 4821)

Routers tell, by ICMP errors that quote a packet of ours; and where they do not, a flow whose data gets no answer while
its control packets do tries smaller ones. Anybody can send an ICMP error, so it has to know both flowIDs, or ports in
framing `native`, and where the flow's packets go, and cannot make them tiny (compare RFC 5927). The next move forgets
what was learned about the old path.
"""

from __future__ import annotations

from serval_core.core import Core
from serval_core.effects import LimitSegments
from serval_core.flow import Flow
from serval_core.wire.sal import PROTOCOL_SAL, PROTOCOL_TCP, PROTOCOL_UDP

MTU_MIN_BYTES = 552  # net.ipv4.route.min_pmtu, below which the kernel's TCP does not go either
PLATEAUS_BYTES = (9000, 4352, 1492, 1400, 1280, 1006, MTU_MIN_BYTES)
"""What a router that does not say may mean: sizes of links that exist (RFC 1191, 7.1)."""
TRIED_BYTES = (1500, 1280, MTU_MIN_BYTES)
"""What is tried where nobody says anything. Each step costs seconds, so there are few: what tunnels let through is
mostly no less than the second (RFC 8200, 5).
"""
_VERSION_AND_LENGTH = 0x45  # we send no IP options
_QUOTED_MIN_BYTES = 20 + 8
_UDP_BYTES = 8


def reported(core: Core, quoted: bytes, mtu_bytes: int) -> None:
    """A router has not forwarded a packet, of which this is the beginning, because it is larger than `mtu_bytes`; 0
    if it does not say how large it might be.
    """
    if len(quoted) < _QUOTED_MIN_BYTES or quoted[0] != _VERSION_AND_LENGTH:
        return
    found = _flow_of(core, quoted)
    if found is None:
        return
    flow, knows_peer = found
    if not knows_peer or int.from_bytes(quoted[16:20], "big") != flow.peer_address:
        core.drop("spoofed_icmp_error")
        return
    if int.from_bytes(quoted[12:16], "big") != flow.local_address:
        core.drop("late_icmp_error")  # the flow has left the path that this is about
        return
    sent_bytes = int.from_bytes(quoted[2:4], "big")
    if not mtu_bytes:
        mtu_bytes = next((each for each in PLATEAUS_BYTES if each < sent_bytes), MTU_MIN_BYTES)
    elif mtu_bytes >= sent_bytes:
        core.drop("meaningless_icmp_error")
        return
    _limit(core, flow, mtu_bytes, False)  # a router would complain again, but a forger's success is to end


def _flow_of(core: Core, quoted: bytes) -> tuple[Flow, bool] | None:
    """The flow of a packet in whatever framing, and whether its number for the peer's end is right."""
    at = 20
    if quoted[9] == PROTOCOL_TCP:
        flow_id = core.native_ports.flow_of(int.from_bytes(quoted[20:22], "big"))
        flow = None if flow_id is None else core.flows.by_id.get(flow_id)
        return None if flow is None else (flow, int.from_bytes(quoted[22:24], "big") == flow.options.native_port)
    if quoted[9] == PROTOCOL_UDP:
        at += _UDP_BYTES
    elif quoted[9] != PROTOCOL_SAL:
        return None
    flow = core.flows.by_id.get(int.from_bytes(quoted[at : at + 4], "big"))
    return None if flow is None else (flow, int.from_bytes(quoted[at + 4 : at + 8], "big") == flow.peer_flow_id)


def suspected(core: Core, flow: Flow) -> None:
    """Data is not answered, but RSYNs are: perhaps only what is large does not get through."""
    smaller = next((each for each in TRIED_BYTES if each < flow.mtu_bytes), MTU_MIN_BYTES)
    if smaller < flow.mtu_bytes:
        core.counters["path_mtu_tried"] += 1
    _limit(core, flow, smaller, True)


def _limit(core: Core, flow: Flow, mtu_bytes: int, lasting: bool) -> None:
    mtu_bytes = max(mtu_bytes, MTU_MIN_BYTES)
    if mtu_bytes < flow.mtu_bytes:
        flow.mtu_bytes = mtu_bytes
        core.counters["path_mtu_lowered"] += 1
    # Also when it is no news: the kernel forgets what it was told (net.ipv4.route.mtu_expires), and sends large ones again.
    core.effects.append(LimitSegments(flow.flow_id, min(mtu_bytes, flow.mtu_bytes), lasting))
