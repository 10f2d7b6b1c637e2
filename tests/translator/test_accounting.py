"""Does the connection limit hold, and is who waits for room told once there is some?"""

from __future__ import annotations

import pytest
import structlog.testing

from serval_core.config_file import Misconfigured
from translator.accounting import Admission
from translator.complaint import SILENCE_S, Complaint
from translator.config import LimitsSection, Settings
from translator.descriptors import RESERVED_DESCRIPTORS, connection_limit
from translator.port_map import parse_map


def test_room_is_announced_once_after_it_was_missed() -> None:
    announced = []
    admission = Admission(2)
    admission.on_room = lambda: announced.append(admission.active)
    admission.enter()
    assert not admission.is_full()
    admission.enter()
    admission.leave()
    assert announced == []  # nobody had asked while it was full
    admission.enter()
    assert admission.is_full()
    assert admission.is_full()
    admission.leave()
    admission.leave()
    assert announced == [1]
    assert (admission.times_full, admission.high_water) == (1, 2)


def test_a_large_limit_waits_for_some_room() -> None:
    announced = []
    admission = Admission(640)
    admission.on_room = lambda: announced.append(admission.active)
    for _ in range(640):
        admission.enter()
    assert admission.is_full()
    while not announced:
        admission.leave()
    assert announced == [620]


def test_the_last_client_turns_the_light_off() -> None:
    empty = []
    admission = Admission(10)
    admission.on_empty = lambda: empty.append(True)
    admission.enter()
    admission.enter()
    admission.leave()
    assert empty == []
    admission.leave()
    assert empty == [True]


def _settings(limit: int | None, ports: str = "80") -> Settings:
    return Settings(maps=(parse_map(f"{ports}=1", {}, "x"),), limits=LimitsSection(connections=limit))


def test_the_default_limit_adapts_to_the_descriptors() -> None:
    assert connection_limit(_settings(None), 1_000_000) == 20_000
    assert connection_limit(_settings(None), RESERVED_DESCRIPTORS + 1 + 700) == 100
    assert connection_limit(_settings(None, "1-100"), RESERVED_DESCRIPTORS + 100 + 700) == 100


def test_an_explicit_limit_is_obeyed_or_refused() -> None:
    assert connection_limit(_settings(100), RESERVED_DESCRIPTORS + 1 + 300) == 100
    with pytest.raises(Misconfigured, match=r"--connection-limit 101 .* \(nearest: 100\)"):
        connection_limit(_settings(101), RESERVED_DESCRIPTORS + 1 + 300)


def test_more_ports_than_descriptors_are_refused() -> None:
    with pytest.raises(Misconfigured, match="60000 mapped ports: the process may have 20000 descriptors"):
        connection_limit(_settings(None, "1-60000"), 20_000)


def test_a_warning_is_said_once_and_then_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("translator.complaint.time.monotonic", lambda: now)
    with structlog.testing.capture_logs() as lines:
        complaint = Complaint()
        for _ in range(4):
            complaint.say("it burns", where="here")
        now += SILENCE_S
        complaint.say("it burns", where="there")
        now += SILENCE_S
        complaint.say("it burns")
    assert lines == [
        {"event": "it burns", "where": "here", "log_level": "warning"},
        {"event": "it burns", "where": "there", "unsaid": 3, "log_level": "warning"},
        {"event": "it burns", "log_level": "warning"},
    ]
