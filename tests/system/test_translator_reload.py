"""What does SIGHUP change, and does it leave connections, and after a mistake everything, as they were?"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading

import pytest
from configured import Configured
from service_manager import service_manager
from translator_pair import PORT, SERVICE, Pair, ending, exchange, only_map, wait_counter

from lab.waiting import wait_for

OTHER_PORT, OTHER_SERVICE = 8081, "76569"
CHUNK = os.urandom(1 << 16)
RULE = f"[[rule]]\nservice = {SERVICE}\ntargets = ['10.9.0.2']\n"
OTHER_RULE = f"[[rule]]\nservice = {OTHER_SERVICE}\ntargets = ['10.9.0.2']\n"


def map_of(listen: int | str = PORT, service: str = SERVICE) -> str:
    return f"[[map]]\nlisten = '{listen}'\nservice = {service}\n"


def reverse_of(*targets: str, service: str = SERVICE) -> str:
    return f"[[reverse]]\nservice = {service}\ntargets = {list(targets)}\n"


class Site(Configured):
    """A translator with a configuration file, on the near host if it has maps, else on the far host."""

    def __init__(self, pair: Pair, text: str, ports: tuple[int, ...] = (), services: int = 0) -> None:
        host = pair.near if ports else pair.far
        file = pair.directory / f"{host.name}.toml"
        file.write_text(text)
        super().__init__(file, pair.start(host, "--config", str(file), ports=ports, services=services))


class Upload(threading.Thread):
    """A client that sends until `enough` is set, and what both ends saw of it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._server = server
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self.enough = threading.Event()
        self.sent_bytes = 0
        self.received = hashlib.sha256()
        self.sent = hashlib.sha256()

    def run(self) -> None:
        self._receiver.start()
        while not self.enough.is_set():
            self._client.sendall(CHUNK)
            self.sent.update(CHUNK)
            self.sent_bytes += len(CHUNK)
        self._client.shutdown(socket.SHUT_WR)
        self._receiver.join()

    def _receive(self) -> None:
        while data := self._server.recv(1 << 20):
            self.received.update(data)
        self._server.sendall(self.received.digest())
        self._server.close()

    def wait_for_more(self) -> None:
        """Until more has been sent than any buffer on the way holds."""
        goal = self.sent_bytes + (32 << 20)
        wait_for(lambda: self.sent_bytes >= goal, "the transfer to go on", timeout_s=30)


def test_a_live_transfer_outlives_its_map(pair: Pair) -> None:
    listener = pair.listen()
    pair.reverse()
    site = Site(pair, map_of() + RULE, (PORT,))
    client = pair.dial()
    upload = Upload(client, pair.accept(listener))
    upload.start()
    upload.wait_for_more()
    site.reload(map_of(OTHER_PORT) + RULE)
    with pytest.raises(ConnectionRefusedError):
        pair.dial()
    other_client, other_server = pair.talk(listener, OTHER_PORT)
    shown = [(each["listen"], each["active"], each["removed"]) for each in site.process.ask("maps")]
    assert shown == [(f"*:{OTHER_PORT}", 1, False), (f"*:{PORT}", 1, True)]
    assert f"*:{PORT} (removed)" in site.process.show("maps")
    upload.wait_for_more()
    upload.enough.set()
    upload.join()
    assert client.recv(32, socket.MSG_WAITALL) == upload.sent.digest()
    assert client.recv(1) == b""
    wait_counter(site.process, "clients", 1)
    assert only_map(site.process)["connections"] == 1
    other_client.close()
    assert ending(other_server) == "close"
    other_server.close()
    assert site.process.stop() == 0
    assert "served=2" in site.process.log()


def test_a_port_that_changes_its_service_stays_open(pair: Pair) -> None:
    listeners = [pair.listen(80), pair.listen(81)]
    Site(pair, reverse_of("127.0.0.1:80") + reverse_of("127.0.0.1:81", service=OTHER_SERVICE), services=2)
    site = Site(pair, map_of() + RULE + OTHER_RULE, (PORT,))
    client = pair.dial()
    server = pair.accept(listeners[0])
    site.reload(map_of(service=OTHER_SERVICE) + RULE + OTHER_RULE)
    pair.talk(listeners[1])
    exchange(client, server)


def test_a_map_that_only_moved_in_the_file_keeps_its_account(pair: Pair) -> None:
    listener = pair.listen()
    pair.reverse()
    site = Site(pair, map_of() + RULE, (PORT,))
    pair.talk(listener)
    site.reload(RULE + map_of())
    pair.talk(listener)
    assert only_map(site.process)["connections"] == 2


