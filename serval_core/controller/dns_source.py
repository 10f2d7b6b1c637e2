"""Where does DNS say that a service is?

The name of a serviceID is made of labels of eight hex digits (four bytes), the first bytes last as in
in-addr.arpa, without the zero bytes at the end, below the operator's zone: with the zone svc.example

    76568                      00012b18.svc.example
    0xabcd0000 00000001        00000001.abcd0000.svc.example

so that zones can be delegated by prefix, and a wildcard answers for one (`*.abcd0000.svc.example`). There, SRV
records name instances with their priorities and weights (RFC 2782; ports mean nothing here), or TXT records say

    "serval address=10.0.0.2 weight=3 priority=1"

where larger priorities win, as in the service table; address may occur once, the others default to 1. What was
learned lasts as long as the records' TTL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import dns.asyncresolver
import dns.exception
import dns.name
import dns.nameserver
import dns.rdatatype
import dns.resolver
from dns.rdtypes.IN.A import A
from dns.rdtypes.IN.SRV import SRV
from dns.rdtypes.txtbase import TXTBase

from serval_core.controller.answers import Answer, SourceFailed
from serval_core.errors import OurMistake
from serval_core.names import NameMistake, ServiceID, parse_address
from serval_core.rules import NUMBER_MAX

DNS_PORT = 53
TARGETS_MAX = 16
TTL_MIN_S, TTL_MAX_S = 5.0, 3600.0
_LABEL_BYTES = 4


def service_name(service_id: ServiceID, zone: dns.name.Name) -> dns.name.Name:
    """The DNS name of a serviceID."""
    significant = bytes(service_id).rstrip(b"\0")
    labels = [
        bytes(service_id[at : at + _LABEL_BYTES]).hex().encode()
        for at in range(0, max(len(significant), 1), _LABEL_BYTES)
    ]
    return dns.name.Name(list(reversed(labels))).concatenate(zone)


def parse_zone(text: str) -> dns.name.Name:
    """A zone's name. OurMistake when it is none, or leaves no room for serviceIDs."""
    try:
        zone = dns.name.from_text(text)
        service_name(ServiceID(b"\xff" * 32), zone)
    except (dns.exception.DNSException, UnicodeError):
        raise OurMistake(f'"{text}" is no DNS zone that serviceIDs could have names in') from None
    return zone


def parse_nameserver(text: str) -> tuple[str, int]:
    """Address and port of "10.0.0.53" or "10.0.0.53:5353". Raises OurMistake."""
    address, colon, port = text.partition(":")
    parse_address(address)
    if not colon:
        return address, DNS_PORT
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise OurMistake(f'"{text}" has no port between 1 and 65535 after the colon')
    return address, int(port)


class DnsSource:
    """Asks the name servers given, or with none those of the host, for at most `timeout_s` a question."""

    def __init__(self, zone: dns.name.Name, nameservers: Sequence[tuple[str, int]], timeout_s: float) -> None:
        self._zone = zone
        self._timeout_s = timeout_s
        try:
            self._resolver = dns.asyncresolver.Resolver(configure=not nameservers)
        except dns.resolver.NoResolverConfiguration:
            raise OurMistake(
                "this host has no name servers: say which to ask (resolver.nameservers)"
            ) from None
        if nameservers:
            self._resolver.nameservers = [
                dns.nameserver.Do53Nameserver(address, port) for address, port in nameservers
            ]
        self._resolver.timeout = min(1.0, timeout_s)
        self._resolver.lifetime = timeout_s

    async def resolve(self, service_id: ServiceID) -> Sequence[Answer]:
        """The instances; none if DNS knows none. Raises SourceFailed when it does not say."""
        name = service_name(service_id, self._zone)
        services, texts = await asyncio.gather(self._ask(name, "SRV"), self._ask(name, "TXT"))
        found = [] if services is None else await self._instances(services)
        if texts is not None and not found:
            found = [each for record in texts if (each := _text_answer(record, _lifetime_s(texts)))]
        return found[:TARGETS_MAX]

    async def _ask(self, name: dns.name.Name, kind: str) -> dns.resolver.Answer | None:
        try:
            return await self._resolver.resolve(name, kind)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return None
        except (dns.exception.DNSException, OSError) as error:
            raise SourceFailed(f"DNS did not answer for {name}: {error}") from error

    async def _instances(self, services: dns.resolver.Answer) -> list[Answer]:
        records = [record for record in services if isinstance(record, SRV)][:TARGETS_MAX]
        addresses = await asyncio.gather(*(self._ask(record.target, "A") for record in records))
        # The smallest number wins in SRV records, the largest here.
        ranks = sorted({record.priority for record in records}, reverse=True)
        found = []
        for record, answer in zip(records, addresses, strict=True):
            if answer is None:
                continue
            lifetime_s = min(_lifetime_s(services), _lifetime_s(answer))
            found += [
                Answer(
                    parse_address(host.address),
                    1 + ranks.index(record.priority),
                    max(record.weight, 1),
                    lifetime_s,
                )
                for host in answer
                if isinstance(host, A)
            ]
        return found


def _lifetime_s(answer: dns.resolver.Answer) -> float:
    ttl_s = answer.rrset.ttl if answer.rrset is not None else 0
    return min(max(float(ttl_s), TTL_MIN_S), TTL_MAX_S)


def _text_answer(record: object, lifetime_s: float) -> Answer | None:
    """What a TXT record says, None if it is not about Serval or makes no sense."""
    if not isinstance(record, TXTBase):
        return None
    words = b"".join(record.strings).decode("ascii", "replace").split()
    if not words or words[0] != "serval":
        return None
    fields = dict(word.partition("=")[::2] for word in words[1:])
    try:
        address = parse_address(fields.get("address", ""))
        priority, weight = (int(fields.get(name, "1")) for name in ("priority", "weight"))
    except (NameMistake, ValueError):
        return None
    if not (1 <= priority <= NUMBER_MAX // 2 and 1 <= weight <= NUMBER_MAX):
        return None
    return Answer(address, priority, weight, lifetime_s)
