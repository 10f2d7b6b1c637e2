"""The hosts that the whole system is tested on, and the proof that nothing stays behind.

`chain`: four in a row, for unmodified programs. `pair`: two, for the translator's own behaviour.
`wire`: two, our stack on one and a prototype on the other. `site`: two with a servald each.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from playing import OUR_SERVICE
from prototype_wire import OURS, QUICK, THEIRS, Wire, assert_idle
from servald_site import Site
from through_chain import PORTS, RAW, settled_holdings, wait_for_holdings
from translator_pair import Pair

from lab.chain import Chain, kernel_traces
from lab.hosts import Lab
from tests.serval_core.stack_thread import StackThread


@pytest.fixture(scope="session")
def chain(root: None) -> Iterator[Chain]:
    """Four hosts in a row with both translators running. Each of PORTS leads to that port of the server."""
    with Lab() as lab:
        chain = Chain(lab, {port: str(10_000 + port) for port in PORTS})
        # Tests start their servers as they need them: a reverse translator that notices would only be in their way.
        chain.start(reverse_options=["--health-check", "none"])
        yield chain
        statuses = chain.stop()
        assert statuses == (0, 0), chain.translator.log() + chain.reverse.log()
        for host in (chain.translator_host, chain.reverse_host):
            assert kernel_traces(host) == []
            assert host.process_ids() == []


@pytest.fixture
def nothing_left(chain: Chain) -> Iterator[None]:
    """Both translators hold after the test what they held before: no flow, descriptor or map entry more."""
    sides = (chain.translator, chain.reverse)
    before = [settled_holdings(side) for side in sides]
    yield
    for side, held in zip(sides, before, strict=True):
        assert held["flows"] == 0
        wait_for_holdings(side, held)


@pytest.fixture
def listener(chain: Chain) -> Iterator[socket.socket]:
    """A listening socket on the server behind the RAW port."""
    with chain.server.call(socket.create_server, (chain.direct, RAW)) as server:
        server.settimeout(10)
        yield server


@pytest.fixture(scope="module")
def two_hosts(root: None) -> Iterator[Pair]:
    """The hosts of `pair`, made once for all tests of a module."""
    with Lab() as lab:
        yield Pair(lab)


@pytest.fixture
def pair(two_hosts: Pair) -> Iterator[Pair]:
    """Two hosts on which the test starts translators; afterwards they are ended and must have removed their traces."""
    yield two_hosts
    two_hosts.end()


@pytest.fixture(scope="module")
def shared_wire(root: None) -> Iterator[Wire]:
    """Our stack and a prototype's host, made once for all tests of a module."""
    with Lab() as lab:
        ours, theirs = lab.host("ours"), lab.host("theirs")
        lab.connect(ours, f"{OURS}/24", theirs, f"{THEIRS}/24")
        with StackThread(ours, sal=QUICK) as stack:
            yield Wire(stack, stack.listen(str(OUR_SERVICE)), ours, theirs)


@pytest.fixture
def wire(shared_wire: Wire) -> Iterator[Wire]:
    """The wire, and the proof that a test left nothing in the stack: no flow, no socket, no map entry."""
    yield shared_wire
    assert_idle(shared_wire.stack)


@pytest.fixture
def site(lab: Lab) -> Iterator[Site]:
    made = Site(lab)
    yield made
    assert [made.near_daemon.stop(), made.far_daemon.stop()] == [0, 0]
    assert [*kernel_traces(made.near), *kernel_traces(made.far)] == []
