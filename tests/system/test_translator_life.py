"""Does the appliance come up whole or not at all, and go down as asked: gracefully, at once, or by kill -9?"""

from __future__ import annotations

import json
import signal

import pytest
from service_manager import service_manager
from translator_pair import PORT, SERVICE, TIMEOUT_S, Pair, ending, exchange, only_map, wait_counter

from lab.chain import COMMAND, kernel_traces
from lab.traffic import PROJECT
from lab.waiting import wait_for


def refused(pair: Pair, *options: str) -> tuple[int, str]:
    """Exit status and message of a translator on the near host that does not come up."""
    result = pair.near.run([*COMMAND, *options], cwd=PROJECT, check=False)
    assert result.stdout == ""
    return result.returncode, result.stderr


def test_sigterm_lets_open_connections_finish_and_lets_nobody_in(pair: Pair) -> None:
    listener = pair.listen()
    reverse, forward = pair.reverse(), pair.forward()
    client, server = pair.talk(listener)
    for side in (forward, reverse):
        side.process.send_signal(signal.SIGTERM)
    wait_for(lambda: all("draining" in side.log() for side in (forward, reverse)), "both to drain")
    with pytest.raises(ConnectionRefusedError):
        pair.dial()
    exchange(client, server, rounds=10)
    client.close()
    assert ending(server) == "close"
    server.close()
    assert forward.process.wait(TIMEOUT_S) == 0
    assert reverse.process.wait(TIMEOUT_S) == 0


def test_sigterm_ends_with_resets_at_the_deadline(pair: Pair) -> None:
    listener = pair.listen()
    pair.reverse()
    forward = pair.forward("--drain-timeout", "0.3")
    client, server = pair.talk(listener)
    assert forward.stop(signal.SIGTERM) == 0
    assert ending(client) == "reset"
    assert ending(server) == "reset"
    assert "the drain deadline is over" in forward.log()


