"""In which order is everything measured? Stages of rounds; in each round every contender has its turn."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.contenders import CONTENDERS, Contender
from bench.measures import (
    IdleMemory,
    Requests,
    Throughput,
    idle_busy_share,
    idle_memory,
    latency,
    short_connections,
    throughput,
)
from bench.topology import ECHO_PORT, STREAM_PORT, WEB_PORT, Topology
from lab.hosts import CommandFailed, Lab
from lab.waiting import NeverHappened

PACKET_BACKLOG = 10000
SHAPED_RATE = "1gbit"
FAILURES = (CommandFailed, NeverHappened, RuntimeError, subprocess.TimeoutExpired, OSError)

Sample = Throughput | Requests | IdleMemory
Measure = Callable[[Contender], Sample]


class Plan(NamedTuple):
    """How much is measured. Framings and single hops are compared in throughput, and where wanted in every stage."""

    throughput_rounds: int
    request_rounds: int
    shaped_rounds: int
    seconds: float
    idle_pairs: int
    idle_share_s: float
    framings_in_every_stage: bool


QUICK = Plan(
    throughput_rounds=3,
    request_rounds=2,
    shaped_rounds=3,
    seconds=1.0,
    idle_pairs=200,
    idle_share_s=2,
    framings_in_every_stage=False,
)
FULL = Plan(
    throughput_rounds=9,
    request_rounds=5,
    shaped_rounds=7,
    seconds=3.0,
    idle_pairs=1000,
    idle_share_s=5,
    framings_in_every_stage=True,
)


class Stage(NamedTuple):
    """Measures that share a start of each contender that takes part."""

    title: str
    rounds: int
    port: int
    measures: dict[str, Measure]
    framings: bool
    shaped: bool = False

    def has(self, contender: Contender) -> bool:
        """Whether it takes part: it serves the port, and if it is there for its framing, that is asked for."""
        return self.port in contender.ports and (self.framings or not contender.compares_framings)


@dataclass
class Results:
    """Samples by measure and contender, one per round (None where it failed), and what went wrong."""

    samples: dict[str, dict[str, list[Sample | None]]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    idle_busy_share: float = 0.0

    def add(self, measure: str, contender: str, sample: Sample | None) -> None:
        """Append the sample of one more round."""
        self.samples.setdefault(measure, {}).setdefault(contender, []).append(sample)


def stages(plan: Plan, idle_share: float) -> list[Stage]:
    """The stages of a run."""

    def stream(contender: Contender) -> Throughput:
        return throughput(contender, plan.seconds, idle_share)

    requests: dict[str, Measure] = {
        "short_connections": lambda contender: short_connections(contender, plan.seconds),
        "latency": lambda contender: latency(contender, plan.seconds),
    }
    memory: dict[str, Measure] = {"memory": lambda contender: idle_memory(contender, plan.idle_pairs)}
    framings = plan.framings_in_every_stage
    return [
        Stage("throughput", plan.throughput_rounds, STREAM_PORT, {"throughput": stream}, framings=True),
        Stage(
            f"at {SHAPED_RATE}", plan.shaped_rounds, STREAM_PORT, {"shaped": stream}, framings, shaped=True
        ),
        Stage("idle memory", 1, ECHO_PORT, memory, framings),
        # Last: the tens of thousands of sockets that it leaves in TIME_WAIT slow down every look for a listener.
        Stage("requests", plan.request_rounds, WEB_PORT, requests, framings),
    ]


def run(plan: Plan, progress: Callable[[str], None], only: Sequence[str] = ()) -> Results:
    """Measure everything; `only` keeps the contenders whose names contain one of its words."""
    results = Results()
    with Lab() as lab, packet_backlog(PACKET_BACKLOG):
        topology = Topology(lab)
        contenders = [kind(topology) for kind in CONTENDERS if _wanted(kind.name, only)]
        results.absent = {who.name: why for who in contenders if (why := who.absent())}
        present = [who for who in contenders if who.name not in results.absent]
        progress("the idle machine")
        results.idle_busy_share = idle_busy_share(plan.idle_share_s)
        for stage in stages(plan, results.idle_busy_share):
            with _shaped(topology, stage.shaped):
                _run_stage(stage, [who for who in present if stage.has(who)], results, progress)
    return results


@contextmanager
def packet_backlog(packets: int) -> Iterator[None]:
    """Give the machine's CPUs a backlog of that many packets, as `doctor` advises; puts the old value back.

    veth and receive steering queue single packets there, superpackets count as one: for all contenders alike.
    """
    setting = Path("/proc/sys/net/core/netdev_max_backlog")
    before = setting.read_text()
    setting.write_text(str(packets))
    try:
        yield
    finally:
        setting.write_text(before)


def _wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(word.lower() in name.lower() for word in only)


def _run_stage(
    stage: Stage, contenders: list[Contender], results: Results, progress: Callable[[str], None]
) -> None:
    for number in range(stage.rounds):
        # Whatever drifts during a round favours first or last alike.
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            progress(f"{stage.title}, round {number + 1} of {stage.rounds}: {contender.name}")
            taken = _measure(stage, contender, results)
            for measure in stage.measures:
                results.add(measure, contender.name, taken.get(measure))


def _measure(stage: Stage, contender: Contender, results: Results) -> dict[str, Sample]:
    taken: dict[str, Sample] = {}
    try:
        contender.start()
        for name, measure in stage.measures.items():
            taken[name] = measure(contender)
    except FAILURES as error:
        results.failures.append(f"{stage.title}: {contender.name}: {error}")
    try:
        contender.stop()
    except FAILURES as error:
        results.failures.append(f"{stage.title}: stopping {contender.name}: {error}")
    return taken


@contextmanager
def _shaped(topology: Topology, wanted: bool) -> Iterator[None]:
    if wanted:
        topology.shape(SHAPED_RATE)
    yield
    if wanted:
        topology.unshape()
