"""Is everything that the service table decides counted, and shown as plain data?"""

from __future__ import annotations

import json
import random

from hypothesis import given
from hypothesis import strategies as st

from serval_core.names import ServicePrefix
from serval_core.rules import Rule
from tests.serval_core.tables import (
    BROADCAST_1,
    WEB,
    WEB_PREFIX,
    A,
    B,
    C,
    low,
    number,
    table_with,
)


def test_packets_and_bytes_are_counted_per_target_per_entry_and_in_total() -> None:
    table = table_with(Rule.forward(WEB_PREFIX, A), Rule.forward(WEB_PREFIX, B, priority=0))
    for _ in range(3):
        table.resolve(WEB, low, packet_bytes=116)
    table.resolve(WEB, low, exclude={A}, packet_bytes=50)
    table.resolve(WEB, low, exclude={A, B}, packet_bytes=1000)
    (entry,) = table.snapshot()
    assert (entry["packets_resolved"], entry["bytes_resolved"], entry["packets_dropped"]) == (4, 398, 0)
    targets = entry["targets"]
    assert isinstance(targets, list)
    assert [(each["packets_resolved"], each["bytes_resolved"]) for each in targets] == [(3, 348), (1, 50)]
    assert table.counters == {
        "packets_resolved": 4,
        "bytes_resolved": 398,
        "dropped_no_entry": 0,
        "dropped_by_rule": 0,
        "delayed": 0,
        "all_excluded": 1,
    }


def test_what_a_drop_rule_refused_is_counted_there() -> None:
    table = table_with(Rule.drop(WEB_PREFIX))
    table.resolve(WEB, low)
    table.resolve(WEB, low)
    (entry,) = table.snapshot()
    targets = entry["targets"]
    assert isinstance(targets, list)
    assert (entry["packets_dropped"], targets[0]["packets_dropped"], entry["packets_resolved"]) == (2, 2, 0)


def test_local_resolutions_are_counted() -> None:
    table = table_with(Rule.demux(WEB_PREFIX, 1))
    table.resolve_local(WEB, packet_bytes=10)
    (entry,) = table.snapshot()
    assert (entry["packets_resolved"], entry["bytes_resolved"]) == (1, 10)


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(0, 2)), max_size=60), st.integers())
def test_no_resolution_escapes_the_books(questions: list[tuple[int, int]], seed: int) -> None:
    table = table_with(
        Rule.forward(WEB_PREFIX, A, weight=2),
        Rule.forward(WEB_PREFIX, B),
        Rule.forward(WEB_PREFIX, C, priority=0),
    )
    source = random.Random(seed)
    for address, times in questions:
        for _ in range(times):
            table.resolve(WEB, source.random, exclude={address})
    (entry,) = table.snapshot()
    targets = entry["targets"]
    assert isinstance(targets, list)
    asked = sum(times for _, times in questions)
    assert sum(each["packets_resolved"] for each in targets) == number(entry["packets_resolved"]) == asked


def test_snapshot_is_plain_and_readable() -> None:
    table = table_with(Rule.demux(WEB_PREFIX, 3), Rule.forward(ServicePrefix.of(WEB, 24), A, weight=5))
    table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_1, 2)])
    rows = json.loads(json.dumps(table.snapshot()))
    assert [row["prefix"] for row in rows] == ["76568", "0x00012b:24", "default"]
    assert rows[0]["service_id"] == WEB.hex_text
    assert rows[0]["targets"][0] == {
        "type": "DEMUX",
        "priority": 32000,
        "weight": 1024,
        "address": None,
        "interface_index": None,
        "listener_id": 3,
        "broadcast": False,
        "origin": "bound",
        "idle_timeout_s": None,
        "hard_timeout_s": None,
        "down": None,
        "packets_resolved": 0,
        "bytes_resolved": 0,
        "packets_dropped": 0,
    }
    assert rows[1]["targets"][0]["address"] == "10.0.0.1"
    assert rows[2]["targets"][0]["broadcast"] is True
