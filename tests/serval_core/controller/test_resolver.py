"""Are services found for what waits for them, once for many, and what nobody knows given up?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from serval_core.controller.answers import Answer, SourceFailed
from serval_core.controller.directory import IN_MEMORY, Changes, SqliteDirectory, StoredRegistration
from serval_core.controller.resolver import DirectorySource, Resolver, UpstreamSource
from serval_core.names import ServiceID, ServicePrefix, parse_address, parse_service
from serval_core.rules import RuleType
from serval_core.service_table import ServiceTable

from .memory import HOST, OTHER, WALL

DELAYED = parse_service("0xabcd:16")
SERVICE = parse_service("0xabcd01")
START = 500.0


class Source:
    """Answers what a test says, and counts."""

    def __init__(self, *answers: Answer, fails: bool = False, hangs: bool = False) -> None:
        self.answers = answers
        self.fails = fails
        self.hangs = hangs
        self.asked: list[ServiceID] = []

    async def resolve(self, service_id: ServiceID) -> Sequence[Answer]:
        self.asked.append(service_id)
        if self.hangs:
            await asyncio.Event().wait()
        if self.fails:
            raise SourceFailed("no luck")
        return self.answers


class Play:
    """A resolver, its table, and what it had done."""

    def __init__(self, *sources: Source, timeout_s: float = 5.0, rules_max: int = 100) -> None:
        self.now = START
        self.table = ServiceTable()
        self.released: list[ServicePrefix] = []
        self.dropped: list[tuple[ServicePrefix, str]] = []
        self.resolver = Resolver(
            [DELAYED],
            [(f"source_{number}", source) for number, source in enumerate(sources)],
            self.table,
            self.released.append,
            lambda prefix, reason: self.dropped.append((prefix, reason)),
            lambda: self.now,
            timeout_s,
            5.0,
            rules_max,
        )
        self.resolver.start()

    async def ask(self, prefix: ServicePrefix = SERVICE) -> None:
        """Something waits; return when it was decided about."""
        before = len(self.released) + len(self.dropped)
        self.resolver.delayed(prefix.service_id)
        while len(self.released) + len(self.dropped) == before:
            await asyncio.sleep(0)

    def targets(self, prefix: ServicePrefix = SERVICE) -> list[tuple[int, int, int]]:
        entry = self.table.entry(prefix)
        rules = [] if entry is None else [target.rule(prefix) for target in entry.targets()]
        return [(rule.address, rule.priority, rule.weight) for rule in rules if rule.origin == "resolved"]


def play(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())


def test_the_first_source_that_knows_decides_and_its_answer_lasts_as_long_as_it_says() -> None:
    async def body() -> None:
        failing, ignorant = Source(fails=True), Source()
        knowing, unasked = Source(Answer(HOST, 2, 3, 60.0), Answer(OTHER, 1, 1, 30.0)), Source()
        game = Play(failing, ignorant, knowing, unasked)
        await game.ask()
        assert game.released == [SERVICE]
        assert game.targets() == [(HOST, 12, 3), (OTHER, 11, 1)]
        assert [len(each.asked) for each in (failing, ignorant, knowing, unasked)] == [1, 1, 1, 0]
        game.table.expire(START + 31)
        assert game.targets() == [(HOST, 12, 3)]
        game.table.expire(START + 61)
        assert game.targets() == []
        # Afterwards it is asked for again.
        game.now += 61
        await game.ask()
        assert len(knowing.asked) == 2

    play(body)


def test_many_that_wait_make_one_question() -> None:
    async def body() -> None:
        source = Source(Answer(HOST, 1, 1, 60.0))
        game = Play(source)
        for _ in range(10):
            game.resolver.delayed(SERVICE.service_id)
        await game.ask()
        assert len(source.asked) == 1
        assert game.released == [SERVICE]

    play(body)


def test_what_nobody_knows_is_dropped_and_not_asked_for_again_at_once() -> None:
    async def body() -> None:
        source = Source()
        game = Play(source)
        for _ in range(3):
            await game.ask()
        assert len(source.asked) == 1
        assert [prefix for prefix, _ in game.dropped] == [SERVICE] * 3
        game.now += 6
        await game.ask()
        assert len(source.asked) == 2

    play(body)


def test_a_source_that_hangs_is_given_up() -> None:
    async def body() -> None:
        game = Play(Source(hangs=True), timeout_s=0.05)
        await game.ask()
        assert [prefix for prefix, _ in game.dropped] == [SERVICE]
        assert game.resolver.counters["timed_out"] == 1

    play(body)


def test_limits_hold_for_questions_and_rules() -> None:
    async def body() -> None:
        game = Play(Source(hangs=True), timeout_s=60)
        services = [parse_service(f"0xabcd{number:04x}") for number in range(1, 101)]
        for each in services:
            game.resolver.delayed(each.service_id)
        while len(game.dropped) < 36:
            await asyncio.sleep(0)
        assert game.resolver.counters["too_many_questions"] == 36
        game.resolver.stop()
        few = Play(Source(Answer(HOST, 1, 1, 60.0)), rules_max=10)
        for each in services[:12]:
            await few.ask(each)
        assert (len(few.released), len(few.dropped)) == (10, 2)
        few.table.expire(START + 61)
        await few.ask(services[20])
        assert len(few.released) == 11

    play(body)


def test_questions_of_others_leave_room_for_our_own() -> None:
    """Anybody's packets make a service router ask; what its own programs look for is asked for all the same."""

    async def body() -> None:
        source = Source(hangs=True)
        game = Play(source, timeout_s=60)
        for number in range(1, 101):
            game.resolver.delayed(parse_service(f"0xabcd{number:04x}").service_id, own=False)
        game.resolver.delayed(SERVICE.service_id)
        while len(game.dropped) < 52 or not source.asked or source.asked[-1] != SERVICE.service_id:
            await asyncio.sleep(0)
        assert len(source.asked) == 49
        game.resolver.stop()

    play(body)


def test_services_that_others_decide_about_are_left_to_them() -> None:
    async def body() -> None:
        source = Source()
        game = Play(source)
        game.resolver.delayed(parse_service("76568").service_id)
        await game.ask()
        assert source.asked == [SERVICE.service_id]
        game.resolver.stop()
        assert game.table.entry(DELAYED) is None

    play(body)


def test_the_directory_and_routers_above_are_sources() -> None:
    async def body() -> None:
        directory = SqliteDirectory(IN_MEMORY)
        directory.write(Changes([StoredRegistration(DELAYED, HOST, 1, 2, 50.0, WALL, WALL + 40, b"")]))
        source = DirectorySource(directory, lambda: WALL)
        assert await source.resolve(SERVICE.service_id) == [Answer(HOST, 1, 2, 40.0)]
        assert await source.resolve(parse_service("5").service_id) == []
        upstream = UpstreamSource(lambda: (parse_address("10.9.9.9"),), 60.0)
        assert await upstream.resolve(SERVICE.service_id) == [Answer(parse_address("10.9.9.9"), 1, 1, 60.0)]

    play(body)


def test_the_resolvers_rules_win_over_its_delay_even_for_one_service() -> None:
    async def body() -> None:
        game = Play(Source(Answer(HOST, 1, 1, 60.0)))
        assert game.table.resolve(SERVICE.service_id, lambda: 0.5).rule_type is RuleType.DELAY
        await game.ask()
        resolution = game.table.resolve(SERVICE.service_id, lambda: 0.5)
        assert [target.address for target in resolution.targets] == [HOST]

    play(body)
