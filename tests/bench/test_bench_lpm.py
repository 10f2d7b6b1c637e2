"""The benchmark of large service tables: figures that make sense, from a table of which every answer can be checked."""

from __future__ import annotations

from random import Random

import pytest

from bench import lpm
from serval_core.names import SERVICE_ID_BITS


def test_a_small_table_gives_every_figure() -> None:
    found = lpm.measure_apart(5000, 300)
    assert (found.prefixes, found.lengths) == (5000, 10)
    assert all(value > 0 for value in found)
    assert found.sentence().startswith("service table with 5,000 prefixes of 10 lengths: ")


def test_the_prefixes_are_different_and_always_the_same() -> None:
    made = list(lpm.prefixes(20_000, Random(lpm.SEED)))
    assert len(set(made)) == 20_000
    assert made == list(lpm.prefixes(20_000, Random(lpm.SEED)))
    whole = sum(prefix.bits == SERVICE_ID_BITS for prefix in made)
    assert 0.6 < whole / 20_000 < 0.8
    assert {prefix.bits for prefix in made} == {SERVICE_ID_BITS, *lpm.SHORTER_BITS}


def test_a_serviceid_under_a_prefix_is_found_by_search() -> None:
    made = list(lpm.prefixes(500, Random(lpm.SEED)))
    asked = [lpm.under(prefix, Random(1)) for prefix in made[:20]]
    assert all(
        found >= prefix.bits for found, prefix in zip(lpm.by_search(500, asked), made[:20], strict=True)
    )


def test_a_failed_measurement_says_why() -> None:
    with pytest.raises(RuntimeError, match="invalid int value"):
        lpm.measure_apart("many")  # type: ignore[arg-type]
