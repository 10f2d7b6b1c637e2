"""What does a look at this machine yield? `Finding`s: checks return them, `translator.doctor` shows them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# Shown where a kernel lacks something that newer ones have.
KERNEL_ADVISED = "use kernel 5.15 or newer (Debian 12 has 6.1)"
GIST_CHARACTERS = 320
REBUILD = "build it again: make setup (or pip install . where clang, llvm and libbpf-dev are installed)"


class Severity(Enum):
    """REQUIRED: without it the stack does not run. ADVICE: it runs, but slower, or for fewer connections."""

    REQUIRED = "required"
    ADVICE = "advice"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `remedy` is one line naming the command; empty when `ok`."""

    name: str
    severity: Severity
    ok: bool
    found: str
    needed: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the machine shall carry. `busy_pairs`: connections with bytes in flight, two pipes each."""

    connections: int = 4000
    busy_pairs: int = 128
    pipe_bytes: int = 1 << 20
    congestion_control: str = "cubic"


def grant(capability: str) -> str:
    """How a process comes to have a capability."""
    return (
        f"run it as root (sudo serval-translator ...), with AmbientCapabilities={capability} in its "
        f"systemd unit, or with --cap-add {capability.removeprefix('CAP_')} in a container"
    )


def gist(error: str) -> str:
    """An error in one line. Of a long one, such as the verifier's log, beginning and end tell most."""
    line = " ".join(error.split())
    return line if len(line) <= GIST_CHARACTERS else f"{line[:80]} … {line[-GIST_CHARACTERS + 80 :]}"
