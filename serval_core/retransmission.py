"""How long do we wait for an answer before we say it again?

The estimator of SPEC 3.3 (Jacobson and Karn, with the refinements of Linux), and a bounded memory of
estimates per destination, so that the first SYN to a known host already waits the right time. All times are
seconds.
"""

from __future__ import annotations

TIMEOUT_MIN_S = 0.2
TIMEOUT_MAX_S = 120.0
DESTINATIONS_LIMIT = 4096


class RoundTripEstimator:
    """Smoothed round-trip time and the timeout that follows from it.

    Feed it only with packets that were sent once (Karn): the answer to a repeated one may belong to any of
    its copies.
    """

    __slots__ = ("_deviation_s", "_margin_s", "smoothed_s")

    def __init__(self, first_sample_s: float) -> None:
        self.smoothed_s = first_sample_s
        self._deviation_s = first_sample_s / 2
        self._margin_s = max(4 * self._deviation_s, TIMEOUT_MIN_S)

    def sample(self, round_trip_s: float) -> None:
        """Take one more measurement into account."""
        error_s = round_trip_s - self.smoothed_s
        self.smoothed_s += error_s / 8
        growth_s = abs(error_s) - self._deviation_s
        # A round trip that is much shorter says nothing about the next one being late: it counts an eighth of
        # what it otherwise would, or a faster path would lengthen the timeout.
        self._deviation_s += growth_s / 32 if error_s < 0 < growth_s else growth_s / 4
        # The margin follows a growing deviation at once and comes down slowly.
        wanted_s = max(4 * self._deviation_s, TIMEOUT_MIN_S)
        shrinkage_s = max(self._margin_s - wanted_s, 0) * 3 / 4
        self._margin_s = wanted_s + shrinkage_s

    @property
    def timeout_s(self) -> float:
        """How long to wait for an answer to the first copy of a packet."""
        return min(self.smoothed_s + self._margin_s, TIMEOUT_MAX_S)


class RoundTrips:
    """What we know about the round-trip times to hosts: the last DESTINATIONS_LIMIT that became known."""

    __slots__ = ("_estimators",)

    def __init__(self) -> None:
        self._estimators: dict[int, RoundTripEstimator] = {}

    def __len__(self) -> int:
        return len(self._estimators)

    def sample(self, address: int, round_trip_s: float) -> None:
        """A packet to `address` that was sent once has been answered after `round_trip_s`."""
        estimator = self._estimators.get(address)
        if estimator is not None:
            estimator.sample(round_trip_s)
            return
        if len(self._estimators) >= DESTINATIONS_LIMIT:
            del self._estimators[next(iter(self._estimators))]
        self._estimators[address] = RoundTripEstimator(round_trip_s)

    def timeout_s(self, address: int, unknown_s: float) -> float:
        """How long to wait for an answer from `address`; `unknown_s` when nothing is known about it."""
        estimator = self._estimators.get(address)
        return unknown_s if estimator is None else estimator.timeout_s

    def smoothed_s(self, address: int) -> float | None:
        """The smoothed round-trip time to `address`, None when it was never measured."""
        estimator = self._estimators.get(address)
        return None if estimator is None else estimator.smoothed_s


def backed_off_s(timeout_s: float, retransmissions: int, longest_s: float = TIMEOUT_MAX_S) -> float:
    """The wait after the given number of retransmissions: doubled each time, at most `longest_s`."""
    # Shifting by more than 60 would only make numbers that no clock shows.
    return min(timeout_s * (1 << min(retransmissions, 60)), longest_s)
