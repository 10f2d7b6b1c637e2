"""What do the tests of the service table ask it about?"""

from __future__ import annotations

from collections.abc import Callable

from serval_core.names import ServiceID, ServicePrefix, parse_address
from serval_core.rules import Rule
from serval_core.service_table import Resolution, ServiceTable

WEB = ServiceID.from_number(76568)
WEB_PREFIX = ServicePrefix.of(WEB)
WEB_BEGIN = ServicePrefix.of(WEB, 16)
A, B, C = (parse_address(f"10.0.0.{number}") for number in (1, 2, 3))
BROADCAST_1, BROADCAST_2 = parse_address("10.0.0.255"), parse_address("10.1.0.255")

low: Callable[[], float] = lambda: 0.0  # noqa: E731


def addresses(resolution: Resolution) -> list[int]:
    """Where the table sends a packet."""
    return [target.address for target in resolution.targets]


def table_with(*rules: Rule) -> ServiceTable:
    """A table that holds these."""
    table = ServiceTable()
    for rule in rules:
        table.add(rule)
    return table


def number(value: object) -> int:
    """A number in a snapshot, whose values may be anything."""
    assert isinstance(value, int)
    return value
