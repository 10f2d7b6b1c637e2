"""Does the benchmark of migration move a flow in each framing?"""

from __future__ import annotations

import pytest

from bench import migration
from bench.migration import FRAMINGS, MigrationGaps, measure


def test_each_framing_moves(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`measure` raises when a flow has another framing, does not move, or carries something else than was sent."""
    monkeypatch.setattr(migration, "WARM_UP_S", 0.0)
    found = measure(rounds=1, moves=2)
    assert found.moving.keys() == found.still.keys() == set(FRAMINGS)
    assert all(len(gaps) == 2 and min(gaps) > 0 for taken in found for gaps in taken.values())


def test_the_sentence_names_median_and_longest() -> None:
    gaps = {name: [0.004, 0.002, 0.009] for name in FRAMINGS}
    assert "udp 4.0 ms (longest 9.0; without a move 4.0)" in MigrationGaps(gaps, gaps).sentence()
