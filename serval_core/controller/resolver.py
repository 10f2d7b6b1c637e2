"""Where is a service that a packet is waiting for? (late binding, SPEC 6.8, 7.5)

Asks its sources in turn, puts the first answer into the service table, with the answer's lifetime, and lets
what waited go; or drops it when nobody knows. Many packets for one service make one question, and a service
that nobody knew is not asked for again at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence

import structlog

from serval_core.controller.answers import Answer, AnswerSource, SourceFailed
from serval_core.controller.directory import Directory, DirectoryFailed
from serval_core.errors import OurMistake
from serval_core.names import ServiceID, ServicePrefix
from serval_core.rules import Rule, RuleType
from serval_core.service_table import ServiceTable

log = structlog.get_logger("serval_core.resolver")

# Above DELAY rules and registrations of the same prefix, below the rules of an operator who means it.
PRIORITY_BASE = 10
PRIORITY_MAX = 30_000
DELAY_PRIORITY = 0
QUESTIONS_MAX = 64
QUESTIONS_OF_OTHERS_MAX = 48  # anybody's packets make a service router ask
FAILURES_MAX = 4096


class DirectorySource:
    """What has been registered here, or at whoever shares the directory."""

    def __init__(self, directory: Directory, wall: Callable[[], float]) -> None:
        self._directory = directory
        self._wall = wall

    async def resolve(self, service_id: ServiceID) -> Sequence[Answer]:
        wall = self._wall()
        try:
            found = self._directory.lookup(service_id, wall)
        except DirectoryFailed as failure:
            raise SourceFailed(str(failure)) from failure
        return [Answer(each.address, each.priority, each.weight, each.expires_at - wall) for each in found]


class UpstreamSource:
    """The routers above this one know what this one does not: let them decide."""

    def __init__(self, routers: Callable[[], Collection[int]], lifetime_s: float) -> None:
        self._routers = routers
        self._lifetime_s = lifetime_s

    async def resolve(self, service_id: ServiceID) -> Sequence[Answer]:
        return [Answer(router, 1, 1, self._lifetime_s) for router in self._routers()]


class Resolver:
    """Decides about what waits for services under `prefixes`. `release(prefix)` and `drop(prefix, reason)` are
    the stack's; `now` is the clock of the table's timeouts.
    """

    def __init__(
        self,
        prefixes: Sequence[ServicePrefix],
        sources: Sequence[tuple[str, AnswerSource]],
        table: ServiceTable,
        release: Callable[[ServicePrefix], object],
        drop: Callable[[ServicePrefix, str], object],
        now: Callable[[], float],
        timeout_s: float,
        failure_lifetime_s: float,
        rules_max: int,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._prefixes = tuple(prefixes)
        self._sources = tuple(sources)
        self._table = table
        self._release = release
        self._drop = drop
        self._now = now
        self._timeout_s = timeout_s
        self._failure_lifetime_s = failure_lifetime_s
        self._rules_max = rules_max
        self._rules = 0
        self._questions: dict[ServiceID, asyncio.Task[None]] = {}
        self._failures: OrderedDict[ServiceID, float] = OrderedDict()
        self._unsubscribe = table.on_change(self._table_changed)

    def start(self) -> None:
        """Have packets for the services wait. OurMistake when another rule is in the way."""
        for prefix in self._prefixes:
            self._table.add(Rule.delay(prefix, priority=DELAY_PRIORITY, origin="configured"))

    def stop(self) -> None:
        """Answer no more questions and take the DELAY rules back."""
        self._unsubscribe()
        for question in self._questions.values():
            question.cancel()
        self._questions.clear()
        for prefix in self._prefixes:
            try:
                self._table.remove(prefix, RuleType.DELAY)
            except OurMistake:
                self.counters["delay_rules_gone_before"] += 1  # an operator removed it by hand

    def delayed(self, service_id: ServiceID, *, own: bool = True) -> None:
        """Something waits for a service, of this host or else of another one. Decides later, never within this call."""
        if service_id in self._questions or not any(each.covers(service_id) for each in self._prefixes):
            return
        loop = asyncio.get_running_loop()
        exact = ServicePrefix.of(service_id)
        failed_at = self._failures.get(service_id)
        if failed_at is not None and self._now() < failed_at + self._failure_lifetime_s:
            self.counters["known_to_be_unknown"] += 1
            loop.call_soon(self._drop, exact, "nobody knew the service a moment ago")
        elif len(self._questions) >= (QUESTIONS_MAX if own else QUESTIONS_OF_OTHERS_MAX):
            self.counters["too_many_questions"] += 1
            loop.call_soon(self._drop, exact, "too many services are being looked for")
        else:
            self._questions[service_id] = loop.create_task(self._decide(service_id))

    async def _decide(self, service_id: ServiceID) -> None:
        exact = ServicePrefix.of(service_id)
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    answers = await self._ask(service_id)
            except TimeoutError:
                self.counters["timed_out"] += 1
                answers = ()
            if answers and self._install(exact, answers):
                self.counters["resolved"] += 1
                self._release(exact)
                return
            self._remember_failure(service_id)
            self.counters["unresolved"] += 1
            self._drop(exact, "nobody knows the service")
        finally:
            self._questions.pop(service_id, None)

    async def _ask(self, service_id: ServiceID) -> Sequence[Answer]:
        for name, source in self._sources:
            try:
                answers = await source.resolve(service_id)
            except SourceFailed as failure:
                self.counters[f"{name}_failed"] += 1
                log.warning("a source failed", source=name, service=service_id.text, why=str(failure))
                continue
            if answers:
                self.counters[f"{name}_answered"] += 1
                return answers
        return ()

    def _install(self, prefix: ServicePrefix, answers: Sequence[Answer]) -> bool:
        """Put the answers into the table; whether it says anything now."""
        installed = False
        now = self._now()
        for answer in answers:
            if self._rules >= self._rules_max:
                self.counters["too_many_rules"] += 1
                break
            rule = Rule.forward(
                prefix,
                answer.address,
                priority=min(PRIORITY_BASE + answer.priority, PRIORITY_MAX),
                weight=answer.weight,
                origin="resolved",
                hard_timeout_s=max(answer.lifetime_s, 1.0),
            )
            try:
                self._table.add(rule, now)
            except OurMistake as mistake:
                self.counters["rules_refused"] += 1
                log.warning("an answer cannot be used", service=str(prefix), why=str(mistake))
            else:
                installed = True
        return installed

    def _remember_failure(self, service_id: ServiceID) -> None:
        self._failures[service_id] = self._now()
        self._failures.move_to_end(service_id)
        if len(self._failures) > FAILURES_MAX:
            self._failures.popitem(last=False)

    def _table_changed(self, kind: str, rule: Rule) -> None:
        if rule.origin == "resolved":
            self._rules += {"rule_added": 1, "rule_removed": -1, "rule_expired": -1}.get(kind, 0)
