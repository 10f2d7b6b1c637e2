"""Who takes part? Each contender carries the three services of the topology past the middle host."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from bench.topology import PORTS, STREAM_PORT, Topology
from lab.chain import TranslatorProcess
from lab.hosts import Argument, CommandFailed, Host
from lab.traffic import PROJECT
from serval_core.framing import Framing

STOP_TIMEOUT_S = 20.0
NGINX_STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
SERVICE_OF_PORT = {port: str(1000 + port) for port in PORTS}

HAPROXY = """\
global
    nbthread 1
    maxconn 4000
defaults
    mode tcp
    option splice-auto
    timeout connect 10s
    timeout client 1h
    timeout server 1h
"""
HAPROXY_SERVICE = """\
listen port{port}
    bind :{port} backlog 4096
    server s {server}:{port}
"""
NGINX = """\
load_module {module};
daemon off; pid {directory}/stream.pid; error_log stderr; worker_processes 1;
events {{ worker_connections 16384; }}
stream {{
    proxy_timeout 1h; proxy_half_close on;
    {services}
}}
"""
NGINX_SERVICE = "server {{ listen {port} backlog=4096; proxy_pass {server}:{port}; }}"


class Contender(ABC):
    """One way from the client to the server. Between `start` and `stop` it is the only one that runs."""

    name: ClassVar[str]
    ports: ClassVar[tuple[int, ...]] = PORTS
    compares_framings: ClassVar[bool] = False  # it takes part for what a framing or a hop costs

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    @property
    def address(self) -> str:
        """What the client dials."""
        return self.topology.middle_address

    def stream_sender(self, duration_s: float) -> list[Argument]:
        """What the client runs to send one stream."""
        where: list[Argument] = [self.address, STREAM_PORT, str(duration_s)]
        return [sys.executable, "-m", "bench.stream", "send", *where]

    def absent(self) -> str | None:
        """Why it cannot take part here, None if it can."""
        return None

    @abstractmethod
    def start(self) -> None:
        """Return once all its ports are served."""

    @abstractmethod
    def stop(self) -> None:
        """End all its processes."""

    def process_ids(self) -> list[int]:
        """Its processes, forked ones included, for their memory."""
        return self.topology.middle.process_ids()


class Direct(Contender):
    """The middle host routes; the client's TCP reaches the server's."""

    name = "direct TCP"

    @property
    def address(self) -> str:
        """The server itself."""
        return self.topology.server_address

    def start(self) -> None:
        """Routing needs no process."""

    def stop(self) -> None:
        """Nothing runs."""


class ProcessContender(Contender):
    """A proxy made of ordinary processes on the middle host."""

    program: ClassVar[str]

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology)
        self._processes: list[subprocess.Popen[Any]] = []

    @abstractmethod
    def commands(self) -> list[list[Argument]]:
        """What to run on the middle host."""

    def absent(self) -> str | None:
        """Absent when the program is not installed."""
        return None if shutil.which(self.program) else f"{self.program} is not installed"

    def start(self) -> None:
        """Start the commands and wait for the ports."""
        middle = self.topology.middle
        log_path = self.topology.directory / f"{self.program}.log"
        with log_path.open("ab") as log:
            self._processes = [
                middle.popen(command, stdout=subprocess.DEVNULL, stderr=log) for command in self.commands()
            ]
        try:
            for port in self.ports:
                middle.wait_listening(port, self._processes[0])
        except CommandFailed as error:
            raise RuntimeError(f"{error}\n{log_path.read_text()}") from None

    def stop(self) -> None:
        """End them, and what they forked."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_TIMEOUT_S)
        self.topology.middle.kill_processes()


class HAProxy(ProcessContender):
    """HAProxy in TCP mode with splicing, one thread."""

    name = "HAProxy splice"
    program = "haproxy"

    def commands(self) -> list[list[Argument]]:
        """One process."""
        server = self.topology.server_address
        services = [HAPROXY_SERVICE.format(port=port, server=server) for port in self.ports]
        return [["haproxy", "-db", "-f", self.topology.write("haproxy.cfg", HAPROXY + "".join(services))]]


class NginxStream(ProcessContender):
    """nginx's stream proxy, one worker."""

    name = "nginx stream"
    program = "nginx"

    def absent(self) -> str | None:
        """Absent without the stream module, too."""
        if not NGINX_STREAM_MODULE.exists():
            return f"{NGINX_STREAM_MODULE} is not installed"
        return super().absent()

    def commands(self) -> list[list[Argument]]:
        """A master and its worker."""
        server = self.topology.server_address
        services = "\n    ".join(NGINX_SERVICE.format(port=port, server=server) for port in self.ports)
        text = NGINX.format(module=NGINX_STREAM_MODULE, directory=self.topology.directory, services=services)
        return [["nginx", "-e", "stderr", "-c", self.topology.write("stream.conf", text)]]


class Socat(ProcessContender):
    """socat, which forks for each connection."""

    name = "socat"
    program = "socat"

    def commands(self) -> list[list[Argument]]:
        """One listener per port."""
        listen = "TCP-LISTEN:{port},fork,reuseaddr,backlog=4096"
        server = self.topology.server_address
        return [["socat", listen.format(port=port), f"TCP:{server}:{port}"] for port in self.ports]


