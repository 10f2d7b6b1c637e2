"""How do datagram sockets of other programs work? `NativeDatagrams`: their part of the native service.

A program's datagram socket is a Unix socket, on which the stack passes datagrams in both directions. A program that does not read
loses datagrams, as with UDP; they are counted.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

from serval_core.datagrams import Datagram, DatagramEndpoint, DatagramFlow, PayloadSize
from serval_core.errors import OurMistake
from serval_core.names import DEFAULT_SERVICE, ServiceID, ServicePrefix, format_address
from serval_core.native_peer import Client, Refused, Service, refusal
from serval_core.native_protocol import DATAGRAM, DATAGRAM_MARK, Reply, Request, encode

if TYPE_CHECKING:
    from serval_core.stack import ServalStack

MESSAGE_LIMIT_BYTES = DATAGRAM.size + 65535


class NativeDatagrams:
    """The datagram sockets of all programs of one stack."""

    def __init__(self, stack: ServalStack, service: Service) -> None:
        self._stack = stack
        self._service = service
        service.counters |= {"datagrams_in": 0, "datagrams_out": 0, "datagrams_not_read": 0}

    def bind(self, client: Client, request: Request) -> None:
        """Receive datagrams from now on; without a service, for a random serviceID."""
        prefix = request.prefix() if request.service else None
        if prefix is not None:
            self._service.check(client, "bind", prefix)
            if prefix.service_id == DEFAULT_SERVICE:
                raise Refused(errno.EINVAL, "nothing can be bound to the default service (all zeros)")
        try:
            endpoint = self._stack.datagrams.bind(prefix, lambda datagram: self._received(client, datagram))
        except OurMistake as mistake:
            raise Refused(errno.EADDRINUSE, str(mistake)) from None
        client.datagram_end = endpoint
        endpoint.on_refused = lambda address: self._refused(client, address)
        self._service.answer(client, _bound_reply(endpoint.prefix))

    def listen(self, client: Client, request: Request) -> None:
        """Accept flows instead of datagrams for the prefix that the socket is bound to."""
        endpoint = client.datagram_end
        if not isinstance(endpoint, DatagramEndpoint):
            raise Refused(errno.EDESTADDRREQ, "bind the socket to a serviceID before it listens")
        endpoint.close()
        client.datagram_end = None
        try:
            client.datagram_end = self._stack.datagrams.listen(
                endpoint.prefix, lambda flow: self._accepted(client, flow), max(request.backlog, 1)
            )
        except OurMistake as mistake:
            raise Refused(errno.EADDRINUSE, str(mistake)) from None
        self._service.answer(client, encode(Reply()))

    def connect(self, client: Client, request: Request) -> None:
        """Open a flow; the socket carries its datagrams then."""
        service_id = self._service.begin_connect(client, request)
        client.pending = self._stack.datagrams.connect(
            service_id,
            lambda flow: self._connected(client, flow),
            lambda code, why: self._service.connect_failed(client, code, why),
            request.destination,
        )

    def send(self, client: Client, message: bytes) -> None:
        """What the program wants sent."""
        if len(message) <= DATAGRAM.size:
            raise Refused(errno.EINVAL, "a Serval datagram has at least one byte")
        _, address, _, destination, source = DATAGRAM.unpack_from(message)
        self._service.check_destination(address)
        payload, end = message[DATAGRAM.size :], client.datagram_end
        try:
            if isinstance(end, DatagramFlow):
                code = end.send(payload)
            elif isinstance(end, DatagramEndpoint):
                service_id = ServiceID(destination)
                self._service.check(client, "connect", ServicePrefix.of(service_id))
                code = end.send(payload, service_id, address, ServiceID(source) if any(source) else None)
            else:
                code = errno.ENOTCONN
        except PayloadSize as mistake:
            raise Refused(mistake.errno, str(mistake)) from None
        if code:
            raise Refused(code, f"a datagram was not sent: {os.strerror(code)}")
        self._service.counters["datagrams_out"] += 1

    # -- what the stack says ------------------------------------------------------------------------------------------

    def _received(self, client: Client, datagram: Datagram) -> None:
        head = DATAGRAM.pack(
            DATAGRAM_MARK,
            datagram.source_address,
            datagram.interface_index,
            datagram.source_service,
            datagram.destination_service,
        )
        self._pass(client, head + datagram.payload)

    def _pass(self, client: Client, message: bytes) -> None:
        if self.tell(client, message):
            self._service.counters["datagrams_in"] += 1

    def tell(self, client: Client, message: bytes) -> bool:
        """Pass on a datagram, or what became of one; whether there was room for it."""
        if client.closed:
            return False
        try:
            client.socket.send(message)
        except OSError:  # full, or the program is about to be found gone
            self._service.counters["datagrams_not_read"] += 1
            return False
        return True

    def _refused(self, client: Client, address: int) -> None:
        sentence = f"{format_address(address)} has no such service"
        self.tell(client, refusal(errno.ECONNREFUSED, sentence, datagram=True))

    def _connected(self, client: Client, flow: DatagramFlow) -> None:
        client.pending = None
        if client.closed:
            flow.abort()
            return
        if isinstance(client.datagram_end, DatagramEndpoint):
            client.datagram_end.close()
        self._use(client, flow)
        self._service.connected(client, _flow_reply(flow))

    def _accepted(self, client: Client, flow: DatagramFlow) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            adopted = self._service.adopt(ours, client)
            if adopted is None:
                flow.abort()
                return
            self._use(adopted, flow)
            try:
                socket.send_fds(client.socket, [_flow_reply(flow)], [theirs.fileno()])
            except OSError:
                # The program does not accept, or is gone.
                flow.abort()
                self._service.drop(adopted)

    def _use(self, client: Client, flow: DatagramFlow) -> None:
        head = DATAGRAM.pack(
            DATAGRAM_MARK, flow.peer_address, 0, DEFAULT_SERVICE, flow.service_id or DEFAULT_SERVICE
        )
        client.datagram_end = flow
        client.connected = True
        flow.on_datagram = lambda payload: self._pass(client, head + payload)
        flow.on_ended = lambda code: self._ended(client, code)

    def _ended(self, client: Client, code: int) -> None:
        """The program reads the end, or the error, behind what it has not read yet."""
        if client.closed:
            return
        if code:
            self._service.answer(client, refusal(code, os.strerror(code)))
        if not client.closed:
            client.socket.shutdown(socket.SHUT_WR)


def _bound_reply(prefix: ServicePrefix) -> bytes:
    return encode(Reply(service=prefix.service_id.hex(), bits=prefix.bits))


def _flow_reply(flow: DatagramFlow) -> bytes:
    return encode(
        Reply(
            service=(flow.service_id or DEFAULT_SERVICE).hex(),
            local_address=flow.local_address,
            peer_address=flow.peer_address,
            flow_id=flow.flow_id,
        )
    )
