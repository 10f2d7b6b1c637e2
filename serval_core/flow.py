"""What is known about one flow? The records of the flow table; what happens to them is in other files.

Version numbers, sequence numbers and addresses are 32-bit integers in host order; times are seconds of
the caller's clock.
"""

from __future__ import annotations

from typing import NamedTuple

from serval_core.control_authentication import KeyPair, Proofs
from serval_core.delay_queue import Parked
from serval_core.framing import Framing
from serval_core.moves import Moves
from serval_core.names import FlowID, ServiceID, ServicePrefix
from serval_core.states import State
from serval_core.timers import NO_TIMER
from serval_core.ways import Way
from serval_core.wire.ipv4 import OuterPorts
from serval_core.wire.sal import PROTOCOL_TCP
from serval_core.wire.tcp_segment import NO_OPTIONS


class Listener:
    """A service that is being listened on. `waiting` counts flows that the application has not taken.

    `protocol` is that of the flows, TCP or UDP.
    """

    __slots__ = ("backlog", "listener_id", "prefix", "protocol", "waiting")

    def __init__(self, listener_id: int, prefix: ServicePrefix, backlog: int, protocol: int) -> None:
        self.listener_id = listener_id
        self.prefix = prefix
        self.backlog = backlog
        self.protocol = protocol
        self.waiting = 0


class Traffic:
    """What a UDP flow has carried, in packets and bytes of IP. For TCP the data plane counts."""

    __slots__ = ("bytes_in", "bytes_out", "packets_in", "packets_out")

    def __init__(self) -> None:
        self.packets_out = 0
        self.bytes_out = 0
        self.packets_in = 0
        self.bytes_in = 0

    def counters(self) -> dict[str, int]:
        """The counters by name."""
        return {name: getattr(self, name) for name in self.__slots__}


class SynKey(NamedTuple):
    """What makes two SYNs copies of each other (SPEC 11.1, quirk 9)."""

    address: int
    flow_id: int
    nonce: bytes


class Search:
    """How far an active open has come in finding an instance that answers. Instances are addresses here.

    It asks them in rounds: `asked` are those of this round, `refused` those of them that do not have the
    service, and `out_of_reach` says that for another there is no path. `refusers` are instances that a
    service router chose in vain, `refusals` says how often it did.
    """

    __slots__ = (
        "asked",
        "broadcast",
        "out_of_reach",
        "parked",
        "refusals",
        "refused",
        "refusers",
        "rounds",
        "sent_at",
    )

    def __init__(self) -> None:
        self.rounds = 0
        self.asked: set[int] = set()
        self.refused: set[int] = set()
        self.out_of_reach = False
        self.broadcast = False
        self.sent_at: float | None = None
        self.refusers: set[int] = set()
        self.refusals = 0
        self.parked: Parked | None = None

    def next_round(self) -> None:
        """Every instance may be asked again."""
        self.rounds += 1
        self.asked.clear()
        self.refused.clear()
        self.out_of_reach = False


class Flow:
    """One connection, from the first SYN until the flow table forgets it."""

    __slots__ = (
        "advisory_address",
        "errno",
        "failure",
        "fin_verno",
        "first_sent_at",
        "flow_id",
        "framing",
        "initial_sequence",
        "initial_verno",
        "interface_index",
        "keepalive_timer",
        "key_pair",
        "last_acknowledgement",
        "lifetime_timer",
        "listener",
        "local_address",
        "local_nonce",
        "moves",
        "mtu_bytes",
        "native_port",
        "offered_mss_bytes",
        "opened_at",
        "options",
        "outer_ports",
        "peer_address",
        "peer_flow_id",
        "peer_initial_sequence",
        "peer_nonce",
        "peer_window_bytes",
        "proofs",
        "protocol",
        "receive_next",
        "released",
        "retransmission_timer",
        "retransmissions",
        "search",
        "send_next",
        "send_unacknowledged",
        "service_id",
        "source_addresses",
        "state",
        "syn_key",
        "timeout_s",
        "timestamp_offset",
        "traffic",
        "unattended",
        "waits_in_backlog",
        "ways",
    )

    def __init__(self, flow_id: FlowID, service_id: ServiceID, secrets: int, now: float) -> None:
        """`secrets`: 192 random bits, from which nonce and initial numbers are taken."""
        self.flow_id = flow_id
        self.service_id = service_id
        self.protocol = PROTOCOL_TCP
        self.state = State.INIT
        self.traffic: Traffic | None = None
        self.opened_at = now

        # SAL (SPEC 3.2).
        self.local_nonce = (secrets & 0xFFFFFFFFFFFFFFFF or 1).to_bytes(8, "big")
        self.initial_verno = secrets >> 64 & 0xFFFFFFFF
        self.send_next = self.initial_verno + 1 & 0xFFFFFFFF
        self.send_unacknowledged = self.initial_verno
        self.receive_next = 0
        self.peer_flow_id = FlowID(0)
        self.peer_nonce = b""
        self.fin_verno: int | None = None
        self.last_acknowledgement = b""

        # Authentication of control packets. Our key, if the handshake agreed on it; the proofs, when it is over.
        self.key_pair: KeyPair | None = None
        self.proofs: Proofs | None = None

        # Where the two ends are.
        self.local_address = 0
        self.peer_address = 0
        self.interface_index = 0
        self.mtu_bytes = 0
        self.moves: Moves | None = None

        # The TCP handshake inside (SPEC 4.2). The timestamp clock starts anywhere, at an even number.
        self.initial_sequence = secrets >> 96 & 0xFFFFFFFF
        self.timestamp_offset = secrets >> 128 & 0xFFFFFFFE
        self.peer_initial_sequence = 0
        self.peer_window_bytes = 0
        self.offered_mss_bytes = 0
        self.options = NO_OPTIONS

        # How packets travel: what is wanted, our port for framing `native` (0: none), and the ports of the UDP
        # encapsulation that control packets go with at present.
        self.framing = Framing.SAL
        self.native_port = 0
        self.outer_ports: OuterPorts | None = None
        self.keepalive_timer = NO_TIMER

        # The control packet that waits for its acknowledgement, and how long things may take.
        self.first_sent_at = now
        self.retransmissions = 0
        self.timeout_s = 0.0
        self.retransmission_timer = NO_TIMER
        self.lifetime_timer = NO_TIMER

        # What the application did, and what it is told in the end.
        self.released = False
        self.unattended = False
        self.errno = 0
        self.failure = ""

        # Active open: where the SYN goes (`advisory` 0: as the service table says).
        self.advisory_address = 0
        self.ways: tuple[Way, ...] = ()
        self.search: Search | None = None

        # Passive open.
        self.listener: Listener | None = None
        self.waits_in_backlog = False
        self.syn_key: SynKey | None = None
        self.source_addresses: tuple[int, ...] = ()


class TimeWait(NamedTuple):
    """All that is left of a closed flow: what it takes to acknowledge a repeated FIN once more."""

    peer_nonce: bytes
    acknowledgement: bytes  # the IPv4 packet to answer with
    destination: int
    interface_index: int
    proofs: Proofs | None
