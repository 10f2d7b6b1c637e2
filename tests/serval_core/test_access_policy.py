"""Who may bind and connect to what: the rule with the longest prefix decides."""

from __future__ import annotations

import os

import pytest

from serval_core.access_policy import AccessPolicy, AccessRule, Principals, Program
from serval_core.errors import OurMistake
from serval_core.names import parse_service

ALICE, BOB = 1000, 1001
WEB_GROUP = 33


def program(uid: int, *groups: int) -> Program:
    return Program(4711, uid, lambda: groups)


def policy(**rules: tuple[list[str | int] | None, list[str | int] | None]) -> AccessPolicy:
    return AccessPolicy(
        AccessRule(
            parse_service(prefix.replace("_", ":").replace("x", "0x", 1)),
            *(None if who is None else Principals.parse(who) for who in (bind, connect)),
        )
        for prefix, (bind, connect) in rules.items()
    )


def may(made: AccessPolicy, who: Program, action: str, service: str) -> bool:
    return made.refusal(who, action, parse_service(service)) is None  # type: ignore[arg-type]


def test_without_rules_root_may_all_and_others_connect() -> None:
    made = AccessPolicy()
    for uid in (0, os.geteuid()):
        assert may(made, program(uid), "bind", "5")
    assert may(made, program(ALICE), "connect", "5")
    assert not may(made, program(ALICE), "bind", "5")


def test_longest_prefix_decides() -> None:
    made = policy(xab_8=([ALICE], None), xabcd_16=([BOB], [BOB]))
    assert may(made, program(ALICE), "bind", "0xab01")
    assert not may(made, program(BOB), "bind", "0xab01")
    assert may(made, program(BOB), "bind", "0xabcd01")
    assert not may(made, program(ALICE), "bind", "0xabcd01")
    assert not may(made, program(ALICE), "connect", "0xabcd01")
    assert may(made, program(ALICE), "connect", "0xab01"), "a rule that does not mention it leaves the default"


def test_prefix_is_bound_whole_or_not_at_all() -> None:
    made = policy(xab_8=([ALICE, BOB], None), xabcd_16=([BOB], None))
    assert not may(made, program(ALICE), "bind", "0xab:8")
    assert may(made, program(BOB), "bind", "0xab:8")
    assert may(made, program(ALICE), "connect", "0xab:8")


def test_groups_and_everybody() -> None:
    made = policy(xab_8=([f"%{WEB_GROUP}"], ["*"]), xac_8=(["*"], []))
    assert may(made, program(ALICE, 7, WEB_GROUP), "bind", "0xab01")
    assert not may(made, program(ALICE, 7), "bind", "0xab01")
    assert may(made, program(ALICE), "bind", "0xac01")
    assert not may(made, program(ALICE), "connect", "0xac01")
    assert may(made, program(0), "connect", "0xac01")


def test_groups_are_asked_for_only_when_they_matter() -> None:
    def fail() -> list[int]:
        raise AssertionError

    made = policy(xab_8=([ALICE], None))
    assert may(made, Program(1, ALICE, fail), "bind", "0xab01")


def test_names_that_this_machine_does_not_have() -> None:
    assert Principals.parse(["root", "%root"]) == Principals(False, frozenset({0}), frozenset({0}))
    for name, kind in (("nosuchuser", "user"), ("%nosuchgroup", "group")):
        with pytest.raises(OurMistake, match=f"no {kind}"):
            Principals.parse([name])


def test_two_rules_for_one_prefix() -> None:
    rule = AccessRule(parse_service("5"))
    with pytest.raises(OurMistake, match="two access rules for 5"):
        AccessPolicy([rule, rule])
