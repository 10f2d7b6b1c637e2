"""How do unmodified TCP clients come in?

`LegacyAcceptor` binds, listens and accepts; what happens to a client is the business of who gave it
`on_client`. All listening sockets hang in one epoll of their own, so that the event loop knows a single
descriptor and "stop accepting" is one call however many ports are mapped. At the connection limit clients are
left in the kernel's queue instead of being refused.
"""

from __future__ import annotations

import asyncio
import errno
import select
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from serval_core.config_file import Misconfigured
from translator.accounting import Admission, MapTraffic
from translator.complaint import Complaint
from translator.port_map import EVERY_ADDRESS, ForwardMap, addresses_overlap, host_text

# Clients taken per wake-up of the loop: above, flows and timers would wait for a flood of clients.
ACCEPTS_PER_WAKEUP = 64
# How long no client is taken after the process ran out of descriptors or memory.
SHORTAGE_PAUSE_S = 0.2
KEEPALIVE_INTERVAL_S = 15
KEEPALIVE_PROBES = 5

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# accept(2): errors of one connection that is already gone, to be treated like "try again".
_LOST_CLIENT = frozenset(
    {
        *(errno.ECONNABORTED, errno.EINTR, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.ENOPROTOOPT),
        *(errno.EHOSTDOWN, errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH),
    }
)

Address = Any  # what the socket module returns as a peer address: (host, port) or (host, port, flow, scope)
OnClient = Callable[[socket.socket, Address, "MappedPort"], None]


class SocketOptions(NamedTuple):
    """What is set on every legacy TCP connection. `keepalive_s` 0: no keepalive."""

    tcp_nodelay: bool = True
    keepalive_s: int = 600

    def apply(self, target: socket.socket) -> None:
        """Set them; on a listening socket this means: on everything it accepts (Linux hands them down)."""
        if self.tcp_nodelay:
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.keepalive_s:
            target.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, self.keepalive_s)
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


class MappedPort(NamedTuple):
    """One listening socket and what it stands for."""

    socket: socket.socket
    map: ForwardMap
    traffic: MapTraffic
    number: int


class PortChange(NamedTuple):
    """The ports of other maps, all of them open; `added` are those that were opened for it."""

    ports: list[MappedPort]
    added: list[MappedPort]
    traffic: dict[ForwardMap, MapTraffic]


