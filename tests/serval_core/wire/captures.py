"""What did the prototype send? The IP packets of the captures, and what is special about a few of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scapy.utils import RawPcapReader

DIRECTORY = Path(__file__).parents[2] / "captures"
_LINK_HEADER_BYTES = {1: 14, 276: 20}  # Ethernet, Linux cooked v2
_SAL_PROTOCOL = 144


class Capture(NamedTuple):
    """A file, and how many of its protocol-144 packets are there in whole and cut by the snap length."""

    name: str
    whole: int
    cut: int

    def packets(self) -> Iterator[bytes]:
        """The IP packets of protocol 144, as long as they were stored, without link-layer padding."""
        with RawPcapReader(str(DIRECTORY / self.name)) as reader:
            skipped = _LINK_HEADER_BYTES[reader.linktype]
            for frame, _ in reader:
                packet = frame[skipped:]
                if packet[0] >> 4 == 4 and packet[9] == _SAL_PROTOCOL:
                    yield packet[: int.from_bytes(packet[2:4], "big")]


CAPTURES = (
    Capture("01_first_tcp.pcap", 13, 0),
    Capture("02_tcp_data_100k.pcap", 45, 71),
    Capture("03_tcp_loss2pct_100k.pcap", 315, 435),
    Capture("04_tcp_loss15pct_small.pcap", 173, 0),
    Capture("05_tcp_noservice_syn_rexmit.pcap", 29, 0),
    Capture("06_udp_connected.pcap", 13, 0),
    Capture("07_udp_unconnected.pcap", 6, 0),
    Capture("08_tcp_client_killed_rst_control.pcap", 4, 0),
    Capture("09_tcp_server_killed_control.pcap", 7, 0),
    Capture("10_mig_tcp_client_side_control.pcap", 13, 0),
    Capture("10_mig_tcp_server_side_control.pcap", 9, 0),
    Capture("11_mig_udp_a.pcap", 16, 0),
    Capture("13_servd_a.pcap", 52, 0),
    Capture("13_servd_b.pcap", 48, 0),
    Capture("13_servd_c.pcap", 21, 0),
    Capture("14_probe_control.pcap", 51, 0),
    Capture("15_probe_client.pcap", 74, 0),
)

# Hand-made packets by which the prototype was probed: their IP identifications in 14_probe_control.pcap.
PROBE_WITH_WRONG_SAL_CHECKSUM = 0x195F
PROBE_WITH_WRONG_TCP_CHECKSUM = 0x19EF
PROBE_WITH_PADDING = 0x1DAC


def is_whole(packet: bytes) -> bool:
    """Whether all of the packet was stored."""
    return int.from_bytes(packet[2:4], "big") == len(packet)


def without_identification(packet: bytes) -> bytes:
    """The kernel fills the identification in, and with it the checksum of the IP header: both are zero then."""
    return packet[:4] + bytes(2) + packet[6:10] + bytes(2) + packet[12:]
