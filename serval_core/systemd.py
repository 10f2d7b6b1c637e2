"""How do we work with the service manager? Readiness (sd_notify(3)) and sockets that it opened for us (sd_listen_fds(3)).

The protocols only, no library.
"""

from __future__ import annotations

import os
import socket

import structlog

log = structlog.get_logger("serval_core.systemd")

FIRST_INHERITED = 3  # SD_LISTEN_FDS_START


def notify_systemd(state: str) -> None:
    """Send `READY=1`, `STOPPING=1` … to $NOTIFY_SOCKET, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError as error:
            log.warning("cannot tell the service manager", state=state, error=str(error))


def inherited_sockets() -> dict[bytes, socket.socket]:
    """The listening sockets that we were started with, by the address they are bound to. The caller owns them."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return {}
    inherited = {}
    for fd in range(FIRST_INHERITED, FIRST_INHERITED + int(os.environ.pop("LISTEN_FDS", "0"))):
        os.set_inheritable(fd, False)
        opened = socket.socket(fileno=fd)
        name = opened.getsockname()
        inherited[name if isinstance(name, bytes) else str(name).encode()] = opened
    return inherited
