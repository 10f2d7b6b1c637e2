"""Fixtures of the translator's tests: each splice test runs with the compiled and with the pure Python engine."""

from __future__ import annotations

from importlib import import_module

import pytest

from translator.splice_engine import SpliceEngine


@pytest.fixture(params=["splice_ext", "splice_fallback"], ids=["compiled", "python"])
def engine_class(request: pytest.FixtureRequest) -> type[SpliceEngine]:
    """Both engines. A missing compiled one is a failure: `make setup` builds it."""
    found: type[SpliceEngine] = import_module(f"translator.{request.param}").SpliceEngine
    return found
