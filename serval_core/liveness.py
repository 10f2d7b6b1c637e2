"""When does a target count as down, and for how long? The evidence of SYNs that were or were not answered.

The service table passes over what is marked; this file decides about the marks. Each target is judged by
what happened under the prefix of its rule:

- unreachable (a send error or an ICMP error) is about the host, and counts at once;
- refused is about one service at that host: it counts at once where the rule is for one service only;
- silent may be a lost packet, so it counts the second time in a row, and under a rule for many services only
  when they were different ones: else connects to a service that does not exist would bring a router down.

A mark lasts `target_down_s`, twice as long each time there has been no answer in between. An answer ends it.
"""

from __future__ import annotations

from serval_core.names import SERVICE_ID_BITS, ServiceID, ServicePrefix
from serval_core.retransmission import backed_off_s
from serval_core.sal_settings import SalSettings
from serval_core.service_table import ServiceTable

RECORDS_LIMIT = 4096


class _Record:
    """What speaks against one target since it last answered."""

    __slots__ = ("marks", "silences", "silent_service")

    def __init__(self) -> None:
        self.marks = 0
        self.silences = 0
        self.silent_service: ServiceID | None = None


class Liveness:
    """What one stack knows about targets that did not answer: of RECORDS_LIMIT at most, the oldest go first."""

    __slots__ = ("_records", "_settings", "_table")

    def __init__(self, settings: SalSettings, table: ServiceTable) -> None:
        self._settings = settings
        self._table = table
        self._records: dict[tuple[int, ServicePrefix], _Record] = {}

    def refused(self, service_id: ServiceID, address: int, now: float) -> None:
        """The host at `address` has answered that it does not have the service."""
        prefix = self._table.matching_prefix(service_id)
        if prefix is not None and prefix.bits == SERVICE_ID_BITS:
            self._mark(address, prefix, "refused", now)

    def unreachable(self, service_id: ServiceID, address: int, now: float) -> None:
        """A SYN could not be brought to `address`."""
        prefix = self._table.matching_prefix(service_id)
        if prefix is not None:
            self._mark(address, prefix, "unreachable", now)

    def silent(self, service_id: ServiceID, address: int, now: float) -> None:
        """No answer from `address` has come in time."""
        prefix = self._table.matching_prefix(service_id)
        if prefix is None:
            return
        record = self._record(address, prefix)
        if prefix.bits == SERVICE_ID_BITS or record.silent_service != service_id:
            record.silences += 1
            record.silent_service = service_id
        if record.silences >= self._settings.target_silences:
            self._mark(address, prefix, "silent", now)

    def answered(self, service_id: ServiceID, address: int) -> None:
        """The target `address` works."""
        if not self._records:
            return
        prefix = self._table.matching_prefix(service_id)
        if prefix is not None and self._records.pop((address, prefix), None) is not None:
            self._table.mark_up(address, prefix)

    def _mark(self, address: int, prefix: ServicePrefix, reason: str, now: float) -> None:
        record = self._record(address, prefix)
        settings = self._settings
        until = now + backed_off_s(settings.target_down_s, record.marks, settings.target_down_max_s)
        if self._table.mark_down(address, until, prefix, reason):
            record.marks += 1
        else:
            del self._records[address, prefix]

    def _record(self, address: int, prefix: ServicePrefix) -> _Record:
        key = address, prefix
        record = self._records.get(key)
        if record is None:
            if len(self._records) >= RECORDS_LIMIT:
                del self._records[next(iter(self._records))]
            record = self._records[key] = _Record()
        return record
