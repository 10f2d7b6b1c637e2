"""What does SIGHUP change of a servald, and does a mistake leave everything as it was?"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest
from configured import Configured
from service_manager import service_manager

from lab.hosts import Host, Lab
from lab.native import running, serval, serval_json, start_servald
from lab.traffic import PROJECT
from lab.waiting import wait_for

ROUTED = "[registration]\nrouters = ['10.1.0.254']\n"
ROUTER = "[router]\nenabled = true\ndirectory = ':memory:'\n"
SERVER = "import sys; from serval_core import sockets; s = sockets.create_server(sys.argv[1]); sys.stdin.read()"
TRYING = """
import os, sys
from serval_core import sockets
os.setgid(65534); os.setuid(65534)
try:
    sockets.create_server(sys.argv[1])
    print("ok")
except OSError as error:
    print(error.errno)
"""


class Daemon(Configured):
    """A servald with a configuration file."""

    def __init__(self, lab: Lab, host: Host, text: str) -> None:
        self.host = host
        file = lab.directory / f"{host.name}.toml"
        file.write_text(text)
        super().__init__(file, start_servald(host, lab.directory / f"{host.name}.log", "--config", file))

    def rules(self) -> list[tuple[str, str, str]]:
        """Prefix, type and address of all rules that are neither broadcast nor listeners."""
        return sorted(
            (entry["prefix"], target["type"], target["address"] or "")
            for entry in self.process.ask("services")
            for target in entry["targets"]
            if target["origin"] in ("configured", "registered")
        )

    def registered(self) -> dict[str, Any]:
        """What other hosts have registered here, by prefix."""
        return {each["prefix"]: each for each in self.process.ask("registrations")["received"]}


@pytest.fixture
def lab_network(lab: Lab) -> tuple[Lab, Host, Host]:
    host, router = lab.host("host"), lab.host("router")
    lab.connect(host, "10.1.0.1/24", router, "10.1.0.254/24")
    return lab, host, router


def may_bind(host: Host, service: str) -> bool:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return host.run([sys.executable, "-c", TRYING, service], env=environment).stdout == "ok\n"


def test_rules_names_and_access_change_while_programs_go_on(lab_network: tuple[Lab, Host, Host]) -> None:
    lab, host, _ = lab_network
    rule = "[[rule]]\nservice = 'web'\ntargets = ['10.1.0.254']\n"
    daemon = Daemon(lab, host, "[services]\nweb = 7\n" + rule)
    with running(host, sys.executable, "-c", SERVER, "5", serving="5", stdin=-1):
        assert daemon.rules() == [("7", "FORWARD", "10.1.0.254")]
        assert not may_bind(host, "9")
        access = "[[access]]\nservice = 9\nbind = ['nobody']\n"
        said = daemon.reload("[services]\nweb = 8\n" + rule + access)
        assert "web=10.1.0.254" in said
        assert daemon.rules() == [("8", "FORWARD", "10.1.0.254")]
        assert may_bind(host, "9")
        assert any(entry["prefix"] == "5" for entry in daemon.process.ask("services")), "the program listens on"
    assert daemon.process.stop() == 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[rule]]\n", "rule: the key \"service\" is missing"),
        ("[stack]\ndelay_limit = 9\n[timeouts]\nconnect_s = 9\n", "stack.delay_limit, timeouts.connect_s: cannot change"),
        ("[resolver]\nprefixes = [7]\n", "resolver.prefixes: cannot change"),
        ("[router]\nenabled = true\n", "router.enabled: cannot change"),
        (
            "[registration]\nweight = 7\n[[rule]]\nservice = 8\ntargets = ['10.1.0.2']\n[[rule]]\nservice = 7\ntype = 'drop'\n"
            "priority = 5\n[[rule]]\nservice = 7\ntargets = ['10.1.0.3']\npriority = 5\n",
            "already has a DROP rule at priority 5",
        ),
    ],
    ids=["shape", "stack", "resolver", "router", "table"],
)
def test_a_mistake_leaves_everything_as_it_was(lab_network: tuple[Lab, Host, Host], text: str, complaint: str) -> None:
    lab, host, _ = lab_network
    daemon = Daemon(lab, host, "[[rule]]\nservice = 7\ntargets = ['10.1.0.254']\n")
    with running(host, sys.executable, "-c", SERVER, "5", serving="5", stdin=-1):
        before = daemon.rules(), daemon.process.ask("registrations")
        said = daemon.reload(text, "not reloaded, everything stays as it was")
        assert complaint in " ".join(said.split())
        assert (daemon.rules(), daemon.process.ask("registrations")) == before
    daemon.reload("")
    assert daemon.rules() == []
    assert daemon.process.stop() == 0


def test_policy_of_a_router_changes_at_once(lab_network: tuple[Lab, Host, Host]) -> None:
    """What the new policy refuses ends, what it allows comes at the next refresh; terms of the host reach the rule."""
    lab, host, router = lab_network
    registering = Daemon(lab, host, ROUTED + "refresh_s = 0.3\nlifetime_s = 20\n")
    routing = Daemon(lab, router, ROUTER)
    with running(host, sys.executable, "-c", SERVER, "5", serving="5", stdin=-1):
        wait_for(lambda: routing.rules() == [("5", "FORWARD", "10.1.0.1")], "the service is registered", 20)
        routing.reload(ROUTER + "[[router.policy]]\nprefix = 5\nrequire = 'signed'\n")
        assert routing.rules() == []
        key = lab.directory / "key"
        public = serval(host, "keygen", key).stdout.strip()
        registering.reload(ROUTED + f"refresh_s = 0.3\nlifetime_s = 20\nweight = 7\nkeys = ['{key}']\n")
        wait_for(lambda: routing.rules() == [("5", "FORWARD", "10.1.0.1")], "the signed one is accepted", 20)
        known = routing.registered()["5"]
        assert (known["signed_by"], known["weight"]) == (public, 7)
        # Back to unsigned ones: the old registration is ended with the key that made it.
        routing.reload(ROUTER)
        registering.reload(ROUTED + "refresh_s = 0.3\nlifetime_s = 20\n")
        wait_for(lambda: not routing.registered().get("5", {"signed_by": "?"})["signed_by"], "it is unsigned again", 20)
    assert [registering.process.stop(), routing.process.stop()] == [0, 0]


def test_routers_that_are_left_are_told(lab_network: tuple[Lab, Host, Host]) -> None:
    lab, host, router = lab_network
    lab.connect(host, "10.2.0.1/24", router, "10.2.0.254/24")
    registering = Daemon(lab, host, ROUTED)
    routing = Daemon(lab, router, ROUTER)
    with running(host, sys.executable, "-c", SERVER, "5", serving="5", stdin=-1):
        wait_for(lambda: routing.rules() == [("5", "FORWARD", "10.1.0.1")], "the service is registered", 20)
        registering.reload(ROUTED.replace("10.1.0.254", "10.2.0.254"))
        wait_for(lambda: routing.rules() == [("5", "FORWARD", "10.2.0.1")], "it is registered by the other way", 20)
        assert [each["address"] for each in serval_json(host, "routers")] == ["10.2.0.254"]
        registering.reload("")
        wait_for(lambda: routing.rules() != [("5", "FORWARD", "10.2.0.1")], "the router that was named is told", 20)
        wait_for(lambda: {"10.1.0.254", "10.2.0.254"} & {each["address"] for each in serval_json(host, "routers")}, "found", 20)
    assert [registering.process.stop(), routing.process.stop()] == [0, 0]


def test_a_reload_is_told_to_the_service_manager(lab: Lab) -> None:
    host = lab.host("notifying")
    with service_manager() as manager:
        daemon = Daemon(lab, host, "")
        assert manager.recv(100) == b"READY=1"
        for text in ("[[rule]]\nservice = 7\ntype = 'drop'\n", "broken"):
            daemon.file.write_text(text)
            daemon.process.process.send_signal(signal.SIGHUP)
            assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert manager.recv(100) == b"READY=1"
        assert daemon.rules() == [("7", "DROP", "")]
        assert daemon.process.stop() == 0


def test_without_a_file_sighup_is_sigterm(lab: Lab) -> None:
    daemon = start_servald(lab.host("h"), lab.directory / "h.log")
    assert daemon.stop(signal.SIGHUP) == 0
