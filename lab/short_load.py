"""What do many short connections experience, and when? `Load` runs `lab.short_connections` on a host and keeps the answers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

from lab.hosts import Host
from lab.native import ENVIRONMENT
from lab.traffic import PROJECT


class Attempt(NamedTuple):
    """One connection. `began`: seconds of the wall clock; `got`: what it was answered, "" if it failed."""

    began: float
    took_s: float
    got: str
    failure: str


class Load:
    """A running load. Its `attempts` grow while it runs; leaving the context lets the last ones finish."""

    def __init__(self, host: Host, address: str, path: str, per_second: float, workers: int) -> None:
        command = [sys.executable, "-m", "lab.short_connections", "--address", address, "--path", path]
        command += ["--per-second", str(per_second), "--workers", str(workers)]
        self.attempts: list[Attempt] = []
        self._process = host.popen(
            command, cwd=PROJECT, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._reader = threading.Thread(target=self._read, name="load", daemon=True)
        self._reader.start()

    def between(self, began: float, ended: float) -> list[Attempt]:
        """The connections that began at `began` or later, and before `ended`."""
        return [each for each in self.attempts if began <= each.began < ended]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._reader.join()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            self.attempts.append(
                Attempt(said["began"], said["took_s"], said.get("got", ""), said.get("failed", ""))
            )


def answered(attempts: Sequence[Attempt]) -> Counter[str]:
    """How many connections each server has answered."""
    return Counter(each.got for each in attempts if not each.failure)


def chi_square(counted: Counter[str], weights: dict[str, int]) -> tuple[float, float]:
    """How far counts of three servers are from their weights: the statistic, and the probability of one as large."""
    if len(weights) != 3:
        raise ValueError("the tail of the distribution is known here for two degrees of freedom only")
    total, whole = sum(counted[name] for name in weights), sum(weights.values())
    expected = {name: total * weight / whole for name, weight in weights.items()}
    statistic = sum((counted[name] - expected[name]) ** 2 / expected[name] for name in weights)
    return statistic, math.exp(-statistic / 2)
