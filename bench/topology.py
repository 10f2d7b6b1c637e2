"""Where do all contenders run? client - middle - server, 1500-byte wires, the same services on the server.

    client 10.1.0.1 - 10.1.0.254 middle 10.2.0.1 - 10.2.0.2 server

The middle host also routes IP for the direct path. Services: a sink for streams, a tiny web answer, an echo.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lab.hosts import Argument, Host, Lab, shape, unshape
from lab.traffic import PROJECT

STREAM_PORT = 5201
WEB_PORT = 8080
ECHO_PORT = 7000
PORTS = (STREAM_PORT, WEB_PORT, ECHO_PORT)

# Short connections: many ports, used again at once, and queues that no contender overflows.
SYSCTLS: dict[str, Argument] = {
    "net.ipv4.tcp_tw_reuse": 1,
    "net.ipv4.ip_local_port_range": "10240 65535",
    "net.ipv4.tcp_max_syn_backlog": 4096,
    "net.core.somaxconn": 4096,
}

WEB_ANSWER = """\
daemon off; pid {directory}/answer.pid; error_log stderr; worker_processes 1;
events {{ worker_connections 8192; }}
http {{
    access_log off; keepalive_requests 1000000000; default_type text/plain;
    client_body_temp_path {directory}/answer; proxy_temp_path {directory}/answer;
    fastcgi_temp_path {directory}/answer; uwsgi_temp_path {directory}/answer;
    scgi_temp_path {directory}/answer;
    server {{ listen {port} backlog=4096; return 200 "hello\\n"; }}
}}
"""


class Topology:
    """The three hosts with the services running. Lives as long as the lab."""

    def __init__(self, lab: Lab) -> None:
        self.directory = lab.directory
        self.client, self.middle, self.server = lab.host("client"), lab.host("middle"), lab.host("server")
        lab.connect(self.client, "10.1.0.1/24", self.middle, "10.1.0.254/24")
        lab.connect(self.middle, "10.2.0.1/24", self.server, "10.2.0.2/24")
        self.client.add_route("default", "10.1.0.254")
        self.server.add_route("default", "10.2.0.1")
        self.middle.forward()
        for host in (self.client, self.middle, self.server):
            for key, value in SYSCTLS.items():
                host.sysctl(key, value)
        # As RSS does on a network card: the receiver's work is not done by the sender's CPU. For all contenders alike.
        every_cpu = f"{(1 << (os.cpu_count() or 1)) - 1:x}"
        for host, interface in self.shaped_interfaces():
            host.run(["sh", "-c", f"echo {every_cpu} > /sys/class/net/{interface}/queues/rx-0/rps_cpus"])
        self.middle_address = self.middle.address("eth0")
        self.server_address = self.server.address()
        self._serve()

    def _serve(self) -> None:
        configuration = self.write("answer.conf", WEB_ANSWER.format(directory=self.directory, port=WEB_PORT))
        commands: dict[int, list[Argument]] = {
            STREAM_PORT: [sys.executable, "-m", "bench.stream", "sink", STREAM_PORT],
            ECHO_PORT: [sys.executable, "-m", "bench.idle", "serve", ECHO_PORT],
            WEB_PORT: ["nginx", "-e", "stderr", "-c", configuration],
        }
        for port, command in commands.items():
            process = self.server.popen(command, cwd=PROJECT, stderr=subprocess.PIPE)
            self.server.wait_listening(port, process)

    def write(self, name: str, text: str) -> Path:
        """A configuration file in the lab's scratch directory."""
        path = self.directory / name
        path.write_text(text)
        return path

    def shaped_interfaces(self) -> list[tuple[Host, str]]:
        """Both ends of both wires."""
        return [(self.client, "eth0"), (self.middle, "eth0"), (self.middle, "eth1"), (self.server, "eth0")]

    def shape(self, rate: str) -> None:
        """Limit every wire in both directions."""
        for host, interface in self.shaped_interfaces():
            shape(host, interface, rate)

    def unshape(self) -> None:
        """Remove the limits."""
        for host, interface in self.shaped_interfaces():
            unshape(host, interface)
