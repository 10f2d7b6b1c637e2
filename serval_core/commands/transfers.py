"""`serval tcp-server` and `serval tcp-client`: a file over a Serval stream, with its rate and hash, which both ends print.

They speak nothing but the bytes of the file, so either end may as well be a prototype's test tool.
"""

from __future__ import annotations

import contextlib
import os
import socket as system
import stat
import sys
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import rich_click as click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from serval_core import sockets
from serval_core.commands.hashing import BUFFER_BYTES, Hashing
from serval_core.commands.options import address_argument, json_option, served_argument, service_argument
from serval_core.config_file import Misconfigured
from serval_core.number_types import Whole
from serval_core.sockets import ServalSocket
from serval_core.tables import bytes_text, new_console, print_json

PROTOTYPE_SERVICE = "16385"  # SPEC 1.2.3: what the prototype's test tools use when nothing is said
_FILE = click.Path(dir_okay=False, path_type=Path)


class Transferred(NamedTuple):
    """What went over a connection."""

    size_bytes: int
    seconds: float
    sha256: str

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        rate = self.size_bytes / self.seconds if self.seconds else 0.0
        return {
            "bytes": self.size_bytes,
            "seconds": round(self.seconds, 6),
            "bytes_per_second": round(rate),
            "sha256": self.sha256,
        }

    def text(self) -> str:
        """For people."""
        rate = self.size_bytes / self.seconds if self.seconds else 0.0
        return f"{bytes_text(self.size_bytes)} in {self.seconds:.3f} s, {rate * 8 / 1e9:.3f} Gbit/s, sha256 {self.sha256}"


@click.command("tcp-server")
@click.option("--service", "-s", default=PROTOTYPE_SERVICE, show_default=True, metavar="ID[:BITS]", help="What to serve.")
@click.option("--file", "-f", type=_FILE, help="Where to store what comes; each connection anew. [default: nowhere]")
@click.option("--count", "-n", type=Whole(min=1), help="End after N connections. [default: never]")
@json_option
def tcp_server(service: str, file: Path | None, count: int | None, as_json: bool) -> None:
    """Receive files from `serval tcp-client`, one after the other."""
    prefix = served_argument(service)
    if file is not None and not file.parent.is_dir():
        raise Misconfigured(f"--file {file}", f"there is no directory {file.parent}")
    with sockets.create_server(prefix) as listener:
        click.echo(f"serving {prefix}", err=True)
        served = 0
        while count is None or served < count:
            connection, peer = listener.accept()
            with connection:
                try:
                    received = receive(connection, file)
                except OSError as error:
                    click.echo(f"from {peer.address}: {error.strerror or error}", err=True)
                else:
                    _print(received, f"from {peer.address}: ", as_json)
            served += 1


@click.command("tcp-client")
@click.option("--service", "-s", default=PROTOTYPE_SERVICE, show_default=True, metavar="ID", help="Whom to send to.")
@click.option("--file", "-f", type=_FILE, required=True, help="What to send; - for standard input.")
@click.option("--address", "-a", metavar="IP", default="", help="Where the service is. [default: resolve it]")
@json_option
def tcp_client(service: str, file: Path, address: str, as_json: bool) -> None:
    """Send a file to `serval tcp-server`."""
    where = (service_argument(service), address and address_argument(address))
    try:
        # Opened before anything is connected: a wrong name must not reach the server as an empty file.
        source = os.fdopen(os.dup(sys.stdin.fileno()), "rb") if str(file) == "-" else file.open("rb")
    except OSError as error:
        raise Misconfigured(f"--file {file}", error.strerror or str(error)) from None
    with source, sockets.create_connection(where) as connection:
        status = os.fstat(source.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
        _print(send(connection, source, size), "", as_json)


def send(connection: ServalSocket, source: BufferedReader, size_bytes: int | None = None) -> Transferred:
    """Send all of `source` and wait until the peer has closed as well, i.e. has it all. OSError."""
    sent, started = 0, time.monotonic()
    with _progress("sending", size_bytes) as advance, Hashing() as hashing:
        while size := source.readinto(buffer := hashing.buffer()):
            hashing.add(buffer, size)
            connection.sendall(buffer[:size])
            sent += size
            advance(size)
        connection.shutdown(system.SHUT_WR)
        while connection.recv(BUFFER_BYTES):
            pass
    return Transferred(sent, time.monotonic() - started, hashing.hexdigest())


def receive(connection: ServalSocket, file: Path | None) -> Transferred:
    """Receive to the end, into `file` if there is one. OSError."""
    received, started = 0, time.monotonic()
    with (
        file.open("wb") if file else contextlib.nullcontext() as target,
        _progress("receiving", None) as advance,
        Hashing() as hashing,
    ):
        while size := connection.recv_into(buffer := hashing.buffer()):
            hashing.add(buffer, size)
            if target is not None:
                target.write(buffer[:size])
            received += size
            advance(size)
    return Transferred(received, time.monotonic() - started, hashing.hexdigest())


@contextlib.contextmanager
def _progress(what: str, size_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error if that is a terminal; yields what to call with each number of bytes."""
    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task: TaskID = progress.add_task(what, total=size_bytes)
        yield lambda size: progress.advance(task, size)


def _print(transferred: Transferred, prefix: str, as_json: bool) -> None:
    if as_json:
        print_json(new_console(), transferred.as_dict())
        sys.stdout.flush()
    else:
        click.echo(prefix + transferred.text())
