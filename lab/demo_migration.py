"""Do flows survive changes of interface and address? `make demo-migration`: downloads that move, and what clients noticed.

Two translators with two wires each between unmodified programs; the wires are shaped to 1 Gbit/s. First two downloads share
a wire until one of them is moved to the other. Then one download is moved: by hand, by wires that are cut, by a path that
dies without a sign, by a virtual machine that goes to another subnet; first on the serving side, then on the client's.
Everything is hashed at both ends. For each kind of move the silence at the client is printed, and, as that tells what
machine and wires do by themselves, for as many times without a move. The exit status is 0 only if all was as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from lab.arrivals import Arrivals
from lab.demonstration import Findings, Hashed, console, end, expect_idle, hashes_table, run
from lab.hosts import Lab
from lab.migration_moves import VM_PAUSE_S, Download, Move, Scene, Server, Side
from lab.migration_plots import Period, write_plot
from lab.two_ways import OTHER_ADDRESS, REVERSE_ADDRESSES, WAYS, TwoWays

SERVICE = "76568"
PORT = 8080
RATE = "1gbit"
SHARED_S = 4.0  # how long two downloads share a wire, and how long they do not
WARM_UP_S = 1.0
BETWEEN_CUTS_S = 0.5
TARGET_GAP_S = 0.020
NO_MOVE, SERVER_BY_HAND, CLIENT_BY_HAND = "no move, to compare", "server, by hand", "client, by hand"
NICENESS = -10  # what else runs on this machine makes gaps, too


class Plan(NamedTuple):
    """How many moves of each kind."""

    by_hand: int = 24
    lost: int = 8
    silent: int = 4
    subnet: int = 5
    client_by_hand: int = 10
    client_lost: int = 6


PLAN = Plan()


@dataclass
class Seen(Findings):
    """What the demonstration saw."""

    moves: dict[str, list[Move]] = field(default_factory=dict)
    hashes: list[Hashed] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    not_noted: int = 0


def main(arguments: list[str] | None = None, plan: Plan = PLAN) -> int:
    """Run the demonstration; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lab.demo_migration", description=__doc__)
    parser.add_argument(
        "--plots", type=Path, default=Path("demo-migration"), metavar="DIRECTORY", help="where the pictures go"
    )
    directory: Path = parser.parse_args(arguments).plots
    if find_spec("matplotlib") is None:
        parser.error("matplotlib is needed for the pictures: pip install matplotlib, or run make demo-migration")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--plots {directory}: {error.strerror}")
    with preferred():
        return run(Seen(), partial(demonstrate, plan=plan, directory=directory), report)


