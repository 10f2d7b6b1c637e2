"""How does a program's socket reach the stack, and when does it try again after that has ended?

A daemon that is restarted, or upgraded, is back in a moment, and programs that listen or wait for datagrams need not notice.
The attempts follow each other ever more slowly, and end. Meanwhile the socket's descriptor leads to a timer: `select` and
its kin find it readable when the next attempt is due.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import socket as system
import time

from serval_core.native_protocol import NATIVE_SOCKET_ADDRESS
from serval_core.unix_socket import peer_credentials

SYSTEM_USER = "serval"  # configs/systemd/serval.sysusers
FIRST_PAUSE_S = 0.02  # doubles
LONGEST_PAUSE_S = 1.0
CLOCK_MONOTONIC = 1
_TFD_CLOEXEC = os.O_CLOEXEC


def reach_stack(*, wait: bool = True) -> int:
    """A descriptor that leads to the stack's native socket. OSError: ENETDOWN (no stack runs), EPERM (somebody pretends to be one).

    Without `wait`, BlockingIOError when too many others are before us.
    """
    with system.socket(system.AF_UNIX, system.SOCK_SEQPACKET) as reaching:
        reaching.settimeout(None if wait else 0)
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


class _Interval(ctypes.Structure):
    _fields_ = (
        ("every_s", ctypes.c_long),
        ("every_ns", ctypes.c_long),
        ("first_s", ctypes.c_long),
        ("first_ns", ctypes.c_long),
    )


class Return:
    """The attempts of one socket. The first one is due at once, the last one when `patience_s` is over."""

    def __init__(self, patience_s: float) -> None:
        now = time.monotonic()
        self.due = now
        self._until = now + patience_s
        self._pause_s = FIRST_PAUSE_S

    @property
    def over(self) -> bool:
        """Whether no more attempts are to be made."""
        return time.monotonic() >= self._until

    def failed(self) -> None:
        """The attempt that was due has failed."""
        self.due = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def timer(self) -> int:
        """A new descriptor that becomes readable when the next attempt is due."""
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.timerfd_create(CLOCK_MONOTONIC, _TFD_CLOEXEC)
        wait_ns = max(int((self.due - time.monotonic()) * 1e9), 1)
        interval = _Interval(0, 0, *divmod(wait_ns, 10**9))
        if fd < 0 or libc.timerfd_settime(fd, 0, ctypes.byref(interval), None):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return int(fd)
