"""Probes that go wrong, or hit a limit, give an answer, too."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from serval_core import kernel_probes


def test_a_probe_that_crashes_is_an_answer() -> None:
    def crash() -> dict[str, int | str]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    how = f"the probe ended with wait status {signal.SIGKILL.value}"
    assert kernel_probes._in_child(crash) == {"crashed": how}


def test_a_probe_that_raises_is_an_answer() -> None:
    answer = kernel_probes._in_child(lambda: {"veth": 1 // 0})
    assert "ZeroDivisionError" in str(answer["crashed"])


def test_a_probe_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_probes, "CHILD_TIMEOUT_S", 0.05)

    def hang() -> dict[str, int | str]:
        while True:
            signal.pause()

    assert kernel_probes._in_child(hang) == {"crashed": "the probe did not end within 0.05 s"}


def test_pipes_are_counted_up_to_what_there_is() -> None:
    assert kernel_probes.count_pipes(3, 1 << 16) == 3
    limit = subprocess.run(
        ["prlimit", "--nofile=64:64", sys.executable, "-c", COUNT_PROGRAM],
        check=True,
        capture_output=True,
        text=True,
    )
    got, open_after = map(int, limit.stdout.split())
    assert 20 <= got <= 31
    assert open_after < 10


COUNT_PROGRAM = """
import os
from serval_core.kernel_probes import count_pipes
print(count_pipes(1000, 65536), len(os.listdir("/proc/self/fd")))
"""


def test_a_congestion_control_that_does_not_exist_is_refused() -> None:
    assert kernel_probes.try_congestion_control("no-such") == errno.ENOENT
