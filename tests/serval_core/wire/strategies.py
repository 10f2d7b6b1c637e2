"""What can stand in a packet? Hypothesis strategies for fields and for whole headers."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from serval_core.names import ServiceID
from serval_core.wire.sal import Control, SalPacket
from serval_core.wire.tcp_segment import TcpOptions, TcpSegment

octets = st.integers(0, 0xFF)
words = st.integers(0, 0xFFFF)
words32 = addresses = st.integers(0, 0xFFFFFFFF)
nonces = st.binary(min_size=8, max_size=8)
service_ids = st.binary(min_size=32, max_size=32).map(ServiceID)
controls = st.builds(Control, st.integers(0, 63).map(lambda bits: bits << 2), words32, words32, nonces)
keys = st.just(b"") | st.binary(min_size=32, max_size=32)
proofs = st.just(b"") | st.binary(min_size=16, max_size=16)
source_addresses = st.just(()) | st.lists(words32, min_size=2, max_size=20).map(tuple)


def sal_packets(
    protocols: SearchStrategy[int], transports: SearchStrategy[bytes]
) -> SearchStrategy[SalPacket]:
    """SAL packets with any extensions that may stand together."""
    return st.builds(
        SalPacket,
        src_flow_id=words32,
        dst_flow_id=words32,
        protocol=protocols,
        control=st.none() | controls,
        services=st.lists(service_ids, max_size=2).map(tuple),
        source_addresses=source_addresses,
        transport=transports,
        key=keys,
        proof=proofs,
    )


NO_PORT = st.just(0)


def tcp_options(
    capabilities: SearchStrategy[int | None], native_port: SearchStrategy[int] = NO_PORT
) -> SearchStrategy[TcpOptions]:
    """Any set of TCP options; the last two are in our own one."""
    return st.builds(
        TcpOptions,
        mss=st.none() | words,
        window_scale=st.none() | st.integers(0, 14),
        sack_permitted=st.booleans(),
        timestamp=st.none() | st.tuples(words32, words32),
        capabilities=capabilities,
        native_port=native_port,
    )


def segments(options: SearchStrategy[TcpOptions], payload_bytes: int = 60) -> SearchStrategy[TcpSegment]:
    """TCP segments with up to that many bytes of payload."""
    return st.builds(
        TcpSegment,
        source_port=words,
        destination_port=words,
        sequence=words32,
        acknowledgement=words32,
        flags=octets,
        window=words,
        urgent=words,
        options=options,
        payload=st.binary(max_size=payload_bytes),
    )
