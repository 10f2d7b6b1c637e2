"""Two hosts that each have two interfaces, with a router between them: flows can go either way at either end."""

from __future__ import annotations

import hashlib
import queue
import threading
from typing import Any

from lab.hosts import Host, Lab
from serval_core.names import FlowID, parse_address
from tests.serval_core.stack_thread import StackThread, Stream

CLIENT = ("10.1.1.2", "10.1.2.2")
SERVER = ("10.2.1.2", "10.2.2.2")
TIMEOUT_S = 20.0


def two_paths(lab: Lab, mtu: int = 1500, second_mtu: int = 0) -> tuple[Host, Host, Host]:
    """Client, server, and the router. Their interfaces are eth0 and eth1, the addresses CLIENT and SERVER."""
    client, server, router = lab.host("client"), lab.host("server"), lab.host("router")
    router.forward()
    for host, addresses in ((client, CLIENT), (server, SERVER)):
        for metric, address in enumerate(addresses):
            network = address.rpartition(".")[0]
            size = second_mtu if metric and second_mtu else mtu
            name, _ = lab.connect(host, f"{address}/24", router, f"{network}.1/24", mtu=size)
            route = ("default", "via", f"{network}.1", "dev", name, "metric", 100 + metric)
            host.run(["ip", "route", "add", *route, "congctl", "cubic"])
        host.sysctl("net.ipv4.conf.all.rp_filter", 2)
    return client, server, router


def cut(router: Host, interface: str) -> None:
    """From now on nothing gets through the router by this interface, and nobody is told."""
    rules = f"""table ip cut {{
        chain forward {{
            type filter hook forward priority 0; policy accept; iifname {interface} drop; oifname {interface} drop
        }}
    }}"""
    router.run(["nft", "-f", "-"], input=rules)


class Mover:
    """Moves flows of a stack, and waits for what comes of it."""

    def __init__(self, stack: StackThread) -> None:
        self.stack = stack
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        kinds = ("flow_migrated", "migration_failed")
        stack.call(lambda: stack.stack.events.subscribe(lambda event: self.events.put(event.as_dict()), kinds))

    def move(self, flow_id: int, interface: str = "", address: str = "") -> dict[str, Any]:
        """Move a flow to an interface, or to an own address; the event that says how it went."""
        self.begin(flow_id, interface, address)
        return self.outcome(flow_id, "local")

    def begin(self, flow_id: int, interface: str = "", address: str = "") -> None:
        """Begin to move a flow."""
        migrations = self.stack.stack.migrations
        goal = migrations.goal(interface, parse_address(address) if address else 0)
        self.stack.call(lambda: migrations.migrate_flow(FlowID(flow_id), goal))

    def outcome(self, flow_id: int, end: str) -> dict[str, Any]:
        """The next event about a flow's "local" or "peer" end."""
        while True:
            event = self.events.get(timeout=TIMEOUT_S)
            if event["flow_id"] == flow_id and event["end"] == end:
                return event


class Transfer:
    """Random bytes from one end of a flow to the other until `finish()`, and a proof that they arrived."""

    def __init__(self, sender: Stream, receiver: Stream) -> None:
        self.sender, self.receiver = sender, receiver
        self.sent_bytes = self.received_bytes = 0
        self._sent, self._received = hashlib.sha256(), hashlib.sha256()
        self._finish = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(each,), daemon=True) for each in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def finish(self) -> int:
        """End the transfer; the number of bytes, after all of them have arrived as they were sent."""
        self._finish.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), f"{self.sent_bytes} bytes sent, {self.received_bytes} received"
        assert not self._failures, self._failures
        assert self._received.hexdigest() == self._sent.hexdigest()
        return self.received_bytes

    def _run(self, target: Any) -> None:
        try:
            target()
        except BaseException as error:
            self._failures.append(error)

    def _send(self) -> None:
        block = hashlib.shake_128(b"transfer").digest(1 << 16)
        while not self._finish.is_set():
            self.sender.socket.sendall(block)
            self._sent.update(block)
            self.sent_bytes += len(block)
        self.sender.socket.shutdown(1)

    def _receive(self) -> None:
        while data := self.receiver.socket.recv(1 << 18):
            self._received.update(data)
            self.received_bytes += len(data)
