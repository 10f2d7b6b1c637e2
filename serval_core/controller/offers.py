"""What does this host offer to its routers, all in all?

Programs bind and close services here; whoever watches over a service may withhold it for a while; on a router,
other hosts register theirs, which it offers to the routers above it. What lies within an aggregate is offered as
the aggregate. The sum of it goes to the host role.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from serval_core.names import ServicePrefix


class Offers:
    """`offer(prefix, priority, weight)` and `withdraw(prefix)` are called when the sum changes."""

    def __init__(
        self,
        priority: int,
        weight: int,
        aggregates: Sequence[ServicePrefix],
        offer: Callable[[ServicePrefix, int, int], None],
        withdraw: Callable[[ServicePrefix], None],
    ) -> None:
        self._terms = (priority, weight)
        self._aggregates = sorted(aggregates, key=lambda aggregate: -aggregate.bits)
        self._offer = offer
        self._withdraw = withdraw
        self._bound: Counter[ServicePrefix] = Counter()
        self._withheld: set[ServicePrefix] = set()
        self._own_terms: dict[ServicePrefix, tuple[int, int]] = {}
        self._registered: dict[ServicePrefix, int] = {}
        self._members: dict[ServicePrefix, set[ServicePrefix]] = {each: set() for each in aggregates}
        self._offered: set[ServicePrefix] = set()

    def bound(self, prefix: ServicePrefix) -> None:
        """A program has bound `prefix`; several may."""
        self._bound[prefix] += 1
        self._update(prefix)

    def unbound(self, prefix: ServicePrefix) -> None:
        """A program has closed it."""
        self._bound[prefix] -= 1
        if self._bound[prefix] <= 0:
            del self._bound[prefix]
        self._update(prefix)

    def withhold(self, prefix: ServicePrefix, *, withheld: bool) -> None:
        """Do not offer what is bound to `prefix`, or offer it again. Holds over closing and binding."""
        if withheld:
            self._withheld.add(prefix)
        else:
            self._withheld.discard(prefix)
        self._update(prefix)

    def set_terms(self, prefix: ServicePrefix, priority: int, weight: int) -> None:
        """Offer what is bound to `prefix` with another priority and weight than the usual ones."""
        self._own_terms[prefix] = priority, weight
        self._update(prefix)

    def set_usual_terms(self, priority: int, weight: int) -> None:
        """Offer everything that has no terms of its own with this priority and weight."""
        self._terms = priority, weight
        for prefix in {*self._bound, *self._registered}:
            self._update(prefix)

    def registered(self, prefix: ServicePrefix, weight: int) -> None:
        """Other hosts have registered `prefix` here, with weights that sum up to this; 0: none any more."""
        if weight:
            self._registered[prefix] = weight
        else:
            self._registered.pop(prefix, None)
        self._update(prefix)

    def _update(self, prefix: ServicePrefix) -> None:
        priority, weight = self._own_terms.get(prefix, self._terms)
        if not self._bound[prefix] or prefix in self._withheld:
            weight = 0
        weight += self._registered.get(prefix, 0)
        if not self._bound[prefix]:
            del self._bound[prefix]
        for aggregate in self._aggregates:
            if aggregate.bits <= prefix.bits and aggregate.covers(prefix.service_id):
                members = self._members[aggregate]
                if weight:
                    members.add(prefix)
                else:
                    members.discard(prefix)
                self._tell(aggregate, *self._terms, wanted=bool(members))
                return
        self._tell(prefix, priority, weight, wanted=weight > 0)

    def _tell(self, prefix: ServicePrefix, priority: int, weight: int, *, wanted: bool) -> None:
        if wanted:
            self._offered.add(prefix)
            self._offer(prefix, priority, weight)
        elif prefix in self._offered:
            self._offered.remove(prefix)
            self._withdraw(prefix)
