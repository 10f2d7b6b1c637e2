"""How do two translators stand that can reach each other two ways? Each inner host has two wires to a router.

    client 10.1.0.1 - 10.1.0.254 translator 10.2.1.2 --+        +-- 10.4.1.2 reverse 10.3.0.254 - 10.3.0.1 server
                                            10.2.2.2 --+ router +-- 10.4.2.2

Their interfaces to the router are `way1` and `way2`, the first of which the default routes prefer. The router's first
wire to the reverse translator is in a second network too, 10.5.1.0/24, where a virtual machine may go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lab.chain import TranslatorProcess
from lab.hosts import Argument, Host, Lab, shape
from lab.waiting import wait_for
from serval_core.stack_socket import StackSocketClient

WAYS = ("way1", "way2")
TRANSLATOR_ADDRESSES = ("10.2.1.2", "10.2.2.2")
REVERSE_ADDRESSES = ("10.4.1.2", "10.4.2.2")
OTHER_ADDRESS = "10.5.1.2"
FRONT = "10.1.0.254"
MOBILITY = "[mobility]\nreturn_after_s = 3600\n"  # flows stay where they are until they have to leave, or are told to


class Inner(NamedTuple):
    """An inner host, and the router's ends of its wires, in the order of `WAYS`."""

    host: Host
    addresses: tuple[str, str]
    router: Host
    router_ends: tuple[str, str]

    def cut(self, way: str) -> None:
        """Take the carrier off a wire, as whoever pulls the plug at the router."""
        self._router_end(way, "down")

    def mend(self, way: str) -> None:
        """Put it back."""
        self._router_end(way, "up")

    def shape(self, rate: str) -> None:
        """Limit its wires in both directions (token bucket)."""
        for way, router_end in zip(WAYS, self.router_ends, strict=True):
            shape(self.host, way, rate)
            shape(self.router, router_end, rate)

    def default_route(self, way: str, address: str) -> None:
        """The default route through an interface that has this address."""
        metric = 100 + WAYS.index(way)
        route: list[Argument] = ["default", "via", gateway(address), "dev", way, "metric", metric, "congctl", "cubic"]
        self.host.run(["ip", "route", "replace", *route])

    def _router_end(self, way: str, state: str) -> None:
        self.router.run(["ip", "link", "set", self.router_ends[WAYS.index(way)], state])


class TwoWays:
    """The five hosts, and after `start` the two translators. `services` maps TCP ports to serviceIDs."""

    def __init__(self, lab: Lab, services: Mapping[int, str]) -> None:
        self.services = dict(services)
        self.directory = lab.directory
        self.client, self.server, self.router = lab.host("client"), lab.host("server"), lab.host("router")
        self.router.forward()
        translator, reverse = lab.host("translator"), lab.host("reverse")
        lab.connect(self.client, "10.1.0.1/24", translator, f"{FRONT}/24")
        lab.connect(reverse, "10.3.0.254/24", self.server, "10.3.0.1/24")
        self.near = self._inner(lab, translator, TRANSLATOR_ADDRESSES)
        self.far = self._inner(lab, reverse, REVERSE_ADDRESSES)
        other = f"{gateway(OTHER_ADDRESS)}/24"
        self.router.run(["ip", "address", "add", other, "dev", self.far.router_ends[0]])
        self.client.add_route("default", FRONT)
        self.translator: TranslatorProcess
        self.reverse: TranslatorProcess

    def start(self, framing: str = "auto") -> None:
        """Start both translators, which begin flows in that framing, and return when both are ready."""
        configuration = self.directory / "mobility.toml"
        configuration.write_text(f'{MOBILITY}[stack]\nframing = "{framing}"\n')
        shared: list[Argument] = ["--config", configuration, "--no-broadcast"]
        reverses = [f"{service}={self.server.address()}:{port}" for port, service in self.services.items()]
        arguments = [*shared, *(word for each in reverses for word in ("--reverse", each))]
        self.reverse = TranslatorProcess(self.far.host, arguments, self.directory / "reverse.log")
        self.reverse.wait_ready(demux_services=len(set(self.services.values())))
        maps = [f"{port}={service}" for port, service in self.services.items()]
        arguments = [*shared, "--service", f"default={REVERSE_ADDRESSES[0]}"]
        arguments += [word for each in maps for word in ("--map", each)]
        self.translator = TranslatorProcess(self.near.host, arguments, self.directory / "translator.log")
        self.translator.wait_ready(ports=list(self.services))

    def _inner(self, lab: Lab, host: Host, addresses: tuple[str, str]) -> Inner:
        ends = tuple(f"{host.name[:12]}{number}" for number in (1, 2))
        for way, end, address in zip(WAYS, ends, addresses, strict=True):
            lab.connect(host, f"{address}/24", self.router, f"{gateway(address)}/24", names=(way, end))
        inner = Inner(host, addresses, self.router, (ends[0], ends[1]))
        for way, address in zip(WAYS, addresses, strict=True):
            inner.default_route(way, address)
        host.sysctl("net.ipv4.conf.all.rp_filter", 2)
        return inner


def gateway(address: str) -> str:
    """The router's address in the network of `address`."""
    return f"{address.rpartition('.')[0]}.1"


class EventFollower:
    """The events of a running stack, as they come, in a thread that ends with the stack."""

    def __init__(self, host: Host, kinds: tuple[str, ...]) -> None:
        self._events: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=host.call, args=(self._follow, kinds), daemon=True)
        self._thread.start()

    def _follow(self, kinds: tuple[str, ...]) -> None:
        for event in StackSocketClient().stream("events", kinds=list(kinds)):
            self._events.append(event)

    def __len__(self) -> int:
        """How many have come so far."""
        return len(self._events)

    def wait(self, after: int, wanted: Callable[[dict[str, Any]], bool], what: str, timeout_s: float = 20.0) -> dict[str, Any]:
        """The first event that is `wanted` among those behind the first `after`. NeverHappened if none comes."""
        return wait_for(lambda: next(filter(wanted, self._events[after:]), None), what, timeout_s, 0.005) or {}