@contextlib.contextmanager
def preferred() -> Iterator[None]:
    """Let this process, and those that it starts, go before others of this machine."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, min(before, NICENESS))
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def demonstrate(lab: Lab, findings: Seen, plan: Plan, directory: Path) -> None:
    """Build the hosts, move downloads about, compare what was sent and received."""
    with console.status("five hosts, two translators"):
        ways = TwoWays(lab, {PORT: SERVICE})
        server = Server(ways, PORT)
        ways.far.shape(RATE)
        ways.start()
    console.print(
        f"client - [bold]serval-translator --map {PORT}={SERVICE}[/] = two wires - router - two wires of {RATE} = "
        f"[bold]serval-translator --reverse {SERVICE}={ways.server.address()}:{PORT}[/] - server"
    )
    with Arrivals(ways.client, "eth0", PORT) as arrivals:
        stage = Stage(ways, arrivals, server, findings, directory)
        with console.status(f"two downloads on one interface of {RATE}; then one of them is moved to another"):
            stage.share_and_part()
        ways.near.shape(RATE)
        stage.move_one(plan)
        findings.not_noted = arrivals.missed()
    finish(ways, findings)


class Stage:
    """What is shown, on hosts that are ready."""

    def __init__(self, ways: TwoWays, arrivals: Arrivals, server: Server, findings: Seen, directory: Path) -> None:
        self._ways, self._arrivals, self._server = ways, arrivals, server
        self._findings, self._directory = findings, directory
        self._near, self._far = Side(ways.near, ways.translator), Side(ways.far, ways.reverse)

    def share_and_part(self) -> None:
        """Two flows on one NIC of the serving side, one is moved to the other NIC."""
        downloads = [Download(self._ways, PORT) for _ in range(2)]
        scenes = [self._scene(each) for each in downloads]
        time.sleep(WARM_UP_S)
        began = time.time()
        time.sleep(SHARED_S)
        moved = scenes[1].by_hand(self._far, WAYS[1])
        time.sleep(SHARED_S)
        period = Period(began, time.time(), {moved.at: "download 2 moves"})
        for way, scene, download in zip(WAYS, scenes, downloads, strict=True):
            self._findings.expect(scene.way(self._far) == way, f"a download is not on {way}, where it should be")
            self._compare(f"one of two, to {way}", download)
        ports = {f"download {number}": download.port for number, download in enumerate(downloads, 1)}
        self._plot("two-flows.png", "Two downloads share an interface, then one moves to another", ports, period)

    def move_one(self, plan: Plan) -> None:
        """One download, moved in every way."""
        download = Download(self._ways, PORT)
        scene = self._scene(download)
        near, far = self._near, self._far
        time.sleep(WARM_UP_S)
        console.print(f"one download, framing {self._ways.reverse.flows()[0].get('framing')}; all four wires shaped to {RATE}")
        began = time.time()
        with moves_progress() as progress:
            go = partial(self._moves, progress)
            go(NO_MOVE, plan.by_hand, scene.still)
            go(SERVER_BY_HAND, plan.by_hand, lambda: scene.by_hand(far, other(scene.way(far))))
            go("server, wire cut", plan.lost, lambda: self._cut(scene, far))
            go("server, dead path", plan.silent, lambda: self._dead_path(scene))
            if scene.way(far) != WAYS[0]:
                scene.by_hand(far, WAYS[0])
            scene.alone(up=False)
            self._as_virtual_machine(scene, download, partial(go, "server, other subnet", plan.subnet))
            scene.alone(up=True)
            go(CLIENT_BY_HAND, plan.client_by_hand, lambda: scene.by_hand(near, other(scene.way(near))))
            go("client, wire cut", plan.client_lost, lambda: self._cut(scene, near))
        moves = self._findings.moves
        moments = {move.at: kind for kind in moves if kind != NO_MOVE for move in moves[kind]}
        period = Period(began, time.time(), moments)
        self._compare("moved all the time", download)
        self._plot("all-moves.png", "A download whose ends move all the time", {"download": download.port}, period)

    def _as_virtual_machine(self, scene: Scene, download: Download, go: Callable[[Callable[[], Move]], None]) -> None:
        """The serving side's host has one interface, and goes to another subnet and back."""
        moments = {}

        def change_subnet() -> Move:
            here = scene.address(self._far)
            there = OTHER_ADDRESS if here == REVERSE_ADDRESSES[0] else REVERSE_ADDRESSES[0]
            move = scene.change_subnet(here, there)
            self._findings.expect(scene.address(self._far) == there, f"the flow has not followed its host to {there}")
            moments[move.at] = "the flow goes on from the other subnet"
            time.sleep(WARM_UP_S)
            return move

        began = time.time()
        time.sleep(WARM_UP_S)
        go(change_subnet)
        if self._far.host.interfaces[WAYS[0]].partition("/")[0] != scene.address(self._far):
            scene.change_subnet(OTHER_ADDRESS, REVERSE_ADDRESSES[0])
        period = Period(began, time.time(), moments)
        title = f"A virtual machine changes subnet, with {VM_PAUSE_S:g} s without network each time"
        self._plot("subnet.png", title, {"download": download.port}, period)

    def _cut(self, scene: Scene, side: Side) -> Move:
        """A wire is cut and mended, and the picture shows it."""
        time.sleep(BETWEEN_CUTS_S)
        return scene.lose(side)

    def _dead_path(self, scene: Scene) -> Move:
        """The path dies and comes back; the flow finds another one and is brought back, so that none stays in bad repute."""
        way = scene.way(self._far)
        time.sleep(WARM_UP_S)
        move = scene.drop(self._far)
        self._findings.expect(scene.way(self._far) != way, "a flow is said to have left a dead path, and is there still")
        scene.by_hand(self._far, way)
        return move

    def _scene(self, download: Download) -> Scene:
        return Scene(self._ways, self._arrivals, self._near, self._far, download)

    def _moves(self, progress: Progress, kind: str, count: int, move: Callable[[], Move]) -> None:
        """Do `move` so many times, and note what came of it."""
        task = progress.add_task(kind, total=count, last="")
        for _ in range(count):
            moved = move()
            self._findings.moves.setdefault(kind, []).append(moved)
            progress.update(task, advance=1, last=f"silence {milliseconds(moved.gap_s)}")

    def _compare(self, name: str, download: Download) -> None:
        """End a download, and compare what was sent with what arrived."""
        received, sent = download.finish(), self._server.sent()
        self._findings.hashes.append(Hashed(name, received["bytes"], sent["sha256"], received["sha256"]))
        self._findings.expect(received == sent, f"of the download ({name}) something else arrived than was sent")

    def _plot(self, name: str, title: str, ports: dict[str, int], period: Period) -> None:
        path = self._directory / name
        write_plot(path, title, self._arrivals, ports, period)
        self._findings.written.append(path)


