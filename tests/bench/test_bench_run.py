"""Does the benchmark measure real contenders, who has a turn where, and does one that fails spoil only its own figures?"""

from __future__ import annotations

from typing import ClassVar

import pytest

from bench import run as bench_run
from bench.contenders import CONTENDERS, Contender, Direct, HAProxy, ProcessContender, TwoTranslators
from bench.measures import IdleMemory, Requests, Throughput
from bench.run import FULL, QUICK, Plan, run, stages
from bench.topology import Topology
from lab.hosts import Argument, Lab

SHORT = Plan(
    throughput_rounds=1,
    request_rounds=1,
    shaped_rounds=1,
    seconds=0.2,
    idle_pairs=20,
    idle_share_s=0.1,
    framings_in_every_stage=False,
)
THROUGHPUT, REQUESTS, MEMORY, SHAPED = "throughput", "requests", "idle memory", "at 1gbit"
PROXIES = {"direct TCP", "HAProxy splice", "nginx stream", "socat", "two translators"}
ONE_TRANSLATOR = "one translator, native sink"


class Broken(ProcessContender):
    """A proxy that ends at once."""

    name = "broken"
    program = "false"

    def commands(self) -> list[list[Argument]]:
        """It says why."""
        return [["sh", "-c", "echo cannot >&2; exit 3"]]


class NotInstalled(Broken):
    """A proxy that this machine does not have."""

    name: ClassVar[str] = "not installed"
    program = "no-such-program"


def test_each_measure_of_each_contender_gives_a_figure(monkeypatch: pytest.MonkeyPatch, root: None) -> None:
    contenders: tuple[type[Contender], ...] = (Direct, HAProxy, TwoTranslators, Broken, NotInstalled)
    monkeypatch.setattr(bench_run, "CONTENDERS", contenders)
    results = run(SHORT, lambda text: None)
    assert results.absent == {"not installed": "no-such-program is not installed"}
    assert len(results.failures) == 4
    assert all("broken" in failure and "cannot" in failure for failure in results.failures)
    for name in (Direct.name, HAProxy.name, TwoTranslators.name):
        for measure in ("throughput", "shaped"):
            (stream,) = results.samples[measure][name]
            assert isinstance(stream, Throughput)
            assert stream.bytes > 0
        (short,) = results.samples["short_connections"][name]
        assert isinstance(short, Requests)
        assert short.per_s > 0
        assert short.errors == 0
        (memory,) = results.samples["memory"][name]
        assert isinstance(memory, IdleMemory)
        assert memory.pairs == SHORT.idle_pairs
    assert results.samples["throughput"]["broken"] == [None]


def test_a_quick_run_compares_framings_in_throughput_only(root: None) -> None:
    with Lab() as lab:
        topology = Topology(lab)
        contenders = [kind(topology) for kind in CONTENDERS]
    names = {who.name for who in contenders}
    quick, full = (
        {stage.title: {who.name for who in contenders if stage.has(who)} for stage in stages(plan, 0.0)}
        for plan in (QUICK, FULL)
    )
    assert quick == {
        THROUGHPUT: names,
        REQUESTS: PROXIES,
        MEMORY: PROXIES,
        SHAPED: PROXIES | {ONE_TRANSLATOR},
    }
    assert full[SHAPED] == full[THROUGHPUT] == names
    assert full[REQUESTS] == full[MEMORY] == PROXIES | {"two translators, udp", "two translators, native"}
