"""Where does a stack of its own live? In a network namespace of its own, since the name of its socket belongs to one."""

from __future__ import annotations

import pytest

from lab.hosts import Host, Lab


@pytest.fixture
def host(lab: Lab) -> Host:
    """A host of this test alone."""
    return lab.host("stack")
