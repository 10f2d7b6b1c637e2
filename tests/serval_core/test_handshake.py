"""What do we offer in the TCP handshake, and which transport follows from what the peer offers?"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core import handshake
from serval_core.effects import OpenTransport
from serval_core.errors import OurMistake
from serval_core.flow import Flow
from serval_core.names import FlowID
from serval_core.sal import SalSettings
from serval_core.wire.tcp_segment import TcpOptions
from tests.serval_core.lone_host import (
    OUR_OPTIONS,
    PROTOTYPE_OPTIONS,
    REMOTE,
    SERVICE_ID,
    LoneHost,
    Peer,
    accepted_host,
    connected_host,
)


def opened(host: LoneHost) -> OpenTransport:
    (transport,) = host.news(OpenTransport)
    return transport


def test_the_mss_leaves_room_for_ip_sal_and_tcp_headers() -> None:
    assert handshake.mss_to_offer(1500, 32767) == 1448  # SPEC 4.3
    assert handshake.mss_to_offer(9000, 32767) == 8948
    assert handshake.mss_to_offer(65536, 65535) == 32767
    assert handshake.mss_to_offer(1500, 1000) == 1000
    assert handshake.mss_to_offer(68, 32767) == handshake.MSS_MIN_BYTES


@given(st.integers(0, 70000), st.integers(0, 70000))
def test_the_prototype_reads_no_tiny_mss_from_our_option(mtu_bytes: int, cap_bytes: int) -> None:
    """It swaps the bytes and understands anything from 1536 on as "no limit" (OBSERVED 3)."""
    mss_bytes = handshake.mss_to_offer(mtu_bytes, cap_bytes)
    assert handshake.MSS_MIN_BYTES <= mss_bytes <= 32767
    assert (mss_bytes & 0xFF) << 8 | mss_bytes >> 8 >= 1536


def test_an_mss_whose_low_byte_is_small_is_offered_a_little_smaller() -> None:
    offers = [handshake.mss_to_offer(1500, mss_bytes) for mss_bytes in (1279, 1280, 1285, 1286)]
    assert offers == [1279, 1279, 1279, 1286]


def test_timestamps_are_even_and_never_go_back() -> None:
    flow = Flow(FlowID(1), SERVICE_ID, Random(5).getrandbits(192), 0.0)
    values = [handshake.timestamp_value(flow, 1000 + n / 3000) for n in range(3000)]
    assert all(value % 2 == 0 for value in values)
    assert values == sorted(values)
    assert values[-1] - values[0] == pytest.approx(1000, abs=2)


def test_timestamps_wrap_around() -> None:
    flow = Flow(FlowID(1), SERVICE_ID, 0, 0.0)
    flow.timestamp_offset = 0xFFFFFFFE
    assert handshake.timestamp_value(flow, 0.004) == 2


def test_we_offer_everything_in_a_syn() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    host.connect()
    segment = host.only_packet().segment
    assert segment is not None
    assert (segment.flags, segment.window, segment.acknowledgement) == (0x02, 65535, 0)
    assert (segment.source_port, segment.destination_port, segment.payload) == (0, 0, b"")
    options = segment.options
    assert (options.mss, options.window_scale, options.sack_permitted) == (1448, 10, True)
    assert options.timestamp is not None
    assert options.timestamp[1] == 0
    assert options.capabilities == 0


def test_settings_take_offers_away() -> None:
    host = LoneHost(SalSettings(sack=False, timestamps=False, window_scale=3, mss_cap=1000))
    host.forward(REMOTE)
    host.connect()
    segment = host.only_packet().segment
    assert segment is not None
    assert segment.options == TcpOptions(1000, 3, False, None, 0)


@pytest.mark.parametrize(
    "offered",
    [
        PROTOTYPE_OPTIONS,
        OUR_OPTIONS,
        TcpOptions(),
        TcpOptions(mss=1460),
        TcpOptions(mss=1460, window_scale=7, sack_permitted=True),
        TcpOptions(mss=1460, timestamp=(5, 0)),
    ],
)
def test_a_syn_ack_answers_only_what_the_syn_offered(offered: TcpOptions) -> None:
    host, peer = LoneHost(), Peer(options=offered)
    host.listen()
    host.receive(peer.syn())
    segment = host.only_packet().segment
    assert segment is not None
    assert (segment.flags, segment.window) == (0x12, 65535)
    assert segment.acknowledgement == peer.initial_sequence + 1
    answer = segment.options
    assert answer.mss == 1448
    assert (answer.window_scale is None) == (offered.window_scale is None)
    assert answer.sack_permitted == offered.sack_permitted
    assert (answer.timestamp is None) == (offered.timestamp is None)
    if answer.timestamp and offered.timestamp:
        assert answer.timestamp[1] == offered.timestamp[0]
    assert answer.capabilities == offered.capabilities


def test_active_parameters_towards_our_own_stack() -> None:
    peer = Peer(options=OUR_OPTIONS, window=65535)
    host, peer, _ = connected_host(peer=peer)
    transport = opened(host)
    parameters = transport.parameters
    assert transport.peer_is_ours
    assert parameters.send_next == peer.host_sequence + 1 & 0xFFFFFFFF
    assert parameters.receive_next == peer.initial_sequence + 1
    assert parameters.mss_bytes == 1440, "there is room for UDP, should the flow come to a path that passes nothing else"
    assert (parameters.send_window_scale, parameters.receive_window_scale) == (10, 10)
    assert parameters.sack
    assert parameters.timestamp is not None
    assert parameters.timestamp % 2 == 0
    assert parameters.send_window_bytes == 5792  # of the SYN-ACK, which is never scaled
    assert parameters.receive_window_bytes == 65535


def test_passive_parameters_towards_a_prototype() -> None:
    host, _peer, _ = accepted_host(peer=Peer(options=PROTOTYPE_OPTIONS))
    transport = opened(host)
    parameters = transport.parameters
    assert not transport.peer_is_ours
    assert (parameters.send_window_scale, parameters.receive_window_scale) == (1, 10)
    assert not parameters.sack
    assert parameters.timestamp is None
    assert parameters.send_window_bytes == 2896 << 1


@pytest.mark.parametrize(
    ("option", "mss_bytes"), [(None, 524), (536, 536), (1460, 1448), (9000, 1448), (0, 88), (10, 88)]
)
def test_the_send_mss_is_the_least_of_peer_and_path(option: int | None, mss_bytes: int) -> None:
    host, _, _ = accepted_host(peer=Peer(options=TcpOptions(mss=option)))
    assert opened(host).parameters.mss_bytes == mss_bytes


def test_without_window_scale_neither_side_scales() -> None:
    host, _, _ = accepted_host(peer=Peer(options=TcpOptions(mss=1448)))
    parameters = opened(host).parameters
    assert (parameters.send_window_scale, parameters.receive_window_scale) == (-1, -1)
    assert parameters.send_window_bytes == 2896
    host, _peer, _ = connected_host(peer=Peer(options=TcpOptions(mss=1448)))
    parameters = opened(host).parameters
    assert (parameters.send_window_scale, parameters.receive_window_scale) == (-1, -1)


def test_the_first_timestamp_of_the_transport_is_not_older_than_those_sent() -> None:
    host, peer = LoneHost(), Peer(options=OUR_OPTIONS)
    host.forward(REMOTE)
    host.connect()
    syn = host.only_packet()
    peer.learn(syn)
    host.now += 0.1
    host.receive(peer.syn_ack())
    ack = host.only_packet()
    assert syn.segment is not None
    assert ack.segment is not None
    sent = [each.options.timestamp for each in (syn.segment, ack.segment)]
    assert sent[0] is not None
    assert sent[1] is not None
    assert sent[1][1] == 77777776
    first = opened(host).parameters.timestamp
    assert first is not None
    assert first - sent[1][0] & 0xFFFFFFFF == 0
    assert first - sent[0][0] & 0xFFFFFFFF == 100


def test_the_handshake_ack_of_a_prototype_has_no_options() -> None:
    host, peer = LoneHost(), Peer(options=PROTOTYPE_OPTIONS)
    host.forward(REMOTE)
    host.connect()
    peer.learn(host.only_packet())
    host.receive(peer.syn_ack())
    segment = host.only_packet().segment
    assert segment is not None
    assert segment.options == TcpOptions()
    assert segment.window == 65535 >> 10


@pytest.mark.parametrize(
    "wrong",
    [{"connect_timeout_s": 0.0}, {"backlog": -1}, {"window_scale": 15}, {"syn_initial_timeout_s": -1.0}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(OurMistake, match=next(iter(wrong))):
        SalSettings(**wrong)  # type: ignore[arg-type]
