"""Which TCP ports of this host stand for flows in framing `native`? Ports that are bound, so that no other socket gets them.

Nothing listens there. What comes to a flow's port and is not the flow's, the host treats as it treats any closed port.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections import deque
from errno import EACCES, EADDRINUSE, EMFILE, ENFILE
from typing import NamedTuple

from serval_core.dataplane.bpf_loader import Map
from serval_core.errors import KernelRefused
from serval_core.names import FlowID

_ENTRY = struct.Struct("!I4s")
_RESERVED = (1).to_bytes(4, sys.byteorder)
_NOT_OURS = bytes(_ENTRY.size)
_TRIES = 16  # ports in a row that other sockets have


class PortRange(NamedTuple):
    """TCP ports, both ends included."""

    first: int
    last: int


DEFAULT_PORTS = PortRange(61000, 65535)
"""Behind those that Linux gives to sockets that ask for none in particular."""


class ReservedPorts:
    """The ports of one stack. Owns a bound socket for each that is taken; `close` gives all of them back."""

    def __init__(self, ports: PortRange, entries: Map) -> None:
        """`entries`: the BPF map `native_ports`."""
        self._entries = entries
        # First in, first out: a port rests as long as possible after its last flow.
        self._free = deque(range(ports.first, ports.last + 1))
        self._bound: dict[int, socket.socket] = {}
        self._flow_of: dict[int, FlowID] = {}

    def __len__(self) -> int:
        return len(self._bound)

    def take(self) -> int:
        """A port that no flow and no other socket has; 0 when none is found, or no descriptor is left for it."""
        for _ in range(min(_TRIES, len(self._free))):
            port = self._free.popleft()
            try:
                if self._bind(port):
                    return port
            except OSError as error:
                if error.errno not in (EMFILE, ENFILE):
                    raise KernelRefused(f"reserve TCP port {port}", error.errno or 0, "") from error
                self._free.appendleft(port)
                return 0
            self._free.append(port)
        return 0

    def release(self, port: int) -> None:
        """The flow that had this port is gone."""
        bound = self._bound.pop(port, None)
        if bound is not None:
            bound.close()
            self._free.append(port)

    def give(self, port: int, flow_id: FlowID) -> None:
        """What comes to the port belongs to this flow from now on."""
        self._flow_of[port] = flow_id
        self._entries.update(port.to_bytes(4, sys.byteorder), _ENTRY.pack(flow_id, _RESERVED))

    def flow_of(self, port: int) -> FlowID | None:
        """The flow that a port belongs to."""
        return self._flow_of.get(port)

    def take_back(self, port: int, flow_id: FlowID) -> None:
        """Nothing that comes to the port is the flow's any more, nor ours, unless another flow has it by now."""
        if self._flow_of.get(port) == flow_id:
            del self._flow_of[port]
            self._entries.update(port.to_bytes(4, sys.byteorder), _NOT_OURS)

    def close(self) -> None:
        """Give all ports back to the host."""
        for port in list(self._bound):
            self.release(port)
        self._free.clear()

    def _bind(self, port: int) -> bool:
        """Bind a port; False if another socket has it, or this process may not. Raises OSError."""
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            bound.bind(("", port))
        except OSError as error:
            bound.close()
            if error.errno in (EADDRINUSE, EACCES):
                return False
            raise
        self._bound[port] = bound
        return True
