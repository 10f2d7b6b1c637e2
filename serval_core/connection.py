"""What does a program hold of the stack? Connections, connects under way, listeners: handles, each with one owner.

They know nothing but their owner, the stack, which does the work. All calls and callbacks are made on the stack's loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from serval_core.dataplane.kernel import FlowCounters
from serval_core.effects import OpenTransport
from serval_core.names import FlowID, ServiceID, ServicePrefix
from serval_core.unattended import Holder

C = TypeVar("C")
OnAccept = Callable[["Connection"], None]
OnConnected = Callable[["Connection"], None]
OnFailed = Callable[[int, str], None]


class AttemptOwner(Protocol):
    """What attempts to connect ask of whoever makes them."""

    def connect_cancelled(self, pending: Any) -> None:
        """The application gave up waiting; `pending` is an attempt that this owner has made."""


class Owner(AttemptOwner, Protocol):
    """What the handles ask of the stack."""

    def connection_released(self, connection: Connection) -> None:
        """The application is finished with it."""

    def connection_aborted(self, connection: Connection) -> None:
        """The application wants it reset."""

    def connection_handed_over(self, connection: Connection, holder: Holder) -> None:
        """Another program has the socket now."""

    def connection_taken(self, connection: Connection) -> None:
        """It leaves its listener's backlog."""

    def listener_refuses(self, listener: Listener, refusing: bool) -> None:
        """The application wants no new flows for a while, or wants them again."""

    def listener_closed(self, listener: Listener) -> None:
        """The application accepts no more."""

    def flow_counters(self, flow_id: FlowID) -> FlowCounters:
        """Packets and bytes on the wire."""


class Connection:
    """An open Serval flow. `fd` is a nonblocking kernel TCP socket that belongs to the stack: borrow it, never close it.

    Finish with exactly one of `release()` (both directions are done: the write side was shut down, EOF was read), `abort()`
    (reset towards the peer) or `handed_over()` (another program has a duplicate of `fd` and does the rest).
    `on_ended(errno)`, if set, tells that the flow ended at the SAL before that.
    """

    __slots__ = (
        "_owner",
        "ended",
        "fd",
        "flow_id",
        "local_address",
        "on_ended",
        "peer_address",
        "released",
        "service_id",
    )

    def __init__(self, owner: Owner, flow: OpenTransport, fd: int) -> None:
        self._owner = owner
        self.flow_id = flow.flow_id
        self.local_address = flow.local_address
        self.peer_address = flow.peer_address
        self.service_id: ServiceID | None = None
        self.fd = fd
        self.on_ended: Callable[[int], None] | None = None
        self.released = False
        self.ended = False

    def release(self) -> None:
        """The application is finished with both directions. The fd must not be used any more."""
        if not self.released:
            self.released = True
            self._owner.connection_released(self)

    def abort(self) -> None:
        """End the flow with a reset. The fd must not be used any more."""
        if not self.released:
            self.released = True
            self._owner.connection_aborted(self)

    def handed_over(self, holder: Holder) -> None:
        """A program has a duplicate of the fd, and the flow lives as long as its socket. The fd must not be used any more."""
        if not self.released:
            self.released = True
            self._owner.connection_handed_over(self, holder)

    def taken(self) -> None:
        """Of a listener that `holds_backlog`: the application has it now."""
        self._owner.connection_taken(self)

    def counters(self) -> FlowCounters:
        """Packets and bytes of this flow on the wire."""
        return self._owner.flow_counters(self.flow_id)


class Attempt(Generic[C]):
    """A connect that has not been decided yet; it leads to a C."""

    __slots__ = ("_owner", "flow_id", "on_connected", "on_failed", "service_id")

    def __init__(
        self,
        owner: AttemptOwner,
        flow_id: FlowID,
        service_id: ServiceID,
        on_connected: Callable[[C], None],
        on_failed: OnFailed,
    ) -> None:
        self._owner = owner
        self.flow_id = flow_id
        self.service_id = service_id
        self.on_connected = on_connected
        self.on_failed = on_failed

    def cancel(self) -> None:
        """Give up; neither callback will be called. Does nothing once it was decided."""
        self._owner.connect_cancelled(self)


class PendingConnect(Attempt[Connection]):
    """A connect of a stream."""

    __slots__ = ()


class Listener:
    """A serviceID prefix on which this stack accepts flows.

    With `holds_backlog` a flow counts against the backlog until `Connection.taken()`, otherwise until `on_accept`.
    """

    __slots__ = ("_owner", "holds_backlog", "listener_id", "on_accept", "prefix")

    def __init__(
        self, owner: Owner, listener_id: int, prefix: ServicePrefix, on_accept: OnAccept
    ) -> None:
        self._owner = owner
        self.listener_id = listener_id
        self.prefix = prefix
        self.on_accept = on_accept
        self.holds_backlog = False

    def set_refusing(self, refusing: bool) -> None:
        """Let no new flows begin, so that clients ask another instance, while those that have begun are still
        accepted; or let them begin again. Meanwhile the service counts as not bound. Raises OurMistake.
        """
        self._owner.listener_refuses(self, refusing)

    def close(self) -> None:
        """Stop accepting; flows that were accepted live on."""
        self._owner.listener_closed(self)
