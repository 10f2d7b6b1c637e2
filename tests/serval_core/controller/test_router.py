"""What does a router make of registrations, good ones, unfit ones and too many?"""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.controller import router as reasons
from serval_core.controller.authentication import Signer
from serval_core.controller.policy import PrefixPolicy, RegistrationPolicy, Requirement
from serval_core.controller.router import RouterLimits
from serval_core.names import ServiceID, ServicePrefix, parse_address, parse_service
from serval_core.rules import Rule, RuleType
from serval_core.wire import control_messages, registration_offer
from serval_core.wire.registration_offer import Offer, emit_extension

from .memory import HOST, OTHER, ROUTER, ROUTER_ID, SERVICE, UPSTREAM, Host, Router, register, unregister

EXPIRY_S = 50


def test_silence_for_fifty_seconds_ends_a_registration_and_a_refresh_prolongs_it() -> None:
    router = Router()
    router.receive(register())
    router.advance(EXPIRY_S - 1)
    assert len(router.rules()) == 1
    router.receive(register(refresh=True, old_address=HOST))
    router.advance(EXPIRY_S - 1)
    assert len(router.rules()) == 1
    router.advance(1)
    assert router.rules() == set()
    assert router.news[-1] == (
        "unregistered",
        {"prefix": "76568", "address": "10.0.0.1", "why": "expired"},
    )
    # What expired is gone in every respect: the next refresh is a new registration.
    router.receive(register(refresh=True, old_address=HOST))
    assert router.rules() == {("76568", "10.0.0.1", 1, 1)}


def test_instances_of_one_service_come_and_go_one_by_one() -> None:
    router = Router()
    for last in range(1, 6):
        router.receive(register(), parse_address(f"10.0.0.{last}"))
    assert len(router.rules()) == 5
    router.receive(unregister(), parse_address("10.0.0.3"))
    assert {rule[1] for rule in router.rules()} == {"10.0.0.1", "10.0.0.2", "10.0.0.4", "10.0.0.5"}
    router.receive(unregister(), parse_address("10.0.0.3"))
    assert router.role.counters["unregistered_unknown"] == 1
    assert [weight for _, weight in router.weights] == [1, 2, 3, 4, 5, 4]


def test_a_requested_lifetime_is_honoured_within_limits() -> None:
    router = Router(lifetime_max_s=100.0)
    for last, lifetime_s in ((1, 20), (2, 0), (3, 10_000)):
        payload = register() + emit_extension(Offer(1, 1, lifetime_s))
        router.receive(payload, parse_address(f"10.0.0.{last}"))
    for at_s, left in ((0.5, 3), (2, 2), (19, 2), (21, 1), (99, 1), (101, 0)):
        router.advance(at_s - (router.now - 1000))
        assert len(router.rules()) == left


def test_a_moving_host_keeps_its_counters() -> None:
    router = Router()
    router.receive(register())
    for _ in range(3):
        router.table.resolve(SERVICE.service_id, lambda: 0.5)
    router.receive(register(refresh=True, old_address=HOST), OTHER)
    (entry,) = router.table.snapshot()
    assert entry["packets_resolved"] == 3
    # Both places known: the old one goes, the new one stays.
    router.receive(register())
    router.receive(register(refresh=True, old_address=HOST), OTHER)
    assert router.rules() == {("76568", "10.0.0.2", 1, 1)}


def test_the_operators_rules_are_not_touched() -> None:
    router = Router()
    rule = Rule.forward(SERVICE, HOST, weight=7, origin="configured")
    router.table.add(rule)
    router.receive(register())
    assert router.refusals() == {reasons.CONFLICT: 1}
    router.receive(unregister())
    assert router.rules() == {("76568", "10.0.0.1", 1, 7)}
    # A registration that would move onto the operator's rule loses its own place and leaves that alone.
    router.receive(register(), OTHER)
    router.receive(register(refresh=True, old_address=OTHER), HOST)
    assert router.rules() == {("76568", "10.0.0.1", 1, 7)}
    assert router.role.registrations.counters["displaced"] == 1


def test_a_rule_removed_by_hand_stays_away_while_the_registration_lasts() -> None:
    router = Router()
    router.receive(register())
    router.table.remove(SERVICE, RuleType.FORWARD, HOST)
    router.receive(register(refresh=True, old_address=HOST))
    assert router.rules() == set()
    (listed,) = router.role.registrations.snapshot(router.now)
    assert not listed["in_use"]
    router.table.add(Rule.forward(SERVICE, HOST, weight=9))
    router.advance(EXPIRY_S)
    assert router.rules() == {("76568", "10.0.0.1", 1, 9)}
    assert len(router.role.registrations) == 0


