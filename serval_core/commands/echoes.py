"""`serval udp-echo` and `serval ping`: is a service there, and how long is the way to it and back?"""

from __future__ import annotations

import os
import statistics
import struct
import time
from collections.abc import Iterator
from typing import Any

import rich_click as click

from serval_core import sockets
from serval_core.commands.options import address_argument, json_option, served_argument, service_argument
from serval_core.commands.transfers import PROTOTYPE_SERVICE
from serval_core.datagram_sockets import ServalDatagramSocket
from serval_core.names import ServiceID
from serval_core.native_protocol import DATAGRAM_LIMIT_BYTES
from serval_core.number_types import Real, Whole
from serval_core.tables import new_console, print_json

# Of a probe: 8 random bytes that make it ours, its number.
PROBE = struct.Struct("!8sI")
NOBODY_ANSWERS = 1
_PAUSE = Real(min=0)
_TIMEOUT = Real(min=0, min_open=True)
_SIZE = Whole(PROBE.size, DATAGRAM_LIMIT_BYTES)


@click.command("udp-echo")
@click.option("--service", "-s", default=PROTOTYPE_SERVICE, show_default=True, metavar="ID[:BITS]", help="What to serve.")
def udp_echo(service: str) -> None:
    """Send every datagram back to where it came from."""
    prefix = served_argument(service)
    with ServalDatagramSocket() as echo:
        echo.bind(prefix)
        click.echo(f"serving {prefix}", err=True)
        while True:
            received = echo.receive()
            try:
                echo.send_as(received.service, received.payload, received.source)
            except OSError as error:
                # Of this or an earlier datagram: its sender is gone, which is no concern of others.
                click.echo(error.strerror or str(error), err=True)


@click.command()
@click.argument("service", metavar="ID")
@click.option("--count", "-c", type=Whole(min=1), default=4, show_default=True, help="How many probes.")
@click.option("--interval", "-i", type=_PAUSE, default=1.0, show_default=True, metavar="S", help="Between them.")
@click.option("--timeout", "-W", type=_TIMEOUT, default=2.0, show_default=True, metavar="S", help="For an answer.")
@click.option("--size", type=_SIZE, default=56, show_default=True, help="Bytes of a datagram.")
@click.option("--tcp", is_flag=True, help="Time the opening of connections: for any stream service, not only udp-echo.")
@click.option("--address", "-a", metavar="IP", default="", help="Where the service is. [default: resolve it]")
@json_option
def ping(
    service: str, count: int, interval: float, timeout: float, size: int, tcp: bool, address: str, as_json: bool
) -> None:
    """Send datagrams to a udp-echo service and time the answers. The exit status is 1 if none came."""
    where = (service_argument(service), address and address_argument(address))
    probes = _connect(where, timeout) if tcp else _echo(where, size, timeout)
    answers: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        started = time.monotonic()
        answer = {"probe": number, **next(probes)}
        answers.append(answer)
        if not as_json:
            click.echo(_line(answer))
        if number < count:
            time.sleep(max(0.0, interval - (time.monotonic() - started)))
    times_s = [answer["round_trip_s"] for answer in answers if "round_trip_s" in answer]
    if as_json:
        print_json(new_console(), answers)
    else:
        click.echo(_summary(count, times_s))
    if not times_s:
        raise SystemExit(NOBODY_ANSWERS)


def _echo(where: tuple[ServiceID, str], size_bytes: int, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Send a probe each time, and wait for its answer."""
    ours, number = os.urandom(8), 0
    with ServalDatagramSocket() as probing:
        while True:
            number += 1
            payload = PROBE.pack(ours, number).ljust(size_bytes, b"\0")
            started = time.monotonic()
            try:
                probing.sendto(payload, where)
                source = _answer(probing, payload, started + timeout_s)
            except OSError as error:
                yield {"failed": error.strerror or str(error)}
            else:
                yield {"from": source, "round_trip_s": time.monotonic() - started}


def _answer(probing: ServalDatagramSocket, payload: bytes, deadline: float) -> str:
    """Where the answer came from. Others, and late ones, are passed over. OSError."""
    while True:
        probing.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            received = probing.receive()
        except TimeoutError:
            probing.raise_failure()
            raise TimeoutError("no answer") from None
        if received.payload == payload:
            return received.source.address


def _connect(where: tuple[ServiceID, str], timeout_s: float) -> Iterator[dict[str, Any]]:
    """Open a connection each time, and close it."""
    while True:
        started = time.monotonic()
        try:
            with sockets.create_connection(where, timeout_s) as connection:
                answer = {"from": connection.getpeername().address, "round_trip_s": time.monotonic() - started}
        except OSError as error:
            answer = {"failed": error.strerror or "no answer"}
        yield answer


def _line(answer: dict[str, Any]) -> str:
    if "failed" in answer:
        return f"probe {answer['probe']}: {answer['failed']}"
    return f"probe {answer['probe']}: {answer['from']} {answer['round_trip_s'] * 1000:.2f} ms"


def _summary(count: int, times_s: list[float]) -> str:
    text = f"{len(times_s)} of {count} answered"
    if not times_s:
        return text
    shown = (min(times_s), statistics.mean(times_s), max(times_s))
    return text + ", least/mean/most " + "/".join(f"{seconds * 1000:.2f}" for seconds in shown) + " ms"
