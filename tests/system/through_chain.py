"""Which ports does the chain have, how is it dialled, and what do its translators hold?"""

from __future__ import annotations

import socket

from lab.chain import Chain, TranslatorProcess
from lab.waiting import wait_for

WEB, SSH, GIT, IPERF, REDIS, POSTGRES, RAW, NOBODY = 80, 2222, 9418, 5201, 6379, 5432, 7000, 7999
PORTS = (WEB, SSH, GIT, IPERF, REDIS, POSTGRES, RAW, NOBODY)
IDLE_TIMEOUT_S = 20.0

Holdings = dict[str, int]


def holdings(translator: TranslatorProcess) -> Holdings:
    """Everything of a translator that must come back to where it was once all clients are gone."""
    stack, counters = translator.ask("counters"), translator.ask("translator_counters")
    descriptors = translator.descriptors()
    return {
        "flows": len(translator.flows()),
        "flow map entries": stack["flow_map_entries"],
        "transports": stack["open_transports"],
        "clients": counters["clients"],
        "pairs": counters["splice_pairs_active"],
        "pipes lent": counters["splice_pipes_lent"],
        "pipe ends beyond the idle pipes": descriptors.get("pipe", 0) - 2 * counters["splice_pipes_open"],
        "sockets": descriptors["socket"],
    }


def wait_for_holdings(side: TranslatorProcess, expected: Holdings) -> None:
    """Wait until the translator holds no more than this; the failure shows what it holds instead.

    It may hold less: a connection of the stack socket that had just asked may have been counted before.
    """
    seen: Holdings = {}

    def observe() -> bool:
        seen.update(holdings(side))
        return all(seen[key] <= held for key, held in expected.items())

    try:
        wait_for(observe, "the translator to let go", IDLE_TIMEOUT_S, interval_s=0.05)
    except AssertionError:
        wrong = {key: f"{seen[key]} instead of {held}" for key, held in expected.items() if seen[key] > held}
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
