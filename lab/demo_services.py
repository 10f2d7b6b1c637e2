"""Do services find each other? `make demo-services`: short connections all the time while instances come, go and crash.

A legacy client, a translator, a service router and three instances of one service: two legacy web servers behind
reverse translators and a native one. Instances are asked to end, are killed, and return; who answers is compared with
the weights, the SYNs that still reach a killed instance are timed on its wire, and a large download shows that the
router has no part in it. The exit status is 0 only if all was as it should be.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.live import Live
from rich.table import Table

from lab.attempts import Attempts
from lab.demonstration import REFRESH_S, Findings, console, curl, end, run, transfer_progress, watch
from lab.hosts import Lab
from lab.services import CLIENT_SIDE, LIFETIME_S, SERVICE, Instance, Services
from lab.short_load import Attempt, Load, answered, chi_square
from lab.traffic import hash_file, write_random_file
from lab.waiting import wait_for

WEIGHTS = (2, 1, 1)
PER_SECOND = 60.0
WORKERS = 6
STEADY_S = 8.0
AWAY_S = 3.0
BACK_S = 2.0
BULK_BYTES = 256 << 20
# What the router may send and receive meanwhile: registrations, one SYN, ARP.
ROUTER_BYTES_MAX = 100_000
# One honest run in so many is called unfair.
PROBABILITY_MIN = 1e-4
# A SYN that the router passed on just before it forgot an instance is on its way for less than this.
ON_ITS_WAY_S = 2.0
DRAW_S = 0.25


class Act(NamedTuple):
    """A part of the demonstration: from `began` (seconds of the wall clock) to `ended`."""

    name: str
    began: float
    ended: float
    steady: bool


class Absence(NamedTuple):
    """From when on the router did not know an instance, and when that was started again (wall clock)."""

    began: float
    ended: float


class Crash(NamedTuple):
    """An instance was killed, and between the two times (wall clock) everybody on its host knew.

    `syns` came to its host afterwards, the last one `last_s` after the kill.
    """

    name: str
    killed_at: float
    known_at: float
    syns: int
    last_s: float

    def cut_off(self, attempt: Attempt) -> bool:
        """Whether the connection was open, or just being accepted, when that happened, and ended with it."""
        ended = attempt.began + attempt.took_s
        return bool(attempt.failure) and attempt.began < self.known_at and ended >= self.killed_at


@dataclass
class Seen(Findings):
    """What the demonstration saw. `attempts`: all connections."""

    weights: dict[str, int] = field(default_factory=dict)
    acts: list[Act] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    crashes: list[Crash] = field(default_factory=list)
    services: str = ""
    bulk: tuple[int, int, float] = (0, 0, 0.0)  # the router's packets and bytes, and the seconds it took


def main() -> int:
    """Run the demonstration; the exit status."""
    return run(Seen(), demonstrate, report)


def demonstrate(lab: Lab, seen: Seen) -> None:
    """Build it all, let instances come and go under load, download something large, end it all."""
    with console.status("six hosts, a service router, three instances, a translator"):
        services = Services(lab, WEIGHTS)
        services.start()
    seen.weights = {each.name: each.weight for each in services.instances}
    console.print(
        f"client - [bold]serval-translator --map 80={SERVICE} --router-ip …[/] - router ([bold]servald --router[/]) - "
        "2 x [bold]serval-translator --reverse …[/], 1 x [bold]servald[/] with a native server"
    )
    with (
        Load(services.client, CLIENT_SIDE, "/who", PER_SECOND, WORKERS) as load,
        Live(console=console, refresh_per_second=8) as live,
    ):
        Play(services, seen, load, live).perform()
    console.print()
    seen.attempts = load.attempts
    judge_attempts(seen)
    seen.services = services.router.show("services")
    download(services, seen)
    finish(services, seen)


class Play:
    """The acts, one after the other, with what happens drawn as it happens."""

    def __init__(self, services: Services, seen: Seen, load: Load, live: Live) -> None:
        self._services = services
        self._seen = seen
        self._load = load
        self._live = live
        self._name = ""
        self._began = time.time()
        self._drawn = 0.0
        self._registered: dict[str, int] = {}

    def perform(self) -> None:
        """All of it."""
        first, second, third = self._services.instances
        self._until(lambda: any(not each.failure for each in self._load.attempts), "a first answer")
        self._act("all three", lambda: self._rest(STEADY_S), steady=True)
        self._act(f"{first.name}: SIGTERM", lambda: self._leaves(first))
        self._act(f"{second.name}: kill -9", lambda: self._crashes(second))
        self._act(f"{third.name}: SIGTERM", lambda: self._leaves(third))
        self._act(f"{third.name}: kill -9", lambda: self._crashes(third))
        self._act("all three again", lambda: self._rest(STEADY_S), steady=True)

    def _act(self, name: str, play: Callable[[], None], steady: bool = False) -> None:
        self._name, self._began = name, time.time()
        play()
        self._seen.acts.append(Act(name, self._began, time.time(), steady))

    def _leaves(self, instance: Instance) -> None:
        status = instance.end()
        self._seen.expect(status == 0, f"{instance.name} ended with {status}")
        self._is_away_and_returns(instance, time.time())

    def _crashes(self, instance: Instance) -> None:
        with Attempts(instance.host, "eth0") as attempts:
            killed_at = time.time()
            instance.crash()
            known_at = time.time()
            away = self._is_away_and_returns(instance, known_at)
            late = [each for each in attempts.times if killed_at <= each < away.ended]
        last_s = max(late, default=killed_at) - killed_at
        self._seen.crashes.append(Crash(instance.name, killed_at, known_at, len(late), last_s))
        after_s = killed_at + last_s - away.began
        self._seen.expect(
            after_s <= ON_ITS_WAY_S,
            f"{instance.name} was still asked {after_s:.1f} s after the router had forgotten it",
        )

    def _is_away_and_returns(self, instance: Instance, gone_at: float) -> Absence:
        """Wait until the router has forgotten it, and then until it serves again."""
        address = instance.address
        self._until(
            lambda: address not in self._registered, f"{instance.name} to be forgotten", LIFETIME_S + 10
        )
        forgotten_at = time.time()
        self._rest(AWAY_S)
        returned_at = time.time()
        answers = [each for each in self._load.between(gone_at, returned_at) if each.got == instance.name]
        self._seen.expect(not answers, f"{instance.name} answered {len(answers)} clients while it was away")
        instance.start()
        self._until(lambda: address in self._registered, f"{instance.name} to be registered again")
        self._until(
            lambda: answered(self._load.between(returned_at, time.time()))[instance.name] > 0,
            f"{instance.name} to answer again",
        )
        self._rest(BACK_S)
        return Absence(forgotten_at, returned_at)

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._draw()
            time.sleep(REFRESH_S)

    def _until(self, condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
        def holds() -> bool:
            self._draw()
            return condition()

        self._registered = self._services.registered()
        wait_for(holds, what, timeout_s, REFRESH_S)

    def _draw(self) -> None:
        now = time.monotonic()
        if now < self._drawn + DRAW_S:
            return
        self._drawn = now
        self._registered = self._services.registered()
        self._live.update(self._table())

    def _table(self) -> Table:
        attempts = self._load.between(self._began, time.time())
        counted = answered(attempts)
        failed = sum(bool(each.failure) for each in self._load.attempts)
        title = f"{self._name}: {len(attempts)} connections now, {len(self._load.attempts)} in all, {failed} failed"
        table = Table(title=title, title_justify="left")
        for column in ("instance", "state", "registered"):
            table.add_column(column, no_wrap=True)
        table.add_column("answers now", justify="right")
        table.add_column("share", width=20, no_wrap=True)
        total = sum(counted.values()) or 1
        for instance in self._services.instances:
            share = counted[instance.name] / total
            weight = self._registered.get(instance.address)
            colour = "green" if instance.state == "serving" else "red"
            table.add_row(
                f"{instance.name} ({instance.kind})",
                f"[{colour}]{instance.state}[/]",
                "no" if weight is None else f"weight {weight}",
                str(counted[instance.name]),
                f"[cyan]{'█' * round(14 * share)}[/] {100 * share:.0f} %",
            )
        return table


def failures(seen: Seen) -> tuple[list[Attempt], list[Attempt]]:
    """Connections that failed, and those that were cut off when the instance that they were open at was killed."""
    failed: list[Attempt] = []
    cut_off: list[Attempt] = []
    for each in seen.attempts:
        if each.failure:
            (cut_off if any(crash.cut_off(each) for crash in seen.crashes) else failed).append(each)
    return failed, cut_off


def steady_answers(seen: Seen) -> Counter[str]:
    """Who answered while all were there."""
    acts = [act for act in seen.acts if act.steady]
    return answered(
        [each for each in seen.attempts if any(act.began <= each.began < act.ended for act in acts)]
    )


def judge_attempts(seen: Seen) -> None:
    """No connection may have failed, and the instances have had their shares."""
    failed, cut_off = failures(seen)
    for each in failed[:5]:
        acts = [act.name for act in seen.acts if act.began <= each.began < act.ended]
        seen.expect(
            False,
            f"a connection failed after {each.took_s:.1f} s: {each.failure} (during: {', '.join(acts)})",
        )
    seen.expect(len(failed) <= 5, f"{len(failed)} connections failed in all")
    limit = WORKERS * len(seen.crashes)
    seen.expect(len(cut_off) <= limit, f"{len(cut_off)} connections were cut off, at most {limit} can be")
    _, probability = chi_square(steady_answers(seen), seen.weights)
    seen.expect(probability >= PROBABILITY_MIN, "the instances' shares are not those of their weights")


def download(services: Services, seen: Seen) -> None:
    """A large file, from whichever instance; the router counts what passes it meanwhile."""
    for instance in services.instances:
        sent = write_random_file(instance.directory / "bulk", BULK_BYTES, seed=1)
    arrived = services.directory / "bulk"
    before, started = services.router_traffic(), time.monotonic()
    with transfer_progress() as progress:
        getting = curl(services.client, "-o", arrived, f"http://{CLIENT_SIDE}/bulk")
        watch(progress, "download", getting, arrived, BULK_BYTES)
    after = services.router_traffic()
    seen.bulk = (after[0] - before[0], after[1] - before[1], time.monotonic() - started)
    seen.expect(hash_file(arrived) == sent, "the download arrived with another hash")
    seen.expect(
        seen.bulk[1] <= ROUTER_BYTES_MAX,
        f"{seen.bulk[1]:,} bytes passed the router during a download that is none of its business",
    )


def finish(services: Services, seen: Seen) -> None:
    """Everything ends well and leaves nothing."""
    for name, stack in services.stacks().items():
        end(seen, name, stack)


def report(seen: Seen, duration_s: float) -> None:
    """Print what was seen."""
    console.print("[bold]router: serval-translator show services, at the end[/]")
    print(seen.services)
    console.print(acts_table(seen))
    counted = steady_answers(seen)
    statistic, probability = chi_square(counted, seen.weights)
    failed, cut_off = failures(seen)
    packets, passed_bytes, took_s = seen.bulk
    summary = Table("", "value", title="Summary", show_header=False)
    summary.add_row("connections", f"{len(seen.attempts)}, {PER_SECOND:g} per second")
    summary.add_row("failed", f"{len(failed)}")
    summary.add_row("cut off by a kill -9 while open", f"{len(cut_off)} of {WORKERS} at a time")
    summary.add_row(
        "answers while all were there", ", ".join(f"{name} {counted[name]}" for name in seen.weights)
    )
    summary.add_row("weights", " : ".join(map(str, seen.weights.values())))
    summary.add_row(
        "chi-square, 2 degrees of freedom",
        f"{statistic:.2f} (probability of one as large: {probability:.3f})",
    )
    for crash in seen.crashes:
        when = f", the last one {crash.last_s:.2f} s after it" if crash.syns else ""
        summary.add_row(f"kill -9 of {crash.name}", f"{crash.syns} SYNs came to its host after that{when}")
    summary.add_row(
        "router during the download",
        f"{packets} packets, {passed_bytes:,} bytes of {BULK_BYTES:,} ({BULK_BYTES * 8 / took_s / 1e9:.2f} Gbit/s)",
    )
    summary.add_row("time taken", f"{duration_s:.0f} s")
    console.print(summary)


def acts_table(seen: Seen) -> Table:
    """One row for each act."""
    table = Table(title="What clients saw", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for column in ("clients", "failed", *seen.weights, "median", "slowest"):
        table.add_column(column, justify="right", no_wrap=True)
    failed, _ = failures(seen)
    for act in seen.acts:
        attempts = [each for each in seen.attempts if act.began <= each.began < act.ended]
        counted = answered(attempts)
        times_ms = [1000 * each.took_s for each in attempts if not each.failure] or [0.0]
        table.add_row(
            act.name,
            str(len(attempts)),
            str(sum(each in failed for each in attempts)),
            *(str(counted[name]) for name in seen.weights),
            f"{statistics.median(times_ms):.1f} ms",
            f"{max(times_ms):.0f} ms",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
