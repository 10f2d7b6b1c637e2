"""What do clients notice when the target of a reverse translator dies and returns, or the translator drains?"""

from __future__ import annotations

import signal
import socket
from typing import Any

from translator_pair import PORT, SERVICE, TIMEOUT_S, Pair, ending, exchange, only_map

from lab.chain import TranslatorProcess
from lab.waiting import wait_for

# Checks soon, and none but checks would end a wait of a minute in time.
PATIENT = ("--connect-timeout", "60")
HEALTH = "[health]\ninterval_s = 0.1\nfast_interval_s = 0.05\n"


def reverse_with_checks(pair: Pair, *targets: str, health: str = HEALTH) -> TranslatorProcess:
    file = pair.directory / "health.toml"
    file.write_text(f"[[reverse]]\nservice = {SERVICE}\ntargets = {list(targets)}\n{health}")
    return pair.start(pair.far, "--config", file)


def wait_health(side: TranslatorProcess, *health: str) -> list[dict[str, Any]]:
    def seen() -> list[dict[str, Any]]:
        targets: list[dict[str, Any]] = only_map(side)["targets"]
        return targets if [each["health"] for each in targets] == list(health) else []

    return wait_for(seen, f"targets to be {', '.join(health)}")


def test_a_target_is_killed_and_returns(pair: Pair) -> None:
    listener = pair.listen()
    reverse = reverse_with_checks(pair, "127.0.0.1:80")
    wait_health(reverse, "up")
    assert "127.0.0.1:80" in reverse.show("maps")
    pair.forward(*PATIENT)
    client, server = pair.talk(listener)
    listener.close()
    (target,) = wait_health(reverse, "down")
    assert target["down_because"] == "Connection refused"
    assert "127.0.0.1:80 down: Connection refused" in " ".join(reverse.show("maps").split())
    refused = only_map(reverse)["refused"]
    assert pair.dial_in_vain() == "reset"  # long before the connect timeout
    assert reverse.ask("counters")["dropped_listener_refuses"] == 1
    assert only_map(reverse)["refused"] == refused  # it did not get as far as a target
    exchange(client, server)  # a connection that is open goes on
    listener = pair.listen()
    wait_health(reverse, "up")
    pair.talk(listener)
    log = reverse.log()
    assert log.index("a target is down") < log.index("a target is up")
    assert log.count("a target is down") == 1


def test_only_the_target_that_is_down_is_left_out(pair: Pair) -> None:
    listeners = [pair.listen(80), pair.listen(81)]
    reverse = reverse_with_checks(pair, "127.0.0.1:80", "127.0.0.1:81")
    wait_health(reverse, "up", "up")
    pair.forward(*PATIENT)
    listeners[0].close()
    wait_health(reverse, "down", "up")
    for _ in range(3):
        pair.talk(listeners[1])
    listeners[0] = pair.listen(80)
    wait_health(reverse, "up", "up")
    before = [each["connections"] for each in only_map(reverse)["targets"]]
    for _ in range(2):
        pair.dial()

    def both_got_one() -> bool:
        return [each["connections"] for each in only_map(reverse)["targets"]] == [each + 1 for each in before]

    wait_for(both_got_one, "both to get one")


def test_a_translator_whose_own_target_is_down_sends_its_clients_elsewhere(pair: Pair) -> None:
    here, there = pair.listen(90, pair.near), pair.listen()
    pair.reverse()
    file = pair.directory / "both.toml"
    file.write_text(
        f"[[map]]\nlisten = {PORT}\nservice = {SERVICE}\n"
        f"[[reverse]]\nservice = {SERVICE}\ntargets = ['127.0.0.1:90']\n"
        f"[[rule]]\nservice = {SERVICE}\ntargets = ['10.9.0.2']\n{HEALTH}[timeouts]\nconnect_s = 60\n"
    )
    both = pair.start(pair.near, "--config", file, ports=[PORT])

    def health() -> str:
        return str(both.ask("maps")[1]["targets"][0]["health"])

    wait_for(lambda: health() == "up", "the own target to be up")
    pair.talk(here)
    here.close()
    wait_for(lambda: health() == "down", "the own target to be down")
    pair.talk(there)
    here = pair.listen(90, pair.near)
    wait_for(lambda: health() == "up", "the own target to be up")
    pair.talk(here)


def test_a_translator_that_drains_sends_new_clients_away_and_keeps_the_others(pair: Pair) -> None:
    listener = pair.listen()
    reverse = pair.reverse()
    pair.forward(*PATIENT)
    client, server = pair.talk(listener)
    reverse.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "draining" in reverse.log(), "the drain to begin")
    assert pair.dial_in_vain() == "reset"
    exchange(client, server)
    client.close()
    assert ending(server) == "close"
    server.close()
    assert reverse.process.wait(TIMEOUT_S) == 0


def test_a_reload_changes_how_targets_are_watched_and_keeps_what_is_known(pair: Pair) -> None:
    listener = pair.listen()
    slow = "[health]\ninterval_s = 3600\nfast_interval_s = 3600\n"
    reverse = reverse_with_checks(pair, "127.0.0.1:80", health=slow)
    wait_health(reverse, "up")
    pair.forward(*PATIENT)
    pair.talk(listener)
    listener.close()
    (pair.directory / "health.toml").write_text(
        f"[[reverse]]\nservice = {SERVICE}\ntargets = ['127.0.0.1:80', '127.0.0.1:81']\nhealth.fall = 1\n{HEALTH}"
    )
    reverse.process.send_signal(signal.SIGHUP)
    wait_for(lambda: len(reverse.ask("maps")[0]["targets"]) == 2, "the reload")
    wait_for(
        lambda: [each["health"] for each in reverse.ask("maps")[0]["targets"]] == ["down", "down"],
        "both to be down",
    )
    assert pair.dial_in_vain() == "reset"
    (pair.directory / "health.toml").write_text(
        f"[[reverse]]\nservice = {SERVICE}\ntargets = ['127.0.0.1:80', '127.0.0.1:81']\nhealth.check = 'none'\n"
    )
    reverse.process.send_signal(signal.SIGHUP)
    wait_for(lambda: reverse.ask("maps")[0]["targets"][0]["health"] == "not checked", "the reload")
    listeners = [pair.listen(80), pair.listen(81)]
    client = pair.dial()
    accepted: list[socket.socket] = []

    def taken() -> list[socket.socket]:
        for each in listeners:
            each.setblocking(False)
            try:
                accepted.append(each.accept()[0])
            except BlockingIOError:
                continue
        return accepted

    (server,) = wait_for(taken, "one of the targets to get the connection")
    exchange(client, pair.keep(server))
