"""Which ports does the chain have, how is it dialled, and what do its translators hold?"""

from __future__ import annotations

import socket
from pathlib import Path

from lab.chain import Chain, TranslatorProcess
from lab.waiting import wait_for

WEB, SSH, GIT, IPERF, REDIS, POSTGRES, RAW, NOBODY = 80, 2222, 9418, 5201, 6379, 5432, 7000, 7999
PORTS = (WEB, SSH, GIT, IPERF, REDIS, POSTGRES, RAW, NOBODY)
IDLE_TIMEOUT_S = 20.0

Holdings = dict[str, int]


def holdings(translator: TranslatorProcess) -> Holdings:
    """Everything of a translator that must come back to where it was once all clients are gone."""
    stack, counters = translator.ask("counters"), translator.ask("translator_counters")
    return {
        "flows": len(translator.flows()),
        "flow map entries": stack["flow_map_entries"],
        "transports": stack["open_transports"],
        "clients": counters["clients"],
        "pairs": counters["splice_pairs_active"],
        "pipes lent": counters["splice_pipes_lent"],
        "pipe ends beyond the idle pipes": (
            translator.descriptors().get("pipe", 0) - 2 * counters["splice_pipes_open"]
        ),
        "sockets": _sockets(translator),
    }


def _sockets(translator: TranslatorProcess) -> int:
    """How many sockets it has open, those aside over which it has just told us the rest.

    Accepted Unix sockets carry the name of their listener, and only we dial it: the first look shows all of
    them that the second can find.
    """
    unix_sockets = Path(f"/proc/{translator.process.pid}/net/unix").read_text().splitlines()[1:]
    asked_over = {f"socket:[{line.split()[6]}]" for line in unix_sockets if line.endswith(" @serval-stack")}
    return sum(name.startswith("socket:[") and name not in asked_over for name in translator.open_files())


def settled_holdings(side: TranslatorProcess) -> Holdings:
    """What the translator holds once two successive readings agree."""
    readings = [holdings(side)]

    def agree() -> bool:
        readings.append(holdings(side))
        return readings[-1] == readings[-2]

    wait_for(agree, f"the holdings of {side.host.name} to settle", IDLE_TIMEOUT_S, interval_s=0.05)
    return readings[-1]


def wait_for_holdings(side: TranslatorProcess, expected: Holdings) -> None:
    """Wait until the translator holds exactly this; the failure shows what it holds instead."""
    seen: Holdings = {}

    def observe() -> bool:
        seen.update(holdings(side))
        return seen == expected

    try:
        wait_for(observe, "the translator to let go", IDLE_TIMEOUT_S, interval_s=0.05)
    except AssertionError:
        wrong = {key: f"{seen[key]} instead of {held}" for key, held in expected.items() if seen[key] != held}
        raise AssertionError(f"on {side.host.name}: {wrong}") from None


def dial(chain: Chain, port: int = RAW) -> socket.socket:
    """Connect as a legacy client."""
    connection: socket.socket = chain.client.call(socket.create_connection, (chain.front, port), 10)
    return connection


def dial_through(chain: Chain, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A client's connection and the server's end of it."""
    client = dial(chain)
    server, _ = listener.accept()
    server.settimeout(10)
    return client, server
