"""What do tests hold of a real stack's datagrams? Endpoints and flows whose news waits in queues."""

from __future__ import annotations

import queue

from serval_core.datagrams import Datagram, DatagramEndpoint, DatagramFlow, DatagramListener
from serval_core.names import ServiceID, parse_address, parse_service
from tests.serval_core.stack_thread import StackThread

SOON_S = 20.0


class Bound:
    """An endpoint whose datagrams are taken with `receive()`."""

    def __init__(self, owner: StackThread, service: str | None = None) -> None:
        self._owner = owner
        self.received: queue.Queue[Datagram] = queue.Queue()
        self.refused: queue.Queue[int] = queue.Queue()
        prefix = None if service is None else parse_service(service)
        self.endpoint: DatagramEndpoint = owner.call(
            lambda: owner.stack.datagrams.bind(prefix, self.received.put)
        )
        self.endpoint.on_refused = self.refused.put

    def send(self, payload: bytes, destination: ServiceID, address: str = "") -> int:
        number = parse_address(address) if address else 0
        return self._owner.call(lambda: self.endpoint.send(payload, destination, number))

    def receive(self) -> Datagram:
        return self.received.get(timeout=SOON_S)


class End:
    """One end of a UDP flow."""

    def __init__(self, owner: StackThread, flow: DatagramFlow) -> None:
        """Called on the stack's loop."""
        self._owner = owner
        self.flow = flow
        self.received: queue.Queue[bytes] = queue.Queue()
        self.ended: queue.Queue[int] = queue.Queue()
        flow.on_datagram = self.received.put
        flow.on_ended = self.ended.put

    def send(self, payload: bytes) -> int:
        return self._owner.call(lambda: self.flow.send(payload))

    def receive(self) -> bytes:
        return self.received.get(timeout=SOON_S)

    def ending(self) -> int:
        return self.ended.get(timeout=SOON_S)

    def close(self) -> None:
        self._owner.call(self.flow.close)

    def abort(self) -> None:
        self._owner.call(self.flow.abort)


class AcceptingEnds:
    """A listener whose flows are taken with `accept()`."""

    def __init__(self, owner: StackThread, service: str) -> None:
        self._owner = owner
        self._accepted: queue.Queue[End] = queue.Queue()
        self.listener: DatagramListener = owner.call(
            lambda: owner.stack.datagrams.listen(
                parse_service(service), lambda flow: self._accepted.put(End(owner, flow))
            )
        )

    def accept(self) -> End:
        return self._accepted.get(timeout=SOON_S)

    def close(self) -> None:
        self._owner.call(self.listener.close)


def connect(owner: StackThread, service: str, destination: str = "") -> End:
    """Open a UDP flow; raises OSError with errno and reason when that fails."""
    outcome: queue.Queue[End | OSError] = queue.Queue()

    def begin() -> None:
        owner.stack.datagrams.connect(
            parse_service(service).service_id,
            lambda flow: outcome.put(End(owner, flow)),
            lambda code, why: outcome.put(OSError(code, why)),
            parse_address(destination) if destination else 0,
        )

    owner.call(begin)
    end = outcome.get(timeout=SOON_S)
    if isinstance(end, OSError):
        raise end
    return end
