"""Which path is each live flow to take, now that the host has changed, or a while after? Policy; it moves nothing.

`decide` looks at every flow and names those that are to go elsewhere, best path first:

- A flow whose address, interface or route is gone moves at once, to the best path that is left. If its peer does not
  answer there within `try_path_s`, it tries the next one, each once; after that the SAL's own patience decides.
  Without any path it waits (`sal.path_lost`), and goes on when one appears.
- A flow that keeps sending and hears nothing tries another path as well, but keeps its own until the other one works.
  If there is no other one it asks its peer for a sign of life on its own, which also finds out where the peer is.
- A flow goes without need where the operator prefers it to be, or back to where it was before it had to leave: but only
  when that interface has been good for `return_after_s`, doubled each time that it failed soon after it came. A flow
  that an operator has placed leaves only out of need, and returns.

A path on which a peer did not answer is avoided for a while. Times are in seconds of the caller's clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import inf
from typing import NamedTuple

from serval_core.migration_states import OwnMove
from serval_core.mobility_settings import MobilitySettings
from serval_core.moves import LiveFlow
from serval_core.names import FlowID
from serval_core.path_choice import PathChoice
from serval_core.paths import Path, PathFinder
from serval_core.retransmission import backed_off_s

AVOID_S = 30.0  # doubles each time that the peer did not answer there
AVOID_MAX_S = 600.0
AVOIDED_LIMIT = 4096
FAILURES_FORGOTTEN_AFTER = 10  # times the wait that an interface was good for
STRANDED_RETRY_S = 10.0
ALIVE_S = 10.0  # how long an answer of the peer shows that small packets get through


class Decision(NamedTuple):
    """A flow is to take `path` from now on, or, if that is None, to wait for one. `why`: a clause."""

    flow_id: FlowID
    path: Path | None
    why: str


class _Place(NamedTuple):
    """Where a flow belongs: an interface, and the address that it had there."""

    interface_index: int
    address: int


class _Standing:
    """How reliable an interface is: since when it has been there, and how often it failed soon after it came."""

    __slots__ = ("failures", "since", "there")

    def __init__(self, since: float) -> None:
        self.there = True
        self.since = since
        self.failures = 0


class _Search:
    """A flow that has no path that works: the interfaces that it has tried, and since when the last one."""

    __slots__ = ("since", "tried")

    def __init__(self) -> None:
        self.tried: set[int] = set()
        self.since = -inf


class Mobility:
    """Decides for one stack. `settings` may be replaced at any time."""

    def __init__(self, settings: MobilitySettings, paths: PathFinder, choice: PathChoice) -> None:
        self.settings = settings
        self._paths = paths
        self._choice = choice
        self._standing = {each.index: _Standing(-inf) for each in paths.interfaces()}
        self._places = {(each.index, each.address) for each in paths.interfaces()}
        self._homes: dict[FlowID, _Place] = {}
        self._placed: set[FlowID] = set()
        self._searches: dict[FlowID, _Search] = {}
        self._answered_at: dict[FlowID, float] = {}
        self._avoided: dict[tuple[int, int], tuple[float, int]] = {}
        self._due = inf

    def __len__(self) -> int:
        """How many flows it remembers something about."""
        return len({*self._homes, *self._placed, *self._searches, *self._answered_at})

    # What happens.

    def host_changed(self, now: float) -> None:
        """Interfaces, addresses or routes are others."""
        present = {each.index for each in self._paths.interfaces()}
        for index, standing in self._standing.items():
            if standing.there and index not in present:
                standing.there = False
                if now - standing.since < FAILURES_FORGOTTEN_AFTER * self._wait_s(standing):
                    standing.failures += 1
                else:
                    standing.failures = 0
        for index in present:
            known = self._standing.get(index)
            if known is None:
                self._standing[index] = _Standing(now)
            elif not known.there:
                known.there, known.since = True, now
        # Notifications that change nothing for us must not make flows try for ever.
        places = {(each.index, each.address) for each in self._paths.interfaces()}
        if places != self._places:
            self._places = places
            for search in self._searches.values():
                search.tried.clear()
                search.since = -inf

    def placed(self, flow_ids: Iterable[FlowID]) -> None:
        """An operator, or whoever balances the load, sends these flows somewhere: they stay there."""
        for flow_id in flow_ids:
            self._placed.add(flow_id)
            self._homes.pop(flow_id, None)
            self._searches.pop(flow_id, None)

    def migrated(self, flow_id: FlowID, interface_index: int, now: float) -> None:
        """A flow has moved, so its peer has answered."""
        self._answered_at[flow_id] = now
        self._searches.pop(flow_id, None)
        home = self._homes.get(flow_id)
        if home is not None and home.interface_index == interface_index:
            del self._homes[flow_id]

    def failed(self, interface_index: int, peer_address: int, now: float) -> None:
        """A peer did not answer through an interface."""
        _, times = self._avoided.pop((interface_index, peer_address), (0.0, 0))
        if len(self._avoided) >= AVOIDED_LIMIT:
            del self._avoided[next(iter(self._avoided))]
        until = now + backed_off_s(AVOID_S, times, AVOID_MAX_S)
        self._avoided[interface_index, peer_address] = until, times + 1

    def keep_only(self, flow_ids: Collection[FlowID]) -> None:
        """Forget all other flows."""
        for memory in (self._homes, self._searches, self._answered_at):
            for flow_id in [each for each in memory if each not in flow_ids]:
                memory.pop(flow_id)
        self._placed.intersection_update(flow_ids)

    def works(self, interface_index: int, peer_address: int) -> None:
        """A peer did answer through an interface."""
        self._avoided.pop((interface_index, peer_address), None)

    # What follows.

    def decide(self, flows: Collection[LiveFlow], now: float) -> list[Decision]:
        """The flows that are to move now. `flows` are all there are; what was known of others is forgotten."""
        self._due = inf
        self.keep_only({each.flow_id for each in flows})
        if not self.settings.section.automatic:
            return []
        return [decision for flow in flows if (decision := self._decide(flow, now)) is not None]

    def is_alive(self, flow: LiveFlow, now: float) -> bool:
        """Whether the peer has answered on the flow's path a moment ago. If data gets no answer, its size may be why."""
        return flow.is_settled and now - self._answered_at.get(flow.flow_id, -inf) < ALIVE_S

    def silent(self, flow: LiveFlow, now: float) -> Decision | None:
        """A flow has sent for some time and heard nothing: the path that it may try instead, or its own."""
        if not self.settings.section.automatic or not flow.is_settled:
            return None
        self.failed(flow.interface_index, flow.peer_address, now)
        others = [
            path
            for path in self._candidates(flow, now)
            if path.interface_index != flow.interface_index and not self._is_avoided(path, flow.peer_address, now)
        ]
        if not others:
            if not flow.peer_is_ours or not self._exists(flow.local_address, flow.interface_index, flow.peer_address):
                return None
            return self._back(flow, "nothing comes back, and there is no other path")
        self._homes.setdefault(flow.flow_id, _Place(flow.interface_index, flow.local_address))
        return Decision(flow.flow_id, others[0], "nothing comes back on its path")

    def next_timeout(self) -> float | None:
        """When `decide` may have something else to say although nothing has happened."""
        return None if self._due == inf else self._due

    def _decide(self, flow: LiveFlow, now: float) -> Decision | None:
        works = self._exists(flow.local_address, flow.interface_index, flow.peer_address)
        goal = flow.goal
        if flow.migration is OwnMove.SETTLED:
            return self._by_wish(flow, now) if works else self._by_need(flow, now)
        if flow.migration is OwnMove.MOVING and goal is not None:
            if not self._exists(goal.source_address, goal.interface_index, flow.peer_address):
                return self._back(flow, "its goal is gone") if works else self._by_need(flow, now)
            if works:
                if self._searches.pop(flow.flow_id, None) is None:
                    return None
                return self._back(flow, "its path is there again")
            search = self._searches.setdefault(flow.flow_id, _Search())
            if search.since == -inf:
                search.since = now
            search.tried.add(goal.interface_index)
            return self._next_try(flow, search, self.settings.section.try_path_s, now)
        if works and flow.migration is OwnMove.RETURNING:
            return None
        search = self._searches.setdefault(flow.flow_id, _Search())
        if flow.migration is OwnMove.STRANDED and self._tried_all(flow, search, now):
            if now < search.since + STRANDED_RETRY_S:
                self._due = min(self._due, search.since + STRANDED_RETRY_S)
                return None
            search.tried.clear()
        return self._by_need(flow, now)

    def _back(self, flow: LiveFlow, why: str) -> Decision:
        """The flow is to stay on its path, whatever it has told its peer meanwhile."""
        path = self._paths.path_to(flow.peer_address, flow.interface_index)
        assert path is not None
        home = self._homes.get(flow.flow_id)
        if home is not None and home.interface_index == flow.interface_index:
            del self._homes[flow.flow_id]
        return Decision(flow.flow_id, path._replace(source_address=flow.local_address), why)

    def _by_need(self, flow: LiveFlow, now: float) -> Decision | None:
        """The flow has to leave where it is."""
        candidates = self._candidates(flow, now)
        home = _Place(flow.interface_index, flow.local_address)
        if not candidates:
            if flow.migration is OwnMove.STRANDED:
                return None
            self._homes.setdefault(flow.flow_id, home)
            return Decision(flow.flow_id, None, "no path is left")
        search = self._searches.setdefault(flow.flow_id, _Search())
        path = next((each for each in candidates if each.interface_index not in search.tried), candidates[0])
        search.tried.add(path.interface_index)
        search.since = now
        if path.interface_index != flow.interface_index:
            self._homes.setdefault(flow.flow_id, home)
        if len(candidates) > 1 or flow.migration is OwnMove.STRANDED:
            self._due = min(self._due, now + self.settings.section.try_path_s)
        return Decision(flow.flow_id, path, "its path is lost")

    def _next_try(self, flow: LiveFlow, search: _Search, wait_s: float, now: float) -> Decision | None:
        """The flow is under way to a path, and its peer may not be reached there."""
        left = [each for each in self._candidates(flow, now) if each.interface_index not in search.tried]
        if not left:
            return None
        if now < search.since + wait_s:
            self._due = min(self._due, search.since + wait_s)
            return None
        return self._by_need(flow, now)

    def _by_wish(self, flow: LiveFlow, now: float) -> Decision | None:
        """The flow could stay, but may be better off elsewhere."""
        settings = self.settings
        home = self._homes.get(flow.flow_id)
        if home is None and (not settings.ranks or flow.flow_id in self._placed):
            return None
        here = settings.rank(flow.service_id, self._name(flow.interface_index))
        for path in self._candidates(flow, now):
            index = path.interface_index
            if index == flow.interface_index:
                continue
            rank = settings.rank(flow.service_id, path.interface_name)
            is_home = home is not None and home.interface_index == index
            preferred = rank < here and flow.flow_id not in self._placed
            if not preferred and not (is_home and (rank == here or flow.flow_id in self._placed)):
                continue
            good_from = max(self._good_from(index), self._avoided.get((index, flow.peer_address), (-inf, 0))[0])
            if good_from > now:
                self._due = min(self._due, good_from)
                continue
            if is_home:
                return Decision(flow.flow_id, path, "the path that it had to leave is back")
            return Decision(flow.flow_id, path, f"{path.interface_name} is preferred")
        return None

    def _candidates(self, flow: LiveFlow, now: float) -> list[Path]:
        """Every path to the peer, the best one first. The host's own order decides last."""
        home = self._homes.get(flow.flow_id)

        def key(path: Path) -> tuple[object, ...]:
            avoided = self._is_avoided(path, flow.peer_address, now)
            is_home = home is not None and home.interface_index == path.interface_index
            return avoided, self.settings.rank(flow.service_id, path.interface_name), not is_home

        candidates = sorted(self._choice.candidates(flow.peer_address), key=key)
        if home is None:
            return candidates
        return [
            self._at_home(path, home) if path.interface_index == home.interface_index else path for path in candidates
        ]

    def _at_home(self, path: Path, home: _Place) -> Path:
        return path._replace(source_address=home.address) if self._paths.has_address(home.address) else path

    def _exists(self, address: int, interface_index: int, peer_address: int) -> bool:
        """Whether this host still has an address, and a path through an interface."""
        has_path = self._paths.path_to(peer_address, interface_index) is not None
        return has_path and self._paths.has_address(address)

    def _tried_all(self, flow: LiveFlow, search: _Search, now: float) -> bool:
        return all(each.interface_index in search.tried for each in self._candidates(flow, now))

    def _is_avoided(self, path: Path, peer_address: int, now: float) -> bool:
        return self._avoided.get((path.interface_index, peer_address), (-inf, 0))[0] > now

    def _good_from(self, interface_index: int) -> float:
        standing = self._standing[interface_index]
        return standing.since + self._wait_s(standing)

    def _wait_s(self, standing: _Standing) -> float:
        section = self.settings.section
        longest_s = max(section.return_after_max_s, section.return_after_s)
        return backed_off_s(section.return_after_s, standing.failures, longest_s)

    def _name(self, interface_index: int) -> str:
        return next((each.name for each in self._paths.interfaces() if each.index == interface_index), "")

