"""How does the service manager learn that we are ready, or about to stop? (sd_notify(3), protocol only)"""

from __future__ import annotations

import os
import socket

import structlog

log = structlog.get_logger("serval_core.systemd")


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
