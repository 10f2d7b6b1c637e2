"""What do all native sockets of a program have in common? The way to the stack, and addresses made of serviceIDs.

Knows neither streams nor datagrams; the messages are those of `native_protocol`.
"""

from __future__ import annotations

import array
import errno
import os
import pwd
import socket as system
from typing import Any, NamedTuple, Self

import msgspec

from serval_core.errors import OurMistake
from serval_core.names import (
    DEFAULT_SERVICE,
    ServiceID,
    ServicePrefix,
    format_address,
    parse_address,
    parse_service,
)
from serval_core.native_protocol import (
    HOLD,
    HOLD_SEND_BUFFER_BYTES,
    MESSAGE_LIMIT_BYTES,
    NATIVE_SOCKET_ADDRESS,
    Reply,
    Request,
    decode_reply,
    encode,
)
from serval_core.unix_socket import peer_credentials

SYSTEM_USER = "serval"  # configs/systemd/serval.sysusers
DEFAULT_BACKLOG = 128
DESCRIPTOR_BYTES = system.CMSG_LEN(array.array("i").itemsize)


class ServiceAddress(NamedTuple):
    """What AF_SERVAL has for an address: a service, and where it is (dotted; empty: wherever resolution finds it)."""

    service: ServicePrefix
    address: str = ""

    def __str__(self) -> str:
        return f"{self.service}@{self.address}" if self.address else str(self.service)


def service_address(value: Any) -> ServiceAddress:
    """Read an address; see the module's docstring. Raises OSError (EINVAL)."""
    if isinstance(value, ServiceAddress):
        return value
    try:
        if isinstance(value, ServicePrefix):
            return ServiceAddress(value)
        if isinstance(value, tuple):
            service, where = value
            if where:
                parse_address(where)
            return ServiceAddress(service_address(service).service, where)
        if isinstance(value, ServiceID):
            return ServiceAddress(ServicePrefix.of(value))
        return ServiceAddress(parse_service(str(value)))
    except (OurMistake, ValueError, TypeError) as mistake:
        raise OSError(errno.EINVAL, str(mistake)) from None


