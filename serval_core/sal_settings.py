"""What can be chosen about the service access layer? Its settings, the defaults, and their sources."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum

from serval_core.errors import OurMistake
from serval_core.framing import Framing, ServiceFraming
from serval_core.wire.tcp_segment import MAX_WINDOW_SCALE


class Authenticate(StrEnum):
    """Whether control packets of streams carry proofs (`control_authentication`). OFFER: if the peer has them, too."""

    OFF = "off"
    OFFER = "offer"
    REQUIRE = "require"


@dataclass(frozen=True, slots=True, kw_only=True)
class SalSettings:
    """Times in seconds, sizes in bytes, counts as counts.

    The prototype waits 3 s before it repeats a SYN (SPEC 3.3). We begin earlier, which is harmless to it: it
    answers a repeated SYN with the same SYN-ACK. OurMistake when a value makes no sense.
    """

    syn_initial_timeout_s: float = 0.2  # towards a destination whose round-trip time is unknown
    syn_timeout_max_s: float = 3.0
    connect_timeout_s: float = 10.0
    target_silences: int = 2  # unanswered SYNs in a row after which a target counts as down (`liveness`)
    target_down_s: float = 2.0  # doubles as long as the target does not answer in between
    target_down_max_s: float = 30.0
    # Answer SYNs for services that nobody here listens on, so that clients of ours ask another instance at once.
    # Without, they ask again for as long as they wait, and so get over the restart of an only instance.
    refuse_unknown_services: bool = False
    delay_limit: int = 1024  # parked by DELAY rules, of the whole stack (SPEC 6.8)
    delay_timeout_s: float = 5.0
    synack_timeout_s: float = 0.3  # doubles; how often it is repeated follows from request_expiry_s
    request_expiry_s: float = 3.0  # SPEC 3.6
    request_queue_limit: int = 1024  # half-open flows of the whole stack
    backlog: int = 1024  # accepted flows that the application has not taken, per listener

    control_initial_timeout_s: float = 1.0  # FIN to a peer whose round-trip time is unknown (RFC 6298)
    control_timeout_max_s: float = 120.0
    control_retransmissions: int = 15
    released_retransmissions: int = 8  # nobody waits for the outcome any more
    # RSYN and RSYN-ACK. A move that fails is taken back, which is tried less often: the old path is known to work,
    # or not to. A flow without a path that works ends after `no_path_wait_s`.
    migration_initial_timeout_s: float = 0.5
    migration_timeout_max_s: float = 3.0
    migration_retransmissions: int = 15
    return_retransmissions: int = 5
    rendezvous_after: int = 2  # unanswered RSYNs after which the peer is looked for elsewhere too (`rendezvous`)
    no_path_wait_s: float = 90.0  # less than the kernel's TCP waits (DataPlaneSettings.peer_timeout_s)
    authenticate: Authenticate = Authenticate.OFF
    version_gap_limit: int = 256  # how far a version number may run ahead (SPEC 11.1, quirk 7)

    # Released, but the peer's TCP has not acknowledged our last bytes. A peer may read slowly, and one that is
    # gone makes the kernel's TCP give up much sooner: this only bounds what a broken data plane can hold.
    release_timeout_s: float = 3600.0
    fin_wait2_s: float = 60.0  # SPEC 3.8
    time_wait_s: float = 60.0
    time_wait_limit: int = 65536  # the oldest goes first

    framing: Framing = Framing.AUTO
    nat_keepalive_s: float = 20.0
    native_half_open_limit: int = 128  # with so many half-open flows no more ports are spent on framing `native`
    service_framings: tuple[ServiceFraming, ...] = ()  # exceptions

    forwarding: bool = False  # act as a service router (SPEC 6.5)

    window_scale: int = 10
    receive_window_bytes: int = 65535
    sack: bool = True
    timestamps: bool = True
    mss_cap: int = 32767

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and (value < 0 or (field.name.endswith("_s") and value == 0)):
                raise OurMistake(f"{field.name} cannot be {value}")
        if self.window_scale > MAX_WINDOW_SCALE:
            raise OurMistake(f"window_scale is at most {MAX_WINDOW_SCALE}, not {self.window_scale}")
