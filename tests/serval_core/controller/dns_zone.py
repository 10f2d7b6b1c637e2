"""A name server for tests: answers from a few records, over real UDP, and counts the questions."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

from lab.hosts import Host


class Zone:
    """Records as "name TTL type data"; names that none mentions do not exist. `silent` swallows questions."""

    def __init__(self, records: list[str]) -> None:
        self.records: dict[tuple[dns.name.Name, int], dns.rrset.RRset] = {}
        for record in records:
            name, ttl, kind, data = record.split(maxsplit=3)
            key = dns.name.from_text(name), int(dns.rdatatype.from_text(kind))
            if key in self.records:
                self.records[key].add(dns.rrset.from_text(name, int(ttl), "IN", kind, data)[0])
            else:
                self.records[key] = dns.rrset.from_text(name, int(ttl), "IN", kind, data)
        self.questions: Counter[str] = Counter()
        self.silent = False
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def serve(self) -> None:
        """Answer until the socket is shut down."""
        while True:
            data, client = self._socket.recvfrom(4096)
            if not data:
                return
            query = dns.message.from_wire(data)
            (question,) = query.question
            self.questions[f"{question.name} {dns.rdatatype.to_text(question.rdtype)}"] += 1
            if self.silent:
                continue
            response = dns.message.make_response(query)
            response.flags |= dns.flags.AA
            found = self._find(question.name, question.rdtype)
            if found is not None:
                response.answer.append(found)
            elif not any(name == question.name for name, _ in self.records):
                response.set_rcode(dns.rcode.NXDOMAIN)
            self._socket.sendto(response.to_wire(), client)

    def stop(self) -> None:
        """Have `serve` return."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as knock:
            knock.sendto(b"", self._socket.getsockname())

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def _find(self, name: dns.name.Name, kind: int) -> dns.rrset.RRset | None:
        exact = self.records.get((name, int(kind)))
        if exact is not None:
            return exact
        for depth in range(1, len(name.labels)):
            wildcard = self.records.get((dns.name.Name((b"*", *name.labels[depth:])), int(kind)))
            if wildcard is not None:
                return dns.rrset.from_rdata_list(name, wildcard.ttl, list(wildcard))
        return None


@contextmanager
def serving(*records: str, host: Host | None = None) -> Iterator[Zone]:
    """A running name server, on a lab host or here."""
    zone = Zone(list(records)) if host is None else host.call(Zone, list(records))
    thread = threading.Thread(target=zone.serve)
    thread.start()
    try:
        yield zone
    finally:
        if host is None:
            zone.stop()
        else:
            host.call(zone.stop)
        thread.join()
        zone.close()
