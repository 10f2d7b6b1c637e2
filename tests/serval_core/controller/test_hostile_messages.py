"""Does anything that may arrive on the controller's services do more than be counted?"""

from __future__ import annotations

import contextlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.controller.discovery import Announcer, Network, RouterFinder
from serval_core.errors import TheirMistake
from serval_core.wire.registration_offer import Offer, emit_extension
from serval_core.wire.router_discovery import emit_solicitation

from .memory import HOST, OTHER, ROUTER, START, Router, register, unregister

GOOD = (
    register(),
    register(refresh=True, old_address=OTHER),
    unregister(),
    register() + emit_extension(Offer(1, 2, 50)),
    emit_solicitation(bytes(8)),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good message, cut, lengthened, or with bytes changed."""
    data = bytearray(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    end = draw(st.integers(0, len(data)))
    return bytes(data[: end if draw(st.booleans()) else None]) + draw(st.binary(max_size=8))


@given(
    st.lists(
        st.tuples(st.binary(max_size=200) | damaged(), st.sampled_from([HOST, OTHER, ROUTER])), max_size=20
    )
)
def test_every_message_to_a_router_is_accepted_or_counted(messages: list[tuple[bytes, int]]) -> None:
    router = Router()
    for payload, source in messages:
        router.receive(payload, source)
        router.advance(0.1)
    counters, done = router.role.counters, router.role.registrations.counters
    explained = sum(router.refusals().values()) + sum(
        counters[name] for name in ("own_messages", "control_services", "unregistered_unknown")
    )
    explained += sum(done[name] for name in ("registered", "changed", "refreshed", "unregistered"))
    assert explained == counters["messages"] == len(messages)
    assert len(router.rules()) == len(router.role.registrations)


@given(st.binary(max_size=200) | damaged())
def test_nothing_that_was_not_asked_for_makes_a_router(data: bytes) -> None:
    finder = RouterFinder(20.0, (), Random(1))
    finder.set_networks([Network(HOST | 0xFF, HOST)], START)
    finder.handle_timeouts(START)
    with pytest.raises(TheirMistake):
        finder.announcement_received(data, ROUTER, START)
    assert finder.routers == ()
    assert sum(finder.counters.values()) == 1
    announcer = Announcer(60.0, None)
    with contextlib.suppress(TheirMistake):
        announcer.answer(data, HOST, ROUTER, START)
    assert sum(announcer.counters.values()) == 1
