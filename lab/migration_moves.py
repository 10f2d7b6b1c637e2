"""How does one end of a live download get somewhere else, and what did the client notice? Moves, each measured.

What is measured is the silence at the unmodified client: the longest time without data between shortly before a move and
shortly after it. What TCP of the sending translator repeated meanwhile is counted too, as that is what explains long ones.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from lab.arrivals import Arrivals
from lab.chain import TranslatorProcess
from lab.hosts import Argument, CommandFailed, Host
from lab.native import serval_json
from lab.traffic import PROJECT
from lab.two_ways import FRONT, WAYS, EventFollower, Inner, TwoWays
from lab.waiting import NeverHappened, wait_for
from serval_core.stack_socket import StackSocketClient

BEFORE_S = 0.02
AFTER_S = 0.3
NOTICED_S = 20.0
VM_PAUSE_S = 0.3
STREAM_TIMEOUT_S = 30.0
KINDS = ("flow_migrated", "migration_failed")
COUNTERS = ("RetransSegs", "TCPTimeouts")


class Move(NamedTuple):
    """One move. `at`: when it was done, seconds of the wall clock; `gap_s`: the silence at the client around it."""

    at: float
    gap_s: float
    repeated_segments: int = 0
    timeouts: int = 0


class Program:
    """A program of `lab.endless_stream` on `host`, and the lines of JSON that it prints."""

    def __init__(self, host: Host, *words: Argument) -> None:
        command = [sys.executable, "-m", "lab.endless_stream", *words]
        self.host = host
        self.process = host.popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def line(self) -> dict[str, Any]:
        """The next line. CommandFailed if the program has ended, NeverHappened if it takes too long."""
        try:
            line = self._lines.get(timeout=STREAM_TIMEOUT_S)
        except queue.Empty:
            raise NeverHappened(f"nothing more came out of the stream on {self.host.name}") from None
        if not line:
            status = self.process.wait(STREAM_TIMEOUT_S)
            raise CommandFailed(self.host.name, subprocess.CompletedProcess(self.process.args, status, "", ""))
        said: dict[str, Any] = json.loads(line)
        return said

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # the lab has ended, and closed the pipe
            while line := self.process.stdout.readline():
                self._lines.put(line)
        self._lines.put("")


class Server:
    """A plain TCP server on the server host that sends for ever. It prints the hash of each download that has ended."""

    def __init__(self, ways: TwoWays, port: int) -> None:
        self._program = Program(ways.server, "serve", port)
        ways.server.wait_listening(port, self._program.process)

    def sent(self) -> dict[str, Any]:
        """What was sent to the client that has finished."""
        return self._program.line()


class Download:
    """A plain TCP client on the client host that reads from the server through both translators until `finish`."""

    def __init__(self, ways: TwoWays, port: int) -> None:
        self._program = Program(ways.client, "read", FRONT, port)
        self.port = int(self._program.line()["port"])

    def finish(self) -> dict[str, Any]:
        """Half-close, read what is still coming; the number of bytes and their SHA-256."""
        assert self._program.process.stdin is not None
        self._program.process.stdin.close()
        return self._program.line()


class Side:
    """A translator, the host it is on, and what its stack tells of migrations."""

    def __init__(self, inner: Inner, translator: TranslatorProcess) -> None:
        self.inner = inner
        self.host = inner.host
        self.translator = translator
        self.events = EventFollower(inner.host, KINDS)

    def moved(self, after: int, flow_id: int) -> dict[str, Any]:
        """The next successful move of a flow's end on this side, among the events behind the first `after`."""

        def wanted(event: dict[str, Any]) -> bool:
            return (event["event"], event["flow_id"], event["end"]) == ("flow_migrated", flow_id, "local")

        return self.events.wait(after, wanted, f"flow {flow_id} to move on {self.host.name}", NOTICED_S)