def other(way: str) -> str:
    """The other interface."""
    return WAYS[1 - WAYS.index(way)]


@contextlib.contextmanager
def moves_progress() -> Iterator[Progress]:
    """A bar for each kind of move, with the silence of the last one."""
    columns = (TextColumn("{task.description:21}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[last]}"))
    with Progress(*columns, console=console) as progress:
        yield progress


def finish(ways: TwoWays, findings: Seen) -> None:
    """Nothing may be left: no flow after the downloads, no trace in the kernel after the translators."""
    sides = {"translator": ways.translator, "reverse translator": ways.reverse}
    for name, side in sides.items():
        expect_idle(findings, name, side)
        end(findings, name, side)


def report(findings: Seen, duration_s: float) -> None:
    """Print what was seen."""
    console.print(hashes_table("download", findings.hashes))
    table = Table(title="Silence at the client, in milliseconds")
    table.add_column("move", no_wrap=True)
    for heading in ("times", "p50", "p95", "longest", "again", "timeouts"):
        table.add_column(heading, justify="right")
    for kind, moves in findings.moves.items():
        gaps = [move.gap_s for move in moves]
        table.add_row(
            kind,
            str(len(gaps)),
            *(f"{1000 * each:.1f}" for each in (statistics.median(gaps), percentile(gaps, 95), max(gaps))),
            f"{statistics.median(move.repeated_segments for move in moves):.0f}",
            str(sum(move.timeouts for move in moves)),
        )
    console.print(table)
    console.print(
        "again: segments that the sending side's TCP repeated, median of the moves; timeouts: of TCP, in all of them.\n"
        f"other subnet: includes {VM_PAUSE_S:g} s without network. dead path: known to be dead after sending in vain for a while."
    )
    by_hand = [move.gap_s for kind in (SERVER_BY_HAND, CLIENT_BY_HAND) for move in findings.moves.get(kind, [])]
    if by_hand:
        median_s = statistics.median(by_hand)
        verdict = "as wanted" if median_s <= TARGET_GAP_S else "more than wanted"
        console.print(
            f"By hand, either side: median {milliseconds(median_s)} of {len(by_hand)} moves, {verdict} "
            f"(at most {milliseconds(TARGET_GAP_S)}). A busy machine shows in the line without moves."
        )
    if findings.not_noted:
        console.print(f"[yellow]{findings.not_noted} packets came too fast to be noted: silences may be shorter.[/]")
    for path in findings.written:
        console.print(f"written: {path}")
    console.print(f"time taken: {duration_s:.0f} s")


def milliseconds(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds * 1000:.1f} ms"


def percentile(values: list[float], percent: float) -> float:
    """The smallest of `values` that at least so many percent do not exceed."""
    ranked = sorted(values)
    return ranked[math.ceil(len(ranked) * percent / 100) - 1]


if __name__ == "__main__":
    sys.exit(main())
