"""How many clients can this process hold, given how many descriptors it may have?"""

from __future__ import annotations

from serval_core.config_file import Misconfigured
from translator.config import CONNECTION_LIMIT, Settings

# The stack, BPF, logs, clients of the stack socket.
RESERVED_DESCRIPTORS = 512
# The client's socket, the flow's, and the port that stands for the flow in framing native; and while large amounts are moving, a
# pipe for each direction.
DESCRIPTORS_PER_CLIENT = 3
DESCRIPTORS_PER_BUSY_CLIENT = 7


def connection_limit(settings: Settings, descriptors: int) -> int:
    """The connection limit that fits into `descriptors`.

    The default one is lowered until all clients may be busy at once. An explicit one need only fit if most are
    idle, which the operator may know. That, or ports, not fitting raises Misconfigured.
    """
    ports = sum(each.last_port - each.first_port + 1 for each in settings.maps)
    free = descriptors - RESERVED_DESCRIPTORS - ports
    if free < DESCRIPTORS_PER_BUSY_CLIENT:
        needed = RESERVED_DESCRIPTORS + ports + DESCRIPTORS_PER_BUSY_CLIENT
        raise Misconfigured(
            f"{ports} mapped ports",
            f"the process may have {descriptors} descriptors and needs at least {needed}; raise LimitNOFILE"
            " (ulimit -n) or map fewer ports",
        )
    wanted = settings.limits.connections
    if wanted is None:
        return min(CONNECTION_LIMIT, free // DESCRIPTORS_PER_BUSY_CLIENT)
    fits = free // DESCRIPTORS_PER_CLIENT
    if wanted > fits:
        needed = RESERVED_DESCRIPTORS + ports + wanted * DESCRIPTORS_PER_CLIENT
        raise Misconfigured(
            f"--connection-limit {wanted} (limits.connections)",
            f"the process may have {descriptors} descriptors and would need {needed}; raise LimitNOFILE"
            f" (ulimit -n) or lower the limit (nearest: {fits})",
        )
    return wanted
