"""Does a host keep its routers informed: at once, every 20 s, after a move, and at the end?"""

from __future__ import annotations

from itertools import pairwise

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from serval_core.controller.authentication import Signer
from serval_core.controller.policy import Requirement
from serval_core.controller.registration import Way
from serval_core.identity import Identity
from serval_core.names import parse_service
from serval_core.wire.control_messages import MessageType, parse_registration
from serval_core.wire.registration_offer import Offer, parse_extension

from .memory import HOST, OTHER, ROUTER, Host, Router

OTHER_SERVICE = parse_service("80")


def deliver(host: Host, router: Router) -> None:
    for payload in host.payloads():
        router.receive(payload, host.address)


def test_registration_is_confirmed_soon_and_then_refreshed_every_twenty_seconds() -> None:
    """The confirmation is for a first datagram that got lost; refreshes come a little early, never late."""
    host = Host()
    host.offer()
    sent = host.advance(100)
    times = [at for at, _ in sent]
    assert times[:2] == [0.0, 1.0]
    gaps = [later - earlier for earlier, later in pairwise(times[1:])]
    assert len(gaps) >= 4
    assert all(18 <= gap <= 20 for gap in gaps)
    messages = [parse_registration(outgoing.payload) for _, outgoing in sent]
    assert [message.transaction_id for message in messages] == list(range(1, len(messages) + 1))
    assert [(message.refresh, message.old_address) for message in messages] == [(False, 0)] + [
        (True, HOST)
    ] * (len(messages) - 1)


def test_refreshes_of_many_services_spread() -> None:
    host = Host()
    for number in range(1, 51):
        host.offer(parse_service(str(number)))
    host.advance(100)
    assert len({at for at, _ in host.advance(20)}) > 40


def test_closing_unregisters_and_ends_the_refreshes() -> None:
    host = Host()
    host.offer()
    host.payloads()
    host.withdraw()
    (payload,) = host.payloads()
    assert parse_registration(payload).kind is MessageType.UNREGISTER
    assert host.advance(100) == []
    host.withdraw()
    assert host.payloads() == []


def test_moving_registers_the_new_address_in_place_of_the_old_one() -> None:
    host, router = Host(), Router()
    host.offer()
    deliver(host, router)
    host.move(OTHER)
    deliver(host, router)
    assert router.rules() == {("76568", "10.0.0.2", 1, 1)}
    assert router.role.registrations.counters == {"registered": 1, "changed": 1}
    host.withdraw()
    deliver(host, router)
    assert router.rules() == set()


def test_a_router_that_appears_later_is_told_everything_and_one_that_went_nothing() -> None:
    host = Host()
    host.offer()
    host.offer(OTHER_SERVICE)
    host.payloads()
    host.role.set_ways([Way(ROUTER, ROUTER, HOST), Way(9, 9, HOST)], host.now)
    outgoing = host.outgoing()
    assert [(each.destination, parse_registration(each.payload).refresh) for each in outgoing] == [
        (9, False),
        (9, False),
    ]
    host.role.set_ways([Way(9, 9, HOST)], host.now)
    assert host.payloads() == []
    host.withdraw()
    assert [each.destination for each in host.outgoing()] == [9]


def test_weight_and_priority_follow_the_48_bytes_and_reach_the_rule() -> None:
    host, router = Host(), Router()
    host.offer(weight=3, priority=2)
    (payload,) = host.payloads()
    assert len(payload) > 48
    assert int.from_bytes(payload[2:4], "big") == 48
    assert parse_extension(payload).offer == Offer(2, 3, 50)
    router.receive(payload)
    assert router.rules() == {("76568", "10.0.0.1", 2, 3)}
    host.offer(weight=5, priority=2)
    deliver(host, router)
    assert router.rules() == {("76568", "10.0.0.1", 2, 5)}
    host.offer(weight=5, priority=2)
    assert host.payloads() == []


def test_withdrawing_all_unregisters_each() -> None:
    host, router = Host(), Router()
    host.offer()
    host.offer(OTHER_SERVICE)
    deliver(host, router)
    assert len(router.rules()) == 2
    host.role.withdraw_all()
    deliver(host, router)
    assert router.rules() == set()


def test_a_service_that_comes_and_goes_before_its_turn_costs_no_message() -> None:
    """Ten thousand short-lived sockets must not use up what routers take of this host."""
    host, router = Host(), Router()
    host.offer()
    deliver(host, router)
    for number in range(1, 10_001):
        host.offer(parse_service(str(number)))
        host.withdraw(parse_service(str(number)))
    assert host.payloads() == []
    for number in range(1, 1001):
        host.offer(parse_service(str(number)))
    first = host.payloads()
    assert len(first) == 499
    sent = host.advance(4)
    assert 550 <= len(sent) <= 601 + 10
    for number in range(1, 1001):
        host.withdraw(parse_service(str(number)))
    host.withdraw()
    for payload in [*first, *(outgoing.payload for _, outgoing in sent)]:
        router.now += 0.01
        router.receive(payload)
    assert router.refusals() == {}
    last = host.role.take_outgoing(host.now, host.wall, unlimited=True)
    for outgoing in last:
        router.now += 0.01
        router.receive(outgoing.payload)
    assert router.rules() == set()


def test_an_end_that_was_not_told_yet_is_taken_back() -> None:
    host, router = Host(), Router()
    host.offer()
    deliver(host, router)
    host.withdraw()
    host.offer()
    (payload,) = host.payloads()
    assert parse_registration(payload).kind is MessageType.REGISTER
    router.receive(payload)
    assert len(router.rules()) == 1


def test_an_end_that_was_taken_back_and_comes_after_all_is_told() -> None:
    host, router = Host(), Router()
    host.offer()
    deliver(host, router)
    host.withdraw()
    host.offer()
    host.withdraw()
    deliver(host, router)
    assert router.rules() == set()
    assert host.role._told == {}


def test_a_router_that_is_left_is_told_so_and_one_that_is_found_again_everything() -> None:
    """Under the key that made the registrations, as no other may end them."""
    first, second = Signer([Identity(Ed25519PrivateKey.generate())]), Signer([Identity(Ed25519PrivateKey.generate())])
    host, router = Host(signer=first), Router(default=Requirement.SIGNED)
    host.offer()
    host.offer(OTHER_SERVICE)
    deliver(host, router)
    host.withdraw(OTHER_SERVICE)
    for outgoing in host.role.leave(host.role.ways, host.now, host.wall):
        router.receive(outgoing.payload, host.address)
    assert router.rules() == set()
    assert host.payloads() == []
    host.role.set_signer(second)
    host.move(host.address)
    deliver(host, router)
    assert router.rules() == {("76568", "10.0.0.1", 1, 1)}
    assert router.refusals() == {}
