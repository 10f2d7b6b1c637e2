"""What do clients see when all is well, when something is missing, and when someone goes away too early?"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from translator_pair import (
    PORT,
    SERVICE,
    Pair,
    ending,
    exchange,
    is_silent,
    only_map,
    silent_service,
    wait_counter,
)

from lab.waiting import wait_for
from translator.legacy_side import reset

UNCHECKED = ("--health-check", "none")


def test_several_maps_both_directions_and_both_ip_versions_in_one_process(pair: Pair) -> None:
    """Client, forward map, reverse map and service on the same host: the stack delivers to itself."""
    listeners = {port: pair.listen(port, pair.near) for port in (80, 81)}
    both = pair.start(
        pair.near,
        *("--map", "8080=76568", "--map", "[::1]:8081-8082=0x00012b19", "--map", "127.0.0.1:8083=76570"),
        *("--reverse", "76568=127.0.0.1:80", "--reverse", "0x00012b19:32=localhost:81"),
        ports=[8080, 8081, 8082, 8083],
        services=2,
    )
    for address, port, target in (
        ("127.0.0.1", 8080, 80),
        ("::1", 8080, 80),
        ("::1", 8081, 81),
        ("::1", 8082, 81),
    ):
        client = pair.dial(port, address)
        server = pair.accept(listeners[target])
        exchange(client, server)
        client.close()
        assert ending(server) == "close"
        server.close()
    wait_counter(both, "clients", 0)
    maps = {each["listen"]: each for each in both.ask("maps")}
    assert maps["*:8080"]["finished"] == 2
    assert maps["[::1]:8081-8082"]["finished"] == 2
    assert maps["0x00012b19:32"]["bytes_to_service"] == 2 * len("request 0")


def test_a_service_without_any_rule_is_refused_at_once(pair: Pair) -> None:
    pair.start(pair.near, "--map", f"{PORT}={SERVICE}", "--no-broadcast", ports=[PORT])
    assert pair.dial_in_vain() == "reset"


@contextlib.contextmanager
def silence(pair: Pair) -> Iterator[None]:
    """The far host drops what nobody there listens to, instead of saying so."""
    pair.far.run(["nft", "add table ip quiet; add chain ip quiet in { type filter hook input priority 0; }"])
    pair.far.run(["nft", "add rule ip quiet in ip protocol 144 drop"])
    try:
        yield
    finally:
        pair.far.run(["nft", "delete table ip quiet"])


@pytest.mark.parametrize(
    ("behaviour", "error", "why"),
    [
        (silence, "ETIMEDOUT", "no answer to the SYNs"),
        (contextlib.nullcontext, "EHOSTUNREACH", "10.9.0.2 cannot be reached: ENOPROTOOPT"),
    ],
    ids=["silent", "unreachable"],
)
def test_an_unknown_service_is_a_reset_after_the_timeout_and_nothing_hangs(
    pair: Pair, behaviour: Callable[[Pair], AbstractContextManager[object]], error: str, why: str
) -> None:
    """No stack runs at the far host. Its kernel's ICMP is a reason, but not the end: others may answer."""
    forward = pair.forward("--connect-timeout", "0.7")
    started_s = time.monotonic()
    with behaviour(pair):
        assert pair.dial_in_vain() == "reset"
    assert time.monotonic() - started_s >= 0.7
    wait_counter(forward, "clients", 0)
    assert forward.ask("translator_counters")[f"refused_{error}"] == 1
    assert only_map(forward)["refused"] == 1
    assert forward.flows() == []
    assert "a client could not reach its service" in forward.log()
    assert why in forward.log()


def test_an_unknown_service_can_be_a_close_instead(pair: Pair) -> None:
    pair.forward("--connect-timeout", "0.3", "--no-answer", "close")
    assert pair.dial_in_vain() == "close"


def test_a_dropped_service_is_refused_at_once(pair: Pair) -> None:
    config = pair.directory / "drop.toml"
    config.write_text(f"[[map]]\nlisten = {PORT}\nservice = 1\n[[rule]]\nservice = 1\ntype = 'drop'\n")
    forward = pair.start(pair.near, "--config", config, ports=[PORT])
    assert pair.dial_in_vain() == "reset"
    assert forward.ask("translator_counters")["refused_EHOSTUNREACH"] == 1


def test_a_client_that_is_reset_while_connecting_is_forgotten_before_the_timeout(pair: Pair) -> None:
    forward = pair.forward("--connect-timeout", "60")
    client = pair.dial()
    wait_counter(forward, "clients_connecting", 1)
    assert len(forward.flows()) == 1
    reset(client)
    wait_counter(forward, "clients", 0)
    wait_for(lambda: forward.flows() == [], "the flow to be cancelled")
    assert only_map(forward)["gave_up"] == 1


def test_a_client_that_has_sent_all_before_it_is_connected_gets_its_answer(pair: Pair) -> None:
    """`printf … | nc -N` at a moment when the service is only just coming up."""
    forward = pair.forward("--connect-timeout", "60")
    listener = pair.listen()
    client = pair.dial()
    client.sendall(b"early")
    client.shutdown(socket.SHUT_WR)
    wait_counter(forward, "clients_connecting", 1)
    pair.reverse()
    server = pair.accept(listener)
    assert server.recv(5, socket.MSG_WAITALL) == b"early"
    assert server.recv(1) == b""
    server.sendall(b"answer")
    server.close()
    assert client.recv(6, socket.MSG_WAITALL) == b"answer"
    assert client.recv(1) == b""
    wait_counter(forward, "clients", 0)


