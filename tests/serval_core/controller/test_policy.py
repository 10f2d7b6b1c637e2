"""Who may register what? Decisions of the policy, with real keys."""

from __future__ import annotations

from ipaddress import IPv4Network

from serval_core.controller.authentication import Signer
from serval_core.controller.policy import PrefixPolicy, RegistrationPolicy, Requirement
from serval_core.identity import Identity, self_certifying_id
from serval_core.names import ServiceID, ServicePrefix, parse_address, parse_service

from .memory import HOST, Host, Router, register

PROVIDER = parse_service("0xabcd0000:32")


def decide(
    policy: RegistrationPolicy, prefix: str, key: bytes | None = None, source: str = "10.0.0.1"
) -> str | None:
    return policy.refusal(parse_service(prefix), parse_address(source), key)


def test_the_longest_prefix_decides(identity: Identity, stranger: Identity) -> None:
    keys = frozenset({identity.public_key})
    policy = RegistrationPolicy(
        [
            PrefixPolicy(parse_service("0xab:8"), Requirement.SIGNED),
            PrefixPolicy(parse_service("0xabcd:16"), Requirement.SIGNED, keys),
            PrefixPolicy(parse_service("0xabcdef:24"), Requirement.OPEN),
            PrefixPolicy(parse_service("0xee:8"), Requirement.NOBODY),
        ],
        Requirement.OPEN,
        8,
    )
    assert decide(policy, "0x11") is None
    assert decide(policy, "0xab01") == "not_signed"
    assert decide(policy, "0xab01", stranger.public_key) is None
    assert decide(policy, "0xabcd01", stranger.public_key) == "unknown_key"
    assert decide(policy, "0xabcd01", identity.public_key) is None
    assert decide(policy, "0xabcdef01") is None
    assert decide(policy, "0xee01", identity.public_key) == "foreign_prefix"


def test_a_broad_registration_must_satisfy_whatever_it_covers(identity: Identity) -> None:
    policy = RegistrationPolicy(
        [
            PrefixPolicy(parse_service("0xab:8"), Requirement.OPEN),
            PrefixPolicy(parse_service("0xabcd:16"), Requirement.SIGNED),
            PrefixPolicy(parse_service("0xabce:16"), Requirement.NOBODY),
        ],
        Requirement.OPEN,
        8,
    )
    assert decide(policy, "0xabcc:16") is None
    assert decide(policy, "0xabcc:15") == "not_signed"
    assert decide(policy, "0xabcc:15", identity.public_key) is None
    assert decide(policy, "0xab:8", identity.public_key) == "foreign_prefix"
    assert decide(policy, "0xaa:7", identity.public_key) == "foreign_prefix"


def test_what_no_policy_names_has_the_default_and_a_shortest_prefix() -> None:
    closed = RegistrationPolicy([PrefixPolicy(PROVIDER, Requirement.OPEN)], Requirement.NOBODY, 8)
    assert decide(closed, "0xabcd000001") is None
    assert decide(closed, "76568") == "foreign_prefix"
    opened = RegistrationPolicy([], Requirement.OPEN, 8)
    assert decide(opened, "0xab:8") is None
    assert decide(opened, "0xab:7") == "prefix_too_broad"


def test_networks_say_where_a_host_may_be() -> None:
    networks = (IPv4Network("10.2.0.0/16"), IPv4Network("10.3.1.1/32"))
    policy = RegistrationPolicy(
        [PrefixPolicy(PROVIDER, Requirement.OPEN, networks=networks)], Requirement.OPEN, 8
    )
    assert decide(policy, "0xabcd0000", source="10.2.9.9") is None
    assert decide(policy, "0xabcd0000", source="10.3.1.1") is None
    assert decide(policy, "0xabcd0000", source="10.3.1.2") == "foreign_network"


def test_self_certifying_ids_belong_to_their_keys(identity: Identity, stranger: Identity) -> None:
    router = Router(PrefixPolicy(PROVIDER, Requirement.SELF_CERTIFYING))
    own = ServicePrefix.of(identity.service_id(PROVIDER))
    for who, what in ((stranger, own), (identity, PROVIDER), (identity, own)):
        host = Host(signer=Signer([who]))
        host.offer(what)
        router.receive(*host.payloads())
    router.receive(register(own), HOST + 1)
    assert router.refusals() == {"not_self_certifying": 2, "not_signed": 1}
    assert router.rules() == {(str(own), "10.0.0.1", 1, 1)}


def test_a_signer_with_several_keys_takes_the_one_that_certifies(
    identity: Identity, stranger: Identity
) -> None:
    router = Router(PrefixPolicy(PROVIDER, Requirement.SELF_CERTIFYING))
    host = Host(signer=Signer([stranger, identity]))
    for key in (identity, stranger):
        host.offer(ServicePrefix.of(self_certifying_id(PROVIDER, key.public_key)))
        router.receive(*host.payloads())
    host.offer(ServicePrefix.of(ServiceID(b"\1" * 32)))
    router.receive(*host.payloads())
    assert router.refusals() == {}
    signers = {each["signed_by"] for each in router.role.registrations.snapshot(router.now)}
    assert signers == {identity.public_key.hex(), stranger.public_key.hex()}
