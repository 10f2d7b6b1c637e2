"""Is only that believed which its signer has said, there and then, and for the first time?"""

from __future__ import annotations

import pytest

from serval_core.controller import authentication as reasons
from serval_core.controller.authentication import Authenticator, Signer
from serval_core.controller.directory import IN_MEMORY, SqliteDirectory
from serval_core.controller.policy import PrefixPolicy, Requirement
from serval_core.identity import Identity
from serval_core.names import parse_service
from serval_core.wire.registration_offer import parse_extension

from .memory import OTHER, SERVICE, WALL, Host, Router, register, unregister

SIGNED_ONLY = PrefixPolicy(SERVICE, Requirement.SIGNED)


def registration(host: Host) -> bytes:
    (payload,) = host.payloads()
    return payload


def test_signed_registration_lives_moves_and_ends(signer: Signer) -> None:
    host, router = Host(signer=signer), Router(SIGNED_ONLY)
    host.offer(weight=2)
    router.receive(registration(host))
    host.move(OTHER)
    router.receive(registration(host), OTHER)
    assert router.rules() == {("76568", "10.0.0.2", 1, 2)}
    host.withdraw()
    router.receive(registration(host), OTHER)
    assert router.rules() == set()
    assert router.refusals() == {}


def test_unsigned_is_refused_where_signed_is_asked_for() -> None:
    router = Router(SIGNED_ONLY)
    router.receive(register())
    assert router.refusals() == {"not_signed": 1}
    assert router.rules() == set()
    router.receive(register(parse_service("80")))
    assert len(router.rules()) == 1


def test_a_replayed_message_is_refused_whatever_it_says(signer: Signer) -> None:
    host, router = Host(signer=signer), Router(SIGNED_ONLY)
    host.offer()
    first = registration(host)
    host.withdraw()
    end = registration(host)
    router.receive(first)
    router.receive(first)
    assert router.refusals() == {reasons.REPLAYED: 1}
    router.receive(end)
    assert router.rules() == set()
    router.receive(first)  # would bring a service back that is gone
    assert router.refusals() == {reasons.REPLAYED: 2}
    assert router.rules() == set()
    host.offer()
    again = registration(host)
    router.receive(again)
    assert len(router.rules()) == 1
    router.receive(end)  # would end a service that is back
    assert router.refusals() == {reasons.REPLAYED: 3}
    assert len(router.rules()) == 1


def test_a_replay_does_not_pass_after_the_router_has_restarted(signer: Signer) -> None:
    directory = SqliteDirectory(IN_MEMORY)
    before = Router(SIGNED_ONLY, directory=directory)
    host = Host(signer=signer)
    host.offer()
    first = registration(host)
    before.receive(first)
    host.withdraw()
    before.receive(registration(host))
    before.role.registrations.stop(before.now, before.wall)
    after = Router(SIGNED_ONLY, directory=directory)
    assert after.role.restore(after.now, after.wall) == 0
    after.receive(first)
    assert after.refusals() == {reasons.REPLAYED: 1}


def test_messages_about_different_prefixes_may_overtake_each_other(signer: Signer) -> None:
    host, router = Host(signer=signer), Router()
    host.offer()
    host.offer(parse_service("80"))
    for payload in reversed(host.payloads()):
        router.receive(payload)
    assert len(router.rules()) == 2
    assert router.refusals() == {}


@pytest.mark.parametrize(("error_s", "reason"), [(61.0, reasons.STALE), (-61.0, reasons.FROM_THE_FUTURE)])
def test_a_message_is_believed_for_a_minute(signer: Signer, error_s: float, reason: str) -> None:
    host, router = Host(signer=signer), Router(SIGNED_ONLY)
    host.offer()
    payload = registration(host)
    router.clock_error_s = error_s
    router.receive(payload)
    assert router.refusals() == {reason: 1}
    router.clock_error_s = error_s * 59 / 61
    router.receive(payload)
    assert len(router.rules()) == 1


def test_a_message_cannot_be_used_from_another_address(signer: Signer) -> None:
    host, router = Host(signer=signer), Router()
    host.offer()
    router.receive(registration(host), OTHER)
    assert router.refusals() == {reasons.WRONG_ADDRESS: 1}
    assert router.rules() == set()


