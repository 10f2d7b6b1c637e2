"""Does the demonstration of services end well when all is well, and does it notice what is not?"""

from __future__ import annotations

import math
from collections import Counter

import pytest

from lab import demo_services, services
from lab.demo_services import Act, Crash, Seen, failures, judge_attempts
from lab.short_load import Attempt, chi_square

WEIGHTS = {"first": 2, "second": 1, "third": 1}


def test_it_ends_with_0_when_all_is_as_it_should_be(
    root: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"STEADY_S": 1.5, "AWAY_S": 0.3, "BACK_S": 0.0, "BULK_BYTES": 20 << 20}
    for name, value in small.items():
        monkeypatch.setattr(demo_services, name, value)
    monkeypatch.setattr(services, "REFRESH_S", 0.5)
    monkeypatch.setattr(services, "LIFETIME_S", 2.0)
    assert demo_services.main() == 0
    printed = capsys.readouterr().out
    assert "Everything was as it should be." in printed
    assert "chi-square" in printed
    assert printed.count("SYNs came to its host after that") == 2


def attempts(began: float, count: int, got: str) -> list[Attempt]:
    return [Attempt(began + number / 1000, 0.001, got, "") for number in range(count)]


def seen(*more: Attempt, shares: tuple[int, int, int] = (200, 100, 100), crashes: tuple[Crash, ...] = ()) -> Seen:
    """Connections in a steady act from 100 to 200, and `more`."""
    found = Seen(weights=WEIGHTS, acts=[Act("all", 100.0, 200.0, True)], crashes=list(crashes))
    for name, count in zip(WEIGHTS, shares, strict=True):
        found.attempts += attempts(101.0, count, name)
    found.attempts += more
    return found


def problems(found: Seen) -> list[str]:
    judge_attempts(found)
    return found.problems


def test_shares_that_fit_the_weights_are_no_problem() -> None:
    assert problems(seen()) == []


def test_shares_that_do_not_fit_are_a_problem() -> None:
    assert problems(seen(shares=(130, 135, 135))) == ["the instances' shares are not those of their weights"]


def test_a_connection_that_failed_is_a_problem() -> None:
    failed = Attempt(150.0, 0.2, "", "ECONNRESET")
    assert problems(seen(failed)) == ["a connection failed after 0.2 s: ECONNRESET (during: all)"]


CRASH = Crash("second", 150.0, 150.1, 7, 1.0)


@pytest.mark.parametrize(
    ("began", "took_s", "is_cut_off"),
    [(149.9, 0.2, True), (150.05, 0.2, True), (149.0, 0.5, False), (150.2, 0.1, False)],
    ids=["open", "before anybody knew", "failed before", "began later"],
)
def test_only_what_was_open_at_a_killed_instance_is_excused(
    began: float, took_s: float, is_cut_off: bool
) -> None:
    failed = Attempt(began, took_s, "", "ECONNRESET")
    found = seen(failed, crashes=(CRASH,))
    assert failures(found) == (([], [failed]) if is_cut_off else ([failed], []))
    assert (problems(found) == []) == is_cut_off


def test_more_cannot_be_cut_off_than_were_open() -> None:
    many = [Attempt(149.9, 0.2, "", "ECONNRESET")] * (demo_services.WORKERS + 1)
    (problem,) = problems(seen(*many, crashes=(CRASH,)))
    assert "were cut off, at most" in problem


def test_chi_square() -> None:
    """Against the definition; the tail for two degrees of freedom is exp(-x/2)."""
    statistic, probability = chi_square(Counter(first=210, second=100, third=90), WEIGHTS)
    assert statistic == pytest.approx(10**2 / 200 + 10**2 / 100)
    assert probability == pytest.approx(math.exp(-0.75))
