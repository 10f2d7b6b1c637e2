"""What holds for every test: who may run it, and what a test that needs root says when it is not given it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import structlog

from lab.hosts import Lab


@pytest.fixture(autouse=True)
def logging_as_at_start() -> Iterator[None]:
    """A test that runs the command line in this process configures logging to streams that end with it."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def root() -> None:
    """Ask for this in a test that needs root. It fails instead of skipping: a skipped test proves nothing."""
    if os.geteuid() != 0:
        pytest.fail("this test needs root: run `make test` as root", pytrace=False)


@pytest.fixture
def lab(root: None) -> Iterator[Lab]:
    """A laboratory of network namespaces that is gone after the test."""
    with Lab() as laboratory:
        yield laboratory
