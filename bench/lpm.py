"""What does a large service table cost? Inserting, looking up and removing, in time and memory, with as many prefixes as wanted.

Seven of ten prefixes are whole serviceIDs, the others have one of eight shorter lengths; each has one FORWARD
rule, and there is a default rule. Looked up are serviceIDs under whole ones, under shorter prefixes, and such
that only the default rule covers. A few answers are compared with a search through all prefixes. Runs in a
process of its own, whose memory is measured as the growth of its resident set.

    python -m bench.lpm [--prefixes N] [--lookups N]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

from serval_core.names import DEFAULT_PREFIX, SERVICE_ID_BITS, SERVICE_ID_BYTES, ServiceID, ServicePrefix
from serval_core.rules import Rule, RuleType
from serval_core.service_table import ServiceTable

PREFIXES = 1_000_000
LOOKUPS = 300_000
QUICK_PREFIXES, QUICK_LOOKUPS = 100_000, 100_000
CHECKED_LOOKUPS = 4  # of each kind
WHOLE_SHARE = 0.7
SHORTER_BITS = (24, 32, 64, 96, 128, 160, 192, 224)
SHORTEST_SHARE = 1 / 64  # of the prefixes; there are only so many short ones
CHUNK = 10_000
SEED = 20261121


class LargeTable(NamedTuple):
    """One run. Rates are per second of one CPU, memory is in bytes per prefix."""

    prefixes: int
    lengths: int
    inserts_per_s: float
    lookups_per_s: float
    lookups_whole_per_s: float
    lookups_shorter_per_s: float
    lookups_default_per_s: float
    removals_per_s: float
    bytes_per_prefix: float

    def sentence(self) -> str:
        """The figures in one line."""
        return (
            f"service table with {self.prefixes:,} prefixes of {self.lengths} lengths: "
            f"{self.inserts_per_s / 1e3:.0f} k inserts/s, {self.lookups_per_s / 1e3:.0f} k lookups/s "
            f"(whole serviceIDs {self.lookups_whole_per_s / 1e3:.0f}, shorter prefixes "
            f"{self.lookups_shorter_per_s / 1e3:.0f}, default rule {self.lookups_default_per_s / 1e3:.0f}), "
            f"{self.removals_per_s / 1e3:.0f} k removals/s, {self.bytes_per_prefix:.0f} bytes per prefix"
        )


def prefixes(count: int, random: Random) -> Iterator[ServicePrefix]:
    """`count` different prefixes."""
    seen: set[ServicePrefix] = set()
    few = int(count * SHORTEST_SHARE)
    made = 0
    while made < count:
        if random.random() < WHOLE_SHARE:
            yield ServicePrefix.of(ServiceID(random.randbytes(SERVICE_ID_BYTES)))
            made += 1
            continue
        bits = random.choice(SHORTER_BITS)
        if bits == SHORTER_BITS[0] and few <= 0:
            continue
        prefix = ServicePrefix.of(ServiceID(random.randbytes(SERVICE_ID_BYTES)), bits)
        if bits <= 32:
            if prefix in seen or not any(prefix.service_id):
                continue
            seen.add(prefix)
            few -= bits == SHORTER_BITS[0]
        yield prefix
        made += 1


def under(prefix: ServicePrefix, random: Random) -> ServiceID:
    """A random serviceID that begins with `prefix`."""
    beyond = SERVICE_ID_BITS - prefix.bits
    number = int.from_bytes(prefix.service_id, "big") | (random.getrandbits(beyond) if beyond else 0)
    return ServiceID(number.to_bytes(SERVICE_ID_BYTES, "big"))


def by_search(count: int, asked: list[ServiceID]) -> list[int]:
    """The length of the longest of the `count` prefixes that covers each of `asked`, by looking at them all."""
    numbers = [int.from_bytes(each, "big") for each in asked]
    longest = [0] * len(asked)
    for service_id, bits in prefixes(count, Random(SEED)):
        beyond = SERVICE_ID_BITS - bits
        leading = int.from_bytes(service_id, "big") >> beyond
        for at, number in enumerate(numbers):
            if number >> beyond == leading and bits > longest[at]:
                longest[at] = bits
    return longest


def measure(count: int, lookups: int) -> LargeTable:
    """Fill a table, ask it, empty it. AssertionError if an answer is wrong."""
    random = Random(SEED + 1)
    sample = _sample(count, lookups, random)
    _settle()
    before_bytes = _resident_bytes()
    table = ServiceTable()
    table.add(Rule.forward(DEFAULT_PREFIX, 1))
    insert_s = 0.0
    coming = prefixes(count, Random(SEED))
    while chunk := [Rule.forward(each, each.service_id[0] << 8 | each.bits or 1) for each in islice(coming, CHUNK)]:
        began = time.perf_counter()
        for rule in chunk:
            table.add(rule)
        insert_s += time.perf_counter() - began
    _settle()
    grown_bytes = _resident_bytes() - before_bytes
    assert len(table) == count + 1

    rates = {name: len(asked) / _asking_s(table, asked) for name, asked in sample.items()}
    checked = [random.choice(asked) for asked in sample.values() for _ in range(CHECKED_LOOKUPS)]
    found = [table.matching_prefix(each) for each in checked]
    assert [each.bits for each in found if each is not None] == by_search(count, checked)

    remove_s = 0.0
    going = prefixes(count, Random(SEED))
    while chunk_gone := list(islice(going, CHUNK)):
        began = time.perf_counter()
        for prefix in chunk_gone:
            table.remove(prefix, RuleType.FORWARD, prefix.service_id[0] << 8 | prefix.bits or 1)
        remove_s += time.perf_counter() - began
    assert len(table) == 1
    return LargeTable(
        prefixes=count,
        lengths=len(SHORTER_BITS) + 2,
        inserts_per_s=count / insert_s,
        lookups_per_s=len(rates) / sum(1 / rate for rate in rates.values()),
        lookups_whole_per_s=rates["whole"],
        lookups_shorter_per_s=rates["shorter"],
        lookups_default_per_s=rates["default"],
        removals_per_s=count / remove_s,
        bytes_per_prefix=grown_bytes / count,
    )


def measure_apart(count: int = PREFIXES, lookups: int = LOOKUPS) -> LargeTable:
    """`measure` in a process of its own. RuntimeError with its last words if that fails."""
    command = [sys.executable, "-m", "bench.lpm", "--prefixes", str(count), "--lookups", str(lookups)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()[-400:]}")
    return LargeTable(**json.loads(result.stdout))


def _sample(count: int, lookups: int, random: Random) -> dict[str, list[ServiceID]]:
    each = lookups // 3
    whole: list[ServiceID] = []
    shorter: list[ServiceID] = []
    wanted = max(1, count // max(1, each))
    for number, prefix in enumerate(prefixes(count, Random(SEED))):
        kind = whole if prefix.bits == SERVICE_ID_BITS else shorter
        if len(kind) < each and (number % wanted == 0 or len(kind) == 0):
            kind.append(under(prefix, random))
    default = [ServiceID(random.randbytes(SERVICE_ID_BYTES)) for _ in range(each)]
    for kind in (whole, shorter):
        kind += [random.choice(kind) for _ in range(each - len(kind))]
        random.shuffle(kind)
    return {"whole": whole, "shorter": shorter, "default": default}


def _asking_s(table: ServiceTable, asked: list[ServiceID]) -> float:
    draw = Random(0).random
    began = time.perf_counter()
    for service_id in asked:
        table.resolve(service_id, draw, (), 116)
    return time.perf_counter() - began


def _settle() -> None:
    """Give back what is not in use, so that the resident set is what is."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prefixes", type=int, default=PREFIXES)
    parser.add_argument("--lookups", type=int, default=LOOKUPS)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.prefixes, arguments.lookups)._asdict()))


if __name__ == "__main__":
    main()
