"""Which measurements join those of the contenders, and is one that fails told without spoiling the others?"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from rich.console import Console

from bench import __main__ as bench_main
from bench.__main__ import Finding, Other, Progress, left_out, measure_others


class Answer(NamedTuple):
    """A finding."""

    value: int

    def sentence(self) -> str:
        """In one line."""
        return f"it is {self.value}"


def broken(progress: Progress) -> Finding:
    """A measurement that fails."""
    raise RuntimeError("it broke")


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = (
        Other("first", "one that breaks", full=broken, quick=broken),
        Other("second", "one that works", full=lambda progress: Answer(2), quick=lambda progress: Answer(1)),
        Other("third", "a long one", full=lambda progress: Answer(3), quick=None),
    )
    monkeypatch.setattr(bench_main, "OTHERS", chosen)


@pytest.mark.parametrize(
    ("quick", "expected"), [(True, {"second": Answer(1)}), (False, {"second": Answer(2), "third": Answer(3)})]
)
def test_what_fails_is_told_and_the_rest_is_measured(
    others: None, quick: bool, expected: dict[str, Finding]
) -> None:
    failures: list[str] = []
    assert measure_others(quick, Console(quiet=True), failures) == expected
    assert failures == ["one that breaks: it broke"]


def test_a_quick_run_says_what_it_left_out(others: None) -> None:
    assert left_out() == ["a long one", "single hops and framings native and udp, except in throughput unshaped"]
