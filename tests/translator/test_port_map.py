"""Are maps, reverse maps and rules read as documented, are wrong ones refused in a helpful sentence?"""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.config_file import Misconfigured
from serval_core.configured_rules import WeightedAddress, parse_rule
from serval_core.names import ServiceID, ServicePrefix, parse_address
from serval_core.rules import RuleType
from translator.port_map import (
    EVERY_ADDRESS,
    ForwardMap,
    LegacyTarget,
    parse_map,
    parse_reverse,
    refuse_contradictions,
)

WEB = ServiceID.from_number(76568)
NAMES = {"web": ServicePrefix.of(WEB), "farm": ServicePrefix.of(WEB, 32)}


def read_map(text: str) -> ForwardMap:
    return parse_map(text, NAMES, f"--map {text}")


@pytest.mark.parametrize(
    ("text", "address", "first_port", "last_port"),
    [
        ("80=76568", EVERY_ADDRESS, 80, 80),
        ("*:80=76568", EVERY_ADDRESS, 80, 80),
        ("10.0.0.1:80=76568", "10.0.0.1", 80, 80),
        ("[::1]:80=76568", "::1", 80, 80),
        ("[2001:DB8:0::1]:80=76568", "2001:db8::1", 80, 80),
        ("[::ffff:10.0.0.1]:80=76568", "10.0.0.1", 80, 80),
        ("[fe80::1%eth0]:80=76568", "fe80::1%eth0", 80, 80),
        ("0.0.0.0:80=76568", "0.0.0.0", 80, 80),
        ("8000-8009=76568", EVERY_ADDRESS, 8000, 8009),
        ("10.0.0.1:1-65535=76568", "10.0.0.1", 1, 65535),
        (" 80 = 76568 ", EVERY_ADDRESS, 80, 80),
    ],
)
def test_where_a_map_listens(text: str, address: str, first_port: int, last_port: int) -> None:
    found = read_map(text)
    assert (found.address, found.first_port, found.last_port) == (address, first_port, last_port)
    assert found.service_id == WEB


@pytest.mark.parametrize(
    "service",
    ["76568", "0x00012b18", "0x00012B18:256", "00012b18" + 56 * "0", "web", "0x" + "00012b18" + 56 * "0"],
)
def test_every_text_form_of_a_service(service: str) -> None:
    assert read_map(f"80={service}").service_id == WEB


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("80", "is not of the form PORT=ID"),
        ("=76568", "is not of the form PORT=ID"),
        ("80=", "is not of the form PORT=ID"),
        ("0=76568", "port 0 is out of range 1 to 65535 (nearest: 1)"),
        ("65536=76568", "port 65536 is out of range 1 to 65535 (nearest: 65535)"),
        ("-80=76568", '"" is no port number'),
        ("٨٠=76568", "is no port number"),
        ("http=76568", '"http" is no port number; write 80'),
        ("90-80=76568", "the port range 90-80 runs backwards; write 80-90"),
        ("80-=76568", '"" is no port number'),
        ("localhost:80=76568", '"localhost" is no IP address to listen on; write 127.0.0.1 or [::1]'),
        ("10.0.0.256:80=76568", '"10.0.0.256" is no IP address'),
        ("::1:80=76568", "an IPv6 address needs brackets; write [::1]"),
        ("[10.0.0.1]:80=76568", "an IPv4 address takes no brackets; write 10.0.0.1"),
        ("80=default", "cannot be sent to the default service"),
        ("80=0", "is all zero"),
        ("80=0x12g4", '"g" is not a hex digit'),
        ("80=4294967296", "too large for a decimal serviceID"),
        ("80=0x" + 65 * "0", "65 hex digits"),
        ("80=76568:257", "257 bits"),
        ("80=wbe", 'did you mean "web"?'),
    ],
)
def test_wrong_maps(text: str, sentence: str) -> None:
    with pytest.raises(Misconfigured) as refusal:
        read_map(text)
    assert sentence in str(refusal.value)
    assert str(refusal.value).startswith(f"--map {text}: ")
    assert "\n" not in str(refusal.value)


def test_a_reverse_map_with_every_kind_of_target() -> None:
    found = parse_reverse("farm=127.0.0.1:80,[::1]:8080, backend.example:443", NAMES, "here")
    assert found.prefix == ServicePrefix.of(WEB, 32)
    assert found.targets == (
        LegacyTarget("127.0.0.1", 80),
        LegacyTarget("::1", 8080),
        LegacyTarget("backend.example", 443),
    )
    assert [str(target) for target in found.targets] == ["127.0.0.1:80", "[::1]:8080", "backend.example:443"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("76568=80", 'the target "80" is not of the form HOST:PORT; write for example 127.0.0.1:80'),
        ("76568=backend", "write for example backend:80"),
        ("76568=127.0.0.1:80,", 'the target "" is not of the form HOST:PORT'),
        ("76568=127.0.0.1:80,127.0.0.1:80", "the target 127.0.0.1:80 is given twice"),
        ("76568=::1:80", "an IPv6 target needs brackets; write [::1]:80"),
        ("76568=[::g]:80", '"::g" is no IPv6 address'),
        ("76568=1.2.3:80", '"1.2.3" is no IPv4 address'),
        ("76568=ho st:80", '"ho st" is no host name'),
        ("76568=host:0", "port 0 is out of range"),
        ("default=host:80", "the default service (all zeros) cannot be served"),
    ],
)
def test_wrong_reverse_maps(text: str, sentence: str) -> None:
    with pytest.raises(Misconfigured) as refusal:
        parse_reverse(text, NAMES, f"--reverse {text}")
    assert sentence in str(refusal.value)