def test_a_target_that_is_down_is_a_reset_and_the_next_one_is_taken(pair: Pair) -> None:
    reverse = pair.reverse("127.0.0.1:80,127.0.0.1:81", *UNCHECKED)
    pair.forward()
    assert pair.dial_in_vain() == "reset"
    wait_counter(reverse, "clients", 0)
    assert only_map(reverse)["refused"] == 1
    listener = pair.listen(81)
    for _ in range(3):
        client = pair.dial()
        exchange(client, pair.accept(listener))
    targets = {each["target"]: each["connections"] for each in only_map(reverse)["targets"]}
    assert targets == {"127.0.0.1:80": 0, "127.0.0.1:81": 3}


def test_targets_take_turns(pair: Pair) -> None:
    reverse = pair.reverse("127.0.0.1:80,127.0.0.1:81", *UNCHECKED)
    pair.forward()
    listeners = [pair.listen(80), pair.listen(81)]
    for number in range(4):
        pair.talk(listeners[number % 2])
    assert [each["connections"] for each in only_map(reverse)["targets"]] == [2, 2]


def test_a_silent_target_ends_in_a_reset_within_its_timeout(pair: Pair) -> None:
    with silent_service(pair, 80):
        reverse = pair.reverse("127.0.0.1:80", "--target-timeout", "0.4", *UNCHECKED)
        pair.forward()
        assert pair.dial_in_vain() == "reset"
        wait_counter(reverse, "clients", 0)
        assert only_map(reverse)["refused"] == 1


def test_a_client_that_goes_away_while_its_target_is_dialled_is_forgotten(pair: Pair) -> None:
    with silent_service(pair, 80):
        reverse = pair.reverse("127.0.0.1:80", "--target-timeout", "60", *UNCHECKED)
        pair.forward()
        client = pair.dial()
        wait_counter(reverse, "flows_waiting_for_targets", 1)
        reset(client)
        wait_counter(reverse, "flows_waiting_for_targets", 0)
        wait_counter(reverse, "clients", 0)
        assert only_map(reverse)["gave_up"] == 1


def test_at_the_connection_limit_clients_wait_for_their_turn(pair: Pair) -> None:
    listener = pair.listen()
    pair.reverse()
    forward = pair.forward("--connection-limit", "2")
    clients = [pair.dial() for _ in range(4)]
    servers = [pair.accept(listener) for _ in range(2)]
    assert forward.ask("translator_counters")["clients"] == 2
    assert forward.ask("translator_counters")["connection_limit_reached"] == 1
    assert "the connection limit is reached" in forward.log()
    assert all(is_silent(client) for client in clients[2:])
    for index in range(2):
        clients[index].close()
        assert ending(servers[index]) == "close"
        servers[index].close()
    servers += [pair.accept(listener) for _ in range(2)]
    exchange(clients[2], servers[2])
    exchange(clients[3], servers[3])
    assert forward.ask("translator_counters")["clients_high_water"] == 2


def test_beyond_the_limit_of_the_reverse_side_flows_are_reset(pair: Pair) -> None:
    listener = pair.listen()
    reverse = pair.reverse("127.0.0.1:80", "--connection-limit", "1")
    pair.forward()
    client, server = pair.talk(listener)
    assert pair.dial_in_vain() == "reset"
    exchange(client, server)
    assert only_map(reverse)["refused"] == 1


def test_an_idle_pair_is_reset_on_both_sides(pair: Pair) -> None:
    listener = pair.listen()
    pair.reverse()
    forward = pair.forward("--idle-timeout", "0.5")
    client, server = pair.talk(listener)
    assert ending(client) == "reset"
    assert ending(server) == "reset"
    wait_counter(forward, "splice_completed_idle_timeout", 1)
    assert only_map(forward)["timed_out"] == 1


@pytest.mark.parametrize("silent_side", ["client", "server"])
def test_a_half_closed_pair_is_reset_when_the_other_side_stays_silent(pair: Pair, silent_side: str) -> None:
    listener = pair.listen()
    pair.reverse()
    forward = pair.forward(f"--{silent_side}-fin-timeout", "0.5")
    client, server = pair.talk(listener)
    closing, silent = (server, client) if silent_side == "client" else (client, server)
    closing.shutdown(socket.SHUT_WR)
    assert silent.recv(1) == b""
    assert ending(closing) == "reset"
    wait_counter(forward, "clients", 0)
    assert only_map(forward)["timed_out"] == 1


def test_clients_are_spread_by_weight(pair: Pair) -> None:
    """A second instance would need a third host: instead one of two addresses is never answered from."""
    listener = pair.listen()
    pair.reverse()
    forward = pair.forward("--service", f"{SERVICE}=10.9.0.77@100", "--connect-timeout", "20")
    pair.talk(listener)  # reaches the living one after some tries, each drawn anew
    (entry,) = [each for each in forward.ask("services") if each["prefix"] == SERVICE]
    assert {each["address"]: each["weight"] for each in entry["targets"]} == {"10.9.0.2": 1, "10.9.0.77": 100}
    assert entry["packets_resolved"] > 1