def reset(connection: socket.socket) -> None:
    """Close a TCP socket so that its peer sees a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    connection.close()


def address_text(address: Address) -> str:
    """A peer address as people write it; an IPv4 client of an IPv6 socket appears as what it is."""
    host = address[0]
    return f"{host_text(host.removeprefix('::ffff:') if '.' in host else host)}:{address[1]}"


class LegacyAcceptor:
    """The listening side. Use: `bind`, then `listen`, later `pause`, `resume`, `close`.

    Other maps are served after `prepare` and `replace` (or, to forget them, `abandon`).

    Owns the listening sockets. An accepted socket (nonblocking) belongs to `on_client`.
    """

    def __init__(
        self, options: SocketOptions, backlog: int, admission: Admission, on_client: OnClient
    ) -> None:
        self._options = options
        self._backlog = backlog
        self._admission = admission
        self._on_client = on_client
        self._ports: dict[int, MappedPort] = {}
        self._epoll: select.epoll | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepting = False
        self._wanted = False
        self._full = Complaint()
        self._shortage = Complaint()
        self._traffic: dict[ForwardMap, MapTraffic] = {}
        self.counters = {"accept_lost_clients": 0, "accept_shortages": 0}

    @property
    def traffic(self) -> list[MapTraffic]:
        """What each map has carried, in the order of the maps."""
        return list(self._traffic.values())

    def bind(self, maps: Sequence[ForwardMap]) -> None:
        """Take every port; nobody can connect yet. Raises Misconfigured, and then no port is taken."""
        change = self._bound(maps)
        self._ports = {port.socket.fileno(): port for port in change.ports}
        self._traffic = change.traffic

    def listen(self) -> None:
        """Let clients in. Raises Misconfigured if a port was lost meanwhile; then all are given back."""
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        try:
            for fd, port in self._ports.items():
                self._listen(port)
                self._epoll.register(fd, select.EPOLLIN)
        except BaseException:
            self.close()
            raise
        self._admission.on_room = self._update
        self.resume()

    def prepare(self, maps: Sequence[ForwardMap]) -> PortChange:
        """Open what `maps` needs beyond the present ports; who dials it waits for `replace`.

        Raises Misconfigured, and then nothing was opened.
        """
        change = self._bound(maps)
        try:
            for port in change.added:
                self._listen(port)
        except BaseException:
            self.abandon(change)
            raise
        return change

    def abandon(self, change: PortChange) -> None:
        """Close what was opened for `change`."""
        for port in change.added:
            port.socket.close()

    def replace(self, change: PortChange) -> list[MapTraffic]:
        """Serve `change` instead; returns the accounts of the maps that are gone.

        Who waits at a port that is given up is still let in, as far as the limit allows.
        """
        assert self._epoll is not None
        before, self._ports = self._ports, {port.socket.fileno(): port for port in change.ports}
        for port in change.added:
            self._epoll.register(port.socket.fileno(), select.EPOLLIN)
        for fd in before.keys() - self._ports.keys():
            self._accept_from(before[fd], self._backlog)
            before[fd].socket.close()  # which also takes it out of the epoll
        gone = [traffic for each, traffic in self._traffic.items() if each not in change.traffic]
        self._traffic = change.traffic
        self.resume()
        return gone

    def _bound(self, maps: Sequence[ForwardMap]) -> PortChange:
        """All ports of `maps`: those that are there with their new meaning, the others bound."""
        present: dict[int, list[MappedPort]] = {}
        for port in self._ports.values():
            present.setdefault(port.number, []).append(port)
        change = PortChange([], [], {})
        try:
            for each in maps:
                known = each._replace(origin="")  # the same map may have moved to another line
                traffic = self._traffic.get(known) or MapTraffic(each.listen_text, each.service_text)
                change.traffic[known] = traffic
                for number in range(each.first_port, each.last_port + 1):
                    there = present.get(number, ())
                    kept = next((port for port in there if port.map.address == each.address), None)
                    if kept is not None:
                        change.ports.append(kept._replace(map=each, traffic=traffic))
                        continue
                    _refuse_overlap(each, number, there)
                    port = MappedPort(_bind(each, number, self._options), each, traffic, number)
                    change.ports.append(port)
                    change.added.append(port)
        except BaseException:
            self.abandon(change)
            raise
        return change

    def _listen(self, port: MappedPort) -> None:
        try:
            port.socket.listen(self._backlog)
        except OSError as error:
            raise _refused(port.map, port.number, error) from None

    def pause(self) -> None:
        """Leave new clients in the kernel's queues."""
        self._wanted = False
        self._update()

    def resume(self) -> None:
        """Take clients (again)."""
        self._wanted = bool(self._ports)
        self._update()

    def take_waiting(self) -> None:
        """Accept what waits in the queues right now, as far as the limit allows: before closing."""
        if self._epoll is None:
            return
        for fd in self._ports:
            self._accept_from(self._ports[fd], self._backlog)

    def close(self) -> None:
        """Give all ports back; clients that still wait in the queues are reset by the kernel."""
        self._wanted = False
        self._update()
        for port in self._ports.values():
            port.socket.close()
        self._ports.clear()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None

    def addresses(self) -> list[Address]:
        """Where it listens, one socket address per port."""
        return [port.socket.getsockname() for port in self._ports.values()]

    def _update(self) -> None:
        """Bring the registration with the event loop in line with what is wanted and possible."""
        if self._loop is None or self._epoll is None:
            return
        wanted = self._wanted and not self._admission.is_full()
        if wanted and not self._accepting:
            self._loop.add_reader(self._epoll.fileno(), self._clients_wait)
        elif self._accepting and not wanted:
            if self._wanted:
                self._full.say(
                    "the connection limit is reached: new clients wait", limit=self._admission.limit
                )
            self._loop.remove_reader(self._epoll.fileno())
        self._accepting = wanted

    def _clients_wait(self) -> None:
        assert self._epoll is not None
        budget = ACCEPTS_PER_WAKEUP
        for fd, _ in self._epoll.poll(0, ACCEPTS_PER_WAKEUP):
            budget -= self._accept_from(self._ports[fd], budget)
            if budget <= 0 or not self._accepting:
                return

    def _accept_from(self, port: MappedPort, budget: int) -> int:
        """Take up to `budget` clients of one port; returns how many."""
        accept, on_client, admission = port.socket.accept, self._on_client, self._admission
        for taken in range(budget):
            if admission.is_full():
                self._update()
                return taken
            try:
                client, address = accept()
            except BlockingIOError:
                return taken
            except OSError as error:
                if not self._accept_failed(error):
                    return budget
                continue
            client.setblocking(False)
            on_client(client, address, port)
        return budget

    def _accept_failed(self, error: OSError) -> bool:
        """Count it; True if it makes sense to go on at once."""
        if error.errno in _LOST_CLIENT:
            self.counters["accept_lost_clients"] += 1
            return True
        if error.errno not in _SHORTAGE:
            raise error
        # The client stays queued, so the loop would call again at once and find the same shortage.
        self.counters["accept_shortages"] += 1
        self._shortage.say(
            "cannot take clients for now: out of descriptors or memory; lower --connection-limit or raise"
            " LimitNOFILE",
            error=str(error),
        )
        if self._accepting and self._loop is not None:
            self.pause()
            self._loop.call_later(SHORTAGE_PAUSE_S, self._shortage_over)
        return False

    def _shortage_over(self) -> None:
        if self._epoll is not None:
            self.resume()