def test_a_fresh_registration_takes_the_mark_of_a_dead_target_away() -> None:
    router = Router()
    router.receive(register())
    router.table.mark_down(HOST, router.now + 100, SERVICE)
    router.receive(register(refresh=True, old_address=HOST))
    assert router.table.mark_up(HOST, SERVICE) == 1
    router.table.mark_down(HOST, router.now + 100, SERVICE)
    router.receive(register())
    assert router.table.mark_up(HOST, SERVICE) == 0


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", control_messages.TRUNCATED),
        (register()[:47], control_messages.TRUNCATED),
        (register() + b"x", registration_offer.EXTENSION_LENGTH),
        (register() + bytes(200), registration_offer.UNKNOWN_EXTENSION),
        (register() + emit_extension(Offer(1, 1, 50)) + b"x", registration_offer.EXTENSION_LENGTH),
        (b"\x05" + register()[1:], control_messages.UNKNOWN_TYPE),
        (register()[:2] + b"\x30\x00" + register()[4:], control_messages.LENGTH),
        (register(ServicePrefix.of(ServiceID(bytes(32)), 0)), reasons.DEFAULT_PREFIX_REASON),
        (register(parse_service("0x80:1")), "prefix_too_broad"),
        (register() + emit_extension(Offer(1001, 1, 50)), reasons.PRIORITY_TOO_HIGH),
        (register() + emit_extension(Offer(1, 1001, 50)), reasons.WEIGHT_TOO_HIGH),
    ],
)
def test_unfit_messages_are_refused_with_the_reason_and_change_nothing(payload: bytes, reason: str) -> None:
    router = Router()
    router.receive(register(parse_service("80")))
    before = router.rules(), router.role.registrations.snapshot(router.now)
    router.receive(payload)
    assert router.refusals() == {reason: 1}
    assert (router.rules(), router.role.registrations.snapshot(router.now)) == before


def test_senders_that_are_none_are_refused_or_ignored() -> None:
    router = Router()
    router.receive(register(), HOST, ROUTER_ID)
    router.receive(register(), parse_address("10.0.0.255") | 0xE0000000)
    router.receive(register(), ROUTER)
    router.receive(register(), UPSTREAM)
    assert router.refusals() == {
        reasons.WRONG_SOURCE_SERVICE: 1,
        reasons.WRONG_SOURCE_ADDRESS: 1,
        reasons.FROM_UPSTREAM: 1,
    }
    assert router.role.counters["own_messages"] == 1
    assert router.rules() == set()


def test_a_flood_of_one_host_costs_only_that_host() -> None:
    router = Router(messages_per_host_s=10.0, registrations_per_host=20)
    router.receive(register(), OTHER)
    for number in range(1, 1001):
        router.receive(register(parse_service(str(number))))
    # As many messages as a host may have registrations; after that they are not even looked at.
    assert len(router.rules()) == 21
    assert router.refusals() == {reasons.TOO_MANY_MESSAGES: 980}
    router.receive(register(refresh=True, old_address=OTHER), OTHER)
    assert router.role.registrations.counters["refreshed"] == 1
    router.advance(2)
    router.receive(register(parse_service("5000")))
    router.receive(register(parse_service("1"), refresh=True, old_address=HOST))
    assert router.refusals()[reasons.TOO_MANY_FROM_HOST] == 1
    assert router.role.registrations.counters["refreshed"] == 2


def test_a_flood_of_many_hosts_does_not_keep_known_ones_from_refreshing() -> None:
    router = Router(new_registrations_s=50.0, registrations_max=150)
    router.receive(register())
    for number in range(1000):
        router.receive(register(), parse_address("10.1.0.0") + number)
    assert len(router.rules()) == 100
    assert router.refusals() == {reasons.TOO_MANY_NEW: 901}
    router.advance(10)
    for number in range(1000, 1100):
        router.receive(register(), parse_address("10.1.0.0") + number)
    assert router.refusals()[reasons.TOO_MANY] == 50
    router.receive(register(refresh=True, old_address=HOST))
    assert router.role.registrations.counters["refreshed"] == 1
    router.advance(EXPIRY_S)
    assert {rule[1] for rule in router.rules()} == set()


