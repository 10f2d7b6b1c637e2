"""Late binding on a real wire: a connect waits while its service is looked for."""

from __future__ import annotations

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core.controller.settings import (
    ControllerSettings,
    RegistrationSection,
    ResolverSection,
    RouterSection,
)
from tests.serval_core.stack_thread import Accepting, StackThread, Stream

from .controlled import Controlled, host_settings, router_settings
from .dns_zone import serving

PREFIX = "0xabcd:16"
SERVICE = "0xabcd0000"
UNKNOWN = "0xabcd0001"


@pytest.fixture
def pair(lab: Lab) -> tuple[Host, Host]:
    client, server = lab.host("client"), lab.host("server")
    lab.connect(client, "10.1.0.1/24", server, "10.1.0.2/24")
    return client, server


def say_hello(near: Stream, listener: Accepting) -> None:
    far = listener.accept()
    near.socket.sendall(b"hello")
    assert far.socket.recv(5) == b"hello"
    near.release()
    far.release()


def test_dns_tells_where_a_service_is(pair: tuple[Host, Host]) -> None:
    client, server = pair
    with (
        serving(
            "abcd0000.svc.example. 30 SRV 0 1 0 server.example.",
            "server.example. 30 A 10.1.0.2",
            host=client,
        ) as zone,
        StackThread(server) as far,
    ):
        resolver = ResolverSection(prefixes=(PREFIX,), zone="svc.example", nameservers=(zone.address,))
        settings = ControllerSettings(registration=RegistrationSection(enabled=False), resolver=resolver)
        with Controlled(client, settings) as near:
            listener = far.listen(SERVICE)
            say_hello(near.connect(SERVICE), listener)
            assert near.rules("resolved") == {("2882338816", "10.1.0.2", 1)}
            say_hello(near.connect(SERVICE), listener)
            assert zone.questions["abcd0000.svc.example. SRV"] == 1
            with pytest.raises(OSError, match="nobody knows the service"):
                near.connect(UNKNOWN)
            kinds = [each["event"] for each in near.news]
            assert [kinds.count(kind) for kind in ("delayed", "delay_released", "delay_dropped")] == [2, 1, 1]


def test_the_routers_above_know_what_this_one_does_not(lab: Lab) -> None:
    """A router holds SYNs that pass through, asks upstream, and lets them go on their way."""
    client, middle, top, server = (lab.host(name) for name in ("client", "middle", "top", "server"))
    lab.switch(
        "switch",
        {client: "10.1.0.1/24", middle: "10.1.0.2/24", top: "10.1.0.3/24", server: "10.1.0.4/24"},
    )
    settings = ControllerSettings(
        registration=RegistrationSection(routers=("10.1.0.3",)),
        router=RouterSection(enabled=True, directory=":memory:"),
        resolver=ResolverSection(prefixes=(PREFIX,)),
    )
    with (
        Controlled(top, router_settings()) as above,
        Controlled(middle, settings) as between,
        Controlled(server, host_settings(routers=("10.1.0.3",))) as far,
        Controlled(client, host_settings(routers=("10.1.0.2",))) as near,
    ):
        listener = far.listen(SERVICE)
        above.wait_rules((SERVICE, "10.1.0.4", 1))
        near.wait_rules(("default", "10.1.0.2", 1), origin="default")
        say_hello(near.connect(SERVICE), listener)
        between.wait_rules((SERVICE, "10.1.0.3", 1), origin="resolved")
        wait_for(lambda: between.controller_counters()["resolver_upstream_answered"] == 1, "one question")
