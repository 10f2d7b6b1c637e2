"""What does a flood of SYNs from everywhere do to a reverse translator? Nothing to its flows, little to its memory.

The attacker is also the server's default gateway, so that the server has a way back to every forged source, and
nobody ever answers its SYN-ACKs. Nothing here depends on how fast anything is.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hostile import SERVICE_NUMBER, Attacker, LiveTransfer, SynTemplate, resident_bytes

from lab.chain import TranslatorProcess, kernel_traces
from lab.hosts import Host, Lab, shape
from lab.waiting import wait_for
from serval_core.sal_settings import SalSettings
from tests.serval_core.stack_thread import StackThread

CLIENT, SERVER, ATTACKER = "10.1.0.1", "10.1.0.2", "10.1.0.3"
SYNS = 50_000
HALF_OPEN_MAX = SalSettings().request_queue_limit
GROWTH_MAX_BYTES = 24 << 20
# It asks twice per second, so that the test need not wait for an answer to its next SYN for long.
PATIENT = SalSettings(connect_timeout_s=20.0, syn_timeout_max_s=0.5, time_wait_s=0.2)


class Besieged(NamedTuple):
    """The server's host with its translator and the legacy service behind it, and the others."""

    client: StackThread
    server: TranslatorProcess
    legacy: socket.socket
    attacker: Attacker

    def open_flow(self) -> LiveTransfer:
        """A connection from the client to the legacy service, and bytes on it."""
        near = self.client.connect(str(SERVICE_NUMBER), SERVER)
        far, _ = self.legacy.accept()
        far.settimeout(20)
        return LiveTransfer(near.socket, far)


@pytest.fixture
def besieged(lab: Lab) -> Iterator[Besieged]:
    hosts = client, server, attacker = lab.host("client"), lab.host("server"), lab.host("attacker")
    lab.switch("switch", dict(zip(hosts, (f"{each}/24" for each in (CLIENT, SERVER, ATTACKER)), strict=True)))
    server.add_route("default", ATTACKER)
    shape(client, "eth0", "20mbit")
    legacy = server.call(socket.create_server, ("127.0.0.1", 7000))
    legacy.settimeout(20)
    log = lab.directory / "reverse.log"
    translator = TranslatorProcess(server, ["--reverse", f"{SERVICE_NUMBER}=127.0.0.1:7000"], log)
    translator.wait_ready(demux_services=1)
    villain = Attacker(attacker, SERVER)
    with StackThread(client, sal=PATIENT) as near, legacy:
        yield Besieged(near, translator, legacy, villain)
    villain.close()
    assert translator.stop() == 0
    assert "Traceback" not in translator.log()
    assert "Exception" not in translator.log()
    assert_clean(server)


def assert_clean(host: Host) -> None:
    assert kernel_traces(host) == []


def flood(attacker: Attacker, seed: int) -> None:
    """SYNs for the service from all over the Internet, no two alike."""
    numbers = random.Random(seed)
    template = SynTemplate(SERVER)
    for _ in range(SYNS):
        first_octet = numbers.choice((8, 23, 51, 104, 151, 185, 203))
        address = first_octet << 24 | numbers.getrandbits(24)
        attacker.send_packet(template.make(address, numbers.getrandbits(32) | 1, numbers.getrandbits(64)))


def test_a_syn_flood(besieged: Besieged) -> None:
    transfer = besieged.open_flow()
    server = besieged.server
    memory = resident_bytes(server.process.pid)
    flooding = threading.Thread(target=flood, args=(besieged.attacker, 1))
    flooding.start()
    # This one begins in the middle of it, and is served as soon as there is room between the half-open flows.
    wait_for(lambda: server.ask("counters").get("dropped_request_queue_full", 0) > 0, "the queue to be full")
    hopeful = besieged.client.begin_connect(str(SERVICE_NUMBER), SERVER)
    entries = []

    def flood_is_over() -> bool:
        entries.append(server.ask("counters")["flow_map_entries"])
        return not flooding.is_alive()

    wait_for(flood_is_over, "the flood to be over", timeout_s=60, interval_s=0.1)
    transfer.goes_on()
    transfer.finish()

    outcome = hopeful.get(timeout=25)
    if isinstance(outcome, OSError):
        raise outcome
    late, _ = besieged.legacy.accept()
    late.settimeout(20)
    second = LiveTransfer(outcome.socket, late)
    second.finish()

    counters = server.ask("counters")
    assert HALF_OPEN_MAX <= max(entries) <= HALF_OPEN_MAX + 2
    assert counters["packets_received"] > HALF_OPEN_MAX
    assert resident_bytes(server.process.pid) - memory < GROWTH_MAX_BYTES
    for each in (transfer, second):
        each.receiver.close()
    wait_for(lambda: server.ask("counters")["flow_map_entries"] == 0, "half-open and finished flows to be gone", 30)
    assert server.flows() == []
