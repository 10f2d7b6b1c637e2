"""What do a service router's fast paths know of the service table? `Router` keeps them in line with it while forwarding is on.

Two of them do ahead of the SAL what `forwarding` would: a BPF program on the ingress of the interfaces (`router_programs`), and
the receive loop of the raw socket (`forward_batch`) for what reaches user space all the same. Both act on plans
(`forwarding_plan`) only; where there is none, packets reach the SAL. What they forward is counted in the table, a little later.
"""

from __future__ import annotations

from asyncio import TimerHandle
from collections.abc import Callable, Set
from pathlib import Path as FilePath
from typing import Protocol

import structlog

from serval_core.dataplane.forward_batch import BatchForwarder, Decision
from serval_core.dataplane.neighbours import Key
from serval_core.dataplane.next_hops import Link
from serval_core.dataplane.router_programs import PREFIXES_MAX, RouterPrograms, TargetCount
from serval_core.errors import KernelRefused
from serval_core.forwarding_plan import Plan, impossible_targets, plan
from serval_core.names import ServiceID, ServicePrefix
from serval_core.paths import Path, PathFinder
from serval_core.rules import Rule
from serval_core.service_table import ServiceTable

log = structlog.get_logger("serval_core.router")

RENEWAL_S = 1.0
STRICT_REVERSE_PATH = 1

CallLater = Callable[[float, Callable[[], None]], TimerHandle]


class Ingress(Protocol):
    """What a router needs of the data plane."""

    @property
    def paths(self) -> PathFinder:
        """The ways out of this host."""

    def forward_with(self, forwarder: BatchForwarder | None) -> None:
        """Give received packets to `forwarder` first."""

    on_link_change: Callable[[Key], None] | None

    def use_next_hop(self, key: Key) -> Link | None:
        """The MAC addresses for frames to a next hop, if known."""

    def release_next_hops(self) -> None:
        """Forget all that were used."""

    def attach_router(self, interface_indexes: Set[int], program_fd: int) -> None:
        """Have the program on exactly these interfaces."""


