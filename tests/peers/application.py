"""What does the program on top of a prototype flow do, and what does it tell about it afterwards?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

CloseWhen = Literal["end_of_stream", "sent", "acknowledged", "received"]

COMPLAINTS = (
    "oversize_packets",
    "malformed_packets",
    "wrong_sal_checksums",
    "wrong_transport_checksums",
    "wrong_nonces",
    "tcp_resets",
    "bytes_beyond_window",
)
"""Counters that a correct peer on a wire that damages nothing leaves at 0."""


@dataclass(frozen=True)
class Behaviour:
    """What the program does with a connection.

    It writes `send` at once and, with `echo`, whatever it receives. It closes both directions (the prototype
    has no half-close) at the peer's end of stream; or earlier: when everything was written ("sent"), when the
    peer has acknowledged it ("acknowledged"), when moreover `expected_bytes` have arrived ("received"). After
    `stop_reading_at` bytes it reads no more, and closes when more have come, which resets the flow. It migrates to
    each address of `migrations`, one after the other, when so many bytes have gone to and fro.
    """

    send: bytes = b""
    echo: bool = False
    close_when: CloseWhen = "end_of_stream"
    expected_bytes: int = 0
    stop_reading_at: int | None = None
    migrations: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class FlowResult:
    """What became of a flow. `error` is the name of the errno that the program would have seen, "" for none.

    `end_of_stream`: whether the peer's SAL FIN came. `received_sha256` is in hex.
    """

    flow_id: int
    peer_flow_id: int
    peer_address: str
    state: str
    error: str
    sent_bytes: int
    received_bytes: int
    received_sha256: str
    end_of_stream: bool
    connect_s: float
    counters: dict[str, int]


@dataclass(frozen=True)
class PeerResult:
    """What a peer saw. `counters` are those of its wire, `log` has a line for every packet either way.

    `timed_out`: it stopped because its time was over, not because its flows had ended.
    """

    flows: list[FlowResult]
    counters: dict[str, int]
    timed_out: bool
    log: list[str] = field(repr=False)

    @property
    def complaints(self) -> dict[str, int]:
        """What the other side did wrong, by counter; empty when there is nothing to complain about."""
        found: dict[str, int] = {}
        for counters in (self.counters, *(flow.counters for flow in self.flows)):
            for name in COMPLAINTS:
                if counters.get(name, 0):
                    found[name] = found.get(name, 0) + counters[name]
        return found
