"""What does the stack know of a Serval socket of some program? `Client`, and what is done with any of them (`Service`)."""

from __future__ import annotations

import select
import socket
from collections import deque
from typing import Protocol

from serval_core.access_policy import Action, Program
from serval_core.connection import Connection, Listener, PendingConnect
from serval_core.datagrams import DatagramEndpoint, DatagramFlow, DatagramListener, PendingDatagramFlow
from serval_core.errors import OurMistake
from serval_core.names import ServiceID, ServicePrefix
from serval_core.native_protocol import Reply, Request, encode


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
        "connected",
        "counts_as_bound",
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
        self.connected = False  # a stream socket: the program has its descriptor
        self.counts_as_bound = False
        self.closed = False

    @property
    def listens(self) -> bool:
        """Whether connections are accepted for it."""
        return self.listener is not None or isinstance(self.datagram_end, DatagramListener)


class Service(Protocol):
    """What streams and datagrams need of the native service."""

    counters: dict[str, int]

    def check(self, client: Client, action: Action, prefix: ServicePrefix) -> None:
        """Raise Refused if the policy says so."""

    def answer(self, client: Client, message: bytes) -> None:
        """Tell the program."""

    def begin_connect(self, client: Client, request: Request) -> ServiceID:
        """Check a connect, and wait for its outcome; the service to connect to."""

    def connect_failed(self, client: Client, code: int, why: str) -> None:
        """Tell the program."""

    def connected(self, client: Client, reply: bytes) -> None:
        """Tell a program whose datagram socket is connected."""

    def end_hold(self, client: Client) -> None:
        """Read the HOLD message, which makes the program's end writable."""

    def watch(self, client: Client, events: int) -> None:
        """Wait for these events (EPOLLIN ...) of its socket."""

    def drop(self, client: Client) -> None:
        """The program has closed the socket, or has to."""

    def adopt(self, connection: socket.socket, like: Client) -> Client | None:
        """Serve another socket of the same program (taken); None when it may not have one more."""

    def has_room_for_flow(self, client: Client) -> bool:
        """Whether the program may have one more connection; counted when it may not."""

    def check_destination(self, address: int) -> None:
        """Raise Refused unless this is the address of one host, or 0: whoever the service table says."""


def refusal(code: int, sentence: str, *, datagram: bool = False) -> bytes:
    """The message that refuses what a program has asked for, or tells that a datagram was refused."""
    return encode(Reply(datagram, code, sentence))