class ServalContender(Contender):
    """A translator on the middle host, and something that speaks Serval on the server."""

    framing: ClassVar[Framing] = Framing.SAL
    far_end: TranslatorProcess

    def start(self) -> None:
        """Start both; neither needs the other for that."""
        topology = self.topology
        self.far_end = self.start_far_end(topology.server, topology.directory / "far-end.log")
        arguments: list[Argument] = ["--framing", self.framing.value]
        for port in self.ports:
            arguments += ["--map", f"{port}={SERVICE_OF_PORT[port]}"]
        arguments += ["--service", f"default={topology.server_address}"]
        self._translator = TranslatorProcess(
            topology.middle, arguments, topology.directory / "translator.log"
        )
        self.far_end.wait_ready(demux_services=len(self.ports))
        self._translator.wait_ready(ports=self.ports)

    @abstractmethod
    def start_far_end(self, server: Host, log_path: Path) -> TranslatorProcess:
        """Start what serves the serviceIDs on the server host."""

    def stop(self) -> None:
        """End both."""
        both = self._translator.process, self.far_end.process
        for process in both:
            process.send_signal(signal.SIGINT)
        for process in both:
            process.wait(STOP_TIMEOUT_S)

    def process_ids(self) -> list[int]:
        """The translator and the far end."""
        return [self._translator.process.pid, self.far_end.process.pid]


class OneTranslator(ServalContender):
    """One translator; the server is a native Serval program that receives streams."""

    name = "one translator, native sink"
    ports = (STREAM_PORT,)

    def absent(self) -> str | None:
        """Absent without the native program."""
        return (
            None if importlib.util.find_spec("bench.serval_sink") else "bench/serval_sink.py does not exist"
        )

    def start_far_end(self, server: Host, log_path: Path) -> TranslatorProcess:
        """The native sink."""
        return native_sink(server, log_path, self.framing)


class TwoTranslators(ServalContender):
    """A translator on each side; client and server know nothing of Serval."""

    name = "two translators"

    def absent(self) -> str | None:
        """Absent without the translator's program."""
        return None if (PROJECT / "translator/__main__.py").exists() else "the translator cannot be started"

    def start_far_end(self, server: Host, log_path: Path) -> TranslatorProcess:
        """The reverse translator, next to the server."""
        arguments: list[Argument] = ["--framing", self.framing.value]
        for port in self.ports:
            arguments += ["--reverse", f"{SERVICE_OF_PORT[port]}=127.0.0.1:{port}"]
        return TranslatorProcess(server, arguments, log_path)


class OneHop(Contender):
    """No translator: native programs on client and server, each with a stack of its own; the middle host routes."""

    name = "one hop"
    framing: ClassVar[Framing] = Framing.SAL
    ports = (STREAM_PORT,)
    compares_framings = True

    def stream_sender(self, duration_s: float) -> list[Argument]:
        """The native source."""
        source: list[Argument] = [sys.executable, "-m", "bench.serval_source", SERVICE_OF_PORT[STREAM_PORT]]
        return [*source, self.topology.server_address, str(duration_s), "--framing", self.framing.value]

    def start(self) -> None:
        """Start the sink; the source comes with the measurement."""
        self._sink = native_sink(self.topology.server, self.topology.directory / "sink.log", self.framing)
        self._sink.wait_ready(demux_services=1)

    def stop(self) -> None:
        """End the sink."""
        self._sink.stop(signal.SIGINT)


class OneHopNative(OneHop):
    """The same in framing native."""

    name = "one hop, native"
    framing = Framing.NATIVE


class OneHopUdp(OneHop):
    """The same in framing udp."""

    name = "one hop, udp"
    framing = Framing.UDP


class OneTranslatorNative(OneTranslator):
    """The same in framing native."""

    name = "one translator, native sink, native"
    framing = Framing.NATIVE
    compares_framings = True


class TwoTranslatorsNative(TwoTranslators):
    """The same in framing native."""

    name = "two translators, native"
    framing = Framing.NATIVE
    compares_framings = True


class TwoTranslatorsUdp(TwoTranslators):
    """The same in framing udp."""

    name = "two translators, udp"
    framing = Framing.UDP
    compares_framings = True


def native_sink(server: Host, log_path: Path, framing: Framing) -> TranslatorProcess:
    """A native program on the server that receives streams."""
    command = [sys.executable, "-m", "bench.serval_sink", SERVICE_OF_PORT[STREAM_PORT], "--framing", framing]
    return TranslatorProcess(server, [], log_path, command, "serval_sink")


CONTENDERS: tuple[type[Contender], ...] = (
    Direct,
    HAProxy,
    NginxStream,
    Socat,
    OneHop,
    OneHopUdp,
    OneHopNative,
    OneTranslator,
    OneTranslatorNative,
    TwoTranslators,
    TwoTranslatorsUdp,
    TwoTranslatorsNative,
)