class StackSocket(system.socket):
    """A socket whose descriptor leads to the stack, at least until it is connected."""

    datagrams = False

    def __init__(self, family: int, kind: int, protocol: int, fileno: int | None) -> None:
        """With `fileno` (taken) it is connected already. OSError (ENETDOWN) when no stack runs in this network namespace."""
        super().__init__(family, kind, protocol, reach_stack() if fileno is None else fileno)
        self._connected = fileno is not None
        self._listening = False
        self._connecting: ServicePrefix | None = None
        self._local = ServiceAddress(ServicePrefix.of(DEFAULT_SERVICE, 0))
        self._remote: ServiceAddress | None = None
        self.flow_id = 0
        """The local flowID of a connected socket, as `serval flows` shows it."""
        self.failure = ""
        """Why a connect that did not block has failed, when SO_ERROR has said that it did."""
        self.settimeout(system.getdefaulttimeout())

    def _adopt(self, fd: int) -> None:
        """The connection is there, and with it perhaps a descriptor (-1: none)."""

    # -- serving --------------------------------------------------------------------------------------------------

    def bind(self, address: Any) -> None:
        """Take a serviceID, or all under a prefix; an empty one is replaced by a random serviceID.

        OSError: EADDRINUSE (somebody has it), EACCES (the stack's policy), EINVAL (no serviceID, or bound already).
        """
        service = "" if address in ("", None) else service_address(address).service
        request = (
            Request("bind", datagrams=self.datagrams)
            if isinstance(service, str)
            else Request("bind", service.service_id.hex(), service.bits, datagrams=self.datagrams)
        )
        reply = self._ask(request)
        prefix = ServicePrefix.of(ServiceID(bytes.fromhex(reply.service)), reply.bits)
        self._local = ServiceAddress(prefix)

    def listen(self, backlog: int = DEFAULT_BACKLOG, /) -> None:
        """Accept connections; at most about `backlog` of them wait. Registers the service.

        A stream socket that listens already takes a backlog of 0: no more connections begin, clients ask another
        instance, and those under way can still be accepted. So a server ends without a client noticing.
        """
        if self._listening:
            if not backlog and not self.datagrams:
                self._tell(encode(Request("listen")))
            return
        if not self._local.service.bits:
            self.bind("")
        self._ask(Request("listen", backlog=backlog, datagrams=self.datagrams))
        self._listening = True

    def _accept(self) -> tuple[Reply, int]:
        if not self._listening:
            raise OSError(errno.EINVAL, "the socket does not listen")
        reply, fd = self._next_reply()
        if fd < 0:
            raise OSError(errno.EBADMSG, "the stack said something else than that there is a connection")
        return reply, fd

    def _accepted(self, reply: Reply) -> Self:
        """Name a connection that was just accepted: its service is known, its peer's is not."""
        service = ServicePrefix.of(ServiceID(bytes.fromhex(reply.service)))
        self._describe(reply, service, ServicePrefix.of(DEFAULT_SERVICE, 0))
        return self

    # -- connecting -----------------------------------------------------------------------------------------------

    def connect(self, address: Any, /) -> None:
        """Connect to an instance of a service. OSError as SPEC 3.10; BlockingIOError (EINPROGRESS) when it does not block.

        Then the socket becomes writable when the outcome is there, and `getsockopt(SOL_SOCKET, SO_ERROR)` tells it.
        """
        if self._connected:
            raise OSError(errno.EISCONN, os.strerror(errno.EISCONN))
        if self._listening:
            raise OSError(errno.EOPNOTSUPP, "the socket listens")
        if self._connecting is None:
            self._begin_connect(service_address(address))
            if self.gettimeout() == 0:
                raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))
        try:
            self._finish_connect()
        except BlockingIOError:
            raise BlockingIOError(errno.EALREADY, os.strerror(errno.EALREADY)) from None

    def connect_ex(self, address: Any, /) -> int:
        """Like `connect`, with the errno as its result."""
        try:
            self.connect(address)
        except TimeoutError as error:
            return error.errno or errno.EAGAIN
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _begin_connect(self, where: ServiceAddress) -> None:
        service, hold = where.service, self.gettimeout() == 0
        request = Request(
            "connect",
            service.service_id.hex(),
            destination=parse_address(where.address) if where.address else 0,
            datagrams=self.datagrams,
            hold=hold,
        )
        if hold:
            self.setsockopt(system.SOL_SOCKET, system.SO_SNDBUF, HOLD_SEND_BUFFER_BYTES)
        self._tell(encode(request))
        if hold:
            self._tell(HOLD)
        self._connecting = service

    def _finish_connect(self) -> None:
        """Take the outcome. BlockingIOError or TimeoutError: it is not there yet."""
        service = self._connecting
        assert service is not None
        try:
            reply, fd = self._next_reply()
        except (BlockingIOError, TimeoutError):
            raise
        except OSError:
            self._connecting = None
            raise
        self._connecting = None
        self._connected = True
        self._adopt(fd)
        self._describe(reply, self._local.service, service)

    def getsockopt(self, level: int, option: int, *arguments: Any) -> Any:
        """As of any socket; SO_ERROR finishes a connect under way."""
        if self._connecting is not None and (level, option) == (system.SOL_SOCKET, system.SO_ERROR):
            timeout = self.gettimeout()
            self.setblocking(False)
            try:
                self._finish_connect()
            except BlockingIOError:
                return 0
            except OSError as error:
                self.failure = error.strerror or ""
                return error.errno
            finally:
                self.settimeout(timeout)
        return super().getsockopt(level, option, *arguments)

    # -- names ----------------------------------------------------------------------------------------------------

    def getsockname(self) -> ServiceAddress:
        """The own service (for an accepted connection the exact one that was asked for) and address."""
        return self._local

    def getpeername(self) -> ServiceAddress:
        """The peer's service ("default" when it is unknown) and address. OSError ENOTCONN."""
        self._settle()
        if self._remote is None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return self._remote

    def _describe(self, reply: Reply, local: ServicePrefix, remote: ServicePrefix) -> None:
        self._local = ServiceAddress(local, format_address(reply.local_address))
        self._remote = ServiceAddress(remote, format_address(reply.peer_address))
        self.flow_id = reply.flow_id

    def _settle(self) -> None:
        if self._connecting is not None:
            self._finish_connect()

    def _ready(self) -> None:
        """Raise ENOTCONN unless it is connected, or a connect that did not block has succeeded meanwhile."""
        if not self._connected:
            self._settle()
            if not self._connected:
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    # -- talking to the stack -----------------------------------------------------------------------------------------

    def _tell(self, message: bytes) -> None:
        try:
            system.socket.send(self, message, system.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            # It may have said why before it closed.
            self._next_reply()
            raise

    def _ask(self, request: Request) -> Reply:
        """A request that the stack answers at once, whatever the socket's timeout is."""
        timeout = self.gettimeout()
        self.settimeout(None)
        try:
            self._tell(encode(request))
            return self._next_reply()[0]
        finally:
            self.settimeout(timeout)

    def _next_reply(self) -> tuple[Reply, int]:
        """What the stack says next, with the descriptor that came along or -1. Raises the OSError that it reports."""
        try:
            message, ancillary = self._receive()
        except ConnectionResetError:
            # It closed before it had read everything; what it said before that is still there.
            message, ancillary = self._receive()
        if not message:
            self._stack_is_gone()
        fd = _descriptor(ancillary)
        try:
            reply = decode_reply(message)
        except msgspec.DecodeError as error:
            raise OSError(errno.EPROTO, f"the stack speaks another language: {error}") from None
        if reply.errno:
            raise OSError(reply.errno, reply.error)
        return reply, fd

    def _receive(self) -> tuple[bytes, list[tuple[int, int, bytes]]]:
        message, ancillary, _, _ = system.socket.recvmsg(
            self, MESSAGE_LIMIT_BYTES, DESCRIPTOR_BYTES, system.MSG_CMSG_CLOEXEC
        )
        return message, ancillary

    def _stack_is_gone(self) -> None:
        """Raise ENETDOWN. The descriptor leads nowhere from now on, or an event loop would find it readable for ever."""
        nowhere = os.eventfd(0, os.EFD_CLOEXEC)
        os.dup2(nowhere, self.fileno(), inheritable=False)
        os.close(nowhere)
        raise OSError(errno.ENETDOWN, "the Serval stack of this network namespace has ended")


def reach_stack() -> int:
    """A descriptor that leads to the stack's native socket."""
    with system.socket(system.AF_UNIX, system.SOCK_SEQPACKET) as reaching:
        reaching.settimeout(None)
        try:
            reaching.connect(NATIVE_SOCKET_ADDRESS)
        except ConnectionRefusedError:
            raise OSError(
                errno.ENETDOWN, "no Serval stack runs in this network namespace: start servald or serval-translator"
            ) from None
        server = peer_credentials(reaching)
        # Anyone may take the name while no stack runs. Root trusts the user that it runs the stack as.
        if os.geteuid() != 0 and server.uid not in (0, os.geteuid(), _system_user()):
            raise OSError(
                errno.EPERM, f"the native socket is held by uid {server.uid}, which is neither root nor {SYSTEM_USER} nor you"
            )
        return reaching.detach()


def _system_user() -> int:
    try:
        return pwd.getpwnam(SYSTEM_USER).pw_uid
    except KeyError:
        return 0


def _descriptor(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if (level, kind) == (system.SOL_SOCKET, system.SCM_RIGHTS):
            return int(array.array("i", data)[0])
    return -1
