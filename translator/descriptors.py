"""How many clients can this process hold, given how many descriptors it may have?"""

from __future__ import annotations

import resource

from translator.config import CONNECTION_LIMIT, Settings
from translator.port_map import Misconfigured

# The stack, BPF, logs, clients of the stack socket, and pipes of the pairs that are busy just now: the
# splice engine does with few pipes, or none, when there are no more descriptors.
RESERVED_DESCRIPTORS = 512
# The client's socket and the flow's.
DESCRIPTORS_PER_CLIENT = 2


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def connection_limit(settings: Settings, descriptors: int) -> int:
    """The connection limit that fits into `descriptors`.

    An explicit one that does not fit, or ports that do not, raise Misconfigured; the default one adapts.
    """
    ports = sum(each.last_port - each.first_port + 1 for each in settings.maps)
    fits = (descriptors - RESERVED_DESCRIPTORS - ports) // DESCRIPTORS_PER_CLIENT
    if fits < 1:
        needed = RESERVED_DESCRIPTORS + ports + DESCRIPTORS_PER_CLIENT
        raise Misconfigured(
            f"{ports} mapped ports",
            f"the process may have {descriptors} descriptors and needs at least {needed}; raise LimitNOFILE"
            " (ulimit -n) or map fewer ports",
        )
    wanted = settings.limits.connections
    if wanted is None:
        return min(CONNECTION_LIMIT, fits)
    if wanted > fits:
        needed = RESERVED_DESCRIPTORS + ports + wanted * DESCRIPTORS_PER_CLIENT
        raise Misconfigured(
            f"--connection-limit {wanted} (limits.connections)",
            f"the process may have {descriptors} descriptors and would need {needed}; raise LimitNOFILE"
            f" (ulimit -n) or lower the limit (nearest: {fits})",
        )
    return wanted
