"""How do other programs get Serval sockets from this stack? `NativeService`: the stack's side of the native socket.

One client per Serval socket of a program. This file knows who the clients are, who may do what (through `access_policy`) and what
they ask; streams are `native_streams`, datagrams `native_datagrams`. It never blocks: a program that does not read holds up nobody
but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
import struct
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import structlog

from serval_core.access_policy import AccessPolicy, Action, Program
from serval_core.addresses import is_unicast
from serval_core.errors import KernelRefused, OurMistake
from serval_core.names import SERVICE_ID_BITS, ServiceID, ServicePrefix
from serval_core.native_datagrams import MESSAGE_LIMIT_BYTES, NativeDatagrams
from serval_core.native_peer import Client, Refused, refusal
from serval_core.native_protocol import DATAGRAM_MARK, HOLD, NATIVE_SOCKET_ADDRESS, Request, decode_request
from serval_core.native_streams import NativeStreams
from serval_core.unix_socket import UnixListener, peer_credentials

if TYPE_CHECKING:
    from serval_core.stack import ServalStack

log = structlog.get_logger("serval_core.native")

CLIENT_LIMIT = 16384
TRUSTED_RESERVE = 1024  # of these; all other users together leave them to root and the stack's own user
USER_SOCKET_LIMIT = 4096  # of one user who is not trusted: sockets that listen, connect or carry datagrams
USER_BOUND_LIMIT = 512  # of these: bound ones. Each is registered, and a router takes only so many from one host
USER_FLOW_LIMIT = 16384  # of one user who is not trusted: open stream connections
ACCEPT_PAUSE_S = 0.05
EVENTS_PER_WAKE_UP = 64
LISTEN_BACKLOG = 4096
SO_PEERGROUPS = 59  # asm-generic/socket.h
GROUPS_MAX = 256  # what Python's getsockopt has room for
_GONE = select.EPOLLHUP | select.EPOLLRDHUP | select.EPOLLERR


class NativeService:
    """Serves the native socket on the asyncio loop that `open` is called on. `counters` says what happened and what was refused."""

    def __init__(self, stack: ServalStack, policy: AccessPolicy) -> None:
        self._stack = stack
        self.policy = policy
        self._listener: UnixListener | None = None
        self._epoll: select.epoll | None = None
        self._clients: dict[int, Client] = {}
        self._sockets_of_user: Counter[int] = Counter()
        self._bound_of_user: Counter[int] = Counter()
        self._buffer = bytearray(MESSAGE_LIMIT_BYTES)
        self.counters: dict[str, int] = {
            "sockets": 0,
            "connected": 0,
            "refused_by_policy": 0,
            "refused_by_limit": 0,
            "malformed": 0,
            "accept_failures": 0,
        }
        self._streams = NativeStreams(stack, self)
        self._datagrams = NativeDatagrams(stack, self)

    # -- life ---------------------------------------------------------------------------------------------------------

    def open(self, listener: socket.socket | None = None) -> None:
        """Begin to serve, on `listener` (taken) if the service manager has passed one. Raises KernelRefused."""
        self._loop = asyncio.get_running_loop()
        self._listener = UnixListener(listener or _bind(), self._accepted, self.counters, ACCEPT_PAUSE_S)
        self._epoll = select.epoll()
        self._loop.add_reader(self._epoll.fileno(), self._clients_wait)

    def close(self) -> None:
        """Drop all clients; connections that they were given live on. Closing twice is harmless."""
        if self._listener is None or self._epoll is None:
            return
        self._loop.remove_reader(self._epoll.fileno())
        self._listener.close()
        self._listener = None
        for client in list(self._clients.values()):
            self.drop(client)
        self._epoll.close()

    def _accepted(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        peer = peer_credentials(connection)
        program = Program(peer.pid, peer.uid, lambda: _groups(connection, peer.gid))
        full = self._full(program)
        if full is not None:
            with connection, contextlib.suppress(OSError):
                connection.send(refusal(errno.EMFILE, full))
            return
        self._serve(connection, program)

    def _full(self, program: Program) -> str | None:
        """Why the program gets no other socket, as a sentence, and counted; None when it gets one."""
        used, trusted = self._sockets_of_user[program.uid], self.policy.trusts(program)
        limit = CLIENT_LIMIT if trusted else USER_SOCKET_LIMIT
        room = CLIENT_LIMIT - len(self._clients) - (0 if trusted else TRUSTED_RESERVE)
        if used < limit and room > 0:
            return None
        self.counters["refused_by_limit"] += 1
        if used >= limit:
            return f"uid {program.uid} has {used} Serval sockets, its limit is {limit}"
        return f"all programs together have {len(self._clients)} Serval sockets, the limit is {CLIENT_LIMIT}"

    def _serve(self, connection: socket.socket, program: Program) -> Client:
        self._sockets_of_user[program.uid] += 1
        self.counters["sockets"] += 1
        client = self._clients[connection.fileno()] = Client(connection, program)
        assert self._epoll is not None
        self._epoll.register(connection.fileno(), client.events)
        return client

    def drop(self, client: Client) -> None:
        """The program has closed the socket, or has to."""
        if client.closed:
            return
        client.closed = True
        assert self._epoll is not None
        self._epoll.unregister(client.socket.fileno())
        del self._clients[client.socket.fileno()]
        _count_down(self._sockets_of_user, client.program.uid)
        if client.counts_as_bound:
            _count_down(self._bound_of_user, client.program.uid)
        if client.pending is not None:
            client.pending.cancel()
        if client.listener is not None:
            client.listener.close()
        if client.datagram_end is not None:
            client.datagram_end.close()
        self._streams.forget(client)
        client.socket.close()

    # -- what programs say --------------------------------------------------------------------------------------------

    def _clients_wait(self) -> None:
        assert self._epoll is not None
        # Whose events these are is settled first: a socket that is dropped meanwhile may leave its number to another one.
        waiting = [(self._clients[fd], events) for fd, events in self._epoll.poll(0, EVENTS_PER_WAKE_UP)]
        for client, events in waiting:
            if client.closed:
                continue
            if events & select.EPOLLOUT:
                self._streams.push(client)
                if client.closed:
                    continue
            if events & select.EPOLLIN and client.events & select.EPOLLIN:
                self._receive(client)
            elif events & _GONE:
                self.drop(client)

    def watch(self, client: Client, events: int) -> None:
        """Wait for these events of its socket."""
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
            self.drop(client)
            return
        message = bytes(memoryview(self._buffer)[:size])
        is_datagram = message[:1] == DATAGRAM_MARK
        # Nobody waits for the answer to a datagram, and a program that reads none yet must not lose its socket.
        answer = self._datagrams.tell if is_datagram else self.answer
        try:
            if is_datagram:
                self._datagrams.send(client, message)
            elif message != HOLD:  # behind a connect that was refused at once
                self._request(client, decode_request(message))
        except Refused as refused:
            answer(client, refusal(refused.errno, str(refused), datagram=is_datagram))
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError, OurMistake) as mistake:
            self.counters["malformed"] += 1
            answer(client, refusal(errno.EINVAL, str(mistake), datagram=is_datagram))
        except Exception as error:
            # A defect must neither leave the program waiting nor stay hidden.
            self._loop.call_exception_handler(
                {"message": "a native program's request failed", "exception": error}
            )
            sentence = f"the stack failed at this, which is a defect of it: {error!r}"
            answer(client, refusal(errno.EIO, sentence, datagram=is_datagram))

    def _request(self, client: Client, request: Request) -> None:
        if client.listener is not None and request.request == "listen" and not request.backlog:
            client.listener.set_refusing(True)  # no answer: connections may be on their way to the program
            return
        if client.listens or client.pending is not None:
            raise Refused(errno.EINVAL, "this socket listens or connects already")
        if client.connected:
            raise Refused(errno.EISCONN if request.request == "connect" else errno.EINVAL, "this socket is connected")
        kind = self._datagrams if request.datagrams else self._streams
        if request.request == "bind":
            self._bind(client, request)
        elif request.request == "listen":
            kind.listen(client, request)
        else:
            kind.connect(client, request)

    def _bind(self, client: Client, request: Request) -> None:
        if client.bound is not None or client.datagram_end is not None:
            raise Refused(errno.EINVAL, "this socket is bound already")
        uid = client.program.uid
        if self._bound_of_user[uid] >= USER_BOUND_LIMIT and not self.policy.trusts(client.program):
            self.counters["refused_by_limit"] += 1
            raise Refused(errno.ENOBUFS, f"uid {uid} has {USER_BOUND_LIMIT} bound Serval sockets, which is the limit")
        (self._datagrams if request.datagrams else self._streams).bind(client, request)
        if not client.closed and not client.counts_as_bound:
            client.counts_as_bound = True
            self._bound_of_user[uid] += 1

    def begin_connect(self, client: Client, request: Request) -> ServiceID:
        """Check a connect, and wait for its outcome; the service to connect to. Raises Refused."""
        if request.bits != SERVICE_ID_BITS:
            raise Refused(errno.EINVAL, "a program connects to one service, not to a prefix")
        self.check_destination(request.destination)
        prefix = request.prefix()
        self.check(client, "connect", prefix)
        if not self.has_room_for_flow(client):
            uid = client.program.uid
            raise Refused(errno.ENFILE, f"uid {uid} has {USER_FLOW_LIMIT} Serval connections, which is the limit")
        if request.hold:
            self.watch(client, select.EPOLLRDHUP)
        return prefix.service_id

    def has_room_for_flow(self, client: Client) -> bool:
        """Whether the program may have one more connection; counted when it may not."""
        if self.policy.trusts(client.program) or self._stack.unattended.flows_of(client.program.uid) < USER_FLOW_LIMIT:
            return True
        self.counters["refused_by_limit"] += 1
        return False

    def check_destination(self, address: int) -> None:
        """Raise Refused unless this is the address of one host, or 0: whoever the service table says."""
        if address and not is_unicast(address):
            raise Refused(errno.EINVAL, "the destination is no address of a host")

    def check(self, client: Client, action: Action, prefix: ServicePrefix) -> None:
        """Raise Refused if the policy says so."""
        sentence = self.policy.refusal(client.program, action, prefix)
        if sentence is not None:
            self.counters["refused_by_policy"] += 1
            raise Refused(errno.EACCES, sentence)

    # -- what the stack says ------------------------------------------------------------------------------------------

    def connect_failed(self, client: Client, code: int, why: str) -> None:
        """Tell the program."""
        client.pending = None
        if not client.closed:
            self.answer(client, refusal(code, why))
            self.end_hold(client)

    def connected(self, client: Client, reply: bytes) -> None:
        """Tell a program whose datagram socket is connected."""
        self.counters["connected"] += 1
        self.answer(client, reply)
        self.end_hold(client)

    def adopt(self, connection: socket.socket, like: Client) -> Client | None:
        """Serve another socket of the same program (taken); None when it may not have one more."""
        if self._full(like.program) is not None:
            connection.close()
            return None
        return self._serve(connection, like.program)

    def end_hold(self, client: Client) -> None:
        """Read the HOLD message, which makes the program's end writable."""
        if client.closed or client.events & select.EPOLLIN:
            return
        with contextlib.suppress(OSError):
            client.socket.recv_into(self._buffer)
        self.watch(client, select.EPOLLIN | select.EPOLLRDHUP)

    def answer(self, client: Client, message: bytes) -> None:
        """Tell the program; one that does not take it is dropped."""
        try:
            client.socket.send(message)
        except OSError:
            self.drop(client)


def _count_down(counter: Counter[int], uid: int) -> None:
    counter[uid] -= 1
    if not counter[uid]:
        del counter[uid]


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
