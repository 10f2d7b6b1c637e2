"""What do two applications say to each other in the tests? Conversations for the memory network."""

from __future__ import annotations

from dataclasses import dataclass, field

from serval_core.dataplane.memory_network import Faults, MemoryHost, MemoryNetwork
from serval_core.dataplane.toy_transport import ToyTransport
from serval_core.names import ServicePrefix, parse_address, parse_service
from serval_core.rules import Rule
from serval_core.sal import SalSettings

SERVICE: ServicePrefix = parse_service("76568")
CLIENT_ADDRESS = parse_address("10.0.0.1")
SERVER_ADDRESS = parse_address("10.0.0.2")


@dataclass
class Exchange:
    """One connection: the client says `request`, the server `reply`, both finish and release.

    `server_waits`: the server answers only after the client's end of stream, as in a half-close; otherwise
    it speaks and finishes at once. `client_waits`: the client finishes only after the server did.
    """

    network: MemoryNetwork
    client: MemoryHost
    server: MemoryHost
    request: bytes = b"request"
    reply: bytes = b"reply"
    server_waits: bool = True
    client_waits: bool = False
    flow_id: int = 0
    transports: dict[str, ToyTransport] = field(default_factory=dict)

    def start(self) -> None:
        self.client.on_open = self._client_opened
        self.server.on_open = self._server_opened
        self.flow_id = self.client.sal.connect(SERVICE.service_id, self.network.now)
        self.client.settle()

    def complete(self) -> bool:
        """Whether both ends got all that the other said."""
        said = {"client": self.reply, "server": self.request}
        return all(
            name in self.transports
            and self.transports[name].received == text
            and self.transports[name].end_of_stream
            for name, text in said.items()
        )

    def _client_opened(self, host: MemoryHost, transport: ToyTransport) -> None:
        self._opened("client", host, transport, self.request, self.client_waits)

    def _server_opened(self, host: MemoryHost, transport: ToyTransport) -> None:
        self._opened("server", host, transport, self.reply, self.server_waits)

    def _opened(self, name: str, host: MemoryHost, transport: ToyTransport, text: bytes, waits: bool) -> None:
        assert name not in self.transports, f"{name} has a second connection"
        self.transports[name] = transport
        finished = False

        def changed(transport: ToyTransport) -> None:
            nonlocal finished
            if not finished and (transport.end_of_stream or not waits):
                finished = True
                transport.write(text)
                transport.finish()
            if transport.end_of_stream:
                host.sal.release(transport.opened.flow_id, host.network.now)

        transport.on_change = changed
        changed(transport)


def two_hosts(
    seed: int = 0, faults: Faults | None = None, settings: SalSettings | None = None
) -> tuple[MemoryNetwork, MemoryHost, MemoryHost]:
    """A client that knows where the service is, and a server that listens."""
    network = MemoryNetwork(seed, faults)
    client = network.add_host(CLIENT_ADDRESS, settings)
    server = network.add_host(SERVER_ADDRESS, settings)
    client.table.add(Rule.forward(SERVICE, SERVER_ADDRESS))
    server.sal.listen(SERVICE, 16, network.now)
    return network, client, server


def leftovers(host: MemoryHost) -> dict[str, object]:
    """What a host still keeps of its connections; empty values when it keeps nothing."""
    core = host.sal._core
    return {
        "flows": dict(core.flows.by_id),
        "syns": dict(core.flows.by_syn),
        "half open": core.flows.half_open,
        "time wait": dict(core.flows.time_wait),
        "timers": len(core.timers),
        "expected": set(host.expected),
        "transports": dict(host.transports),
    }
