"""How do the translators stand between a client and a server? Four hosts in a row, one on each inner host.

    client 10.1.0.1 - 10.1.0.254 translator 10.2.0.1 - 10.2.0.2 reverse 10.3.0.254 - 10.3.0.1 server

The inner hosts also route IP, so the client may dial the server directly for comparison. `TranslatorProcess`
is one `serval-translator` on any host.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.hosts import Argument, CommandFailed, Host, Lab
from lab.traffic import PROJECT
from lab.waiting import NeverHappened, wait_for
from serval_core.controller.settings import RegistrationSection
from serval_core.stack_socket import RequestFailed, StackNotRunning, StackSocketClient
from serval_core.wire.router_discovery import DISCOVERY_SERVICE

COMMAND: tuple[Argument, ...] = (sys.executable, "-m", "translator")
ASK_TIMEOUT_S = 5.0
# Where service controllers listen, for each other.
CONTROL_SERVICES = {str(RegistrationSection().client_id), str(RegistrationSection().router_id), DISCOVERY_SERVICE.text}


class TranslatorProcess:
    """A running `serval-translator`, or another program with a stack, on `host`. It logs to `log_path`."""

    def __init__(
        self,
        host: Host,
        arguments: Sequence[Argument],
        log_path: Path,
        command: Sequence[Argument] = COMMAND,
        name: str = "serval-translator",
    ) -> None:
        """`name`: what messages call the program."""
        self.name = name
        self.host = host
        self.log_path = log_path
        with log_path.open("ab") as log:
            self.process: subprocess.Popen[Any] = host.popen(
                [*command, *arguments], cwd=PROJECT, stdout=log, stderr=log
            )

    def wait_ready(self, ports: Sequence[int] = (), demux_services: int = 0, timeout_s: float = 20.0) -> None:
        """Return once it listens on the TCP `ports` and serves that many services, if only their targets work."""

        def observe() -> bool:
            if self.process.poll() is not None:
                ended = subprocess.CompletedProcess(
                    self.process.args, self.process.returncode, "", self.log()
                )
                raise CommandFailed(self.host.name, ended)
            if not self.host.listening_ports().issuperset(ports):
                return False
            try:
                return self._served() >= demux_services
            except (StackNotRunning, RequestFailed):  # not yet, or it is ending: its log says why
                return False

        try:
            wait_for(observe, f"{self.name} on {self.host.name} to be ready", timeout_s)
        except NeverHappened as error:
            raise NeverHappened(f"{error}\n{self.log()}") from None

    def _served(self) -> int:
        """How many services are offered here, or would be if their legacy targets worked."""
        bound: list[str] = [
            each["prefix"] for each in self.ask("services") if "DEMUX" in (rule["type"] for rule in each["targets"])
        ]
        try:
            reverse_maps: int = sum(each["direction"] == "reverse" for each in self.ask("maps"))
        except RequestFailed:  # no translator
            reverse_maps = 0
        return max(reverse_maps, len(set(bound) - CONTROL_SERVICES))

    def ask(self, request: str) -> Any:
        """What its stack socket answers: "flows", "services", "counters", "maps"."""
        return self.host.call(StackSocketClient(ASK_TIMEOUT_S).request, request)

    def flows(self) -> list[dict[str, Any]]:
        """Its flow table."""
        flows: list[dict[str, Any]] = self.ask("flows")
        return flows

    def show(self, what: str) -> str:
        """What `serval-translator show WHAT` prints."""
        return str(self.host.run([*COMMAND, "show", what], cwd=PROJECT).stdout)

    def log(self) -> str:
        """The end of what it logged."""
        return self.log_path.read_text(errors="replace")[-8000:]

    def open_files(self) -> list[str]:
        """What its file descriptors are, as /proc says it: "socket:[4711]", "pipe:[4712]", "/dev/null" ..."""
        found = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append(link.readlink().as_posix())
        return found

    def descriptors(self) -> dict[str, int]:
        """How many file descriptors of each kind it holds: "socket", "pipe", "anon_inode:bpf-map" ..."""
        return dict(Counter(name.partition("[")[0].rstrip(":") for name in self.open_files()))

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout_s: float = 20.0) -> int:
        """Send a signal, wait for the end and return the exit status."""
        self.process.send_signal(how)
        return self.process.wait(timeout_s)


class Chain:
    """The four hosts, and after `start` the two translators. `services` maps TCP ports to serviceIDs."""

    def __init__(self, lab: Lab, services: Mapping[int, str]) -> None:
        self.services = dict(services)
        self.directory = lab.directory
        self.client, self.translator_host = lab.host("client"), lab.host("translator")
        self.reverse_host, self.server = lab.host("reverse"), lab.host("server")
        lab.connect(self.client, "10.1.0.1/24", self.translator_host, "10.1.0.254/24")
        lab.connect(self.translator_host, "10.2.0.1/24", self.reverse_host, "10.2.0.2/24")
        lab.connect(self.reverse_host, "10.3.0.254/24", self.server, "10.3.0.1/24")
        self.client.add_route("default", "10.1.0.254")
        self.translator_host.add_route("default", "10.2.0.2")
        self.reverse_host.add_route("default", "10.2.0.1")
        self.server.add_route("default", "10.3.0.254")
        self.translator_host.forward()
        self.reverse_host.forward()
        self.front = self.translator_host.address("eth0")
        self.direct = self.server.address()
        self.wire = (self.translator_host, "eth1")
        self.translator: TranslatorProcess
        self.reverse: TranslatorProcess

    def start(
        self, forward_options: Sequence[Argument] = (), reverse_options: Sequence[Argument] = ()
    ) -> None:
        """Start both translators and return when both are ready."""
        self.start_reverse(reverse_options)
        self.start_translator(forward_options)

    def start_translator(self, options: Sequence[Argument] = ()) -> None:
        """Start the forward side: each port of `services` is mapped to its serviceID."""
        arguments: list[Argument] = [*options]
        for port, service in self.services.items():
            arguments += ["--map", f"{port}={service}"]
        arguments += ["--service", f"default={self.reverse_host.address('eth0')}"]
        log = self.directory / "translator.log"
        self.translator = TranslatorProcess(self.translator_host, arguments, log)
        self.translator.wait_ready(ports=list(self.services))

    def start_reverse(self, options: Sequence[Argument] = ()) -> None:
        """Start the reverse side: each serviceID leads to its port on the server."""
        arguments: list[Argument] = [*options]
        for port, service in self.services.items():
            arguments += ["--reverse", f"{service}={self.direct}:{port}"]
        self.reverse = TranslatorProcess(self.reverse_host, arguments, self.directory / "reverse.log")
        self.reverse.wait_ready(demux_services=len(set(self.services.values())))

    def stop(self) -> tuple[int, int]:
        """End both with SIGTERM; returns their exit statuses (forward, reverse)."""
        return self.translator.stop(), self.reverse.stop()


def kernel_traces(host: Host) -> list[str]:
    """What a stack left on `host`: devices that the lab did not make, filters, rules. Empty is clean."""
    traces = []
    for link in json.loads(host.run(["ip", "-json", "link", "show"]).stdout):
        if link["ifname"] != "lo" and link["ifname"] not in host.interfaces:
            traces.append(f"device {link['ifname']}")
    for qdisc in json.loads(host.run(["tc", "-json", "qdisc", "show"]).stdout):
        if qdisc["kind"] in ("clsact", "ingress"):
            traces.append(f"{qdisc['kind']} on {qdisc['dev']}")
    traces += host.run(["nft", "list", "tables"]).stdout.splitlines()
    return traces