class Scene:
    """A download that is looked at, and ways to move it. `flow_ids` are those of its two ends."""

    def __init__(self, ways: TwoWays, arrivals: Arrivals, near: Side, far: Side, download: Download) -> None:
        self.ways, self.near, self.far = ways, near, far
        self._arrivals = arrivals.to(download.port)
        self.port = download.port
        pair = wait_for(self._pair, f"the flow of the client's port {self.port}") or {}
        flow = next(each for each in ways.translator.flows() if each["flow_id"] == pair["flow_id"])
        self.flow_ids = {near.host: int(flow["flow_id"]), far.host: int(flow["peer_flow_id"])}
        self.wait_data()

    def wait_data(self) -> None:
        """Return once some more has arrived."""
        before = len(self._arrivals)
        wait_for(lambda: len(self._arrivals) > before, "data to arrive", NOTICED_S)

    def still(self) -> Move:
        """No move at all: what the client sees of the machine and the wires."""
        at = time.time()
        time.sleep(BEFORE_S + AFTER_S)
        return Move(at + BEFORE_S, self._arrivals.gap(at, at + BEFORE_S + AFTER_S).length_s)

    def by_hand(self, side: Side, way: str) -> Move:
        """`serval migrate flow N IF`, typed on the host of one end."""

        def migrate() -> None:
            (outcome,) = serval_json(side.host, "migrate", "flow", self.flow_ids[side.host], way)
            assert outcome["outcome"] == "migrated", outcome

        return self._measured(side, migrate)

    def by_request(self, side: Side, way: str) -> Move:
        """The same through the stack socket, at the cost of no process."""
        arguments = {"flow_id": self.flow_ids[side.host], "interface": way}
        return self._measured(side, lambda: side.host.call(partial(StackSocketClient().request, "migrate_flow", **arguments)))

    def lose(self, side: Side) -> Move:
        """The wire that one end uses loses its carrier, and gets it back when the flow has gone to the other one."""
        way = self.way(side)
        try:
            return self._measured(side, lambda: side.inner.cut(way), from_the_start=True)
        finally:
            side.inner.mend(way)

    def drop(self, side: Side) -> Move:
        """The router stops to forward what one end sends and gets; nobody is told."""
        address = self.address(side)
        router = self.ways.router

        def forget() -> None:
            rules = "".join(f"add rule ip lab drops ip {word} {address} drop; " for word in ("saddr", "daddr"))
            chain = "add chain ip lab drops { type filter hook forward priority 0; }"
            router.run(["nft", f"add table ip lab; {chain}; {rules}"])

        try:
            return self._measured(side, forget, from_the_start=True)
        finally:
            router.run(["nft", "delete table ip lab"])

    def change_subnet(self, old: str, new: str) -> Move:
        """The reverse translator's host, with one wire, is without network for a moment and then in another subnet."""
        side, way = self.far, WAYS[0]

        def move() -> None:
            side.inner.cut(way)
            side.host.run(["ip", "address", "del", f"{old}/24", "dev", way])
            time.sleep(VM_PAUSE_S)
            side.host.run(["ip", "address", "add", f"{new}/24", "dev", way])
            side.inner.mend(way)
            side.inner.default_route(way, new)

        return self._measured(side, move, from_the_start=True)

    def alone(self, up: bool) -> None:
        """Take the second interface from the reverse translator's host, or give it back."""
        side, way = self.far, WAYS[1]
        side.host.run(["ip", "link", "set", way, "up" if up else "down"])
        if up:
            side.inner.default_route(way, side.inner.addresses[1])

    def address(self, side: Side) -> str:
        """Where one end is, as its stack says."""
        flow_id = self.flow_ids[side.host]
        for each in side.translator.flows():
            if each["flow_id"] == flow_id:
                return str(each["local_address"])
        raise NeverHappened(f"flow {flow_id} on {side.host.name} is no more")

    def way(self, side: Side) -> str:
        """The interface that one end is on."""
        return WAYS[side.inner.addresses.index(self.address(side))]

    def _measured(self, side: Side, move: Callable[[], object], from_the_start: bool = False) -> Move:
        """`from_the_start`: the silence may begin when the move does, not when it is accomplished."""
        before, counted = len(side.events), tcp_counters(self.far.host)
        began = time.time()
        move()
        event = side.moved(before, self.flow_ids[side.host])
        at = float(event["at"])
        self._wait_until(at + AFTER_S)
        self.wait_data()
        after = tcp_counters(self.far.host)
        if not from_the_start:
            began = at - float(event["duration_s"]) - BEFORE_S
        gap_s = self._arrivals.gap(began, at + AFTER_S).length_s
        return Move(at, gap_s, *(after[name] - counted[name] for name in COUNTERS))

    def _pair(self) -> dict[str, Any] | None:
        pairs: list[dict[str, Any]] = self.ways.translator.ask("pairs")
        return next((each for each in pairs if str(each["legacy"]).endswith(f":{self.port}")), None)

    def _wait_until(self, at: float) -> None:
        time.sleep(max(0.0, at - time.time()))


def tcp_counters(host: Host) -> dict[str, int]:
    """What the kernel has counted of a host's TCP, by the names of /proc/net/snmp and netstat."""

    def read() -> dict[str, int]:
        counted: dict[str, int] = {}
        for table in ("snmp", "netstat"):
            with open(f"/proc/thread-self/net/{table}") as lines:
                for names, values in zip(lines, lines, strict=True):
                    counted.update(zip(names.split()[1:], map(int, values.split()[1:]), strict=True))
        return counted

    return host.call(read)

