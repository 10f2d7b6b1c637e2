"""How do tests and demonstrations run servald, `serval` and native programs on hosts? As the processes that a user would start."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lab.chain import TranslatorProcess
from lab.hosts import Argument, Host
from lab.traffic import PROJECT
from lab.waiting import wait_for
from serval_core import aio
from serval_core.errors import ServalError
from serval_core.stack_socket import StackSocketClient

SERVALD: tuple[Argument, ...] = (sys.executable, "-c", "from serval_core.daemon import main; main()")
SERVAL: tuple[Argument, ...] = (sys.executable, "-c", "from serval_core.cli import main; main()")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


def start_servald(host: Host, log_path: Path, *options: Argument, command: Sequence[Argument] = SERVALD) -> TranslatorProcess:
    """Start servald and wait until it serves."""
    process = TranslatorProcess(host, options, log_path, command, "servald")
    process.wait_ready()
    return process


def serval(host: Host, *words: Argument, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `serval` to its end."""
    return host.run([*SERVAL, *words], cwd=PROJECT, env=ENVIRONMENT, check=check)


def serval_json(host: Host, *words: Argument) -> Any:
    """What `serval ... --json` prints."""
    return json.loads(serval(host, *words, "--json").stdout)


@contextlib.contextmanager
def running(host: Host, *command: Argument, serving: str = "", **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A program with the project on its path, killed at the end; with `serving` wait until that service is bound here."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    process = host.popen(command, cwd=PROJECT, env=ENVIRONMENT, **pipes)
    try:
        if serving:
            wait_for(lambda: process.poll() is not None or bound(host, serving), f"{serving} is served on {host.name}", 20)
        yield process
    finally:
        process.kill()
        process.communicate()


def bound(host: Host, service: str) -> bool:
    """Whether a program on this host serves exactly that prefix, with streams or datagrams."""
    try:
        entries = host.call(StackSocketClient(5).request, "services")
    except ServalError:
        return False
    return any(
        entry["prefix"] == service and any(target["type"] == "DEMUX" for target in entry["targets"]) for entry in entries
    )


async def hold_many(service: str, count: int) -> None:
    """So many connections to an echo service at once, each used; AssertionError if one gets another one's answer."""
    streams = await asyncio.gather(*(aio.open_connection(service) for _ in range(count)))
    for number, (_, writer) in enumerate(streams):
        writer.write(number.to_bytes(4, "big"))
    for number, (reader, _) in enumerate(streams):
        if await reader.readexactly(4) != number.to_bytes(4, "big"):
            raise AssertionError(f"connection {number} got another one's answer")
    for _, writer in streams:
        writer.close()


def left_over(daemon: TranslatorProcess) -> dict[str, int]:
    """What is to be zero when no program uses a stack any more."""
    counters = daemon.ask("counters")
    return {name: counters[name] for name in ("open_transports", "unattended_flows", "flow_map_entries")}
