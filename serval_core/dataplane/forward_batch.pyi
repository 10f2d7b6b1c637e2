from collections.abc import Callable, Sequence, Set

from serval_core.dataplane.next_hops import Link
from serval_core.forwarding_plan import Plan
from serval_core.names import ServicePrefix

HEADROOM_BYTES: int

class Decision:
    prefix: ServicePrefix
    def __init__(self, prefix: ServicePrefix, plan: Plan, links: Sequence[Link | None]) -> None: ...
    def take_counts(self) -> list[tuple[int, int, int]]: ...

class BatchForwarder:
    packets_forwarded: int
    send_errors: int
    def __init__(self, decide: Callable[[bytes], Decision | None], own: Set[int]) -> None: ...
    def set_own_addresses(self, own: Set[int]) -> None: ...
    def forget(self) -> None: ...
    def forwarded(self, packet: bytes) -> tuple[bytes, int, int] | None: ...
