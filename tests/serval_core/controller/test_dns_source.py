"""Does DNS tell where services are? Against a name server that speaks over UDP."""

from __future__ import annotations

import asyncio

import dns.name
import pytest

from serval_core.controller.answers import Answer, SourceFailed
from serval_core.controller.dns_source import DnsSource, parse_nameserver, parse_zone, service_name
from serval_core.errors import OurMistake
from serval_core.names import ServiceID, parse_address, parse_service

from .dns_zone import Zone, serving

ZONE = dns.name.from_text("svc.example")
ONE, TWO, THREE = (parse_address(f"10.0.0.{last}") for last in (1, 2, 3))


def ask(zone: Zone, service: str, timeout_s: float = 2.0) -> list[Answer]:
    async def question() -> list[Answer]:
        source = DnsSource(ZONE, [parse_nameserver(zone.address)], timeout_s)
        return list(await source.resolve(parse_service(service).service_id))

    return sorted(asyncio.run(question()))


def test_names_have_the_first_bytes_last_and_no_zeros_behind() -> None:
    assert str(service_name(parse_service("76568").service_id, ZONE)) == "00012b18.svc.example."
    longer = parse_service("0xabcd000000000001").service_id
    assert str(service_name(longer, ZONE)) == "00000001.abcd0000.svc.example."
    longest = service_name(ServiceID(bytes(range(1, 33))), ZONE)
    assert str(longest).startswith("1d1e1f20.191a1b1c.")
    assert str(longest).endswith(".01020304.svc.example.")
    # A prefix of whole labels is a zone.
    assert service_name(longer, ZONE).is_subdomain(service_name(ServiceID(longer[:4] + bytes(28)), ZONE))


def test_service_records_give_instances_with_priorities_and_weights() -> None:
    """The smallest SRV priority is the best, the largest here; a lifetime is the shorter of both TTLs."""
    with serving(
        "00012b18.svc.example. 300 SRV 10 3 0 one.example.",
        "00012b18.svc.example. 300 SRV 10 1 0 two.example.",
        "00012b18.svc.example. 300 SRV 20 0 0 three.example.",
        "00012b18.svc.example. 300 SRV 30 1 0 nowhere.example.",
        "one.example. 60 A 10.0.0.1",
        "two.example. 600 A 10.0.0.2",
        "three.example. 1 A 10.0.0.3",
    ) as zone:
        assert ask(zone, "76568") == [
            Answer(ONE, 3, 3, 60.0),
            Answer(TWO, 3, 1, 300.0),
            Answer(THREE, 2, 1, 5.0),
        ]


def test_text_records_and_wildcards_for_prefixes() -> None:
    with serving(
        '*.abcd0000.svc.example. 30 TXT "serval address=10.0.0.2 weight=3 priority=2"',
        '*.abcd0000.svc.example. 30 TXT "v=spf1 -all"',
        '*.abcd0000.svc.example. 30 TXT "serval address=10.0.0.777"',
        '*.abcd0000.svc.example. 30 TXT "serval weight=3"',
        '*.abcd0000.svc.example. 30 TXT "serval address=10.0.0.3 weight=0"',
        '*.abcd0000.svc.example. 30 TXT "serval address=10.0.0.3 weight=x"',
        '*.abcd0000.svc.example. 30 TXT "serval address=10.0.0.1"',
    ) as zone:
        assert ask(zone, "0xabcd000000000007") == [Answer(ONE, 1, 1, 30.0), Answer(TWO, 2, 3, 30.0)]
        assert ask(zone, "0xabce000000000007") == []


def test_a_name_server_that_does_not_answer_is_a_failure_and_not_an_answer() -> None:
    with serving() as zone:
        assert ask(zone, "76568") == []
        zone.silent = True
        with pytest.raises(SourceFailed, match=r"00012b18\.svc\.example"):
            ask(zone, "76568", timeout_s=0.2)
        assert zone.questions["00012b18.svc.example. SRV"] >= 2


def test_zones_and_name_servers_are_checked() -> None:
    assert parse_zone("svc.example") == ZONE
    assert parse_nameserver("10.0.0.53") == ("10.0.0.53", 53)
    assert parse_nameserver("10.0.0.53:5353") == ("10.0.0.53", 5353)
    for zone in ("a..b", "x" * 64, ".".join(["abcdefgh"] * 24)):
        with pytest.raises(OurMistake, match="no DNS zone"):
            parse_zone(zone)
    for server in ("dns.example", "10.0.0.53:0", "10.0.0.53:x", "10.0.0.53:70000"):
        with pytest.raises(OurMistake):
            parse_nameserver(server)
