"""Registration on real wires: hosts come, move, go and crash; routers restart; nobody has to say anything twice."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core.controller.service_controller import ServiceController
from serval_core.controller.settings import (
    ControllerSettings,
    PolicyEntry,
    RegistrationSection,
    RouterSection,
)
from serval_core.errors import KernelRefused, OurMistake
from serval_core.identity import create_identity
from serval_core.names import ServicePrefix, format_address, parse_service
from serval_core.rules import Rule
from serval_core.stack_socket import RequestFailed, StackNotRunning, StackSocketClient
from tests.serval_core.stack_thread import StackThread

from .controlled import ROOT, Controlled, host_settings, router_settings, start_process
from .memory import CLIENT_ID, OTHER, register, unregister

SERVICE = "76568"


@pytest.fixture
def network(lab: Lab) -> dict[str, Host]:
    """A client, two servers and a router on one LAN."""
    hosts = {name: lab.host(name) for name in ("client", "left", "right", "router")}
    lab.switch("switch", {host: f"10.1.0.{number}/24" for number, host in enumerate(hosts.values(), 1)})
    return hosts


@pytest.fixture
def router(network: dict[str, Host]) -> Iterator[Controlled]:
    with Controlled(network["router"], router_settings()) as router:
        yield router


def test_binding_registers_and_closing_unregisters(network: dict[str, Host], router: Controlled) -> None:
    """Nothing is configured: the host finds the router by itself, and only while it is there."""
    with Controlled(network["left"], ControllerSettings()) as left:
        listener = left.listen(SERVICE)
        other = left.listen("0xabcd:16")
        endpoint = left.call(lambda: left.stack.datagrams.bind(parse_service("80"), lambda _: None))
        rules = [(SERVICE, "10.1.0.2", 1), ("0xabcd:16", "10.1.0.2", 1), ("80", "10.1.0.2", 1)]
        router.wait_rules(*rules)
        left.wait_rules(("default", "10.1.0.4", 1), origin="default")
        listener.close()
        router.wait_rules(*rules[1:])
        left.call(endpoint.close)
        router.wait_rules(rules[1])
        other.close()
        router.wait_rules()
        left.listen(SERVICE)
        router.wait_rules(rules[0])
    router.wait_rules()
    assert {event["event"] for event in router.news} >= {"registered", "unregistered"}
    assert router.refusals() == {}
    assert router.call(lambda: router.stack.forwarding)


def test_a_connection_goes_through_the_router_to_whoever_registered(
    network: dict[str, Host], router: Controlled
) -> None:
    """The client knows no instance: its SYN goes to the router, which sends it on."""
    with (
        Controlled(network["left"], host_settings(weight=3)) as left,
        Controlled(network["client"], ControllerSettings()) as client,
    ):
        listener = left.listen(SERVICE)
        router.wait_rules((SERVICE, "10.1.0.2", 3))
        client.wait_rules(("default", "10.1.0.4", 1), origin="default")
        near, far = client.connect(SERVICE), listener.accept()
        assert format_address(near.connection.peer_address) == "10.1.0.2"
        near.socket.sendall(b"hello")
        assert far.socket.recv(5) == b"hello"
        near.release()
        far.release()


def test_services_without_target_are_withheld_and_offered_again(
    network: dict[str, Host], router: Controlled
) -> None:
    prefix = parse_service(SERVICE)
    with Controlled(network["left"], ControllerSettings()) as left:
        left.listen(SERVICE)
        router.wait_rules((SERVICE, "10.1.0.2", 1))
        left.call(lambda: left.controller.withhold(prefix, withheld=True))
        router.wait_rules()
        left.call(lambda: left.controller.withhold(prefix, withheld=False))
        router.wait_rules((SERVICE, "10.1.0.2", 1))
        left.call(lambda: left.controller.set_terms(prefix, 2, 5))
        router.wait_rules((SERVICE, "10.1.0.2", 5))


def test_a_killed_host_is_forgotten_and_others_stay(network: dict[str, Host], router: Controlled) -> None:
    """kill -9 of the process with the stack: nothing says goodbye, the registration lapses."""
    quick = host_settings(refresh_s=0.3, lifetime_s=1.0)
    with Controlled(network["right"], ControllerSettings()) as right:
        right.listen(SERVICE)
        process = start_process(network["left"], quick, SERVICE)
        router.wait_rules((SERVICE, "10.1.0.2", 1), (SERVICE, "10.1.0.3", 1))
        process.kill()
        process.wait()
        router.wait_rules((SERVICE, "10.1.0.3", 1))
    ended = {event["address"]: event["why"] for event in router.news if event["event"] == "unregistered"}
    assert ended == {"10.1.0.2": "expired", "10.1.0.3": "unregistered"}


def test_a_killed_router_comes_back_with_its_registrations(network: dict[str, Host], tmp_path: Path) -> None:
    """The host refreshes only every 20 s: what the new router knows at once comes from its directory."""
    settings = router_settings(directory=str(tmp_path / "directory.sqlite"))
    with Controlled(network["left"], host_settings(routers=("10.1.0.4",))) as left:
        process = start_process(network["router"], settings)
        left.listen(SERVICE)

        def known() -> object:
            listed = network["router"].call(StackSocketClient().request, "registrations")
            return [each["prefix"] for each in listed["received"]] == [SERVICE]

        wait_for(known, "the registration")
        process.kill()
        process.wait()
        sent = left.controller_counters()["host_messages_sent"]
        with Controlled(network["router"], settings) as router:
            assert router.rules() == {(SERVICE, "10.1.0.2", 1)}
            assert left.controller_counters()["host_messages_sent"] - sent <= 1


def test_a_new_address_is_registered_in_place_of_the_old_one(
    network: dict[str, Host], router: Controlled
) -> None:
    host = network["left"]
    with Controlled(host, ControllerSettings()) as left:
        left.listen(SERVICE)
        router.wait_rules((SERVICE, "10.1.0.2", 1))
        host.run(["ip", "address", "del", "10.1.0.2/24", "dev", "eth0"])
        host.run(["ip", "address", "add", "10.1.0.77/24", "brd", "+", "dev", "eth0"])
        router.wait_rules((SERVICE, "10.1.0.77", 1))
        moved = [event for event in router.news if event["event"] == "registered"][-1]
        assert moved["previous_address"] == "10.1.0.2"
    router.wait_rules()


def test_a_router_that_starts_later_is_found_and_one_that_ends_is_left(network: dict[str, Host]) -> None:
    """The default rule to it comes and goes."""
    quick = host_settings(refresh_s=0.3, lifetime_s=1.0)
    with Controlled(network["left"], quick) as left:
        left.listen(SERVICE)
        with Controlled(network["router"], router_settings(announced_s=1.0)) as router:
            router.wait_rules((SERVICE, "10.1.0.2", 1))
            left.wait_rules(("default", "10.1.0.4", 1), origin="default")
        left.wait_rules(origin="default")


def test_one_failure_does_not_end_the_refreshes(network: dict[str, Host]) -> None:
    """The kernel refuses to answer once, or a part has a defect: that is said, and all goes on."""
    failures: list[str] = []
    defects: list[BaseException | None] = []

    def fail_once(kind: str, rule: Rule) -> None:
        if rule.origin == "default" and not failures:
            failures.append(kind)
            raise KernelRefused("sendto", errno.ENOBUFS, "")

    with Controlled(network["left"], host_settings(refresh_s=0.3, lifetime_s=2.0)) as left:
        left.call(
            lambda: asyncio.get_running_loop().set_exception_handler(
                lambda _, context: defects.append(context.get("exception"))
            )
        )
        left.call(lambda: left.stack.table.on_change(fail_once))
        with Controlled(network["router"], router_settings()) as router:
            left.listen(SERVICE)
            wait_for(lambda: failures, "the failure")
            wait_for(lambda: router.controller_counters().get("router_refreshed", 0) > 5, "refreshes after it")
            assert router.rules() == {(SERVICE, "10.1.0.2", 1)}
        assert [type(each) for each in defects] == [KernelRefused]


def test_a_flood_of_registrations_does_not_fill_the_log(router: Controlled) -> None:
    """What comes and goes is said for a while, then counted."""
    side = router.controller._router
    assert side is not None

    def flood() -> None:
        for number in range(1, 251):
            for payload in (register(parse_service(str(number))), unregister(parse_service(str(number)))):
                side.role.message_received(payload, CLIENT_ID, OTHER, time.monotonic(), time.time())

    with structlog.testing.capture_logs() as lines:
        router.call(flood)
    said = [line for line in lines if line["event"] in ("registered", "unregistered")]
    assert 100 <= len(said) < 200
    wait_for(lambda: len(router.news) >= 1000, "all are published")  # with the events of the rules


def test_a_router_that_was_found_does_not_hide_hosts_that_do_not_register(
    network: dict[str, Host], router: Controlled
) -> None:
    """The router is asked first and does not know the service: then everybody is."""
    with (
        StackThread(network["left"]) as left,
        Controlled(network["client"], ControllerSettings()) as client,
    ):
        listener = left.listen(SERVICE)
        client.wait_rules(("default", "10.1.0.4", 1), origin="default")
        assert client.broadcasts()
        near, far = client.connect(SERVICE), listener.accept()
        near.release()
        far.release()
        assert router.rules() == set()


def test_a_router_that_was_named_takes_the_place_of_broadcasts(
    network: dict[str, Host], router: Controlled
) -> None:
    with Controlled(network["left"], host_settings(routers=("10.1.0.4",))) as left:
        left.wait_rules(("default", "10.1.0.4", 1), origin="default")
        assert not left.broadcasts()
        left.run(left.controller.stop())
        assert left.broadcasts()
        assert left.rules("default") == set()


def test_what_the_operator_says_about_the_default_service_counts_more(
    network: dict[str, Host], router: Controlled
) -> None:
    with Controlled(network["client"], ControllerSettings(), forwards={"default": "10.1.0.3"}) as client:
        wait_for(lambda: client.call(lambda: client.controller.routers), "the router is found")
        wait_for(lambda: client.controller_counters()["host_messages_sent"] >= 2, "another round")
        assert client.rules("default") == set()
        assert client.rules("manual") == {("default", "10.1.0.3", 1)}
        assert client.broadcasts()


def test_signed_services_register_with_their_keys(network: dict[str, Host], tmp_path: Path) -> None:
    """The router asks for self-certifying serviceIDs; the host has the key, its neighbour has another one."""
    key, other = (create_identity(tmp_path / name) for name in ("key", "other"))
    provider = parse_service("0xabcd0000:32")
    service = str(ServicePrefix.of(key.service_id(provider)))
    policy = (PolicyEntry("0xabcd0000:32", "self-certifying"),)
    with (
        Controlled(network["router"], router_settings(policy=policy, default_policy="nobody")) as router,
        Controlled(network["left"], host_settings(keys=(str(tmp_path / "key"),))) as left,
        Controlled(network["right"], host_settings(keys=(str(tmp_path / "other"),))) as right,
        Controlled(network["client"], ControllerSettings()) as client,
    ):
        for each in (right, client, left):
            each.listen(service)
        router.wait_rules((service, "10.1.0.2", 1))
        wait_for(lambda: len(router.refusals()) == 2, "both are refused")
        assert router.refusals().keys() == {"not_self_certifying", "not_signed"}
        refused = [each for each in router.news if each["event"] == "registration_refused"]
        assert {(each["address"], each["reason"]) for each in refused} == {
            ("10.1.0.3", "not_self_certifying"),
            ("10.1.0.1", "not_signed"),
        }
    assert other.public_key != key.public_key


def test_only_signed_routers_are_believed_where_keys_are_named(
    network: dict[str, Host], tmp_path: Path
) -> None:
    key = create_identity(tmp_path / "router.key")
    with (
        Controlled(network["right"], router_settings()) as impostor,
        Controlled(network["router"], router_settings(key=str(tmp_path / "router.key"))),
        Controlled(network["left"], host_settings(router_keys=(key.public_key.hex(),))) as left,
    ):
        left.wait_rules(("default", "10.1.0.4", 1), origin="default")
        wait_for(
            lambda: left.controller_counters().get("host_refused_announcement_key", 0) > 0,
            "the impostor's answer is refused",
        )
        assert impostor.controller_counters()["router_solicitations"] >= 1
        assert left.rules("default") == {("default", "10.1.0.4", 1)}


def test_routers_form_a_hierarchy(lab: Lab) -> None:
    """Services within the aggregate are one registration above, others stand for themselves, with the weights of
    all their instances; and a client above reaches an instance below through both routers.
    """
    client, top, middle, left, right = (
        lab.host(each) for each in ("client", "top", "middle", "left", "right")
    )
    lab.switch("upper", {client: "10.1.0.1/24", top: "10.1.0.2/24", middle: "10.1.0.3/24"})
    lab.switch("lower", {middle: "10.2.0.3/24", left: "10.2.0.1/24", right: "10.2.0.2/24"})
    middle.forward()
    for host in (client, top):
        host.add_route("10.2.0.0/24", "10.1.0.3")
    for host in (left, right):
        host.add_route("10.1.0.0/24", "10.2.0.3")
    below = ControllerSettings(
        registration=RegistrationSection(routers=("10.1.0.2",)),
        router=RouterSection(enabled=True, directory=":memory:", aggregates=("0xabcd:16",)),
    )
    with (
        Controlled(top, router_settings()) as upper,
        Controlled(middle, below) as lower,
        Controlled(left, ControllerSettings()) as one,
        Controlled(right, host_settings(weight=2)) as two,
        Controlled(client, ControllerSettings()) as user,
    ):
        upper.wait_rules()
        listener = one.listen("0xabcd01")
        upper.wait_rules(("0xabcd:16", "10.1.0.3", 1))
        two.listen("0xabcd02")
        one.listen(SERVICE)
        two.listen(SERVICE)
        upper.wait_rules(("0xabcd:16", "10.1.0.3", 1), (SERVICE, "10.1.0.3", 3))
        user.wait_rules(("default", "10.1.0.2", 1), origin="default")
        lower.wait_rules(("default", "10.1.0.2", 1), origin="default")
        near = user.connect("0xabcd01")
        far = listener.accept()
        near.socket.sendall(b"hello")
        assert far.socket.recv(5) == b"hello"
        for stream in (near, far):
            stream.release()
        listener.close()
        lower.wait_rules(("0xabcd02", "10.2.0.2", 2), (SERVICE, "10.2.0.1", 1), (SERVICE, "10.2.0.2", 2))
        upper.wait_rules(("0xabcd:16", "10.1.0.3", 1), (SERVICE, "10.1.0.3", 3))


def test_nothing_is_half_started(network: dict[str, Host], tmp_path: Path) -> None:
    """The directory cannot be made, or a service of the controller is taken: one sentence, and no traces."""
    (tmp_path / "file").write_text("")
    settings = router_settings(directory=str(tmp_path / "file" / "directory"))
    with (
        pytest.raises(OurMistake, match="cannot be made"),
        Controlled(network["left"], settings),
    ):
        pytest.fail("started")
    with StackThread(network["left"]) as stack:
        stack.listen("88888")
        defects: list[object] = []
        stack.call(lambda: stack._loop.set_exception_handler(lambda _, context: defects.append(context)))
        controller = stack.call(lambda: ServiceController(stack.stack, router_settings()))
        with pytest.raises(OurMistake, match="already being listened on"):
            stack.run(controller.start())
        assert stack.call(stack.stack.bound_services) == [parse_service("88888")]
        assert not stack.call(lambda: stack.stack.forwarding)
        stack.run(controller.stop())
        stack.run(asyncio.sleep(0))
        assert defects == []


def test_servald_is_a_router_that_survives_kill_9(network: dict[str, Host], tmp_path: Path) -> None:
    """The daemon, with a file; started again it knows what it knew."""
    configuration = tmp_path / "router.toml"
    configuration.write_text(f'[router]\nenabled = true\ndirectory = "{tmp_path}/directory.sqlite"\n')
    command = [sys.executable, "-c", "from serval_core.daemon import main; main()", "-c", configuration]

    def start() -> subprocess.Popen[str]:
        return network["router"].popen(command, cwd=ROOT)

    def known() -> list[tuple[str, str]]:
        try:
            listed = network["router"].call(StackSocketClient().request, "registrations")
        except (StackNotRunning, RequestFailed):
            return []  # it is still starting
        return [(each["prefix"], each["address"]) for each in listed["received"]]

    first = start()
    with Controlled(network["left"], host_settings(routers=("10.1.0.4",), refresh_s=1.0)) as left:
        left.listen(SERVICE)
        wait_for(lambda: known() == [(SERVICE, "10.1.0.2")], "the registration")
        first.kill()
        first.wait()
        second = start()
        wait_for(lambda: known() == [(SERVICE, "10.1.0.2")], "the registration, again")
    wait_for(lambda: known() == [], "the end of the registration")
    second.terminate()
    assert second.wait(10) == 0
