"""How is a number read that somebody has typed? Out of range, it is refused with the nearest one that is possible."""

from __future__ import annotations

import math
from typing import Any

import rich_click as click


class Whole(click.IntRange):
    """A whole number within a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            self.fail(f"{value!r} is no whole number", param, ctx)
        return int(_within(self, number, param, ctx))


class Real(click.FloatRange):
    """A number within a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return float(_within(self, number, param, ctx))


def _within(
    kind: click.IntRange | click.FloatRange, number: float, param: click.Parameter | None, ctx: click.Context | None
) -> float:
    low, high = kind.min, kind.max
    allowed = ""
    if low is not None and (number < low or (kind.min_open and number == low)):
        allowed = f"more than {low:.12g}" if kind.min_open else f"at least {low:.12g} (nearest: {low:.12g})"
    elif high is not None and number > high:
        allowed = f"at most {high:.12g} (nearest: {high:.12g})"
    if allowed:
        kind.fail(f"{number:.12g} is out of range; it must be {allowed}", param, ctx)
    return number
