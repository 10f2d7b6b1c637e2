"""Through which interface does a new flow begin? By what the operator prefers, by cost, round-trip time or loss.

`PathChoice.of(service)` is a `paths.PathFinder` that answers for flows of that service. Whoever names an interface
gets it; loopback and what only one interface leads to leave nothing to choose. Unusable interfaces have no paths
(`dataplane.addresses`), so what is chosen from works as far as this host can see.

- route: what the host's routing table says, unless an interface is preferred or another one metered.
- cost: the cheapest; rtt: the fastest; loss: the one that loses least, and then the fastest. What has not been measured
  is tried first, since there is no other way to know. A path must be better by a quarter to win against the route.

Preferences and metered interfaces count more than measurements, and measurements more than the routing table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from serval_core.addresses import is_loopback
from serval_core.mobility_settings import MobilitySettings
from serval_core.names import ServiceID
from serval_core.path_quality import PathQuality
from serval_core.paths import Interface, Path, PathFinder

ADVANTAGE = 0.75  # what counts as better: three quarters of the round-trip time
LOSS_STEP = 0.01  # losses that differ by less are the same
_UNKNOWN = -1.0


class PathChoice:
    """Chooses for one stack. `settings` may be replaced at any time; `clock` is that of the measurements."""

    def __init__(
        self,
        settings: MobilitySettings,
        paths: PathFinder,
        quality: PathQuality,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._paths = paths
        self._quality = quality
        self._clock = clock

    def of(self, service_id: ServiceID) -> PathFinder:
        """Who finds the paths of new flows of a service."""
        return _OfService(self, service_id) if self.settings.ranks else self._paths

    def candidates(self, address: int) -> list[Path]:
        """Every path to an address, that of the routing table first."""
        default = self._paths.path_to(address)
        if default is None:
            return []
        interfaces = self._paths.interfaces()
        loopback = {each.index for each in interfaces if is_loopback(each.address)}
        if default.interface_index in loopback:
            return [default]
        others = (each.index for each in interfaces if each.index not in {default.interface_index, *loopback})
        paths = (self._paths.path_to(address, index) for index in others)
        return [default, *(path for path in paths if path is not None)]

    def best(self, service_id: ServiceID, address: int) -> Path | None:
        """The path on which a new flow to `address` begins; None: unreachable."""
        candidates = self.candidates(address)
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        settings, now = self.settings, self._clock()
        ranks = [settings.rank(service_id, each.interface_name) for each in candidates]
        best_rank = min(ranks)
        left = [path for path, rank in zip(candidates, ranks, strict=True) if rank == best_rank]
        choice = settings.choice(service_id)
        if len(left) == 1 or choice == "route":
            return left[0]
        if choice == "cost":
            return min(left, key=lambda path: settings.cost(path.interface_name))
        return min(left, key=lambda path: self._measure(choice, path, address, path is left[0], now))

    def _measure(
        self, choice: str, path: Path, address: int, is_route: bool, now: float
    ) -> tuple[float, float]:
        key = path.interface_index, address
        round_trip_s = self._quality.round_trip_s(key, now)
        loss = self._quality.loss(key, now)
        # A path whose packets are all lost has no round-trip time, and is not the one to try first.
        seconds = (_UNKNOWN if not loss else float("inf")) if round_trip_s is None else round_trip_s
        if is_route and seconds > 0:
            seconds *= ADVANTAGE
        if choice == "rtt":
            return seconds / (1 - min(loss or 0.0, 0.99)) if seconds > 0 else seconds, 0.0
        return _UNKNOWN if loss is None else loss // LOSS_STEP, seconds


class _OfService(PathFinder):
    """The paths for new flows of one service."""

    __slots__ = ("_choice", "_service_id")

    def __init__(self, choice: PathChoice, service_id: ServiceID) -> None:
        self._choice = choice
        self._service_id = service_id

    def path_to(self, address: int, interface_index: int = 0) -> Path | None:
        """See `paths.PathFinder`."""
        if interface_index:
            return self._choice._paths.path_to(address, interface_index)
        return self._choice.best(self._service_id, address)

    def has_address(self, address: int) -> bool:
        """See `paths.PathFinder`."""
        return self._choice._paths.has_address(address)

    def interfaces(self) -> Sequence[Interface]:
        """See `paths.PathFinder`."""
        return self._choice._paths.interfaces()
