"""For how long does a client get nothing when a flow at 1 Gbit/s is moved to another interface? By framing.

The hosts of `lab.two_ways`, every wire shaped. The serving end of one download goes to and fro between its two interfaces,
make-before-break; before each move the same time is looked at without one, because the machine and the wires make
silences, too. Framings take turns, each with translators and a download of its own, which is hashed at both ends.

    python -m bench.migration [--rounds N] [--moves N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from lab.arrivals import Arrivals
from lab.hosts import Lab
from lab.migration_moves import Download, Scene, Server, Side
from lab.two_ways import WAYS, TwoWays

SERVICE, PORT = "76568", 8080
RATE = "1gbit"
FRAMINGS = ("sal", "native", "udp")
WARM_UP_S = 1.0
ROUNDS, MOVES = 2, 20


class MigrationGaps(NamedTuple):
    """The longest silence at the client around each move, and around as many moments without one; seconds, by framing."""

    moving: dict[str, list[float]]
    still: dict[str, list[float]]

    def sentence(self) -> str:
        """The figures in one line."""
        each = (
            f"{framing} {1000 * statistics.median(gaps):.1f} ms (longest {1000 * max(gaps):.1f}; "
            f"without a move {1000 * statistics.median(self.still[framing]):.1f})"
            for framing, gaps in self.moving.items()
        )
        return f"silence at the client while a flow at 1 Gbit/s moves, median: {', '.join(each)}"


def measure(rounds: int, moves: int, progress: Callable[[str], None] = lambda text: None) -> MigrationGaps:
    """Measure all framings. RuntimeError if what arrived is not what was sent."""
    found = MigrationGaps({name: [] for name in FRAMINGS}, {name: [] for name in FRAMINGS})
    for number in range(rounds):
        # Whatever drifts during a round favours first or last alike.
        for framing in FRAMINGS if number % 2 == 0 else FRAMINGS[::-1]:
            progress(f"migration, round {number + 1} of {rounds}: framing {framing}")
            _measure(framing, moves, found)
    return found


def _measure(framing: str, moves: int, found: MigrationGaps) -> None:
    with Lab() as lab:
        ways = TwoWays(lab, {PORT: SERVICE})
        server = Server(ways, PORT)
        for inner in (ways.near, ways.far):
            inner.shape(RATE)
        ways.start(framing)
        near, far = Side(ways.near, ways.translator), Side(ways.far, ways.reverse)
        with Arrivals(ways.client, "eth0", PORT) as arrivals:
            download = Download(ways, PORT)
            scene = Scene(ways, arrivals, near, far, download)
            time.sleep(WARM_UP_S)
            for number in range(moves):
                found.still[framing].append(scene.still().gap_s)
                found.moving[framing].append(scene.by_request(far, WAYS[1 - number % 2]).gap_s)
            (flow,) = ways.reverse.flows()
            received = download.finish()
        if flow["framing"] != framing:
            raise RuntimeError(f"migration: framing {flow['framing']} in place of {framing}")
        if received != server.sent():
            raise RuntimeError(f"migration, framing {framing}: something else arrived than was sent")


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--moves", type=int, default=MOVES)
    arguments = parser.parse_args()
    found = measure(arguments.rounds, arguments.moves)
    print(json.dumps(found._asdict()))
    print(found.sentence(), file=sys.stderr)


if __name__ == "__main__":
    main()
