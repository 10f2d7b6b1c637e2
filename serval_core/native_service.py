"""How do other programs get Serval sockets from this stack? `NativeService`: the stack's side of the native socket.

One client per Serval socket of a program. This file knows who may do what (through `access_policy`), listeners and connects of
streams; datagrams are `native_datagrams`. It never blocks: a program that does not read holds up nobody but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING

import msgspec
import structlog

from serval_core.access_policy import AccessPolicy, Action, Program
from serval_core.connection import Connection, Listener, PendingConnect
from serval_core.datagrams import DatagramEndpoint, DatagramFlow, DatagramListener, PendingDatagramFlow
from serval_core.errors import KernelRefused, OurMistake
from serval_core.names import DEFAULT_SERVICE, ServiceID, ServicePrefix
from serval_core.native_datagrams import MESSAGE_LIMIT_BYTES, NativeDatagrams
from serval_core.native_protocol import (
    DATAGRAM_MARK,
    HOLD,
    NATIVE_SOCKET_ADDRESS,
    Reply,
    Request,
    decode_request,
    encode,
)
from serval_core.stack_socket import peer_credentials
from serval_core.unattended import Holder

if TYPE_CHECKING:
    from serval_core.stack import ServalStack

log = structlog.get_logger("serval_core.native")

CLIENT_LIMIT = 16384
USER_SOCKET_LIMIT = 4096  # of one user who is not trusted: sockets that listen, connect or carry datagrams
USER_FLOW_LIMIT = 16384  # of one user who is not trusted: open stream connections
BACKLOG_LIMIT = 65535
QUEUED_MESSAGE_BYTES = 1024  # what a small message with a descriptor counts in a socket's send buffer, roughly
PAUSE_S = 0.05
EVENTS_PER_WAKE_UP = 64
LISTEN_BACKLOG = 4096
SO_PEERGROUPS = 59  # asm-generic/socket.h
GROUPS_MAX = 256  # what Python's getsockopt has room for
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_GONE = select.EPOLLHUP | select.EPOLLRDHUP | select.EPOLLERR


class Refused(OurMistake):
    """A request that is answered with an errno. The message is the sentence for whoever reads it."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.errno = code


class Client:
    """One Serval socket of some program."""

    __slots__ = (
        "bound",
        "closed",
        "datagram_end",
        "events",
        "listener",
        "pending",
        "program",
        "socket",
        "waiting",
    )

    def __init__(self, connection: socket.socket, program: Program) -> None:
        self.socket = connection
        self.program = program
        self.events = select.EPOLLIN | select.EPOLLRDHUP
        self.bound: ServicePrefix | None = None
        self.listener: Listener | None = None
        self.pending: PendingConnect | PendingDatagramFlow | None = None
        self.waiting: deque[Connection] = deque()  # accepted, not handed over yet
        self.datagram_end: DatagramEndpoint | DatagramFlow | DatagramListener | None = None
        self.closed = False


