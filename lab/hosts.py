"""How do we get several hosts on one machine? Each `Host` is a namespace; a `Lab` makes and removes them.

Nothing of a lab is visible outside its namespaces: links are created inside them, and names carry the process
that made them. When that process died without cleaning up, the next lab on this machine removes what it left.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ParamSpec, Self, TypeVar

from lab.waiting import wait_for

P = ParamSpec("P")
R = TypeVar("R")
Argument = str | Path | int

NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x4000_0000
LISTEN_STATE = "0A"
CONGESTION_CONTROL = ("congctl", "cubic")
LOOPBACK_ROUTE = ("local", "127.0.0.0/8", "dev", "lo", "table", "local", "scope", "host", "src", "127.0.0.1")
PROC_STAT_START_TIME_FIELD = 22
_libc = ctypes.CDLL(None, use_errno=True)
_name_pattern = re.compile(r"serval-lab\.(?P<pid>\d+)\.(?P<started>\d+)\.")


class CommandFailed(AssertionError):
    """A command inside a host ended with a status other than 0. The message holds what it printed."""

    def __init__(self, host: str, result: subprocess.CompletedProcess[Any]) -> None:
        super().__init__(
            f"{shlex.join(result.args)} on {host} ended with {result.returncode}\n"
            f"stdout: {_tail(result.stdout)}\nstderr: {_tail(result.stderr)}"
        )
        self.result = result


class Host:
    """One host: a network namespace with loopback up. Made by `Lab.host`."""

    def __init__(self, name: str, namespace: str) -> None:
        self.name = name
        self.namespace = namespace
        self.interfaces: dict[str, str] = {}  # interface name -> "address/bits" or ""
        self.processes: list[subprocess.Popen[Any]] = []

    def __repr__(self) -> str:
        return f"<Host {self.name}>"

    def command(self, command: Sequence[Argument]) -> list[str]:
        """The argument list that runs `command` here; /sys shows this host's devices to it."""
        return ["ip", "netns", "exec", self.namespace, *map(str, command)]

    def run(
        self,
        command: Sequence[Argument],
        *,
        timeout_s: float = 30.0,
        check: bool = True,
        input: str | bytes | None = None,
        text: bool = True,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run to the end with output captured; `CommandFailed` when `check` and the status is not 0.

        `text=False` exchanges bytes. `options` go to `subprocess.run` (cwd, env, user ...).
        """
        if input is None:
            options.setdefault("stdin", subprocess.DEVNULL)
        result = subprocess.run(
            self.command(command),
            capture_output=True,
            timeout=timeout_s,
            text=text,
            input=input,
            check=False,
            **options,
        )
        if check and result.returncode != 0:
            raise CommandFailed(self.name, result)
        return result

    def popen(self, command: Sequence[Argument], **options: Any) -> subprocess.Popen[Any]:
        """Start a process that ends with the lab. `options` go to `subprocess.Popen`; text by default."""
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("text", True)
        process = subprocess.Popen(self.command(command), **options)
        self.processes.append(process)
        return process

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a Python function inside this namespace, in a thread of its own; return or raise what it does.

        Sockets it makes stay in this namespace wherever they are used later. /sys is not switched, as it is
        for `run` and `popen`.
        """
        outcome: list[R] = []
        failure: list[BaseException] = []

        def in_namespace() -> None:
            try:
                _enter_namespace(NAMESPACES / self.namespace)
                outcome.append(function(*args, **kwargs))
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=in_namespace, name=f"lab-{self.name}")
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return outcome[0]

    def address(self, interface: str | None = None) -> str:
        """The IPv4 address (dotted, no prefix length) of `interface`, or of the first connected one."""
        wanted = self.interfaces[interface] if interface else next(filter(None, self.interfaces.values()))
        return wanted.partition("/")[0]

    def next_interface(self) -> str:
        """The name that the next interface gets when none is asked for."""
        return f"eth{len(self.interfaces)}"

    def sysctl(self, key: str, value: Argument | None = None) -> str:
        """Read, or set and read back, a sysctl: `net.ipv4.ip_forward`. Interface names must have no dots."""
        path = Path("/proc/sys", *key.split("."))

        def access() -> str:
            if value is not None:
                path.write_text(str(value))
            return path.read_text().strip()

        return self.call(access)

    def add_route(self, destination: str, via: str) -> None:
        """`destination` ("default", "10.0.0.0/8") goes through the router `via`."""
        self.run(["ip", "route", "replace", destination, "via", via, *CONGESTION_CONTROL])

    def forward(self) -> None:
        """Make this host an IP router."""
        self.sysctl("net.ipv4.ip_forward", 1)

    def offload(self, interface: str, **features: bool) -> None:
        """Switch ethtool offloads: `offload("eth0", tso=False, gro=True)`."""
        words = [word for name, wanted in features.items() for word in (name, "on" if wanted else "off")]
        self.run(["ethtool", "-K", interface, *words])

    def listening_ports(self) -> set[int]:
        """TCP ports (IPv4 and IPv6) that something listens on here."""

        def read() -> set[int]:
            ports = set()
            for table in ("tcp", "tcp6"):
                with open(f"/proc/thread-self/net/{table}") as lines:
                    next(lines)
                    for line in lines:
                        fields = line.split()
                        if fields[3] == LISTEN_STATE:
                            ports.add(int(fields[1].rpartition(":")[2], 16))
            return ports

        return self.call(read)

    def wait_listening(
        self, port: int, process: subprocess.Popen[Any] | None = None, timeout_s: float = 10.0
    ) -> None:
        """Return once something listens on TCP `port`; raise when `process`, which should, has ended."""

        def observe() -> bool:
            if process is not None and process.poll() is not None:
                raise CommandFailed(self.name, _ended(process))
            return port in self.listening_ports()

        wait_for(observe, f"a listener on {self.name}:{port}", timeout_s)

    def process_ids(self) -> list[int]:
        """Every process whose main thread lives in this namespace, also those that no `popen` knows."""
        return _namespace_processes(self.namespace)

    def kill_processes(self) -> None:
        """Kill (SIGKILL) and reap what runs here."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        _kill_namespace(self.namespace)
        for process in self.processes:
            process.wait()
            _close_pipes(process)
        self.processes.clear()


class Lab:
    """Context manager that owns hosts, their wires and a scratch directory; all are gone when it ends."""

    def __init__(self) -> None:
        self._prefix = f"serval-lab.{os.getpid()}.{_start_time(os.getpid())}."
        self._hosts: dict[str, Host] = {}
        self._serial = 0
        self.directory = Path()

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise PermissionError("the lab makes network namespaces: run it as root")
        remove_leftovers()
        self.directory = Path(tempfile.mkdtemp(prefix=self._prefix))
        self.directory.chmod(0o755)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self._hosts.values():
            host.kill_processes()
        for host in self._hosts.values():
            _ip("netns", "delete", host.namespace)
        self._hosts.clear()
        shutil.rmtree(self.directory)

    @property
    def hosts(self) -> Mapping[str, Host]:
        """The hosts made so far, by name."""
        return self._hosts

    def host(self, name: str) -> Host:
        """Make a host. Its TCP uses cubic; IPv6 addresses are usable at once."""
        if name in self._hosts:
            raise ValueError(f"this lab already has a host {name}")
        self._serial += 1
        namespace = f"{self._prefix}{id(self):x}.{self._serial}.{name}"
        _ip("netns", "add", namespace)
        host = self._hosts[name] = Host(name, namespace)
        host.run(["ip", "link", "set", "lo", "up"])
        # As the namespace's default, cubic is refused where it is not among those the machine allows; a route
        # may choose it everywhere.
        host.run(["ip", "route", "replace", *LOOPBACK_ROUTE, *CONGESTION_CONTROL])
        host.sysctl("net.ipv6.conf.default.accept_dad", 0)
        host.sysctl("net.ipv6.conf.default.router_solicitations", 0)
        return host

    def connect(
        self,
        left: Host,
        left_address: str,
        right: Host,
        right_address: str,
        *,
        mtu: int = 1500,
        names: tuple[str, str] | None = None,
    ) -> tuple[str, str]:
        """Lay a wire (veth) between two hosts; addresses as "10.1.0.1/24", or "" for none.

        Returns the interface names; they default to eth0, eth1 ... in the order of connecting.
        """
        left_name, right_name = names or (left.next_interface(), right.next_interface())
        _ip(
            *("link", "add", left_name, "mtu", mtu, "netns", left.namespace, "type", "veth"),
            *("peer", "name", right_name, "mtu", mtu, "netns", right.namespace),
        )
        for host, interface, address in ((left, left_name, left_address), (right, right_name, right_address)):
            host.run(["ip", "link", "set", interface, "up"])
            host.interfaces[interface] = address
            if address:
                host.run(["ip", "address", "add", address, "brd", "+", "dev", interface])
                network = str(ipaddress.ip_interface(address).network)
                source = ("proto", "kernel", "scope", "link", "src", host.address(interface))
                host.run(["ip", "route", "replace", network, "dev", interface, *source, *CONGESTION_CONTROL])
        return left_name, right_name

    def switch(self, name: str, ports: Mapping[Host, str], *, mtu: int = 1500) -> Host:
        """Join several hosts to one LAN, each with the given address. Returns the bridge's host.

        Its device is `br0`; the ports are called after the hosts they lead to.
        """
        bridge = self.host(name)
        bridge.run(["ip", "link", "add", "br0", "type", "bridge", "forward_delay", 0, "mcast_snooping", 0])
        bridge.run(["ip", "link", "set", "br0", "mtu", mtu, "up"])
        for host, address in ports.items():
            port = host.name[:15]
            self.connect(host, address, bridge, "", mtu=mtu, names=(host.next_interface(), port))
            bridge.run(["ip", "link", "set", port, "master", "br0"])
        return bridge


def shape(host: Host, interface: str, rate: str, *, burst: str = "256k", latency: str = "20ms") -> None:
    """Limit what leaves `interface` to `rate` (tc syntax, "1gbit") with a token bucket."""
    bucket = ("tbf", "rate", rate, "burst", burst, "latency", latency)
    host.run(["tc", "qdisc", "replace", "dev", interface, "root", *bucket])


def unshape(host: Host, interface: str) -> None:
    """Remove what `shape` did."""
    host.run(["tc", "qdisc", "del", "dev", interface, "root"])


def remove_leftovers() -> list[str]:
    """Remove namespaces, processes and directories of labs whose process is dead; returns their names."""
    removed = []
    for namespace in sorted(entry.name for entry in _entries(NAMESPACES) if _is_leftover(entry.name)):
        _kill_namespace(namespace)
        _ip("netns", "delete", namespace)
        removed.append(namespace)
    for directory in _entries(Path(tempfile.gettempdir())):
        if _is_leftover(directory.name):
            shutil.rmtree(directory)
            removed.append(str(directory))
    return removed


def _is_leftover(name: str) -> bool:
    match = _name_pattern.match(name)
    return match is not None and _start_time(int(match["pid"])) != int(match["started"])


def _start_time(pid: int) -> int:
    """Clock ticks after boot at which `pid` started, 0 if it does not exist. Tells it from a later `pid`."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat.rpartition(")")[2].split()[PROC_STAT_START_TIME_FIELD - 3])


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _enter_namespace(path: Path) -> None:
    with _opened(path) as fd:
        if _libc.setns(fd, CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"setns({path}): {os.strerror(code)}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _ip(*words: Argument) -> str:
    result = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True, timeout=30, check=False)
    if result.returncode != 0:
        raise CommandFailed("this machine", result)
    return result.stdout


def _namespace_processes(namespace: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", namespace).split()]


def _kill_namespace(namespace: str) -> None:
    def kill_what_is_left() -> bool:
        left = _namespace_processes(namespace)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    wait_for(kill_what_is_left, f"the processes in {namespace} to end")


def _ended(process: subprocess.Popen[Any]) -> subprocess.CompletedProcess[Any]:
    stdout, stderr = (stream.read() if stream else "" for stream in (process.stdout, process.stderr))
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _close_pipes(process: subprocess.Popen[Any]) -> None:
    streams: tuple[IO[Any] | None, ...] = (process.stdin, process.stdout, process.stderr)
    for stream in streams:
        if stream:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _tail(output: str | bytes | None, limit: int = 4000) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return text[-limit:].strip()
