"""Does the estimator give the timeouts of SPEC 3.3, and do the timers call back when they should?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.retransmission import (
    DESTINATIONS_LIMIT,
    TIMEOUT_MAX_S,
    TIMEOUT_MIN_S,
    RoundTripEstimator,
    RoundTrips,
    backed_off_s,
)
from serval_core.timers import Timers


class IntegerEstimator:
    """SPEC 3.3 with the scaled integers it is written in, microseconds: srtt is 8 times, mdev 4 times."""

    def __init__(self, sample: int) -> None:
        self.srtt, self.mdev = 8 * sample, 2 * sample
        self.rttvar = max(self.mdev, 200_000)

    def sample(self, sample: int) -> None:
        error = sample - self.srtt // 8
        self.srtt += error
        growth = abs(error) - self.mdev // 4
        if error < 0 < growth:
            growth //= 8
        self.mdev += growth
        peak = max(self.mdev, 200_000)
        self.rttvar = peak if peak > self.rttvar else self.rttvar - (self.rttvar - peak) // 4

    @property
    def timeout_s(self) -> float:
        return min((self.srtt // 8 + self.rttvar) / 1e6, TIMEOUT_MAX_S)


def test_the_first_sample_is_the_round_trip_and_half_of_it_the_deviation() -> None:
    assert RoundTripEstimator(0.001).timeout_s == pytest.approx(0.201)
    assert RoundTripEstimator(1.0).timeout_s == pytest.approx(3.0)


@given(st.lists(st.integers(1, 5_000_000), min_size=1, max_size=40))
def test_it_agrees_with_the_integer_arithmetic_of_the_specification(samples_us: list[int]) -> None:
    estimator = RoundTripEstimator(samples_us[0] / 1e6)
    oracle = IntegerEstimator(samples_us[0])
    for sample_us in samples_us[1:]:
        estimator.sample(sample_us / 1e6)
        oracle.sample(sample_us)
    assert estimator.timeout_s == pytest.approx(oracle.timeout_s, abs=1e-3)


def test_a_steady_round_trip_comes_down_to_the_smallest_margin() -> None:
    estimator = RoundTripEstimator(2.0)
    for _ in range(200):
        estimator.sample(0.05)
    assert estimator.timeout_s == pytest.approx(0.05 + TIMEOUT_MIN_S, abs=1e-3)


def test_the_timeout_has_a_ceiling() -> None:
    assert RoundTripEstimator(500.0).timeout_s == TIMEOUT_MAX_S


def test_unknown_destinations_have_the_timeout_that_the_caller_gives() -> None:
    round_trips = RoundTrips()
    assert round_trips.timeout_s(1, 0.7) == 0.7
    assert round_trips.smoothed_s(1) is None
    round_trips.sample(1, 0.1)
    assert round_trips.timeout_s(1, 0.7) == pytest.approx(0.3)
    assert round_trips.timeout_s(2, 0.7) == 0.7
    assert round_trips.smoothed_s(1) == pytest.approx(0.1)


def test_the_memory_of_destinations_is_bounded() -> None:
    round_trips = RoundTrips()
    for address in range(DESTINATIONS_LIMIT + 10):
        round_trips.sample(address, 0.1)
        round_trips.sample(address, 0.2)
    assert len(round_trips) == DESTINATIONS_LIMIT
    assert round_trips.smoothed_s(9) is None
    assert round_trips.smoothed_s(10) is not None


def test_waits_double_up_to_the_longest() -> None:
    assert [backed_off_s(3.0, n) for n in range(8)] == [3, 6, 12, 24, 48, 96, 120, 120]  # SPEC 3.3
    assert [backed_off_s(0.2, n, 3.0) for n in range(6)] == [0.2, 0.4, 0.8, 1.6, 3.0, 3.0]
    assert backed_off_s(0.2, 1000) == TIMEOUT_MAX_S


class Calls:
    """A timer's owner that notes when it was called."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def note(self, owner: str, now: float) -> None:
        self.at.append(now)


def test_timers_run_in_order_of_their_deadlines() -> None:
    timers = Timers()
    order: list[str] = []
    for deadline in (3.0, 1.0, 2.0, 4.0):
        timers.start(deadline, lambda owner, now: order.append(owner), f"at {deadline}")
    assert timers.next_deadline() == 1.0
    timers.run(3.0)
    assert order == ["at 1.0", "at 2.0", "at 3.0"]
    assert timers.next_deadline() == 4.0
    assert len(timers) == 1


def test_cancelled_timers_never_run_and_do_not_wake_anybody() -> None:
    timers = Timers()
    calls = Calls()
    handle = timers.start(1.0, calls.note, "cancelled")
    timers.start(2.0, calls.note, "kept")
    timers.cancel(handle)
    timers.cancel(handle)
    timers.cancel(0)
    assert timers.next_deadline() == 2.0
    timers.run(5.0)
    assert calls.at == [5.0]
    assert timers.next_deadline() is None


def test_a_callback_may_start_and_cancel_timers() -> None:
    timers = Timers()
    calls = Calls()
    victim = timers.start(1.5, calls.note, "victim")

    def first(owner: str, now: float) -> None:
        timers.cancel(victim)
        timers.start(1.2, calls.note, "already due")
        timers.start(9.0, calls.note, "later")

    timers.start(1.0, first, "first")
    timers.run(2.0)
    assert len(calls.at) == 1
    assert timers.next_deadline() == 9.0


def test_cancelled_timers_do_not_pile_up() -> None:
    timers = Timers()
    calls = Calls()
    kept = [timers.start(1e6 + n, calls.note, "kept") for n in range(10)]
    for n in range(10_000):
        timers.cancel(timers.start(60.0 + n, calls.note, "cancelled"))
    assert len(timers) == len(kept)
    assert len(timers._heap) < 1000
    assert timers.next_deadline() == 1e6
