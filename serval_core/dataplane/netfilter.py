"""Which rules of ours does the kernel's firewall get, and when? None that a packet passes while the stack runs, if possible.

A hook costs each superpacket some 0.1 µs whatever its rules say, hence two tables. `serval` in family netdev resets the connections
that a crash left. Table `serval` in family ip keeps our segments out of connection tracking, and is there only where
connections are tracked.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

NFT_TABLE = "serval"
TRACKED = Path("/proc/sys/net/netfilter/nf_conntrack_count")
CHECK_INTERVAL_S = 1.0

# While the BPF programs run, nothing gets to serval1. They vanish with a process that is killed, and the kernel sockets that other
# programs hold would repeat what nobody sends on: they are reset at their first word, a kept-alive silent one at its next probe.
ORPHANS = """
table netdev {table} {{
  chain orphans {{
    type filter hook ingress device "{anchor_outer}" priority 0; policy accept;
    ip saddr {address} meta l4proto tcp reject with tcp reset
  }}
}}
"""
# Conntrack never sees a SYN of our segments, and where it is strict it calls them invalid.
UNTRACKED = """
table ip {table} {{
  chain output {{ type filter hook output priority raw; policy accept; oif "{anchor}" notrack; }}
  chain prerouting {{ type filter hook prerouting priority raw; policy accept; iif "{anchor}" notrack; }}
}}
"""


class NetfilterRules:
    """The two tables of one stack. Without nft(8) there are none, and `doctor` says what that means."""

    def __init__(self, anchor: str, anchor_outer: str, local_address: str) -> None:
        """`anchor`: the device of the kernel sockets, which have `local_address`; `anchor_outer`: the other end of the pair."""
        self._names = {
            "table": NFT_TABLE,
            "anchor": anchor,
            "anchor_outer": anchor_outer,
            "address": local_address,
        }
        self._untracked = False
        self._next_check = 0.0

    def create(self) -> None:
        """Add what has to be there before a crash. The devices exist."""
        self._load(ORPHANS)

    def connection_begins(self, now: float) -> None:
        """Keep our segments untracked if this namespace tracks connections. Called before the first segment of each flow: its
        control packets have been tracked by then, so there is something to see. Looks once a second at most."""
        if self._untracked or now < self._next_check:
            return
        self._next_check = now + CHECK_INTERVAL_S
        if _tracked_connections():
            self._untracked = True
            self._load(UNTRACKED)

    def remove(self) -> list[str]:
        """Remove both tables, of this stack or a crashed one; returns what was there."""
        return [f"nft table {family} {NFT_TABLE}" for family in ("netdev", "ip") if _delete_table(family)]

    def _load(self, rules: str) -> None:
        if shutil.which("nft"):
            text = rules.format(**self._names)
            subprocess.run(["nft", "-f", "-"], input=text, text=True, check=False, capture_output=True)


def _tracked_connections() -> int:
    """How many connections this network namespace tracks; 0 where the kernel does not track at all."""
    try:
        return int(TRACKED.read_text())
    except FileNotFoundError:
        return 0


def _delete_table(family: str) -> bool:
    if not shutil.which("nft"):
        return False
    command = ["nft", "delete", "table", family, NFT_TABLE]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
