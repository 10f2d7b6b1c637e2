"""What do control packets of open flows do besides closing them? (SPEC 3.4)"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from serval_core.effects import (
    InjectSegment,
)
from serval_core.names import FlowID
from serval_core.sal import SalSettings
from serval_core.wire.sal import ACK, FIN, NACK, SYN
from tests.serval_core.lone_host import (
    LoneHost,
    Peer,
    Sent,
    accepted_host,
    connected_host,
)

Connected = tuple[LoneHost, Peer, FlowID]
Connect = Callable[..., Connected]


def own_numbers(peer: Peer, sent: Sent) -> tuple[int, int]:
    """Version number and acknowledgement relative to those after the handshake."""
    return sent.control.verno - peer.ackno & 0xFFFFFFFF, sent.control.ackno - peer.verno & 0xFFFFFFFF


def closewait(connect: Connect = connected_host, settings: SalSettings | None = None) -> Connected:
    host, peer, flow_id = connect(settings)
    host.receive(peer.control(FIN))
    host.effects()
    return host, peer, flow_id


def test_a_stale_pure_ack_is_not_answered() -> None:
    host, peer, _ = closewait()
    host.receive(peer.control(ACK, verno=peer.verno - 5 & 0xFFFFFFFF))
    assert host.effects() == []


def test_version_numbers_may_run_ahead_a_little() -> None:
    """A FIN or RSYN that was overwritten consumes a number (SPEC 11.1, quirk 7)."""
    host, peer, _ = connected_host()
    host.receive(peer.control(FIN, verno=peer.verno + 256))
    assert own_numbers(peer, host.only_packet()) == (0, 257)
    host, peer, _ = connected_host()
    host.receive(peer.control(FIN, verno=peer.verno + 257))
    assert host.effects() == []
    assert host.dropped("version_gap") == 1


@pytest.mark.parametrize("flags", [0, NACK, SYN | FIN])
def test_controls_without_meaning_are_counted(flags: int) -> None:
    host, peer, _ = accepted_host()
    host.receive(peer.control(flags))
    assert host.effects() == []
    assert host.dropped("meaningless_control") == 1


def test_data_for_an_open_flow_is_handed_on() -> None:
    host, peer, _ = connected_host()
    host.receive(peer.data(b"x"))
    assert len(host.news(InjectSegment)) == 1
    host.receive(peer.packet(None, b"short"))
    assert host.dropped("tcp_truncated") == 1
    assert len(host.news(InjectSegment)) == 1