class NativeService:
    """Serves the native socket on the asyncio loop that `open` is called on. `counters` says what happened and what was refused."""

    def __init__(self, stack: ServalStack, policy: AccessPolicy) -> None:
        self._stack = stack
        self.policy = policy
        self._listener: socket.socket | None = None
        self._epoll: select.epoll | None = None
        self._clients: dict[int, Client] = {}
        self._sockets_of_user: dict[int, int] = {}
        self._bound: dict[ServicePrefix, Client] = {}
        self._buffer = bytearray(MESSAGE_LIMIT_BYTES)
        self.counters = {
            "sockets": 0,
            "accepted": 0,
            "connected": 0,
            "refused_by_policy": 0,
            "refused_by_limit": 0,
            "malformed": 0,
            "accept_failures": 0,
        }
        self._datagrams = NativeDatagrams(stack, self)

    # -- life ---------------------------------------------------------------------------------------------------------

    def open(self, listener: socket.socket | None = None) -> None:
        """Begin to serve, on `listener` (taken) if the service manager has passed one. Raises KernelRefused."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener or _bind()
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._loop.add_reader(self._listener, self._accept)
        self._loop.add_reader(self._epoll.fileno(), self._clients_wait)

    def close(self) -> None:
        """Drop all clients; connections that they were given live on. Closing twice is harmless."""
        if self._listener is None or self._epoll is None:
            return
        self._loop.remove_reader(self._listener)
        self._loop.remove_reader(self._epoll.fileno())
        self._listener.close()
        self._listener = None
        for client in list(self._clients.values()):
            self._drop(client)
        self._epoll.close()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            # The connection stays queued, and the loop would call again at once.
            self.counters["accept_failures"] += 1
            self._loop.remove_reader(self._listener)
            self._loop.call_later(PAUSE_S, self._resume_accepting)
            return
        connection.setblocking(False)
        peer = peer_credentials(connection)
        program = Program(peer.pid, peer.uid, lambda: _groups(connection, peer.gid))
        used = self._sockets_of_user.get(peer.uid, 0)
        limit = CLIENT_LIMIT if self.policy.trusts(program) else USER_SOCKET_LIMIT
        if used >= limit or len(self._clients) >= CLIENT_LIMIT:
            self.counters["refused_by_limit"] += 1
            with connection, contextlib.suppress(OSError):
                connection.send(_refusal(errno.EMFILE, f"uid {peer.uid} has {used} Serval sockets, its limit is {limit}"))
            return
        self._serve(connection, program)

    def _serve(self, connection: socket.socket, program: Program) -> Client:
        self._sockets_of_user[program.uid] = self._sockets_of_user.get(program.uid, 0) + 1
        self.counters["sockets"] += 1
        client = self._clients[connection.fileno()] = Client(connection, program)
        assert self._epoll is not None
        self._epoll.register(connection.fileno(), client.events)
        return client

    def _resume_accepting(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    def _drop(self, client: Client) -> None:
        """The program has closed the socket, or has to."""
        if client.closed:
            return
        client.closed = True
        assert self._epoll is not None
        self._epoll.unregister(client.socket.fileno())
        del self._clients[client.socket.fileno()]
        uid = client.program.uid
        self._sockets_of_user[uid] -= 1
        if not self._sockets_of_user[uid]:
            del self._sockets_of_user[uid]
        if client.pending is not None:
            client.pending.cancel()
        if client.listener is not None:
            client.listener.close()
        if client.datagram_end is not None:
            client.datagram_end.close()
        while client.waiting:
            client.waiting.popleft().abort()
        if client.bound is not None:
            del self._bound[client.bound]
        client.socket.close()

    # -- what programs say --------------------------------------------------------------------------------------------

    def _clients_wait(self) -> None:
        assert self._epoll is not None
        for fd, events in self._epoll.poll(0, EVENTS_PER_WAKE_UP):
            client = self._clients.get(fd)
            if client is None:
                continue
            if events & select.EPOLLOUT:
                self._push(client)
            if events & select.EPOLLIN and client.events & select.EPOLLIN:
                self._receive(client)
            elif events & _GONE:
                self._drop(client)

    def _watch(self, client: Client, events: int) -> None:
        if not client.closed and client.events != events:
            client.events = events
            assert self._epoll is not None
            self._epoll.modify(client.socket.fileno(), events)

    def _receive(self, client: Client) -> None:
        try:
            size = client.socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if size == 0:
            self._drop(client)
            return
        message = bytes(memoryview(self._buffer)[:size])
        try:
            if message[:1] == DATAGRAM_MARK:
                self._datagrams.send(client, message)
            elif message != HOLD:  # behind a connect that was refused at once
                self._request(client, decode_request(message))
        except Refused as refusal:
            self.answer(client, _refusal(refusal.errno, str(refusal)))
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError, OurMistake) as mistake:
            self.counters["malformed"] += 1
            self.answer(client, _refusal(errno.EINVAL, str(mistake)))
        except Exception as error:
            # A defect must neither leave the program waiting nor stay hidden.
            self._loop.call_exception_handler(
                {"message": "a native program's request failed", "exception": error}
            )
            self.answer(client, _refusal(errno.EIO, f"the stack failed at this, which is a defect of it: {error!r}"))

    def _request(self, client: Client, request: Request) -> None:
        if client.listener is not None or client.pending is not None:
            raise Refused(errno.EINVAL, "this socket listens or connects already")
        kind = self._datagrams if request.datagrams else self
        if request.request == "bind":
            kind.bind(client, request)
        elif request.request == "listen":
            kind.listen(client, request)
        else:
            kind.connect(client, request)

    def bind(self, client: Client, request: Request) -> None:
        """Reserve a prefix for a stream socket."""
        if client.bound is not None:
            raise Refused(errno.EINVAL, f"this socket is bound to {client.bound}")
        if request.service:
            prefix = request.prefix()
            self.check(client, "bind", prefix)
        else:
            prefix = ServicePrefix.of(ServiceID(os.urandom(32)))
        if prefix in self._bound or prefix in self._stack.table.bound():
            raise Refused(errno.EADDRINUSE, f"{prefix} is being listened on already")
        if prefix.service_id == DEFAULT_SERVICE:
            raise Refused(errno.EINVAL, "nothing can be bound to the default service (all zeros)")
        client.bound = prefix
        self._bound[prefix] = client
        self.answer(client, encode(Reply(service=prefix.service_id.hex(), bits=prefix.bits)))

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
        self.answer(client, encode(Reply()))

    def connect(self, client: Client, request: Request) -> None:
        """Open a stream."""
        service_id = self.begin_connect(client, request)
        client.pending = self._stack.connect(
            service_id,
            lambda connection: self._connected(client, connection),
            lambda code, why: self.connect_failed(client, code, why),
            request.destination,
        )

    def begin_connect(self, client: Client, request: Request) -> ServiceID:
        """Check a connect, and wait for its outcome; the service to connect to. Raises Refused."""
        prefix, uid = request.prefix(), client.program.uid
        self.check(client, "connect", prefix)
        if not self.policy.trusts(client.program) and self._stack.unattended.flows_of(uid) >= USER_FLOW_LIMIT:
            self.counters["refused_by_limit"] += 1
            raise Refused(errno.ENFILE, f"uid {uid} has {USER_FLOW_LIMIT} Serval connections, which is the limit")
        if request.hold:
            self._watch(client, select.EPOLLRDHUP)
        return prefix.service_id

    def check(self, client: Client, action: Action, prefix: ServicePrefix) -> None:
        """Raise Refused if the policy says so."""
        sentence = self.policy.refusal(client.program, action, prefix)
        if sentence is not None:
            self.counters["refused_by_policy"] += 1
            raise Refused(errno.EACCES, sentence)

    # -- what the stack says ------------------------------------------------------------------------------------------

    def _connected(self, client: Client, connection: Connection) -> None:
        client.pending = None
        try:
            handed_over = not client.closed and self._hand_over(client, connection)
        except BlockingIOError:
            handed_over = False
            self.answer(client, _refusal(errno.EMFILE, "too many descriptors are on their way to programs"))
        if handed_over:
            self.counters["connected"] += 1
        else:
            connection.abort()
        self._end_hold(client)

    def connect_failed(self, client: Client, code: int, why: str) -> None:
        """Tell the program."""
        client.pending = None
        if not client.closed:
            self.answer(client, _refusal(code, why))
            self._end_hold(client)

    def connected(self, client: Client, reply: bytes) -> None:
        """Tell a program whose datagram socket is connected."""
        self.counters["connected"] += 1
        self.answer(client, reply)
        self._end_hold(client)

    def adopt(self, connection: socket.socket, like: Client) -> Client:
        """Serve another socket of the same program."""
        return self._serve(connection, like.program)

    def refuse(self, code: int, sentence: str) -> Refused:
        """The exception for a request that is answered with an errno."""
        return Refused(code, sentence)

    def _end_hold(self, client: Client) -> None:
        """Read the HOLD message, which makes the program's end writable."""
        if client.closed or client.events & select.EPOLLIN:
            return
        with contextlib.suppress(OSError):
            client.socket.recv_into(self._buffer)
        self._watch(client, select.EPOLLIN | select.EPOLLRDHUP)

    def _accepted(self, client: Client, connection: Connection) -> None:
        client.waiting.append(connection)
        if len(client.waiting) == 1:
            self._push(client)

    def _push(self, client: Client) -> None:
        """Hand over what waits to be accepted, until the program's queue is full."""
        while client.waiting:
            connection = client.waiting[0]
            try:
                if not self._hand_over(client, connection):
                    self._drop(client)
                    return
            except BlockingIOError:
                self._watch(client, client.events | select.EPOLLOUT)
                return
            client.waiting.popleft()
            self.counters["accepted"] += 1
        self._watch(client, client.events & ~select.EPOLLOUT)

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
            # As many descriptors of this user are in flight as it may have open: others have to accept first.
            self._loop.call_later(PAUSE_S, self._push, client)
            raise BlockingIOError from None
        connection.taken()
        connection.handed_over(Holder(client.program.pid, client.program.uid))
        return True

    def answer(self, client: Client, message: bytes) -> None:
        """Tell the program; one that does not take it is dropped."""
        try:
            client.socket.send(message)
        except OSError:
            self._drop(client)


def _refusal(code: int, sentence: str) -> bytes:
    return encode(Reply(errno=code, error=sentence))


def _bind() -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        listener.bind(NATIVE_SOCKET_ADDRESS)
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        name = NATIVE_SOCKET_ADDRESS[1:]
        raise KernelRefused(
            f"bind @{name}", error.errno or 0, f"Find out who holds it: ss -lxp | grep {name}"
        ) from None
    return listener


def _groups(connection: socket.socket, group: int) -> set[int]:
    """All groups of the program at the other end; of one that has too many, its primary group."""
    try:
        option = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * GROUPS_MAX)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        log.warning("a program has too many groups: only its primary one counts", group=group, limit=GROUPS_MAX)
        return {group}
    return {group, *struct.unpack(f"={len(option) // 4}I", option)}
