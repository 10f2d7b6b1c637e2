"""Do programs that count what they do count the same at both ends? iperf3, redis-benchmark, pgbench."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from through_chain import IPERF, POSTGRES, REDIS

from lab.chain import Chain

pytestmark = pytest.mark.usefixtures("nothing_left")

REDIS_REQUESTS = 4800  # a multiple of the pipeline, which redis-benchmark always fills
PGBENCH_CLIENTS, PGBENCH_TRANSACTIONS = 8, 100


@pytest.fixture(scope="module")
def iperf(chain: Chain) -> Iterator[None]:
    server = chain.server.popen(["iperf3", "-s", "-p", IPERF, "-B", chain.direct, "--forceflush"], stdout=-3)
    chain.server.wait_listening(IPERF, server)
    yield
    server.terminate()
    server.wait(10)


def run_iperf(chain: Chain, *options: str) -> dict[str, Any]:
    command = ["iperf3", "-c", chain.front, "-p", IPERF, "-J", "-t", 1, "-O", 0, *options]
    result: dict[str, Any] = json.loads(chain.client.run(command, timeout_s=60).stdout)
    assert "error" not in result
    return result["end"]  # type: ignore[no-any-return]


def test_iperf3_with_four_streams(chain: Chain, iperf: None) -> None:
    end = run_iperf(chain, "-P", "4")
    assert len(end["streams"]) == 4
    assert all(stream["sender"]["bytes"] for stream in end["streams"])
    assert 0 < end["sum_received"]["bytes"] <= end["sum_sent"]["bytes"]


def test_iperf3_in_reverse(chain: Chain, iperf: None) -> None:
    end = run_iperf(chain, "-R", "-P", "4")
    assert all(stream["receiver"]["bytes"] for stream in end["streams"])
    assert 0 < end["sum_received"]["bytes"] <= end["sum_sent"]["bytes"]


def test_iperf3_in_both_directions_at_once(chain: Chain, iperf: None) -> None:
    end = run_iperf(chain, "--bidir")
    assert 0 < end["sum_received"]["bytes"] <= end["sum_sent"]["bytes"]
    assert 0 < end["sum_received_bidir_reverse"]["bytes"] <= end["sum_sent_bidir_reverse"]["bytes"]


def test_redis_benchmark_has_every_request_carried_out_once(chain: Chain) -> None:
    directory = chain.directory / "redis"
    directory.mkdir()
    options = ["--save", "", "--appendonly", "no", "--protected-mode", "no", "--dir", directory]
    server = chain.server.popen(
        ["redis-server", "--port", REDIS, "--bind", chain.direct, "--logfile", directory / "log", *options]
    )
    chain.server.wait_listening(REDIS, server)
    for clients, pipeline, calls in ((1, 1, 500), (50, 1, REDIS_REQUESTS), (50, 16, REDIS_REQUESTS)):
        chain.server.run(["redis-cli", "-h", chain.direct, "config", "resetstat"])
        command = ["redis-benchmark", "-h", chain.front, "-p", REDIS, "-q", "-t", "set,get,lpush", "-d", 512]
        chain.client.run([*command, "-n", calls, "-c", clients, "-P", pipeline], timeout_s=60)
        statistics = chain.server.run(["redis-cli", "-h", chain.direct, "info", "commandstats"]).stdout
        for name in ("set", "get", "lpush"):
            match = re.search(rf"cmdstat_{name}:calls=(\d+),.*failed_calls=(\d+)", statistics)
            assert match, statistics
            assert match.groups() == (str(calls), "0")
    server.terminate()
    server.wait(10)


def postgres_program(name: str) -> Path:
    """The newest installed version's."""
    return max(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))


@pytest.fixture
def database(chain: Chain) -> Iterator[None]:
    """A cluster of its own, run by user postgres, which trusts the lab's network."""
    data = chain.directory / "postgres"
    data.mkdir()
    shutil.chown(data, "postgres")
    as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
    chain.server.run([*as_postgres, postgres_program("initdb"), "-N", "-A", "trust", "-D", data], cwd=data)
    with (data / "pg_hba.conf").open("a") as file:
        file.write("host all all 10.0.0.0/8 trust\n")
    settings = {
        "listen_addresses": chain.direct,
        "unix_socket_directories": data,
        "fsync": "off",
        "port": POSTGRES,
    }
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    with (chain.directory / "postgres.log").open("w") as log:
        server = chain.server.popen(
            [*as_postgres, postgres_program("postgres"), "-D", data, *options],
            cwd=data,
            stdout=log,
            stderr=log,
        )
    chain.server.wait_listening(POSTGRES, server)
    yield
    server.terminate()
    server.wait(30)


def test_pgbench_has_every_transaction_committed_once(chain: Chain, database: None) -> None:
    there = ["-h", chain.front, "-p", POSTGRES, "-U", "postgres"]
    pgbench = postgres_program("pgbench")
    chain.client.run([pgbench, *there, "-q", "-i", "-s", 1, "postgres"], timeout_s=60)
    clients = ["-c", PGBENCH_CLIENTS, "-j", 2, "-t", PGBENCH_TRANSACTIONS]
    expected = PGBENCH_CLIENTS * PGBENCH_TRANSACTIONS
    output = chain.client.run([pgbench, *there, "-n", *clients, "postgres"], timeout_s=60).stdout
    assert f"number of transactions actually processed: {expected}/{expected}" in output
    psql = [postgres_program("psql"), *there, "-At", "-c", "select count(*) from pgbench_history", "postgres"]
    assert chain.client.run(psql).stdout == f"{expected}\n"
    # A new connection for each transaction.
    output = chain.client.run(
        [pgbench, *there, "-n", "-C", "-c", 4, "-t", 25, "postgres"], timeout_s=60
    ).stdout
    assert "number of transactions actually processed: 100/100" in output
