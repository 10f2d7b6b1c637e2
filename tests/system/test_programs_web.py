"""Do curl and wget get and put files unharmed, one at a time and two hundred at once?"""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from through_chain import WEB

from lab.chain import Chain
from lab.traffic import WebServer, hash_file, write_random_file
from lab.waiting import wait_for

pytestmark = pytest.mark.usefixtures("nothing_left")

DOWNLOADS, UPLOADS = 150, 50
MIXED_BYTES_MAX = 4 << 20


class Web:
    """The web server behind the chain and what the client needs to use it."""

    def __init__(self, chain: Chain) -> None:
        self.here, self.there = chain.directory / "client", chain.directory / "server"
        for directory in (self.here, self.there):
            directory.mkdir()
        self.chain = chain
        self.url = f"http://{chain.front}:{WEB}"
        self.server = WebServer(chain.server, self.there, WEB)

    def stop(self) -> None:
        self.server.process.kill()
        self.server.process.wait()

    def run(self, command: list[str | Path], timeout_s: float = 60) -> str:
        return str(self.chain.client.run(command, timeout_s=timeout_s).stdout)


@pytest.fixture(scope="module")
def web(chain: Chain) -> Iterator[Web]:
    web = Web(chain)
    yield web
    web.stop()


def test_curl_downloads_and_uploads(web: Web) -> None:
    digest = write_random_file(web.there / "down", 30_000_001, seed=1)
    web.run(["curl", "-sSf", "-o", web.here / "down", f"{web.url}/down"])
    assert hash_file(web.here / "down") == digest
    assert web.run(["curl", "-sSf", "-T", web.here / "down", f"{web.url}/up"]) == digest
    assert hash_file(web.there / "up") == digest


def test_wget_downloads_over_one_connection_several_files(web: Web) -> None:
    sizes = {"a": 1, "b": 3_000_000, "c": 0, "d": 70_000}
    digests = {
        name: write_random_file(web.there / name, size, seed=index)
        for index, (name, size) in enumerate(sizes.items())
    }
    web.run(["wget", "-q", "-P", web.here, *(f"{web.url}/{name}" for name in sizes)])
    assert {name: hash_file(web.here / name) for name in sizes} == digests


def test_a_gigabyte_arrives_whole(web: Web) -> None:
    digest = write_random_file(web.there / "gigabyte", 1 << 30, seed=2)
    web.run(["curl", "-sSf", "-o", web.here / "gigabyte", f"{web.url}/gigabyte"], timeout_s=120)
    assert (web.here / "gigabyte").stat().st_size == 1 << 30
    assert hash_file(web.here / "gigabyte") == digest


def test_two_hundred_transfers_at_once_all_arrive_whole(web: Web) -> None:
    source = random.Random(3)
    sizes = [int(2 ** source.uniform(0, 22)) for _ in range(DOWNLOADS + UPLOADS)]
    assert max(sizes) <= MIXED_BYTES_MAX
    down = {f"down{n}": write_random_file(web.there / f"down{n}", sizes[n], seed=n) for n in range(DOWNLOADS)}
    up = {
        f"up{n}": write_random_file(web.here / f"up{n}", sizes[n], seed=n)
        for n in range(DOWNLOADS, DOWNLOADS + UPLOADS)
    }
    arguments = [f"-o {web.here / name} {web.url}/{name}" for name in down]
    arguments += [f"-o {web.here / name}.answer -T {web.here / name} {web.url}/{name}" for name in up]
    source.shuffle(arguments)
    web.chain.client.run(
        ["xargs", "-P", len(arguments), "-L", 1, "curl", "-sSf"], input="\n".join(arguments), timeout_s=120
    )
    assert {name: hash_file(web.here / name) for name in down} == down
    assert {name: hash_file(web.there / name) for name in up} == up
    assert {name: (web.here / f"{name}.answer").read_text() for name in up} == up


def test_a_killed_client_ends_the_servers_connection(web: Web) -> None:
    write_random_file(web.there / "large", 50_000_000, seed=4)
    victim = web.chain.client.popen(
        ["curl", "-sS", "--limit-rate", "1M", "-o", "/dev/null", f"{web.url}/large"]
    )
    connections = ["ss", "-Htn", "state", "established", f"( sport = :{WEB} )"]
    wait_for(lambda: web.chain.server.run(connections).stdout, "the server to have a connection")
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    wait_for(lambda: not web.chain.server.run(connections).stdout, "the server to lose its connection")


def test_a_killed_server_ends_the_clients_transfer_with_an_error(web: Web) -> None:
    write_random_file(web.there / "large", 50_000_000, seed=5)
    command = ["curl", "-sS", "--limit-rate", "1M", "-o", web.here / "cut", f"{web.url}/large"]
    client = web.chain.client.popen(command, stderr=subprocess.PIPE)
    wait_for(lambda: (web.here / "cut").exists() and (web.here / "cut").stat().st_size, "the first bytes")
    web.stop()
    _, errors = client.communicate(timeout=60)
    assert client.returncode in (18, 56), errors
    refused = web.chain.client.run(["curl", "-sS", f"{web.url}/large"], check=False, timeout_s=10)
    # The reset comes so soon after the handshake that curl notices it while connecting (7) or while reading (56).
    assert refused.returncode in (7, 56), refused
    web.server = WebServer(web.chain.server, web.there, WEB)
    digest = write_random_file(web.there / "again", 1_000_000, seed=6)
    web.run(["curl", "-sSf", "-o", web.here / "again", f"{web.url}/again"])
    assert hash_file(web.here / "again") == digest
