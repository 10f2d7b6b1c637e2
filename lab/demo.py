"""Does it work? `make demo`: an unmodified client and web server with two translators between them, checked.

The two hosts in the middle speak Serval with each other and nothing else. Files are hashed at both ends,
packets are counted on the wire between the translators, the flow table is read while bytes move, and the
throughput is set beside direct TCP between the same programs. The exit status is 0 only if all was as it
should be.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from lab.chain import COMMAND, Chain, TranslatorProcess
from lab.demonstration import (
    TRANSFER_TIMEOUT_S,
    Findings,
    Hashed,
    console,
    curl,
    end,
    expect_idle,
    hashes_table,
    run,
    transfer_progress,
    watch,
)
from lab.hosts import Lab
from lab.traffic import PROJECT, WebServer, hash_file, write_random_file
from lab.waiting import wait_for
from lab.wire_counter import WireCounter

SERVICE = "76568"
FRAMING = ("--framing", "sal")  # every packet is counted
PORT = 80
DOWNLOAD_BYTES = 768 << 20
UPLOAD_BYTES = 256 << 20
SLOW_BYTES = 64 << 20  # more than all buffers on the way hold
SLOW_RATE = "16M"
PAIRS = 7
MTU_BYTES = 1500
FLOW_TABLE_COLUMNS = 120
PROTOCOL_SAL = 144
PROTOCOL_TCP = 6


@dataclass
class Seen(Findings):
    """What the demonstration saw."""

    flow_tables: dict[str, str] = field(default_factory=dict)
    sal_packets: int = 0
    through_bits_per_s: list[float] = field(default_factory=list)
    direct_bits_per_s: list[float] = field(default_factory=list)
    hashes: list[Hashed] = field(default_factory=list)


def main() -> int:
    """Run the demonstration; the exit status."""
    return run(Seen(), demonstrate, report)


def demonstrate(lab: Lab, findings: Seen) -> None:
    """Build the chain, move files through it, look at it from outside."""
    here, there = lab.directory / "client", lab.directory / "server"
    here.mkdir()
    there.mkdir()
    with console.status("four hosts, two translators, random files"):
        chain = Chain(lab, {PORT: SERVICE})
        WebServer(chain.server, there, PORT)
        download = write_random_file(there / "download", DOWNLOAD_BYTES, seed=1)
        upload = write_random_file(here / "upload", UPLOAD_BYTES, seed=2)
        slow = write_random_file(there / "slow", SLOW_BYTES, seed=3)
        chain.start(FRAMING, FRAMING)
    console.print(
        "client - [bold]serval-translator --framing sal --map 80=76568[/] - protocol 144 - "
        "[bold]serval-translator --framing sal --reverse 76568=10.3.0.1:80[/] - web server"
    )
    with (
        WireCounter(*chain.wire, PROTOCOL_SAL) as sal,
        WireCounter(*chain.wire, PROTOCOL_SAL, longer_than_bytes=MTU_BYTES) as too_long,
        WireCounter(*chain.wire, PROTOCOL_TCP) as plain_tcp,
    ):
        move_files(chain, findings, here, there, {"download": download, "upload": upload, "slow": slow})
        findings.sal_packets = sal.count()
        least = (DOWNLOAD_BYTES + UPLOAD_BYTES + SLOW_BYTES) // MTU_BYTES
        findings.expect(
            findings.sal_packets >= least,
            f"only {findings.sal_packets} packets of protocol 144 for {least} MTUs",
        )
        findings.expect(too_long.count() == 0, f"{too_long.count()} packets were longer than the MTU")
        findings.expect(
            plain_tcp.count() == 0, f"{plain_tcp.count()} plain TCP packets between the translators"
        )
    compare_with_direct(chain, findings)
    finish(chain, findings)


def move_files(chain: Chain, findings: Seen, here: Path, there: Path, sent: dict[str, str]) -> None:
    """Download and upload with curl, hashing both ends; a slow download keeps one flow open to be seen."""
    url = f"http://{chain.front}"
    with transfer_progress() as progress:
        slow = curl(chain.client, "--limit-rate", SLOW_RATE, "-o", here / "slow", f"{url}/slow")
        wait_for((here / "slow").exists, "the first bytes of the slow download")
        slow.send_signal(signal.SIGSTOP)  # its flow stays open for as long as the tables take
        fast = curl(chain.client, "-o", here / "download", f"{url}/download")
        tables = {name: show_flows(side) for name, side in sides(chain).items()}
        watch(progress, "download", fast, here / "download", DOWNLOAD_BYTES)
        for name, table in tables.items():
            findings.flow_tables[name] = table.communicate(timeout=TRANSFER_TIMEOUT_S)[0]
        slow.send_signal(signal.SIGCONT)
        putting = curl(chain.client, "-T", here / "upload", f"{url}/upload")
        watch(progress, "upload", putting, there / "upload", UPLOAD_BYTES)
        watch(progress, "slow download", slow, here / "slow", SLOW_BYTES)
    for name, arrived, size in (
        ("download", here / "download", DOWNLOAD_BYTES),
        ("upload", there / "upload", UPLOAD_BYTES),
        ("slow", here / "slow", SLOW_BYTES),
    ):
        received = hash_file(arrived)
        findings.hashes.append(Hashed(name, size, sent[name], received))
        findings.expect(received == sent[name], f"the {name} arrived with another hash")


def sides(chain: Chain) -> dict[str, TranslatorProcess]:
    """Both translators by what they are called here."""
    return {"translator": chain.translator, "reverse translator": chain.reverse}


def show_flows(side: TranslatorProcess) -> subprocess.Popen[Any]:
    """What an operator would type, for a terminal of sufficient width."""
    environment = os.environ | {"COLUMNS": str(max(console.width, FLOW_TABLE_COLUMNS))}
    command = [*COMMAND, "show", "flows"]
    return side.host.popen(command, cwd=PROJECT, stdout=subprocess.PIPE, env=environment)


def compare_with_direct(chain: Chain, findings: Seen) -> None:
    """The same download through the chain and directly, in turns."""
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("with direct TCP", total=PAIRS)
        for _ in range(PAIRS):
            findings.through_bits_per_s.append(measured_bits_per_s(chain, chain.front))
            findings.direct_bits_per_s.append(measured_bits_per_s(chain, chain.direct))
            progress.advance(task)


def measured_bits_per_s(chain: Chain, address: str) -> float:
    """What curl reports for one download of the uploaded file."""
    command = ["curl", "-sSf", "-o", "/dev/null", "-w", "%{speed_download}", f"http://{address}/upload"]
    return 8 * float(chain.client.run(command, timeout_s=TRANSFER_TIMEOUT_S).stdout)


def finish(chain: Chain, findings: Seen) -> None:
    """Nothing may be left: no flow after the transfers, no trace in the kernel after the translators."""
    for name, side in sides(chain).items():
        shown = findings.flow_tables[name]
        findings.expect("CONNECTED" in shown, f"{name}: show flows printed no open flow:\n{shown}")
        expect_idle(findings, name, side)
    for name, side in sides(chain).items():
        end(findings, name, side)


def report(findings: Seen, duration_s: float) -> None:
    """Print what was seen."""
    for name, table in findings.flow_tables.items():
        console.print(f"[bold]{name}: serval-translator show flows, while files moved[/]")
        print(table)
    console.print(hashes_table("file", findings.hashes))
    through, direct = (
        statistics.median(x) / 1e9 for x in (findings.through_bits_per_s, findings.direct_bits_per_s)
    )
    ratios = [a / b for a, b in zip(findings.through_bits_per_s, findings.direct_bits_per_s, strict=True)]
    summary = Table("", "value", title="Summary", show_header=False)
    summary.add_row("through both translators", f"{through:.2f} Gbit/s (median of {PAIRS} downloads)")
    summary.add_row("direct TCP, same programs", f"{direct:.2f} Gbit/s")
    summary.add_row("ratio, median of the pairs", f"{statistics.median(ratios):.2f}")
    summary.add_row(
        "protocol-144 packets on the wire", f"{findings.sal_packets:,} (counted there, hashed files only)"
    )
    summary.add_row("time taken", f"{duration_s:.0f} s")
    console.print(summary)


if __name__ == "__main__":
    sys.exit(main())