def test_no_bit_of_a_signed_message_can_be_changed(signer: Signer) -> None:
    """All but the return code's and reserved bytes, which are covered too."""
    host = Host(signer=signer)
    host.offer()
    payload = registration(host)
    for at in range(len(payload)):
        changed = payload[:at] + bytes([payload[at] ^ 0x10]) + payload[at + 1 :]
        router = Router(SIGNED_ONLY)
        router.receive(changed)
        assert sum(router.refusals().values()) + router.role.counters["unregistered_unknown"] >= 1, at
        assert ("76568", "10.0.0.1", 1, 1) not in router.rules()
    router = Router(SIGNED_ONLY)
    router.receive(payload)
    assert len(router.rules()) == 1


def test_a_signature_of_another_key_is_wrong(identity: Identity, stranger: Identity) -> None:
    """The stranger signs, but claims the key of somebody else."""
    router = Router(PrefixPolicy(SERVICE, Requirement.SIGNED, frozenset({identity.public_key})))
    host = Host(signer=Signer([stranger]))
    host.offer()
    payload = registration(host)
    router.receive(payload)
    assert router.refusals() == {"unknown_key": 1}
    at = payload.index(stranger.public_key)
    router.receive(payload[:at] + identity.public_key + payload[at + 32 :])
    assert router.refusals() == {"unknown_key": 1, reasons.WRONG_SIGNATURE: 1}
    assert router.rules() == set()


def test_a_stripped_signature_makes_it_an_unsigned_message(signer: Signer) -> None:
    host, router = Host(signer=signer), Router(SIGNED_ONLY)
    host.offer()
    payload = registration(host)
    router.receive(payload[:48])
    assert router.refusals() == {"not_signed": 1}
    router.receive(payload)
    router.receive(unregister())
    assert router.refusals() == {"not_signed": 2}
    assert len(router.rules()) == 1


def test_a_clock_that_is_set_back_does_not_make_a_host_a_replay_of_itself(signer: Signer) -> None:
    host, router = Host(signer=signer), Router(SIGNED_ONLY)
    host.clock_error_s = 30
    host.offer()
    router.receive(registration(host))
    host.clock_error_s = 0
    host.offer(weight=2)
    router.receive(registration(host))
    assert router.rules() == {("76568", "10.0.0.1", 1, 2)}


def test_a_clock_that_was_wrong_for_a_moment_does_not_silence_a_host_afterwards(signer: Signer) -> None:
    """What it signed then nobody believes, or would believe again; it is not to go on with that time."""
    host, router = Host(signer=signer), Router(SIGNED_ONLY)
    host.clock_error_s = 86_400
    host.offer()
    router.receive(registration(host))
    host.clock_error_s = 0
    host.offer(weight=2)
    router.receive(registration(host))
    assert router.refusals() == {"from_the_future": 1}
    assert router.rules() == {("76568", "10.0.0.1", 1, 2)}


def test_clocks_that_were_wrong_together_do_not_silence_a_host_afterwards(signer: Signer) -> None:
    host, router = Host(signer=signer), Router(SIGNED_ONLY)
    host.clock_error_s = router.clock_error_s = 86_400
    host.offer()
    router.receive(registration(host))
    host.clock_error_s = router.clock_error_s = 0
    host.offer(weight=2)
    payload = registration(host)
    router.receive(payload)
    assert router.rules() == {("76568", "10.0.0.1", 1, 2)}
    router.receive(payload)
    assert router.refusals() == {"replayed": 1}


def test_what_would_not_pass_as_fresh_is_forgotten(identity: Identity) -> None:
    authenticator, signer = Authenticator(60.0), Signer([identity])
    host = Host(signer=signer)
    for number in range(1, 101):
        host.clock_error_s = number
        host.offer(parse_service(str(number)))
        (payload,) = host.payloads()
        proof = parse_extension(payload).proof
        assert proof is not None
        authenticator.remember(parse_service(str(number)), proof, WALL + number)
    assert len(authenticator) == 61
