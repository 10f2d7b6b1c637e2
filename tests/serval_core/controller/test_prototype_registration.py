"""Do prototypes register with our router, and do our hosts with a prototype's, on a real wire?

And does what no host would send leave everything as it was?
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core.controller.authentication import Signer
from serval_core.controller.settings import ControllerSettings, PolicyEntry
from serval_core.identity import Identity, create_identity
from serval_core.names import parse_address, parse_service
from serval_core.wire.control_messages import MessageType, Registration, emit_registration
from serval_core.wire.registration_offer import Offer, emit_extension
from tests.peers.prototype_servd import REGISTER, UNREGISTER, PlayedServd, service_id

from .controlled import Controlled, host_settings, router_settings

SERVICE = 76568


@pytest.fixture
def pair(lab: Lab) -> tuple[Host, Host]:
    """One host of ours, one where a prototype is played."""
    ours, theirs = lab.host("ours"), lab.host("theirs")
    lab.connect(ours, "10.77.0.3/24", theirs, "10.77.0.2/24")
    return ours, theirs


@pytest.fixture
def prototype_host(pair: tuple[Host, Host]) -> Iterator[PlayedServd]:
    servd = pair[1].call(PlayedServd, router=False)
    yield servd
    servd.close()


@pytest.fixture
def prototype_router(pair: tuple[Host, Host]) -> Iterator[PlayedServd]:
    servd = pair[1].call(PlayedServd, router=True)
    yield servd
    servd.close()


def test_a_prototype_host_registers_with_our_router(
    pair: tuple[Host, Host], prototype_host: PlayedServd
) -> None:
    """First by broadcast, then refreshes to the router's address, an address change, and the end."""
    host = prototype_host
    with Controlled(pair[0], router_settings()) as router:
        host.say("10.77.0.2", "10.77.0.255", REGISTER, 55555)
        host.say("10.77.0.2", "10.77.0.255", REGISTER, SERVICE)
        router.wait_rules((str(SERVICE), "10.77.0.2", 1))
        host.say("10.77.0.2", "10.77.0.3", REGISTER, SERVICE, old="10.77.0.2")
        wait_for(lambda: router.controller_counters().get("router_refreshed"), "the refresh")
        host.say("10.77.0.9", "10.77.0.3", REGISTER, SERVICE, old="10.77.0.2")
        router.wait_rules((str(SERVICE), "10.77.0.9", 1))
        host.say("10.77.0.9", "10.77.0.3", UNREGISTER, SERVICE)
        router.wait_rules()
        assert router.refusals() == {}
        # A prototype gets no answer to a registration, and above all no RST.
        host.listen(0.05)
        assert host.resets == 0
        assert router.controller_counters()["router_control_services"] == 1


def test_our_host_registers_with_a_prototype_router_by_broadcast(
    pair: tuple[Host, Host], prototype_router: PlayedServd
) -> None:
    router = prototype_router
    with Controlled(pair[0], ControllerSettings()) as host:
        listener = host.listen(str(SERVICE))
        heard = router.wait_heard(2)
        listener.close()
        heard = router.wait_heard(3)
    source, service = "10.77.0.3", service_id(SERVICE)
    assert [tuple(each) for each in heard] == [
        (source, REGISTER, 1, False, 0, "0.0.0.0", service, 48),
        (source, REGISTER, 2, True, 0, source, service, 48),
        (source, UNREGISTER, 3, False, 0, "0.0.0.0", service, 48),
    ]


def test_our_host_registers_with_a_prototype_router_at_its_address_signed(
    pair: tuple[Host, Host], prototype_router: PlayedServd, tmp_path: Path
) -> None:
    """What we add stands behind what a prototype reads, which is what it was."""
    create_identity(tmp_path / "key")
    settings = host_settings(routers=("10.77.0.2",), keys=(str(tmp_path / "key"),), weight=3)
    with Controlled(pair[0], settings) as host:
        host.listen("0xabcd:16")
        (heard, *_) = prototype_router.wait_heard(1)
        assert heard[:7] == ("10.77.0.3", REGISTER, 1, False, 16, "0.0.0.0", b"\xab\xcd" + bytes(30))
        assert heard.length_bytes == 48 + 132
        assert host.rules("default") == {("default", "10.77.0.2", 1)}