def test_a_rule_with_weights() -> None:
    found = parse_rule("web=10.0.0.1@3,10.0.0.2", NAMES, "here")
    assert found.rule_type is RuleType.FORWARD
    assert found.addresses == (
        WeightedAddress(parse_address("10.0.0.1"), 3),
        WeightedAddress(parse_address("10.0.0.2"), 1),
    )


def test_a_catch_all_rule() -> None:
    assert parse_rule("default=10.0.0.1", {}, "here").prefix.bits == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("web=host", '"host" is no IPv4 address'),
        ("web=::1", '"::1" is no IPv4 address'),
        ("web=10.0.0.1@0", "the weight 0 is out of range 1 to 1048576 (nearest: 1)"),
        ("web=10.0.0.1@9999999", "(nearest: 1048576)"),
        ("web=10.0.0.1@", 'the weight "" is no number'),
        ("web=10.0.0.1@x", 'the weight "x" is no number'),
        ("web=10.0.0.1,10.0.0.1@2", "the address 10.0.0.1 is given twice"),
    ],
)
def test_wrong_rules(text: str, sentence: str) -> None:
    with pytest.raises(Misconfigured) as refusal:
        parse_rule(text, NAMES, f"--service {text}")
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("one", "other", "sentence"),
    [
        ("80=1", "80=2", "port 80 is already mapped by --map 80=1"),
        ("80=1", "80=1", "port 80 is already mapped by --map 80=1"),
        ("80-90=1", "85-95=2", "ports 85-90 are already mapped by --map 80-90=1"),
        ("85-95=1", "80-90=2", "ports 85-90 are already mapped by --map 85-95=1"),
        ("80-90=1", "85=2", "port 85 is already mapped"),
        ("80=1", "10.0.0.1:80=2", "port 80 is already mapped"),
        ("[::1]:80=1", "80=2", "port 80 is already mapped"),
        ("0.0.0.0:80=1", "10.0.0.1:80=2", "port 80 is already mapped"),
        ("[::]:80=1", "[2001:db8::1]:80=2", "port 80 is already mapped"),
    ],
)
def test_maps_that_want_the_same_port(one: str, other: str, sentence: str) -> None:
    with pytest.raises(Misconfigured) as refusal:
        refuse_contradictions([read_map(one), read_map(other)], [], [])
    assert sentence in str(refusal.value)
    assert str(refusal.value).startswith(f"--map {other}: ")


def test_maps_that_live_side_by_side() -> None:
    texts = ["10.0.0.1:80=1", "10.0.0.2:80=2", "0.0.0.0:81=1", "[::]:81=2", "82-84=1", "85=1", "[::1]:80=1"]
    refuse_contradictions([read_map(text) for text in texts], [], [])


def test_two_reverse_maps_for_one_service() -> None:
    reverses = [parse_reverse(text, NAMES, text) for text in ("76568=a:1", "web=b:1")]
    with pytest.raises(Misconfigured, match="the service web is already served by 76568=a:1"):
        refuse_contradictions([], reverses, [])


def test_reverse_maps_of_nested_prefixes_live_side_by_side() -> None:
    refuse_contradictions([], [parse_reverse(text, NAMES, text) for text in ("web=a:1", "farm=b:1")], [])


def test_the_same_rule_twice() -> None:
    rules = [parse_rule(text, NAMES, text) for text in ("web=10.0.0.1", "76568=10.0.0.2,10.0.0.1@2")]
    with pytest.raises(Misconfigured, match=r"already has the target 10\.0\.0\.1 from web=10\.0\.0\.1"):
        refuse_contradictions([], [], rules)


ADDRESSES = [EVERY_ADDRESS, "0.0.0.0", "::", "10.0.0.1", "10.0.0.2", "::1"]
FAMILIES = {EVERY_ADDRESS: {4, 6}, "0.0.0.0": {4}, "::": {6}}
map_strategy = st.builds(
    lambda address, first, length: ForwardMap(
        address, first, first + length, WEB, "web", f"{address} {first}"
    ),
    st.sampled_from(ADDRESSES),
    st.integers(1, 12),
    st.integers(0, 4),
)


def _sockets(item: ForwardMap) -> set[tuple[int, str, int]]:
    """Every (family, address, port) that a map takes; a wildcard takes all addresses that occur."""
    concrete = [address for address in ADDRESSES if address not in FAMILIES] + ["another v4", "another::v6"]
    return {
        (family, address, port)
        for address in concrete
        for family in ([6] if ":" in address else [4])
        for port in range(item.first_port, item.last_port + 1)
        if item.address == address or family in FAMILIES.get(item.address, set())
    }


@given(st.lists(map_strategy, max_size=5))
def test_overlaps_are_found_exactly(maps: list[ForwardMap]) -> None:
    taken = [_sockets(item) for item in maps]
    overlap = any(one & other for index, one in enumerate(taken) for other in taken[:index])
    if overlap:
        with pytest.raises(Misconfigured):
            refuse_contradictions(maps, [], [])
    else:
        refuse_contradictions(maps, [], [])


@given(st.text(max_size=30))
def test_no_text_breaks_the_parsers(text: str) -> None:
    """Whatever is typed is either understood or refused with a sentence."""
    for parse in (parse_map, parse_reverse, parse_rule):
        for candidate in (text, f"80={text}", f"{text}=76568", f"76568={text}"):
            with contextlib.suppress(Misconfigured):
                parse(candidate, NAMES, "--option")
