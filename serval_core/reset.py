"""Who may reset a flow, and what does the answer to a packet say that nobody wants? (SPEC 3.9; 11.1, quirk 8)

A prototype believes every RST with a plausible version number. We ask for a nonce that only the two ends
and the path between them know.
"""

from __future__ import annotations

from serval_core.flow import Flow
from serval_core.wire import encapsulation
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import ACK, FIN, RST, SYN, Control, SalPacket, emit_control

_NO_NONCE = bytes(8)
# A prototype's answer to a FIN acknowledges 32 too many, and one more when there was a SYN (quirk 12).
_ACKNO_SLIP = 33


def resets_request(flow: Flow, control: Control) -> bool:
    """Whether an RST is meant for a flow in REQUEST, whose peer's nonce is not known yet.

    It has to return our nonce, or at least to acknowledge exactly our SYN.
    """
    acknowledges = control.flags & ACK != 0 and control.ackno == flow.send_next
    if control.nonce == flow.local_nonce:
        return acknowledges or not control.flags & ACK
    return control.nonce == _NO_NONCE and acknowledges


def resets_flow(flow: Flow, control: Control, version_gap_limit: int) -> bool:
    """Whether an RST comes from the peer of a flow that has been answered."""
    ahead = control.verno - flow.receive_next & 0xFFFFFFFF
    if control.nonce == flow.peer_nonce:  # an active one
        return ahead <= version_gap_limit
    if control.nonce == flow.local_nonce:  # an answer to one of our control packets, which may be an old one
        if control.flags & ACK:
            answered = control.ackno - flow.initial_verno & 0xFFFFFFFF
            return answered <= (flow.send_next - flow.initial_verno & 0xFFFFFFFF) + _ACKNO_SLIP
        return ahead <= version_gap_limit
    # A prototype's answer to data. Ours makes none, and 32 bits are not much to guess.
    return control.nonce == _NO_NONCE and ahead == 0 and flow.options.capabilities is None


def answer_with_reset(ip: IPv4Packet, sal: SalPacket) -> bytes:
    """The IPv4 packet that tells the sender of `ip` that there is no such flow or service.

    The caller makes sure that the packet was no RST, and that it was sent to this host alone.
    """
    control = sal.control
    if control is not None and control.flags & ACK:
        flags, verno, ackno = RST, control.ackno, 0
    else:
        flags, verno, ackno = RST | ACK, 0, 0
        if control is not None:
            taken = (control.flags & SYN != 0) + (control.flags & FIN != 0)
            ackno = control.verno + taken & 0xFFFFFFFF
    nonce = _NO_NONCE if control is None else control.nonce
    payload = emit_control(sal.dst_flow_id, sal.src_flow_id, sal.protocol, flags, verno, ackno, nonce)
    return encapsulation.answer(ip, payload)