def test_rules_are_replaced_and_those_that_stay_keep_their_counters(pair: Pair) -> None:
    listener = pair.listen()
    pair.reverse()
    site = Site(pair, map_of() + map_of(OTHER_PORT, OTHER_SERVICE) + RULE, (PORT, OTHER_PORT))
    pair.talk(listener)
    drop = f"[[rule]]\nservice = {OTHER_SERVICE}\ntype = 'drop'\n"
    site.reload(map_of() + map_of(OTHER_PORT, OTHER_SERVICE) + RULE + drop)
    assert pair.dial_in_vain(OTHER_PORT) == "reset"
    pair.talk(listener)
    rules = {each["prefix"]: each for each in site.process.ask("services")}
    assert rules[SERVICE]["packets_resolved"] == 2
    assert rules[OTHER_SERVICE]["packets_dropped"] == 1
    site.reload(map_of() + RULE)
    assert {SERVICE, OTHER_SERVICE} & {each["prefix"] for each in site.process.ask("services")} == {SERVICE}


def test_a_service_moves_to_another_target_and_away(pair: Pair) -> None:
    listeners = [pair.listen(80), pair.listen(81)]
    site = Site(pair, reverse_of("127.0.0.1:80"), services=1)
    pair.forward("--connect-timeout", "1")
    client = pair.dial()
    server = pair.accept(listeners[0])
    site.reload(reverse_of("127.0.0.1:81"))
    other_client, other_server = pair.talk(listeners[1])
    site.reload(reverse_of("127.0.0.1:80", service=OTHER_SERVICE))
    assert pair.dial_in_vain() == "reset"
    exchange(client, server)
    exchange(other_client, other_server)
    client.close()
    assert ending(server) == "close"


def test_what_is_known_of_a_target_outlives_a_reload(pair: Pair) -> None:
    listener = pair.listen(81)
    unchecked = "[health]\ncheck = 'none'\n"
    site = Site(pair, reverse_of("127.0.0.1:80", "127.0.0.1:81") + unchecked, services=1)
    pair.forward()
    pair.talk(listener)
    site.reload(reverse_of("127.0.0.1:82", "127.0.0.1:80") + unchecked)
    now, before = site.process.ask("maps")
    assert (now["removed"], before["removed"]) == (False, True)
    targets = {each["target"]: each["failures"] for each in now["targets"]}
    assert targets == {"127.0.0.1:82": 0, "127.0.0.1:80": 1}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (map_of() + RULE + "]", "is no TOML"),
        (map_of() + RULE + "[limit]\n", 'there is no such key (nearest: "limits")'),
        (RULE, "nothing to do"),
        (
            map_of(9000) + RULE + "[timeouts]\nidle_s = 9\ndrain_s = 9\n",
            "timeouts.idle_s, timeouts.drain_s: cannot change while it runs",
        ),
        (
            map_of(9000) + map_of(2222) + OTHER_RULE,
            "cannot listen on *:2222: another program already listens there",
        ),
        (
            map_of(f"127.0.0.1:{PORT}") + OTHER_RULE,
            f"cannot listen on 127.0.0.1:{PORT} while *:{PORT} is open",
        ),
        (
            map_of(9000) + OTHER_RULE + "[[rule]]\nservice = 7\ntype = 'drop'\npriority = 5\n"
            "[[rule]]\nservice = 7\ntargets = ['10.9.0.2']\npriority = 5\n",
            "7 already has a DROP rule at priority 5",
        ),
        (
            map_of(9000)
            + OTHER_RULE
            + reverse_of("127.0.0.1:80", service="7")
            + reverse_of("nowhere.invalid:80"),
            "the host name of target nowhere.invalid:80 has no address",
        ),
    ],
    ids=["syntax", "key", "nothing", "fixed", "port", "overlap", "rule", "name"],
)
def test_a_mistake_leaves_everything_as_it_was(pair: Pair, text: str, complaint: str) -> None:
    listener = pair.listen()
    pair.listen(2222, pair.near)
    pair.reverse()
    right = map_of() + RULE
    site = Site(pair, right, (PORT,))
    client = pair.dial()
    server = pair.accept(listener)

    def seen() -> tuple[object, ...]:
        rules = {(each["prefix"], len(each["targets"])) for each in site.process.ask("services")}
        return pair.near.listening_ports(), rules, only_map(site.process)["listen"]

    before = seen()
    said = site.reload(text, "not reloaded, everything stays as it was")
    assert complaint in " ".join(said.split())
    assert said.count("\n") == 1
    assert seen() == before
    exchange(client, server)
    pair.talk(listener)
    site.reload(right)


def test_a_reload_is_told_to_the_service_manager(pair: Pair) -> None:
    with service_manager() as manager:
        site = Site(pair, map_of(), (PORT,))
        assert manager.recv(100) == b"READY=1"
        for text in (map_of(OTHER_PORT), "broken"):
            site.file.write_text(text)
            site.process.process.send_signal(signal.SIGHUP)
            assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert manager.recv(100) == b"READY=1"
        assert pair.near.listening_ports() == {OTHER_PORT}


def test_without_a_file_sighup_is_sigterm(pair: Pair) -> None:
    forward = pair.forward()
    assert forward.stop(signal.SIGHUP) == 0
    assert "stopped" in forward.log()
