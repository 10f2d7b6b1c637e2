"""How many connections per second can the service access layer open and close, and where does the time go?

Two SALs in one process hand each other their packets: no sockets, no kernel, no loss. What is measured is
the Python of connection setup and teardown, wire formats included; the figure per stack is half of the sum.

    python -m bench.sal_connections [--connections N] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from random import SystemRandom

from serval_core.effects import Accepted, SendPacket
from serval_core.names import parse_address, parse_service
from serval_core.paths import Interface, Path
from serval_core.rules import Rule
from serval_core.sal import SalSettings, ServiceAccessLayer
from serval_core.service_table import ServiceTable

SERVICE = parse_service("76568")
CLIENT = parse_address("10.0.0.1")
SERVER = parse_address("10.0.0.2")
CONNECTIONS_PER_SECOND = 3000  # of simulated time: decides how full TIMEWAIT and the timers are


class OnePath:
    """A host with one interface, whose answers cost nothing."""

    def __init__(self, address: int) -> None:
        self._interface = Interface(2, "wire", address, 24, address | 0xFF, 1500)
        self._path = Path(2, "wire", address, 0, 1500)

    def path_to(self, address: int, interface_index: int = 0) -> Path | None:
        return self._path

    def has_address(self, address: int) -> bool:
        return address == self._interface.address

    def interfaces(self) -> list[Interface]:
        return [self._interface]


def open_and_close(client: ServiceAccessLayer, server: ServiceAccessLayer, now: float) -> None:
    """One connection, closed by the client first, as a short request would."""
    flow_id = client.connect(SERVICE.service_id, now)
    accepted = exchange(client, server, now)
    client.fin_acknowledged(flow_id, now)
    exchange(client, server, now)
    server.fin_acknowledged(accepted, now)
    server.release(accepted, now)
    client.release(flow_id, now)
    exchange(client, server, now)
    client.handle_timeouts(now)
    server.handle_timeouts(now)


def exchange(client: ServiceAccessLayer, server: ServiceAccessLayer, now: float) -> int:
    """Carry packets to and fro until there are none; the flow that the server accepted meanwhile, or 0."""
    accepted = 0
    while True:
        quiet = True
        for sender, receiver in ((client, server), (server, client)):
            for effect in sender.take_effects():
                if type(effect) is SendPacket:
                    quiet = False
                    receiver.packet_received(effect.packet, 2, False, now)
                elif type(effect) is Accepted:
                    accepted = effect.flow_id
                    sender.accepted_taken(accepted)
        if quiet:
            return accepted


def run(connections: int) -> float:
    """Seconds that `connections` connections take, one after the other."""
    client_table, server_table = ServiceTable(), ServiceTable()
    client_table.add(Rule.forward(SERVICE, SERVER))
    client = ServiceAccessLayer(SalSettings(), client_table, OnePath(CLIENT), SystemRandom())
    server = ServiceAccessLayer(SalSettings(), server_table, OnePath(SERVER), SystemRandom())
    server.listen(SERVICE, 128, 0.0)
    start = time.perf_counter()
    for number in range(connections):
        open_and_close(client, server, number / CONNECTIONS_PER_SECOND)
    duration_s = time.perf_counter() - start
    assert not client.flows()
    assert not server.flows()
    return duration_s


def main() -> None:
    """Measure and print one JSON line, or a profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--connections", type=int, default=20000)
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    arguments = parser.parse_args()
    if arguments.profile:
        profile = cProfile.Profile()
        profile.runcall(run, arguments.connections)
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)
        return
    best_s = min(run(arguments.connections) for _ in range(3))
    per_stack_us = best_s / arguments.connections / 2 * 1e6
    print(
        json.dumps(
            {
                "connections": arguments.connections,
                "connections_per_s_both_stacks": round(arguments.connections / best_s),
                "python_us_per_connection_and_stack": round(per_stack_us, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
