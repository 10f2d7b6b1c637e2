"""How do a service router, its instances and legacy clients stand? One LAN, with the clients behind a translator.

    client 10.1.0.1 - 10.1.0.254 translator 10.2.0.1 -+- 10.2.0.254 router
                                                      +- 10.2.0.11 first  (reverse translator, legacy web server)
                                                      +- 10.2.0.12 second (the same)
                                                      +- 10.2.0.13 third  (servald, native web server)

Instances register with their weights; a client's translator knows the router and nothing else.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from lab.chain import TranslatorProcess
from lab.hosts import Argument, Host, Lab
from lab.native import ENVIRONMENT, bound, start_servald
from lab.traffic import PROJECT, WebServer
from lab.waiting import wait_for

SERVICE = "76568"
PORT = 80
ROUTER = "10.2.0.254"
CLIENT_SIDE = "10.1.0.254"
# An instance that crashed is forgotten after LIFETIME_S, which has to be well below the client's connect timeout.
REFRESH_S, LIFETIME_S = 1.0, 4.0
END_TIMEOUT_S = 20.0


class Instance(ABC):
    """A host that serves SERVICE. Its web pages are in `directory`."""

    kind = ""

    def __init__(self, host: Host, address: str, weight: int, directory: Path) -> None:
        self.host = host
        self.name = host.name
        self.address = address
        self.weight = weight
        self.directory = directory
        self.state = "not started"
        self.stack: TranslatorProcess

    @abstractmethod
    def prepare(self) -> None:
        """Start what stays while it comes and goes."""

    def start(self) -> None:
        """Serve, for the first time or again."""
        self._start()
        self.state = "serving"

    def end(self) -> int:
        """Ask it to end (SIGTERM); the exit status."""
        process = self._process()
        process.send_signal(signal.SIGTERM)
        self.state = "ended"
        return process.wait(END_TIMEOUT_S)

    def crash(self) -> None:
        """Kill it (SIGKILL)."""
        process = self._process()
        process.kill()
        self.state = "killed"
        process.wait(END_TIMEOUT_S)

    @abstractmethod
    def _start(self) -> None:
        """Start what comes and goes, and wait until it serves."""

    @abstractmethod
    def _process(self) -> subprocess.Popen[Any]:
        """What comes and goes."""

    def _registration(self, more: str = "") -> Path:
        """A configuration file that has the service registered at the router."""
        file = self.directory / "registration.toml"
        file.write_text(
            f"[registration]\nrouters = ['{ROUTER}']\nweight = {self.weight}\n"
            f"refresh_s = {REFRESH_S}\nlifetime_s = {LIFETIME_S}\n{more}"
        )
        return file


class Reverse(Instance):
    """A legacy web server behind a reverse translator, which is what comes and goes."""

    kind = "reverse"

    def prepare(self) -> None:
        """Start the web server."""
        WebServer(self.host, self.directory, PORT, "127.0.0.1")

    def _start(self) -> None:
        targets = f"[[reverse]]\nservice = {SERVICE}\ntargets = ['127.0.0.1:{PORT}']\n"
        log = self.directory / "translator.log"
        self.stack = TranslatorProcess(self.host, ["--config", self._registration(targets)], log)
        self.stack.wait_ready(demux_services=1)

    def _process(self) -> subprocess.Popen[Any]:
        return self.stack.process


class Native(Instance):
    """A native web server on servald. The web server comes and goes, servald stays."""

    kind = "native"

    def prepare(self) -> None:
        """Start servald."""
        self.stack = start_servald(
            self.host, self.directory / "servald.log", "--config", self._registration()
        )

    def _start(self) -> None:
        command: list[Argument] = [sys.executable, "-m", "lab.web_server", "--directory", self.directory]
        self._server = self.host.popen([*command, "--service", SERVICE], cwd=PROJECT, env=ENVIRONMENT)
        wait_for(lambda: bound(self.host, SERVICE), f"{SERVICE} to be served on {self.name}", END_TIMEOUT_S)

    def crash(self) -> None:
        """Kill it; servald is told by the kernel."""
        super().crash()
        wait_for(lambda: not bound(self.host, SERVICE), "servald to notice")

    def _process(self) -> subprocess.Popen[Any]:
        return self._server


class Services:
    """The hosts; after `start` the router, the instances and the client's translator run."""

    def __init__(self, lab: Lab, weights: tuple[int, int, int]) -> None:
        self.directory = lab.directory
        self.client, self.front_host, self.router_host = (
            lab.host(name) for name in ("client", "translator", "router")
        )
        kinds: tuple[type[Instance], ...] = (Reverse, Reverse, Native)
        self.instances: list[Instance] = []
        for number, (kind, weight) in enumerate(zip(kinds, weights, strict=True)):
            host = lab.host(("first", "second", "third")[number])
            directory = lab.directory / host.name
            directory.mkdir()
            (directory / "who").write_text(host.name)
            self.instances.append(kind(host, f"10.2.0.{11 + number}", weight, directory))
        lab.connect(self.client, "10.1.0.1/24", self.front_host, f"{CLIENT_SIDE}/24")
        ports = {self.front_host: "10.2.0.1/24", self.router_host: f"{ROUTER}/24"}
        lab.switch("switch", ports | {each.host: f"{each.address}/24" for each in self.instances})
        self.front: TranslatorProcess
        self.router: TranslatorProcess

    def start(self) -> None:
        """Start all, and return when the router knows all instances."""
        file = self.directory / "router.toml"
        file.write_text(
            f"[router]\nenabled = true\ndirectory = '{self.directory / 'registrations.sqlite'}'\n"
        )
        self.router = start_servald(self.router_host, self.directory / "router.log", "--config", file)
        for instance in self.instances:
            instance.prepare()
            instance.start()
        options = ["--map", f"{PORT}={SERVICE}", "--router-ip", ROUTER]
        self.front = TranslatorProcess(self.front_host, options, self.directory / "front.log")
        self.front.wait_ready(ports=[PORT])
        wait_for(lambda: len(self.registered()) == len(self.instances), "all instances to be registered")

    def registered(self) -> dict[str, int]:
        """The weight of each registered instance, by address."""
        found = self.router.ask("registrations")["received"]
        return {each["address"]: each["weight"] for each in found if each["prefix"] == SERVICE}

    def stacks(self) -> dict[str, TranslatorProcess]:
        """All processes with a stack, in the order in which they may end."""
        running = {"translator": self.front}
        running |= {each.name: each.stack for each in self.instances}
        return running | {"router": self.router}

    def router_traffic(self) -> tuple[int, int]:
        """Packets and bytes that have passed the router's interface, both directions together."""
        (shown,) = json.loads(
            self.router_host.run(["ip", "-json", "-stats", "link", "show", "dev", "eth0"]).stdout
        )
        received, sent = shown["stats64"]["rx"], shown["stats64"]["tx"]
        return received["packets"] + sent["packets"], received["bytes"] + sent["bytes"]
