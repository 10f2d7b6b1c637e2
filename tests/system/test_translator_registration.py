"""Do service routers know what a reverse translator serves, and only as long as it can serve it?"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from translator_pair import exchange

from lab.chain import TranslatorProcess, kernel_traces
from lab.hosts import Host, Lab
from lab.native import start_servald
from lab.waiting import wait_for
from serval_core.identity import create_identity

SERVICE, OTHER_SERVICE = "76568", "76569"
ROUTER, INSTANCE, CLIENT = "10.9.0.254", "10.9.0.1", "10.9.0.3"
PORT = 8080
TIMEOUT_S = 10.0
QUICK = "[health]\ninterval_s = 0.1\nfast_interval_s = 0.05\n"


class Site:
    """A router, a reverse translator's host and a client's host on one network."""

    def __init__(self, lab: Lab) -> None:
        self.directory = lab.directory
        self.router_host, self.instance, self.client = (
            lab.host(name) for name in ("router", "instance", "client")
        )
        lab.switch(
            "switch",
            {self.router_host: f"{ROUTER}/24", self.instance: f"{INSTANCE}/24", self.client: f"{CLIENT}/24"},
        )
        self.key = self.directory / "instance.key"
        public_key = create_identity(self.key).public_key.hex()
        config = self.directory / "router.toml"
        config.write_text(
            "[router]\nenabled = true\ndirectory = ':memory:'\n"
            f"[[router.policy]]\nprefix = {OTHER_SERVICE}\nrequire = 'signed'\nkeys = ['{public_key}']\n"
        )
        self.router = start_servald(self.router_host, self.directory / "router.log", "--config", config)
        self.running: list[TranslatorProcess] = []

    @property
    def file(self) -> Path:
        """The configuration of the reverse translator."""
        return self.directory / "instance.toml"

    def start(self, host: Host, *options: str, ports: tuple[int, ...] = ()) -> TranslatorProcess:
        """Start a translator that knows the router."""
        log = self.directory / f"{host.name}.{len(self.running)}.log"
        process = TranslatorProcess(host, [*options, "--router-ip", ROUTER], log)
        self.running.append(process)
        process.wait_ready(ports=ports)
        return process

    def reverse(self, text: str) -> TranslatorProcess:
        """Start the reverse translator."""
        self.file.write_text(text)
        return self.start(self.instance, "--config", str(self.file))

    def registered(self) -> dict[str, tuple[int, int]]:
        """Priority and weight of what the instance has registered, by prefix."""
        found: list[dict[str, Any]] = self.router.ask("registrations")["received"]
        assert {each["address"] for each in found} <= {INSTANCE}
        return {each["prefix"]: (each["priority"], each["weight"]) for each in found}

    def wait_registered(self, **expected: tuple[int, int]) -> None:
        """Until this, by serviceIDs after an underscore, is registered and nothing else."""
        wanted = {prefix.lstrip("_"): terms for prefix, terms in expected.items()}
        wait_for(lambda: self.registered() == wanted, f"{wanted} to be registered")

    def end(self) -> None:
        """End translators, and see that nothing is left."""
        for process in self.running:
            if process.process.poll() is None:
                assert process.stop() == 0, process.log()
            assert "Traceback" not in process.log(), process.log()
            assert kernel_traces(process.host) == []
        self.running.clear()
        self.wait_registered()


@pytest.fixture(scope="module")
def shared(root: None) -> Iterator[Site]:
    with Lab() as lab:
        site = Site(lab)
        yield site
        assert site.router.stop() == 0
        assert "Traceback" not in site.router.log()


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    yield shared
    shared.end()


def listen(site: Site, port: int = 80) -> socket.socket:
    listener = site.instance.call(socket.create_server, ("127.0.0.1", port))
    listener.settimeout(TIMEOUT_S)
    return listener


def reverse_of(service: str, *, port: int = 80, more: str = "") -> str:
    return f"[[reverse]]\nservice = {service}\ntargets = ['127.0.0.1:{port}']\n{more}"


def test_a_client_finds_the_service_through_the_router(site: Site) -> None:
    with listen(site) as listener:
        site.reverse(reverse_of(SERVICE))
        site.wait_registered(_76568=(1, 1))
        site.start(site.client, "--map", f"{PORT}={SERVICE}", ports=(PORT,))
        with site.client.call(socket.create_connection, ("127.0.0.1", PORT), TIMEOUT_S) as client:
            server, _ = listener.accept()
            with server:
                exchange(client, server)

        def resolved() -> list[int]:
            services = site.router.ask("services")
            return [each["packets_resolved"] for each in services if each["prefix"] == SERVICE]

        wait_for(lambda: resolved()[0] >= 1, "the router to count a SYN")


def test_a_service_is_registered_only_while_a_target_works(site: Site) -> None:
    keys = f"[registration]\nkeys = ['{site.key}']\n"
    reverse = site.reverse(reverse_of(SERVICE) + reverse_of(OTHER_SERVICE, port=81) + keys + QUICK)
    with listen(site, 81):
        site.wait_registered(
            _76569=(1, 1)
        )  # signed, as the router wants it; the other one waits for its target
        with listen(site):
            site.wait_registered(_76568=(1, 1), _76569=(1, 1))
        site.wait_registered(_76569=(1, 1))
        with listen(site):
            site.wait_registered(_76568=(1, 1), _76569=(1, 1))
            assert reverse.stop(signal.SIGTERM) == 0
            site.wait_registered()


def test_priority_and_weight_are_those_of_the_map_or_else_of_the_section(site: Site) -> None:
    with listen(site):
        usual = "[registration]\npriority = 5\nweight = 7\n"
        reverse = site.reverse(reverse_of(SERVICE, more="weight = 3\n") + usual)
        site.wait_registered(_76568=(5, 3))
        site.file.write_text(reverse_of(SERVICE, more="priority = 2\n") + usual)
        reverse.process.send_signal(signal.SIGHUP)
        site.wait_registered(_76568=(2, 7))


def test_a_reload_registers_what_is_new_and_unregisters_what_is_gone(site: Site) -> None:
    with listen(site):
        keys = f"[registration]\nkeys = ['{site.key}']\n"
        reverse = site.reverse(reverse_of(SERVICE) + keys)
        site.wait_registered(_76568=(1, 1))
        site.file.write_text(reverse_of(OTHER_SERVICE) + keys)
        reverse.process.send_signal(signal.SIGHUP)
        site.wait_registered(_76569=(1, 1))
        site.file.write_text(reverse_of(SERVICE) + "[registration]\nweight = 2\n")
        reverse.process.send_signal(signal.SIGHUP)
        site.wait_registered(_76568=(1, 2))
        site.file.write_text(reverse_of(OTHER_SERVICE) + "[registration]\nrefresh_s = 2\n")
        reverse.process.send_signal(signal.SIGHUP)
        wait_for(
            lambda: "registration.refresh_s: cannot change" in " ".join(reverse.log().split()), "a refusal"
        )
        assert set(site.registered()) == {SERVICE}


def test_a_translator_can_be_the_router(site: Site) -> None:
    """The hosts register at it, and its own clients find what they serve."""
    with listen(site) as listener:
        file = site.directory / "router-and-front.toml"
        file.write_text(
            f"[[map]]\nlisten = {PORT}\nservice = {SERVICE}\n[router]\nenabled = true\ndirectory = ':memory:'\n"
        )
        log = site.directory / "router-and-front.log"
        front = TranslatorProcess(site.client, ["--config", str(file)], log)
        site.running.append(front)
        front.wait_ready(ports=(PORT,))
        site.file.write_text(reverse_of(SERVICE))
        reverse = TranslatorProcess(
            site.instance,
            ["--config", str(site.file), "--router-ip", CLIENT],
            site.directory / "registering.log",
        )
        site.running.append(reverse)
        wait_for(
            lambda: len(front.ask("registrations")["received"]) == 1, "the registration at the translator"
        )
        with site.client.call(socket.create_connection, ("127.0.0.1", PORT), TIMEOUT_S) as client:
            server, _ = listener.accept()
            with server:
                exchange(client, server)
        assert reverse.stop() == 0
        wait_for(lambda: front.ask("registrations")["received"] == [], "the end of the registration")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--router-ip", "nowhere"], "registration.routers: "),
        (
            ["--router-ip", "10.0.0.255", "--router-ip", "127.0.0.1"],
            "127.0.0.1 is not the address of another host",
        ),
    ],
)
def test_a_router_that_cannot_be_is_refused(site: Site, options: list[str], complaint: str) -> None:
    process = TranslatorProcess(site.client, ["--map", f"{PORT}=1", *options], site.directory / "refused.log")
    assert process.process.wait(TIMEOUT_S) == 2
    assert complaint in process.log()
    assert len(process.log().splitlines()) == 1
    process.log_path.unlink()