def test_instances_of_one_service_are_bounded() -> None:
    """What resolves a service looks at all of them, so that senders who invent addresses could make each SYN dear."""
    router = Router(registrations_per_prefix=10)
    for number in range(15):
        router.receive(register(), parse_address("10.1.0.0") + number + 1)
    assert len(router.rules()) == 10
    assert router.refusals() == {reasons.TOO_MANY_OF_PREFIX: 5}
    router.receive(register(parse_service("80")), OTHER)
    known = parse_address("10.1.0.1")
    router.receive(register(refresh=True, old_address=known), known)
    assert router.role.registrations.counters["refreshed"] == 1
    router.receive(register(refresh=True, old_address=known), OTHER)
    assert (str(SERVICE), "10.0.0.2", 1, 1) in router.rules()
    router.receive(unregister(), OTHER)
    router.receive(register(), parse_address("10.1.0.15"))
    assert len(router.rules()) == 11


def test_flipping_weights_do_not_make_the_memory_grow() -> None:
    router = Router(messages_per_host_s=1e6)
    for number in range(5000):
        router.receive(register() + emit_extension(Offer(1, 1 + number % 2, 300)))
    assert len(router.role.registrations._expiries) < 3000
    router.advance(300)
    assert router.rules() == set()


def test_a_signed_registration_cannot_be_ended_or_moved_without_its_key(signer: Signer) -> None:
    router = Router()
    host = Host(signer=signer)
    host.offer()
    router.receive(*host.payloads())
    router.receive(unregister())
    router.receive(register(refresh=True, old_address=HOST))
    router.receive(register(refresh=True, old_address=HOST), OTHER)
    assert router.refusals() == {"not_signed": 3}
    assert router.rules() == {("76568", "10.0.0.1", 1, 1)}


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 3), st.integers(0, 30)), max_size=40
    )
)
def test_table_and_directory_always_agree_with_what_was_registered(
    steps: list[tuple[int, int, int, int]],
) -> None:
    """Random registrations, moves, ends and waits against a model that is a dictionary."""
    router = Router()
    model: dict[tuple[str, str], tuple[int, float]] = {}
    for what, which, weight, wait_s in steps:
        service, source = parse_service(str(which + 1)), HOST + weight
        name, address = str(service), f"10.0.0.{1 + weight}"
        if what == 0:
            router.receive(register(service) + emit_extension(Offer(1, weight, 50)), source)
            model[name, address] = weight, router.now + EXPIRY_S
        elif what == 1:
            router.receive(unregister(service), source)
            model.pop((name, address), None)
        elif what == 2:
            router.receive(register(service, refresh=True, old_address=HOST), source)
            model.pop((name, "10.0.0.1"), None)
            model[name, address] = 1, router.now + EXPIRY_S
        else:
            router.receive(register(service), HOST)
            model[name, "10.0.0.1"] = 1, router.now + EXPIRY_S
        router.advance(wait_s)
        model = {key: value for key, value in model.items() if value[1] > router.now}
        assert router.rules() == {(*key, 1, value[0]) for key, value in model.items()}
    router.role.registrations.save(router.now, router.wall)
    stored = router.directory.registrations(router.wall)
    assert {(str(each.prefix), each.address) for each in stored} == {
        (name, parse_address(address)) for name, address in model
    }


def test_another_policy_ends_what_it_refuses_and_other_limits_hold_for_what_comes() -> None:
    router = Router()
    for last in (1, 2):
        router.receive(register(), parse_address(f"10.0.0.{last}"))
    networks = (IPv4Network("10.0.0.2/32"),)
    policy = RegistrationPolicy([PrefixPolicy(SERVICE, Requirement.OPEN, networks=networks)], Requirement.OPEN, 8)
    router.role.set_policy(policy, RouterLimits(weight_max=5), router.now)
    assert router.rules() == {("76568", "10.0.0.2", 1, 1)}
    assert router.news[-1] == ("unregistered", {"prefix": "76568", "address": "10.0.0.1", "why": "refused_by_policy"})
    assert router.weights[-1] == (SERVICE, 1)
    router.receive(register(), HOST)
    router.receive(register() + emit_extension(Offer(1, 6, 50)), OTHER)
    assert router.refusals() == {"foreign_network": 1, "weight_too_high": 1}
    assert router.rules() == {("76568", "10.0.0.2", 1, 1)}
