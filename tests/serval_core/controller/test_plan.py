"""Are settings understood, and senseless ones refused in a sentence that names the key?"""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

import msgspec
import pytest

from serval_core.config_file import Misconfigured
from serval_core.controller.plan import plan
from serval_core.controller.policy import PrefixPolicy, Requirement
from serval_core.controller.settings import ControllerSettings
from serval_core.identity import create_identity
from serval_core.names import ServiceID, parse_address, parse_service


def settings(**sections: object) -> ControllerSettings:
    return msgspec.convert(sections, ControllerSettings)


def test_nothing_said_means_the_prototypes_numbers() -> None:
    understood = plan(ControllerSettings())
    assert understood.router_id == ServiceID.from_number(88888)
    assert understood.client_id == ServiceID.from_number(55555)
    assert understood.settings.registration.refresh_s == 20
    assert understood.limits.expiry_s == 50
    assert not understood.settings.router.enabled


def test_texts_become_what_they_stand_for(tmp_path: Path) -> None:
    key = create_identity(tmp_path / "key")
    understood = plan(
        settings(
            registration={"routers": ["10.0.0.254"], "keys": [str(tmp_path / "key")], "router_id": "99"},
            router={
                "key": str(tmp_path / "key"),
                "aggregates": ["cluster"],
                "policy": [
                    {
                        "prefix": 76568,
                        "require": "self-certifying",
                        "keys": [key.public_key.hex()],
                        "networks": ["10.2.0.0/16"],
                    }
                ],
            },
            resolver={"prefixes": ["0xee:8"], "zone": "svc.example", "nameservers": ["10.0.0.53"]},
        ),
        {"cluster": parse_service("0xabcd:16")},
    )
    assert understood.routers == (parse_address("10.0.0.254"),)
    assert understood.identities[0].public_key == key.public_key
    assert understood.router_identity is not None
    assert understood.aggregates == (parse_service("0xabcd:16"),)
    assert understood.policy == (
        PrefixPolicy(
            parse_service("76568"),
            Requirement.SELF_CERTIFYING,
            frozenset({key.public_key}),
            (IPv4Network("10.2.0.0/16"),),
        ),
    )
    assert understood.delayed_prefixes == (parse_service("0xee:8"),)
    assert str(understood.zone) == "svc.example."
    assert understood.nameservers == (("10.0.0.53", 53),)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"registration": {"routers": ["10.0.0"]}}, r"registration\.routers: .*no IPv4 address"),
        ({"registration": {"routers": ["127.0.0.1"]}}, r"registration\.routers: .*another host"),
        ({"registration": {"keys": ["/nonexistent"]}}, r"registration\.keys: .*cannot be read"),
        ({"registration": {"router_keys": ["12"]}}, r"registration\.router_keys: .*64 hex digits"),
        ({"registration": {"client_id": "88888"}}, r"registration\.client_id: .*must differ"),
        ({"registration": {"client_id": "0xab:8"}}, r"registration\.client_id: .*whole serviceID"),
        ({"registration": {"lifetime_s": 5}}, r"registration\.lifetime_s: .*nearest: 50"),
        ({"router": {"aggregates": ["0xab:8"]}}, r"router\.aggregates: .*registration\.routers"),
        ({"router": {"policy": [{"prefix": "default"}]}}, r"router\.policy\.prefix: .*name a prefix"),
        (
            {"router": {"policy": [{"prefix": "1"}, {"prefix": "1"}]}},
            r"router\.policy\.prefix: 1 has two policies",
        ),
        (
            {"router": {"policy": [{"prefix": "1", "networks": ["10.0.0.1/8"]}]}},
            r"router\.policy\.networks: .*no IPv4 network",
        ),
        ({"resolver": {"zone": "a..b"}}, r"resolver\.zone: .*no DNS zone"),
        ({"resolver": {"nameservers": ["x"]}}, r"resolver\.nameservers: "),
        ({"resolver": {"prefixes": ["x"]}}, r"resolver\.prefixes: .*neither a serviceID"),
        (
            {
                "registration": {"routers": ["10.0.0.1"]},
                "router": {"aggregates": ["0xab:8", "0xab:8"]},
            },
            r"router\.aggregates: .*twice",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(sections: dict[str, object], sentence: str) -> None:
    with pytest.raises(Misconfigured, match=sentence):
        plan(settings(**sections))


def test_a_place_in_a_file_is_named_where_there_is_one() -> None:
    with pytest.raises(Misconfigured, match=r"^file:router/policy/1/prefix: "):
        plan(
            settings(router={"policy": [{"prefix": "1"}, {"prefix": "x"}]}),
            place=lambda *path: "file:" + "/".join(map(str, path)),
        )
