"""What is offered to routers, when programs, watchers and other hosts all have a say?"""

from __future__ import annotations

from serval_core.controller.offers import Offers
from serval_core.names import ServicePrefix, parse_service

SERVICE = parse_service("76568")
AGGREGATE = parse_service("0xabcd:16")
INSIDE, ALSO_INSIDE = parse_service("0xabcd01"), parse_service("0xabcd02")


class Sum:
    """What stands offered in the end."""

    def __init__(self, *aggregates: ServicePrefix) -> None:
        self.offered: dict[ServicePrefix, tuple[int, int]] = {}
        self.offers = Offers(1, 2, aggregates, self._offer, self.offered.pop)

    def _offer(self, prefix: ServicePrefix, priority: int, weight: int) -> None:
        self.offered[prefix] = priority, weight


def test_a_service_is_offered_while_anything_is_bound_to_it() -> None:
    """A stream listener and datagrams may be bound to one serviceID."""
    total = Sum()
    total.offers.bound(SERVICE)
    total.offers.bound(SERVICE)
    total.offers.unbound(SERVICE)
    assert total.offered == {SERVICE: (1, 2)}
    total.offers.unbound(SERVICE)
    assert total.offered == {}


def test_withholding_holds_over_closing_and_binding() -> None:
    total = Sum()
    total.offers.bound(SERVICE)
    total.offers.withhold(SERVICE, withheld=True)
    assert total.offered == {}
    total.offers.unbound(SERVICE)
    total.offers.bound(SERVICE)
    assert total.offered == {}
    total.offers.withhold(SERVICE, withheld=False)
    assert total.offered == {SERVICE: (1, 2)}
    total.offers.set_terms(SERVICE, 5, 7)
    assert total.offered == {SERVICE: (5, 7)}


def test_what_other_hosts_registered_adds_to_what_is_bound_here() -> None:
    total = Sum()
    total.offers.registered(SERVICE, 5)
    assert total.offered == {SERVICE: (1, 5)}
    total.offers.bound(SERVICE)
    assert total.offered == {SERVICE: (1, 7)}
    total.offers.registered(SERVICE, 0)
    assert total.offered == {SERVICE: (1, 2)}


def test_an_aggregate_stands_for_all_within_it_while_there_is_any() -> None:
    total = Sum(AGGREGATE, parse_service("0xab:8"))
    total.offers.registered(INSIDE, 5)
    total.offers.bound(ALSO_INSIDE)
    total.offers.bound(SERVICE)
    assert total.offered == {AGGREGATE: (1, 2), SERVICE: (1, 2)}
    total.offers.registered(INSIDE, 0)
    assert AGGREGATE in total.offered
    total.offers.unbound(ALSO_INSIDE)
    assert total.offered == {SERVICE: (1, 2)}
    total.offers.registered(parse_service("0xabce01"), 1)
    total.offers.registered(AGGREGATE, 1)
    assert set(total.offered) == {SERVICE, AGGREGATE, parse_service("0xab:8")}


def test_other_usual_terms_hold_at_once_for_all_without_terms_of_their_own() -> None:
    total = Sum(AGGREGATE)
    own = parse_service("5")
    for prefix in (SERVICE, own, INSIDE):
        total.offers.bound(prefix)
    total.offers.set_terms(own, 7, 8)
    total.offers.set_usual_terms(3, 4)
    assert total.offered == {SERVICE: (3, 4), own: (7, 8), AGGREGATE: (3, 4)}
