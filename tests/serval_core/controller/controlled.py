"""A real stack with a service controller on a lab host: in a thread of the test, or as a process that can be killed.

python -m tests.serval_core.controller.controlled '{"registration": {...}}' 76568 80
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import structlog

from lab.hosts import Host
from lab.waiting import wait_for
from serval_core.controller.service_controller import ServiceController
from serval_core.controller.settings import ControllerSettings, RegistrationSection, RouterSection
from serval_core.names import format_address, parse_service
from serval_core.sal_settings import SalSettings
from serval_core.stack import ServalStack, StackSettings
from tests.serval_core.stack_thread import StackThread

PROGRAM = "tests.serval_core.controller.controlled"
ROOT = Path(__file__).parents[3]


class Controlled(StackThread):
    """A stack in a thread, with a controller. `news` are the events that it has published."""

    def __init__(
        self, host: Host, settings: ControllerSettings, forwards: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(host)
        self.controller_settings = settings
        self.forwards = forwards or {}
        self.news: list[dict[str, object]] = []

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.call(lambda: self.stack.events.subscribe(lambda event: self.news.append(event.as_dict())))
            for service, address in self.forwards.items():
                self.forward(service, address)
            self.controller = self.call(lambda: ServiceController(self.stack, self.controller_settings))
            self.run(self.controller.start())
        except BaseException:
            super().__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run(self.controller.stop())
        super().__exit__(kind, error, trace)

    def rules(self, origin: str = "registered") -> set[tuple[str, str, int]]:
        """Prefix, address and weight of the rules of this origin."""

        def read() -> set[tuple[str, str, int]]:
            return {
                (str(rule.prefix), format_address(rule.address), rule.weight)
                for rule in self.stack.table.rules()
                if rule.origin == origin and not rule.broadcast
            }

        return self.call(read)

    def broadcasts(self) -> bool:
        """Whether there is a rule to broadcast by."""
        return self.call(lambda: any(rule.broadcast for rule in self.stack.table.rules()))

    def wait_rules(self, *expected: tuple[str, str, int], origin: str = "registered") -> None:
        """Return once exactly these rules are there."""
        wanted = {(str(parse_service(service)), address, weight) for service, address, weight in expected}
        wait_for(lambda: self.rules(origin) == wanted, f"{self.host} to have the rules {wanted}")

    def controller_counters(self) -> dict[str, int]:
        return self.call(self.controller.counters)

    def refusals(self) -> dict[str, int]:
        prefix = "router_refused_"
        counted = self.controller_counters()
        return {name[len(prefix) :]: count for name, count in counted.items() if name.startswith(prefix)}


def router_settings(**router: Any) -> ControllerSettings:
    """A router whose directory is only in memory unless said otherwise."""
    return ControllerSettings(router=RouterSection(**{"enabled": True, "directory": ":memory:"} | router))


def host_settings(**registration: Any) -> ControllerSettings:
    """A host."""
    return ControllerSettings(registration=RegistrationSection(**registration))


def start_process(host: Host, settings: ControllerSettings, *services: str) -> subprocess.Popen[str]:
    """Run a stack with a controller as a process that listens on `services`. Returns when it is ready."""
    process = host.popen(
        [sys.executable, "-m", PROGRAM, msgspec.json.encode(settings).decode(), *services],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert json.loads(line) == {"ready": True}
    return process


async def main() -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    settings = msgspec.json.decode(sys.argv[1], type=ControllerSettings)
    stack = await ServalStack.start(StackSettings(sal=SalSettings()))
    controller = ServiceController(stack, settings)
    await controller.start()
    for service in sys.argv[2:]:
        stack.listen(parse_service(service), lambda connection: connection.release())
    print(json.dumps({"ready": True}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
