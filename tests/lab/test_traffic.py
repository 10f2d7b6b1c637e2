"""Do random files, their hashes and the web server agree with curl and sha256sum?"""

from __future__ import annotations

import subprocess
from pathlib import Path

from lab.hosts import Lab
from lab.traffic import WebServer, hash_file, write_random_file


def test_a_random_file_follows_from_its_seed_and_sha256sum_agrees(tmp_path: Path) -> None:
    path = tmp_path / "file"
    first = write_random_file(path, 2_500_000, seed=1)
    assert path.stat().st_size == 2_500_000
    assert hash_file(path) == first == subprocess.check_output(["sha256sum", path], text=True).split()[0]
    assert write_random_file(path, 2_500_000, seed=1) == first
    assert write_random_file(path, 2_500_000, seed=2) != first


def test_curl_gets_and_puts_files(lab: Lab) -> None:
    client, server = lab.host("client"), lab.host("server")
    lab.connect(client, "10.1.0.1/24", server, "10.1.0.2/24")
    here, there = lab.directory / "here", lab.directory / "there"
    here.mkdir()
    there.mkdir()
    digest = write_random_file(there / "big", 5_000_001, seed=3)
    WebServer(server, there)
    client.run(["curl", "-sSf", "-o", here / "big", "http://10.1.0.2/big"])
    assert hash_file(here / "big") == digest
    assert client.run(["curl", "-sSf", "-T", here / "big", "http://10.1.0.2/copy"]).stdout == digest
    assert hash_file(there / "copy") == digest
    missing = client.run(["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://10.1.0.2/nothing"])
    assert missing.stdout == "404"
