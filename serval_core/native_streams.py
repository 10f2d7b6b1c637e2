"""How do stream sockets of other programs work? `NativeStreams`: their part of the native service.

A program gets the descriptor of a flow's kernel socket. What it has not accepted yet waits here, at first in its Unix socket, and
counts against the backlog; see "Native programs" in ARCHITECTURE.md.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
from typing import TYPE_CHECKING

from serval_core.connection import Connection
from serval_core.errors import OurMistake
from serval_core.names import DEFAULT_SERVICE, ServiceID, ServicePrefix
from serval_core.native_peer import Client, Refused, Service, refusal
from serval_core.native_protocol import Reply, Request, encode
from serval_core.unattended import Holder

if TYPE_CHECKING:
    from serval_core.stack import ServalStack

BACKLOG_LIMIT = 65535
QUEUED_MESSAGE_BYTES = 1024  # what a small message with a descriptor counts in a socket's send buffer, roughly
IN_FLIGHT_PAUSE_S = 0.05


class _TooManyInFlight(BlockingIOError):
    """As many descriptors of the stack's are in flight as it may have open: some program has to accept first."""


class NativeStreams:
    """The stream sockets of all programs of one stack."""

    def __init__(self, stack: ServalStack, service: Service) -> None:
        self._stack = stack
        self._service = service
        self._bound: dict[ServicePrefix, Client] = {}
        service.counters |= {"accepted": 0, "in_flight_pauses": 0}

    def bind(self, client: Client, request: Request) -> None:
        """Reserve a prefix for a stream socket."""
        if request.service:
            prefix = request.prefix()
            self._service.check(client, "bind", prefix)
        else:
            prefix = ServicePrefix.of(ServiceID(os.urandom(32)))
        if prefix in self._bound or prefix in self._stack.table.bound():
            raise Refused(errno.EADDRINUSE, f"{prefix} is being listened on already")
        if prefix.service_id == DEFAULT_SERVICE:
            raise Refused(errno.EINVAL, "nothing can be bound to the default service (all zeros)")
        client.bound = prefix
        self._bound[prefix] = client
        self._service.answer(client, encode(Reply(service=prefix.service_id.hex(), bits=prefix.bits)))

    def listen(self, client: Client, request: Request) -> None:
        """Accept streams."""
        if client.bound is None:
            raise Refused(errno.EDESTADDRREQ, "bind the socket to a serviceID before it listens")
        backlog = min(max(request.backlog, 1), BACKLOG_LIMIT)
        # What the program has not accepted lies in this socket's buffer, and beyond it in `waiting`.
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, backlog * QUEUED_MESSAGE_BYTES // 2)
        try:
            client.listener = self._stack.listen(
                client.bound, lambda connection: self._accepted(client, connection), backlog
            )
        except OurMistake as mistake:
            raise Refused(errno.EADDRINUSE, str(mistake)) from None
        client.listener.holds_backlog = True
        self._service.answer(client, encode(Reply()))

    def connect(self, client: Client, request: Request) -> None:
        """Open a stream."""
        service_id = self._service.begin_connect(client, request)
        client.pending = self._stack.connect(
            service_id,
            lambda connection: self._connected(client, connection),
            lambda code, why: self._service.connect_failed(client, code, why),
            request.destination,
        )

    def forget(self, client: Client) -> None:
        """The program has closed the socket: what it has not accepted is reset, and its prefix is free."""
        while client.waiting:
            client.waiting.popleft().abort()
        if client.bound is not None:
            del self._bound[client.bound]

    # -- what the stack says ------------------------------------------------------------------------------------------

    def _connected(self, client: Client, connection: Connection) -> None:
        client.pending = None
        try:
            handed_over = not client.closed and self._hand_over(client, connection)
        except BlockingIOError:
            handed_over = False
            self._service.answer(client, refusal(errno.EMFILE, "too many descriptors are on their way to programs"))
        if handed_over:
            client.connected = True
            self._service.counters["connected"] += 1
        else:
            connection.abort()
        self._service.end_hold(client)

    def _accepted(self, client: Client, connection: Connection) -> None:
        if not self._service.has_room_for_flow(client):
            connection.abort()
            return
        client.waiting.append(connection)
        if len(client.waiting) == 1:
            self.push(client)

    def push(self, client: Client) -> None:
        """Hand over what waits to be accepted, until the program's queue is full."""
        while client.waiting:
            connection = client.waiting[0]
            try:
                if not self._hand_over(client, connection):
                    self._service.drop(client)
                    return
            except _TooManyInFlight:
                # It is writable all the time, so waiting for that would mean to try without end.
                self._service.counters["in_flight_pauses"] += 1
                asyncio.get_running_loop().call_later(IN_FLIGHT_PAUSE_S, self.push, client)
                break
            except BlockingIOError:
                self._service.watch(client, client.events | select.EPOLLOUT)
                return
            client.waiting.popleft()
            self._service.counters["accepted"] += 1
        self._service.watch(client, client.events & ~select.EPOLLOUT)

    def _hand_over(self, client: Client, connection: Connection) -> bool:
        """Give the program its descriptor; False when it is gone. Raises BlockingIOError when it has to read first."""
        service = connection.service_id or DEFAULT_SERVICE
        message = encode(
            Reply(
                service=service.hex(),
                local_address=connection.local_address,
                peer_address=connection.peer_address,
                flow_id=connection.flow_id,
            )
        )
        try:
            socket.send_fds(client.socket, [message], [connection.fd])
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                return False
            raise _TooManyInFlight from None
        connection.taken()
        connection.handed_over(Holder(client.program.pid, client.program.uid))
        return True