def _bind(each: ForwardMap, port: int, options: SocketOptions) -> socket.socket:
    every = each.address == EVERY_ADDRESS
    try:
        bound = _new_socket(each.address)
    except OSError as error:
        raise _refused(each, port, error) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if bound.family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if every else 1)
        options.apply(bound)
        bound.bind(_bind_address(bound.family, each.address, port))
    except OSError as error:
        bound.close()
        raise _refused(each, port, error) from None
    bound.setblocking(False)
    return bound


def _refuse_overlap(each: ForwardMap, number: int, there: Sequence[MappedPort]) -> None:
    """The kernel would refuse too, but as if another program were in the way."""
    for port in there:
        if addresses_overlap(port.map.address, each.address):
            raise Misconfigured(
                each.origin,
                f"cannot listen on {host_text(each.address)}:{number} while {host_text(port.map.address)}:{number}"
                " is open; take that map out with one reload and put this one in with the next",
            )


def _new_socket(address: str) -> socket.socket:
    """For every address: an IPv6 socket that takes IPv4 clients too, or IPv4 alone if there is no IPv6."""
    if address != EVERY_ADDRESS:
        return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        return socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)


def _bind_address(family: socket.AddressFamily | int, address: str, port: int) -> Address:
    if family == socket.AF_INET:
        return address, port
    if address == EVERY_ADDRESS:
        return "::", port
    # getaddrinfo turns a %scope into its number.
    return socket.getaddrinfo(address, port, socket.AF_INET6, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)[
        0
    ][4]


def _refused(each: ForwardMap, port: int, error: OSError) -> Misconfigured:
    place = f"{host_text(each.address)}:{port}"
    if error.errno == errno.EADDRINUSE:
        why = f"another program already listens there; `ss -ltnp sport = :{port}` shows which"
    elif error.errno == errno.EADDRNOTAVAIL:
        why = "that address belongs to no interface of this host"
    elif error.errno == errno.EACCES:
        why = "ports below net.ipv4.ip_unprivileged_port_start need root or CAP_NET_BIND_SERVICE"
    elif error.errno in _SHORTAGE:
        why = f"{error.strerror}; raise LimitNOFILE (ulimit -n) or map fewer ports"
    else:
        why = error.strerror or str(error)
    return Misconfigured(each.origin, f"cannot listen on {place}: {why}")
