"""How does a program send and receive Serval datagrams? `Datagrams` is what the stack offers.

    endpoint = stack.datagrams.bind(prefix, on_datagram)             # unconnected
    endpoint.send(payload, destination)

    listener = stack.datagrams.listen(prefix, on_accept)             # connected: see `datagram_flows`
    stack.datagrams.connect(service_id, on_connected, on_failed)
    flow.on_datagram = received; flow.send(payload); flow.close()

All calls and callbacks are made on the stack's loop; nothing blocks. Here are the handles of unconnected
datagrams; their protocol is `unconnected`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from serval_core.connected_datagrams import FLOW_PAYLOAD_BYTES_MAX
from serval_core.connection import OnFailed
from serval_core.datagram_flows import (
    DatagramFlow,
    DatagramFlows,
    DatagramListener,
    Host,
    OnAccept,
    PendingDatagramFlow,
)
from serval_core.effects import Datagram, DatagramRefused, DeliverDatagram, Effect
from serval_core.names import ServiceID, ServicePrefix
from serval_core.sal import ServiceAccessLayer
from serval_core.unconnected import PAYLOAD_BYTES_MAX, Endpoint, PayloadSize

__all__ = [
    "FLOW_PAYLOAD_BYTES_MAX",
    "PAYLOAD_BYTES_MAX",
    "Datagram",
    "DatagramEndpoint",
    "DatagramFlow",
    "DatagramListener",
    "Datagrams",
    "Host",
    "PayloadSize",
    "PendingDatagramFlow",
]

OnDatagram = Callable[[Datagram], None]
OnRefused = Callable[[int], None]


class DatagramEndpoint:
    """What is bound to a serviceID or prefix for unconnected datagrams. Close it when it is not needed any more.

    `on_refused(address)`, if set, is told when the host at `address` answers that it has no such service; that
    changes nothing else. Anybody who sees the datagram can forge it.
    """

    __slots__ = ("_closed", "_endpoint", "_owner", "on_datagram", "on_refused")

    def __init__(self, owner: Datagrams, endpoint: Endpoint, on_datagram: OnDatagram) -> None:
        self._owner = owner
        self._endpoint = endpoint
        self._closed = False
        self.on_datagram = on_datagram
        self.on_refused: OnRefused | None = None

    @property
    def prefix(self) -> ServicePrefix:
        """What it is bound to."""
        return self._endpoint.prefix

    @property
    def service_id(self) -> ServiceID:
        """The serviceID that its datagrams come from unless `send` says otherwise."""
        return self._endpoint.prefix.service_id

    def send(
        self,
        payload: bytes,
        destination: ServiceID,
        destination_address: int = 0,
        source_service: ServiceID | None = None,
    ) -> int:
        """Send a datagram of 1 to PAYLOAD_BYTES_MAX bytes to whatever instance the service table chooses.

        `destination_address`, an IPv4 address, skips the table for this datagram. An endpoint on a prefix may
        say with `source_service` which of its services it speaks for.

        Returns 0, or an errno: EADDRNOTAVAIL without a rule for the service, EHOSTUNREACH behind a DROP rule or
        without a path, ENOSPC when too much waits behind DELAY rules. What the kernel refuses later is counted.
        OurMistake for a source that is not covered and after `close`; PayloadSize, an OurMistake with an
        `errno`, for a wrong size.
        """
        return self._owner.send(self._endpoint.endpoint_id, payload, destination, destination_address, source_service)

    def close(self) -> None:
        """Receive no more. Does nothing the second time."""
        if not self._closed:
            self._closed = True
            self._owner.close_endpoint(self._endpoint.endpoint_id)


class Datagrams:
    """The datagrams of one stack, as programs see them."""

    def __init__(self, sal: ServiceAccessLayer, host: Host) -> None:
        self._sal = sal
        self._host = host
        self.flows = DatagramFlows(sal, host)
        """The connected ones, for the stack."""
        self._endpoints: dict[int, DatagramEndpoint] = {}
        self.carry_out: Mapping[type[Effect], Callable[[Any], None]] = {
            DeliverDatagram: self._deliver,
            DatagramRefused: self._refused,
            **self.flows.carry_out,
        }
        """What is to be done for which effect."""

    def bind(self, prefix: ServicePrefix | None, on_datagram: OnDatagram) -> DatagramEndpoint:
        """Receive datagrams for a serviceID or prefix; None: for a random serviceID, to get answers at.

        OurMistake if something is bound to that prefix, or it is the default one.
        """
        endpoint = self._sal.bind_datagrams(prefix)
        handle = self._endpoints[endpoint.endpoint_id] = DatagramEndpoint(self, endpoint, on_datagram)
        return handle

    def listen(
        self, prefix: ServicePrefix, on_accept: OnAccept, backlog: int = 1024
    ) -> DatagramListener:
        """Accept UDP flows for a serviceID or prefix. OurMistake if something is bound to it, or nothing can be.

        At most `backlog` flows wait to be accepted, which happens at once here.
        """
        return self.flows.listen(prefix, on_accept, backlog)

    def connect(
        self, service_id: ServiceID, on_connected: OnAccept, on_failed: OnFailed, destination: int = 0
    ) -> PendingDatagramFlow:
        """Open a UDP flow to a service; one of the two callbacks follows, never before this call returns.

        `destination`: an IPv4 address that skips resolution. `on_failed` gets an errno and a reason, as for
        streams.
        """
        return self.flows.connect(service_id, on_connected, on_failed, destination)

    def close(self) -> None:
        """Close whatever is open: the stack stops."""
        self.flows.close()
        for endpoint in list(self._endpoints.values()):
            endpoint.close()

    def snapshot(self) -> list[dict[str, object]]:
        """One dict per endpoint with its counters, for `endpoints` on the stack socket."""
        return self._sal.datagram_endpoints()

    def send(
        self, endpoint_id: int, payload: bytes, destination: ServiceID, address: int, source: ServiceID | None
    ) -> int:
        """For the handles."""
        errno = self._sal.send_datagram(
            endpoint_id, payload, destination, self._host.now(), address, source
        )
        self._host.run_effects()
        return errno

    def close_endpoint(self, endpoint_id: int) -> None:
        """For the handles."""
        del self._endpoints[endpoint_id]
        self._sal.close_datagrams(endpoint_id)

    def _deliver(self, effect: DeliverDatagram) -> None:
        endpoint = self._endpoints.get(effect.endpoint_id)
        if endpoint is not None:
            endpoint.on_datagram(effect.datagram)

    def _refused(self, effect: DatagramRefused) -> None:
        endpoint = self._endpoints.get(effect.endpoint_id)
        if endpoint is not None and endpoint.on_refused is not None:
            endpoint.on_refused(effect.address)
