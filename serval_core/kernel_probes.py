"""Does the kernel let us do this? Each probe finds out by doing it, and undoes it at once.

A probe returns 0 when it worked and the errno when it did not. What needs devices or filters is tried in a
network namespace that exists for the time of the probe only. What the answers mean for an operator is
`requirements_check`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serval_core.dataplane.netlink import Netlink
from serval_core.errors import KernelRefused, ServalError
from serval_core.wire.sal import PROTOCOL_SAL

CAPABILITY_BITS = {
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
TCP_REPAIR = 19
TCP_CONGESTION = 13
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
BPF_MAP_TYPE_HASH = 1
BPF_PROG_TYPE_SCHED_CLS = 3
# As large as the data plane's flow map, since kernels before 5.11 charge maps against RLIMIT_MEMLOCK.
MAP_ENTRIES = 65536
MAP_VALUE_BYTES = 64
# r0 = 0; exit
TRIVIAL_PROGRAM = struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)
LIBBPF_NAMES = ("libbpf.so.1", "libbpf.so.0")
CHILD_TIMEOUT_S = 30.0
NOT_TRIED = -1
UNICAST_ROUTE = 1
LOOPBACK_INDEX = 1

_libc = ctypes.CDLL(None, use_errno=True)


def effective_capabilities() -> frozenset[str]:
    """Which of CAPABILITY_BITS this thread has in effect."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            mask = int(value, 16)
            return frozenset(name for name, bit in CAPABILITY_BITS.items() if mask >> bit & 1)
    return frozenset()


def load_libbpf() -> ctypes.CDLL | None:
    """libbpf, or None where it is not installed."""
    for name in LIBBPF_NAMES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def libbpf_version(library: ctypes.CDLL) -> str:
    """Its version, "0" for those that are too old to tell."""
    try:
        library.libbpf_version_string.restype = ctypes.c_char_p
        return str(library.libbpf_version_string().decode()).removeprefix("v")
    except AttributeError:
        return "0"


def try_bpf_program(library: ctypes.CDLL) -> int:
    """Load a traffic control program that does nothing."""
    instructions = ctypes.c_size_t(len(TRIVIAL_PROGRAM) // 8)
    arguments = (BPF_PROG_TYPE_SCHED_CLS, b"doctor", b"GPL", TRIVIAL_PROGRAM, instructions, None)
    return _close_bpf(library.bpf_prog_load(*arguments))


def try_bpf_map(library: ctypes.CDLL) -> int:
    """Create a hash map of the size of the flow map."""
    arguments = (BPF_MAP_TYPE_HASH, b"doctor", 4, MAP_VALUE_BYTES, MAP_ENTRIES, None)
    return _close_bpf(library.bpf_map_create(*arguments))


def _close_bpf(result: int) -> int:
    if result < 0:
        return -result
    os.close(result)
    return 0


def try_tcp_repair() -> int:
    """Put a socket into repair mode and take it out again."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            probe.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
        except OSError as error:
            return error.errno or errno.EIO
    return 0


def try_raw_socket() -> int:
    """Open a raw socket for the SAL's protocol number."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, PROTOCOL_SAL).close()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def try_congestion_control(name: str) -> int:
    """Choose a congestion control for one socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, name.encode())
        except OSError as error:
            return error.errno or errno.EIO
    return 0


def count_pipes(wanted: int, size_bytes: int) -> int:
    """How many of `wanted` pipes of `size_bytes` we get at once. Empty pipes cost next to no memory."""
    held: list[int] = []
    try:
        for got in range(wanted):
            held += os.pipe()
            if fcntl.fcntl(held[-1], fcntl.F_SETPIPE_SZ, size_bytes) < size_bytes:
                return got
    except OSError:
        return len(held) // 2 - 1 if held else 0
    else:
        return wanted
    finally:
        for fd in held:
            os.close(fd)


def read_sysctl(name: str) -> str | None:
    """Its value; None where this kernel or this network namespace does not show it."""
    try:
        return Path("/proc/sys", *name.split(".")).read_text().strip()
    except OSError:
        return None


def ipv4_routes() -> list[tuple[str, int, str]]:
    """All IPv4 routes of all tables but the local one: (destination, prefix length, interface name)."""

    def listed(ip: Any) -> list[tuple[str, int, str]]:
        names = {link["index"]: link.get("IFLA_IFNAME") for link in ip.get_links()}
        return [
            (route.get("RTA_DST") or "0.0.0.0", route["dst_len"], names.get(route.get("RTA_OIF"), "?"))
            for route in ip.get_routes(family=socket.AF_INET)
            if route["type"] == UNICAST_ROUTE
        ]

    netlink = Netlink()
    try:
        return netlink.run("list routes", listed)
    finally:
        netlink.close()


def probe_in_own_namespace() -> dict[str, int | str]:
    """Try what needs devices, in a child process with a network namespace that vanishes with it.

    "namespace", "veth", "clsact": errno, or NOT_TRIED when the step before it failed. "user_namespace": 1
    when only a user namespace could be had, which says nothing about our own privileges. "data_plane": ""
    when the whole data plane could be set up and removed, else the sentence of the error; not tried in a user
    namespace, which may not load BPF.
    """
    return _in_child(_namespace_probes)


def _namespace_probes() -> dict[str, int | str]:
    results: dict[str, int | str] = {"namespace": 0, "user_namespace": 0}
    results |= {"veth": NOT_TRIED, "clsact": NOT_TRIED}
    if _libc.unshare(CLONE_NEWNET) != 0:
        if _libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
            return results | {"namespace": ctypes.get_errno()}
        results["user_namespace"] = 1
    netlink = Netlink()
    try:
        results["veth"] = _attempt(
            netlink, lambda ip: ip.link("add", ifname="probe0", kind="veth", peer={"ifname": "probe1"})
        )
        if results["veth"] == 0:
            _attempt(netlink, lambda ip: ip.link("set", index=LOOPBACK_INDEX, state="up"))
            index = socket.if_nametoindex("probe0")
            results["clsact"] = _attempt(netlink, lambda ip: ip.tc("add", "clsact", index=index))
    finally:
        netlink.close()
    if not results["user_namespace"] and results["clsact"] == 0:
        results["data_plane"] = _try_data_plane()
    return results


def _attempt(netlink: Netlink, work: Callable[[Any], object]) -> int:
    try:
        netlink.run("probe", work)
    except KernelRefused as error:
        return error.errno
    return 0


def _try_data_plane() -> str:
    try:
        from serval_core.dataplane.kernel import DataPlaneSettings, KernelDataPlane

        data_plane = KernelDataPlane(DataPlaneSettings())
        data_plane.open()
        data_plane.close()
    except (ServalError, OSError, ImportError) as error:
        return str(error) or repr(error)
    return ""


def _in_child(work: Callable[[], dict[str, int | str]]) -> dict[str, int | str]:
    """`work`'s result from a forked child. A child that crashes or hangs yields {"crashed": how}."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(readable)
            os.write(writable, json.dumps(work()).encode())
        except BaseException:
            os.write(writable, json.dumps({"crashed": traceback.format_exc(limit=-1)}).encode())
        finally:
            os._exit(0)
    os.close(writable)
    answered = False
    answer = b""
    try:
        answered = bool(select.select([readable], [], [], CHILD_TIMEOUT_S)[0])
        if answered:
            answer = os.read(readable, 65536)
    finally:
        os.close(readable)
        if not answered:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    if answer:
        return dict(json.loads(answer))
    how = f"did not end within {CHILD_TIMEOUT_S:g} s" if not answered else f"ended with wait status {status}"
    return {"crashed": f"the probe {how}"}