def test_signed_messages_pass_once_unchanged_and_from_their_host(
    pair: tuple[Host, Host], prototype_host: PlayedServd, identity: Identity
) -> None:
    """Somebody on the wire repeats, changes and borrows what a host has signed."""
    wire, service = prototype_host, parse_service(str(SERVICE))
    signer, offer = Signer([identity]), Offer(1, 2, 50)
    first, second, end = (
        signer.sign(Registration(kind, number, service), offer, parse_address("10.77.0.66"), time.time())
        for number, kind in enumerate((MessageType.REGISTER, MessageType.REGISTER, MessageType.UNREGISTER))
    )
    settings = router_settings(policy=(PolicyEntry(SERVICE, "signed"),))
    with Controlled(pair[0], settings) as router:
        wire.send("10.77.0.66", "10.77.0.3", first)
        router.wait_rules((str(SERVICE), "10.77.0.66", 2))
        for source, payload, reason in (
            ("10.77.0.66", first, "replayed"),
            ("10.77.0.67", second, "wrong_address"),
            ("10.77.0.66", second[:-1] + bytes([second[-1] ^ 1]), "wrong_signature"),
            ("10.77.0.66", second[:48], "not_signed"),
            ("10.77.0.66", end[:48], "not_signed"),
        ):
            before = router.refusals().get(reason, 0)
            wire.send(source, "10.77.0.3", payload)
            wait_for(lambda r=reason, b=before: router.refusals().get(r, 0) == b + 1, reason)
        assert router.rules() == {(str(SERVICE), "10.77.0.66", 2)}
        wire.send("10.77.0.66", "10.77.0.3", end)
        router.wait_rules()


def test_what_no_host_would_send_is_refused_and_disturbs_nobody(
    pair: tuple[Host, Host], prototype_host: PlayedServd, identity: Identity
) -> None:
    """On the wire: foreign, unsigned, malformed, mis-sent, and a flood. One good registration lives through it."""
    host = prototype_host
    policy = (
        PolicyEntry("0xee:8", "nobody"),
        PolicyEntry("0xabcd:16", "signed", keys=(identity.public_key.hex(),)),
    )
    settings = router_settings(policy=policy, messages_per_host_s=50, registrations_per_host=60)
    with Controlled(pair[0], settings) as router:
        good = (str(SERVICE), "10.77.0.2", 1)
        host.say("10.77.0.2", "10.77.0.3", REGISTER, SERVICE)
        router.wait_rules(good)

        def message(service: str) -> bytes:
            return emit_registration(Registration(MessageType.REGISTER, 1, parse_service(service)))

        for payload in (
            message("0xee01"),
            message("0xabcd01"),
            message("0x40:3"),
            message("5")[:40],
            message("5") + b"\xff" * 300,
            b"\x09" + message("5")[1:],
            message("5") + emit_extension(Offer(4_000_000_000, 1, 50)),
            emit_registration(
                Registration(
                    MessageType.REGISTER, 1, parse_service(str(SERVICE)), True, parse_address("10.77.0.2")
                )
            )
            + emit_extension(Offer(1, 4_000_000_000, 50)),
        ):
            host.send("10.77.0.66", "10.77.0.3", payload)
        host.send("10.77.0.66", "10.77.0.3", message("5"), source_service=12345)
        expected = {
            "foreign_prefix": 1,
            "not_signed": 1,
            "prefix_too_broad": 1,
            "control_truncated": 1,
            "offer_unknown": 1,
            "control_unknown_type": 1,
            "priority_too_high": 1,
            "weight_too_high": 1,
            "wrong_source_service": 1,
        }
        wait_for(lambda: sum(router.refusals().values()) >= 9, "nine refusals")
        assert router.refusals() == expected
        for number in range(1, 301):
            host.say("10.77.0.67", "10.77.0.3", REGISTER, number)
        wait_for(lambda: sum(router.refusals().values()) >= 9 + 150, "the flood is over")
        assert router.refusals()["too_many_messages"] >= 150
        assert len([rule for rule in router.rules() if rule[1] == "10.77.0.67"]) <= 60
        host.say("10.77.0.2", "10.77.0.3", REGISTER, SERVICE, old="10.77.0.2")
        wait_for(lambda: router.controller_counters().get("router_refreshed"), "the good one is refreshed")
        assert good in router.rules()
        published = [each["reason"] for each in router.news if each["event"] == "registration_refused"]
        assert set(published) == {*expected, "too_many_messages"} | (
            {"too_many_registrations_of_host"} & set(published)
        )