@pytest.mark.parametrize(
    "signals", [(signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
)
def test_sigint_or_a_second_sigterm_stops_at_once(pair: Pair, signals: tuple[signal.Signals, ...]) -> None:
    listener = pair.listen()
    reverse = pair.reverse()
    forward = pair.forward("--drain-timeout", "600")
    client, server = pair.talk(listener)
    forward.process.send_signal(signals[0])
    if len(signals) > 1:
        wait_for(lambda: "draining" in forward.log(), "it to drain")
        forward.process.send_signal(signals[1])
    assert forward.process.wait(TIMEOUT_S) == 0
    assert ending(client) == "reset"
    assert ending(server) == "reset"
    wait_counter(reverse, "clients", 0)
    wait_for(lambda: reverse.flows() == [], "the other side to forget the flow")


def test_sigterm_while_clients_are_connecting(pair: Pair) -> None:
    forward = pair.forward("--connect-timeout", "600", "--drain-timeout", "0.2")
    client = pair.dial()
    wait_counter(forward, "clients_connecting", 1)
    assert forward.stop(signal.SIGTERM) == 0
    assert ending(client) == "reset"


def test_sigterm_during_the_start_leaves_nothing(pair: Pair) -> None:
    forward = pair.launch(pair.near, "--map", f"{PORT}={SERVICE}")
    wait_for(lambda: kernel_traces(pair.near), "the start to have begun")
    assert forward.stop(signal.SIGTERM) == 0
    assert kernel_traces(pair.near) == []


def test_a_host_without_ipv6_serves_ipv4(pair: Pair) -> None:
    pair.near.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
    try:
        listener = pair.listen()
        pair.reverse()
        pair.forward()
        pair.talk(listener)
    finally:
        pair.near.sysctl("net.ipv6.conf.all.disable_ipv6", 0)


def test_after_kill_9_a_new_one_clears_up_and_serves(pair: Pair) -> None:
    listener = pair.listen()
    reverse, forward = pair.reverse(), pair.forward()
    client, _ = pair.talk(listener)
    forward.stop(signal.SIGKILL)
    reverse.stop(signal.SIGKILL)
    assert kernel_traces(pair.near) != []  # else this test would prove nothing
    assert ending(client) in ("reset", "close")
    forward, reverse = pair.forward(), pair.reverse()
    assert "removed what an earlier process had left behind" in forward.log()
    pair.talk(listener)


def test_a_second_instance_is_refused_and_the_first_goes_on(pair: Pair) -> None:
    listener = pair.listen()
    pair.reverse()
    forward = pair.forward()
    status, message = refused(pair, "--map", f"{PORT + 1}=1")
    assert status == 1
    assert f"another Serval stack runs in this network namespace (pid {forward.process.pid}" in message
    assert message.count("\n") == 1
    assert PORT + 1 not in pair.near.listening_ports()
    pair.talk(listener)


def test_a_port_of_another_program_leaves_nothing_half_started(pair: Pair) -> None:
    pair.listen(80, pair.near)
    status, message = refused(pair, "--map", "8080=1", "--map", "80=2")
    assert status == 2
    assert "--map 80=2: cannot listen on *:80: another program already listens there" in message
    assert message.count("\n") == 1
    assert kernel_traces(pair.near) == []
    assert pair.near.listening_ports() == {80}


def test_a_rule_that_the_table_refuses_leaves_nothing_half_started(pair: Pair) -> None:
    config = pair.directory / "rules.toml"
    config.write_text(
        "[[map]]\nlisten = 8080\nservice = 1\n"
        "[[rule]]\nservice = 1\ntype = 'drop'\npriority = 5\n"
        "[[rule]]\nservice = 1\ntargets = ['10.9.0.2']\npriority = 5\n"
    )
    status, message = refused(pair, "--config", str(config))
    assert status == 2
    assert f"{config}:9: rule.service: 1 already has a DROP rule at priority 5" in message
    assert kernel_traces(pair.near) == []
    assert pair.near.listening_ports() == set()


def test_readiness_and_the_end_are_told_to_the_service_manager(pair: Pair) -> None:
    with service_manager() as manager:
        forward = pair.launch(pair.near, "--map", f"{PORT}={SERVICE}")
        assert manager.recv(100) == b"READY=1"
        assert PORT in pair.near.listening_ports()
        forward.process.send_signal(signal.SIGTERM)
        assert manager.recv(100) == b"STOPPING=1"
        assert forward.process.wait(TIMEOUT_S) == 0


def test_one_line_at_the_start_and_nothing_per_connection(pair: Pair) -> None:
    listener = pair.listen()
    reverse = pair.reverse("127.0.0.1:80", "--log-format", "json")
    forward = pair.forward("--log-format", "json")
    for _ in range(3):
        client = pair.dial()
        exchange(client, pair.accept(listener))
        client.close()
    for side in (forward, reverse):
        (line,) = side.log().splitlines()
        assert json.loads(line)["event"] == "serving"
    assert json.loads(forward.log())["maps"] == [f"*:{PORT}={SERVICE}"]


def test_show_flows_services_and_maps(pair: Pair) -> None:
    listener = pair.listen()
    reverse, forward = pair.reverse(), pair.forward()
    client, server = pair.talk(listener)
    client_place = f"127.0.0.1:{client.getsockname()[1]}"

    def show(*words: str) -> str:
        return str(pair.near.run([*COMMAND, "show", *words], cwd=PROJECT).stdout)

    def seen() -> bool:
        (flow,) = json.loads(show("flows", "--json"))
        return bool(flow["bytes_to_service"] == 9 and flow["bytes_from_service"] == 8)

    wait_for(seen, "the flow's bytes to be counted")
    (flow,) = json.loads(show("flows", "--json"))
    assert (flow["state"], flow["service"], flow["legacy"]) == ("CONNECTED", SERVICE, client_place)
    table = show("flows")
    for word in ("CONNECTED", SERVICE, "10.9.0.2", client_place, "9 B / 8 B"):
        assert word in table
    (entry,) = [each for each in json.loads(show("services", "--json")) if each["prefix"] == SERVICE]
    assert entry["targets"][0]["address"] == "10.9.0.2"
    assert "10.9.0.2" in show("services")
    (shown,) = json.loads(show("maps", "--json"))
    assert (shown["listen"], shown["active"], shown["connections"]) == (f"*:{PORT}", 1, 1)
    assert (shown["bytes_to_service"], shown["bytes_from_service"]) == (9, 8)
    assert f"*:{PORT}" in show("maps")
    assert only_map(reverse)["targets"][0]["connections"] == 1
    client.close()
    assert ending(server) == "close"
    server.close()
    wait_counter(forward, "clients", 0)
    wait_for(lambda: forward.flows() == [], "the flow to end")
    assert show("flows") == "no flows\n"
    assert only_map(forward)["bytes_to_service"] == 9


def test_show_without_a_stack(pair: Pair) -> None:
    status, message = refused(pair, "show", "flows")
    assert status == 1
    assert message.startswith("serval-translator: no Serval stack runs in this network namespace")
    assert message.count("\n") == 1


def test_without_privileges_one_sentence_says_what_is_missing(pair: Pair) -> None:
    setpriv = ("setpriv", "--reuid", "65534", "--clear-groups", "--inh-caps", "-all")
    result = pair.near.run([*setpriv, *COMMAND, "--map", "8080=1"], cwd=PROJECT, check=False)
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("serval-translator: ")
    assert result.stderr.count("\n") == 1
    assert kernel_traces(pair.near) == []
