"""When a flow counts as sending in vain."""

from __future__ import annotations

from serval_core.names import FlowID
from serval_core.silence import SilenceWatch

FLOW = FlowID(5)
SILENCE_S = 2.0


def looks(*counters: tuple[int, int], interval_s: float = 0.5) -> list[bool]:
    """What the watch says at each look at (packets out, packets in)."""
    watch = SilenceWatch()
    return [
        watch.looked(FLOW, out, received, SILENCE_S, 100.0 + number * interval_s)
        for number, (out, received) in enumerate(counters)
    ]


def test_repetitions_that_nobody_answers() -> None:
    """Those of a TCP that backs off: after 0.2, 0.6, 1.4 and 3 s."""
    told = looks((100, 100), (101, 100), (102, 100), (103, 100), (103, 100), (103, 100))
    assert told == [False, False, False, False, True, False]


def test_it_is_said_again_when_it_goes_on() -> None:
    assert sum(looks(*[(number, 0) for number in range(30)])) > 1


def test_an_idle_flow_and_one_that_only_receives_are_fine() -> None:
    assert not any(looks(*[(100, 100)] * 20))
    assert not any(looks(*[(100, 100 + number) for number in range(20)]))


def test_any_answer_begins_a_new_count() -> None:
    assert not any(looks(*[(number, number // 3) for number in range(40)]))


def test_one_packet_is_no_evidence() -> None:
    assert not any(looks((100, 100), *[(101, 100)] * 20))


def test_another_path_begins_a_new_count_and_flows_are_forgotten() -> None:
    watch = SilenceWatch()
    for number in range(4):
        assert not watch.looked(FLOW, number, 0, SILENCE_S, 100.0 + number / 2)
    watch.restart(FLOW)
    assert not watch.looked(FLOW, 9, 0, SILENCE_S, 110.0)
    assert len(watch) == 1
    watch.keep_only(set())
    assert len(watch) == 0


def test_answers_are_counted_for_each_path() -> None:
    watch = SilenceWatch()
    assert watch.answers(FLOW) == 0
    for packets_in in (100, 103, 103, 109):
        watch.looked(FLOW, 5, packets_in, SILENCE_S, 100.0)
    assert watch.answers(FLOW) == 9
    watch.restart(FLOW)
    watch.looked(FLOW, 5, 110, SILENCE_S, 110.0)
    assert watch.answers(FLOW) == 0
