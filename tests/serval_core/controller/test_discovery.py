"""Do hosts find routers, believe only those they asked, and forget those that have gone?"""

from __future__ import annotations

from random import Random

import pytest

from serval_core.controller import discovery
from serval_core.controller.discovery import Announcer, Network, RouterFinder
from serval_core.errors import TheirMistake
from serval_core.identity import Identity
from serval_core.names import parse_address
from serval_core.wire.router_discovery import Announcement, emit_announcement

from .memory import HOST, ROUTER, START

BROADCAST = parse_address("10.0.0.255")
NETWORK = Network(BROADCAST, HOST)


def finder(*keys: bytes) -> RouterFinder:
    made = RouterFinder(20.0, keys, Random(1))
    made.set_networks([NETWORK], START)
    return made


def solicit(host: RouterFinder, now: float = START) -> bytes:
    host.handle_timeouts(now)
    (outgoing,) = host.take_outgoing()
    assert outgoing.destination == BROADCAST
    return outgoing.payload


def test_a_router_answers_and_is_known_for_as_long_as_it_says() -> None:
    host, router = finder(), Announcer(60.0, None)
    answer = router.answer(solicit(host), HOST, ROUTER, START)
    host.announcement_received(answer, ROUTER, START)
    assert host.routers == (ROUTER,)
    host.handle_timeouts(START + 59)
    assert host.routers == (ROUTER,)
    host.handle_timeouts(START + 61)
    assert host.routers == ()


def test_rounds_follow_each_other_quickly_at_first() -> None:
    host = finder()
    times = []
    while len(times) < 5:
        due = host.next_timeout()
        assert due is not None
        host.handle_timeouts(due)
        times.append(due - START)
        host.take_outgoing()
    assert times == [0.0, 1.0, 4.0, 24.0, 44.0]
    host.set_networks([NETWORK, Network(BROADCAST + 256, HOST + 256)], START + 50)
    assert host.next_timeout() == START + 50
    host.handle_timeouts(START + 50)
    assert len(host.take_outgoing()) == 2
    host.set_networks([], START + 51)
    assert host.next_timeout() is None


def test_only_answers_to_recent_questions_are_believed() -> None:
    host, router = finder(), Announcer(60.0, None)
    first = solicit(host)
    second = solicit(host, START + 1)
    third = solicit(host, START + 4)
    with pytest.raises(TheirMistake, match=discovery.WRONG_NONCE):
        host.announcement_received(router.answer(first, HOST, ROUTER, START), ROUTER, START + 5)
    host.announcement_received(router.answer(second, HOST, ROUTER, START), ROUTER, START + 5)
    host.announcement_received(router.answer(third, HOST, ROUTER, START), ROUTER, START + 5)
    with pytest.raises(TheirMistake, match=discovery.WRONG_NONCE):
        host.announcement_received(emit_announcement(Announcement(bytes(8), 60, ROUTER)), ROUTER, START)
    with pytest.raises(TheirMistake, match=discovery.WRONG_ADDRESS):
        host.announcement_received(router.answer(third, HOST, ROUTER, START), HOST, START + 5)
    assert host.counters["refused_announcement_nonce"] == 2


def test_with_trusted_keys_only_their_owners_are_routers(identity: Identity, stranger: Identity) -> None:
    host = finder(identity.public_key)
    question = solicit(host)
    for who, reason in ((None, discovery.UNKNOWN_KEY), (stranger, discovery.UNKNOWN_KEY)):
        with pytest.raises(TheirMistake, match=reason):
            host.announcement_received(
                Announcer(60.0, who).answer(question, HOST, ROUTER, START), ROUTER, START
            )
    answer = Announcer(60.0, identity).answer(question, HOST, ROUTER, START)
    for at in range(16, len(answer)):
        with pytest.raises(TheirMistake):
            host.announcement_received(
                answer[:at] + bytes([answer[at] ^ 1]) + answer[at + 1 :], ROUTER, START
            )
    assert host.routers == ()
    host.announcement_received(answer, ROUTER, START)
    assert host.routers == (ROUTER,)


def test_neither_side_can_be_flooded() -> None:
    host, router = finder(), Announcer(60.0, None)
    question = solicit(host)
    for number in range(100):
        if number < 20:
            router.answer(question, HOST, ROUTER, START)
        else:
            with pytest.raises(TheirMistake, match=discovery.TOO_MANY_SOLICITATIONS):
                router.answer(question, HOST, ROUTER, START)
    assert router.answer(question, HOST + 1, ROUTER, START)
    with pytest.raises(TheirMistake):
        router.answer(b"hello", HOST + 1, ROUTER, START)
    for number in range(20):
        answer = Announcer(60.0, None).answer(question, HOST, ROUTER + number, START)
        if number < discovery.ROUTERS_MAX:
            host.announcement_received(answer, ROUTER + number, START)
        else:
            with pytest.raises(TheirMistake, match=discovery.TOO_MANY_ROUTERS):
                host.announcement_received(answer, ROUTER + number, START)