class Router:
    """The fast paths of one host. `start` and `stop` as often as one likes."""

    def __init__(self, table: ServiceTable, ingress: Ingress, call_later: CallLater, in_kernel: bool) -> None:
        """`in_kernel` false: without the BPF program."""
        self._table = table
        self._ingress = ingress
        self._call_later = call_later
        self._in_kernel = in_kernel
        self._programs: RouterPrograms | None = None
        self._complete = False  # the program knows the whole table
        self._plans: dict[ServicePrefix, Plan] = {}
        self._ways: dict[tuple[int, int], Path | None] = {}
        self._impossible: frozenset[int] = frozenset()
        self._decisions: dict[ServicePrefix, Decision] = {}
        self._forwarder = BatchForwarder(self._decide, frozenset())
        self._unsubscribe: Callable[[], None] | None = None
        self._timer: TimerHandle | None = None
        self._forwarded_in_kernel = 0

    def start(self) -> None:
        """Forward from now on. A kernel that refuses the program leaves the work to user space, and the log says so."""
        if self._unsubscribe is not None:
            return
        self._unsubscribe = self._table.on_change(self._rule_changed)
        if self._in_kernel:
            try:
                self._programs = RouterPrograms()
            except KernelRefused as error:
                log.warning("service routing stays in user space", error=str(error))
        self._ingress.on_link_change = self._link_changed
        self.host_changed()
        self._ingress.forward_with(self._forwarder)
        self._timer = self._call_later(RENEWAL_S, self._renew)

    def stop(self) -> None:
        """Forward no more, and leave no trace."""
        if self._unsubscribe is None or self._timer is None:
            return
        self._unsubscribe()
        self._unsubscribe = None
        self._timer.cancel()
        self._ingress.forward_with(None)
        self._ingress.on_link_change = None
        self._ingress.release_next_hops()
        self.take_counts()
        self._forget_decisions()
        self._plans.clear()
        self._ways.clear()
        self._complete = False
        if self._programs is not None:
            self._ingress.attach_router(frozenset(), self._programs.program_fd)
            self._programs.close()
            self._programs = None

    def host_changed(self) -> None:
        """Interfaces, addresses or routes have changed."""
        if self._unsubscribe is None:
            return
        paths = self._ingress.paths
        own = frozenset(each.address for each in paths.interfaces())
        impossible = impossible_targets(paths)
        moved = impossible != self._impossible or any(
            paths.path_to(*which) != way for which, way in self._ways.items()
        )
        self._impossible = impossible
        self._forget_decisions()
        self._forwarder.set_own_addresses(own)
        if self._programs is None:
            return
        # An interface that checks the reverse path strictly is left to user space: the program would let pass what that refuses.
        usable = {
            each.index
            for each in paths.interfaces()
            if _reverse_path_filter(each.name) != STRICT_REVERSE_PATH
        }
        self._ingress.attach_router(usable, self._programs.program_fd)
        self._programs.set_own_addresses(own)
        if moved or not self._complete:
            self._ways.clear()
            self._mirror_all()
        else:
            self._programs.extend_lease()

    def counters(self) -> dict[str, int]:
        """Packets that each fast path has forwarded, and what the kernel did not send on."""
        self.take_counts()
        return {
            "forwarded_in_kernel": self._forwarded_in_kernel,
            "forwarded_in_batches": self._forwarder.packets_forwarded,
            "forwarding_send_errors": self._forwarder.send_errors,
        }

    def _renew(self) -> None:
        """The loop is alive, so if the maps are right, the program may act on them for some time more."""
        self._timer = self._call_later(RENEWAL_S, self._renew)
        self.take_counts()
        if self._programs is None:
            return
        if self._complete:
            self._programs.extend_lease()
        else:
            self._mirror_all()

    def take_counts(self) -> None:
        """Count in the service table what was forwarded since the last call."""
        self._take_counts_of_decisions()
        if self._programs is not None:
            for count in self._programs.take_counts():
                self._count(count)

    # -- the receive loop ---------------------------------------------------------------------------------------------

    def _decide(self, service_id: bytes) -> Decision | None:
        entry = self._table.entry_for(ServiceID(service_id))
        if entry is None:
            return None
        known = self._decisions.get(entry.prefix)
        if known is not None:
            return known
        planned = plan(entry, self._impossible, self._ingress.paths)
        if not planned:
            return None
        links = [self._ingress.use_next_hop((each.interface_index, each.next_hop)) for each in planned]
        decision = self._decisions[entry.prefix] = Decision(entry.prefix, planned, links)
        return decision

    def _take_counts_of_decisions(self) -> None:
        for decision in self._decisions.values():
            for address, packets, packet_bytes in decision.take_counts():
                self._table.count_forwarded(decision.prefix, address, packets, packet_bytes)

    def _forget_decisions(self) -> None:
        self._take_counts_of_decisions()
        self._decisions.clear()
        self._forwarder.forget()

    # -- the program --------------------------------------------------------------------------------------------------

    def _rule_changed(self, kind: str, rule: Rule) -> None:
        self._forget_decisions()
        if self._complete and self._fits():
            self._mirror(rule.prefix)

    def _mirror_all(self) -> None:
        """Bring the whole map in line with the table. What does not fit leaves everything to user space."""
        assert self._programs is not None
        if not self._fits():
            return
        prefixes = self._table.prefixes()
        self._complete = True
        # Room first: what is gone, then what is there.
        for prefix in [*(self._plans.keys() - set(prefixes)), *prefixes]:
            if self._complete:
                self._mirror(prefix)
        if self._complete:
            self._programs.extend_lease()

    def _fits(self) -> bool:
        if len(self._table) > PREFIXES_MAX:
            self._give_up(f"the table has more than {PREFIXES_MAX} prefixes")
            return False
        return True

    def _give_up(self, why: str) -> None:
        """The program does not know the whole table: it must not forward by what it knows."""
        assert self._programs is not None
        if self._complete:
            log.warning("service routing falls back to user space", why=why)
        self._complete = False
        self._programs.end_lease()

    def _mirror(self, prefix: ServicePrefix) -> None:
        """Bring what the program knows of one prefix in line with the table."""
        programs = self._programs
        assert programs is not None
        entry = self._table.entry(prefix)
        before = self._plans.get(prefix)
        if entry is None:
            if before is not None:
                del self._plans[prefix]
                programs.delete(prefix)
                self._forget_targets(prefix, before, ())
            return
        planned = plan(entry, self._impossible, self._ingress.paths)
        for target in entry.targets():
            if target.address and not target.broadcast:
                which = target.address, target.interface_index
                self._ways[which] = self._ingress.paths.path_to(*which)
        if planned == before:
            return
        try:
            for each in planned:
                key = each.interface_index, each.next_hop
                programs.set_link(key, self._ingress.use_next_hop(key))
            programs.put(prefix, planned)
        except KernelRefused as error:
            self._give_up(str(error))
            return
        self._plans[prefix] = planned
        self._forget_targets(prefix, before or (), planned)

    def _link_changed(self, key: Key) -> None:
        self._forget_decisions()
        if self._programs is not None:
            self._programs.set_link(key, self._ingress.use_next_hop(key))

    def _forget_targets(self, prefix: ServicePrefix, before: Plan, after: Plan) -> None:
        assert self._programs is not None
        for address in {each.address for each in before} - {each.address for each in after}:
            count = self._programs.forget_target(prefix, address)
            if count is not None:
                self._count(count)

    def _count(self, count: TargetCount) -> None:
        self._forwarded_in_kernel += count.packets
        self._table.count_forwarded(*count)


def _reverse_path_filter(interface: str) -> int:
    """The effective rp_filter: the larger one of `all` and the interface's."""
    settings = (
        FilePath(f"/proc/sys/net/ipv4/conf/{name}/rp_filter") for name in ("all", interface.replace(".", "/"))
    )
    return max((int(each.read_text()) for each in settings if each.exists()), default=0)
