"""Keys, made once."""

from __future__ import annotations

import pytest

from serval_core.controller.authentication import Signer
from serval_core.identity import Identity
from tests.serval_core.controller.memory import new_identity


@pytest.fixture(scope="session")
def identity() -> Identity:
    return new_identity()


@pytest.fixture(scope="session")
def stranger() -> Identity:
    return new_identity()


@pytest.fixture
def signer(identity: Identity) -> Signer:
    return Signer([identity])
