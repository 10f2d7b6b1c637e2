"""What do we send, and did it arrive whole? Random files, their hashes, and a web server for them."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from lab.hosts import Argument, Host

CHUNK_BYTES = 1 << 20
PROJECT = Path(__file__).resolve().parent.parent


def write_random_file(path: Path, size_bytes: int, seed: int) -> str:
    """Fill `path` with `size_bytes` that follow from `seed`; returns their SHA-256 in hex."""
    source = random.Random(seed)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        left = size_bytes
        while left:
            chunk = source.randbytes(min(CHUNK_BYTES, left))
            file.write(chunk)
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """The SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class WebServer:
    """A running `lab.web_server` on `host`: serves the files of `directory` and stores there what is PUT."""

    def __init__(self, host: Host, directory: Path, port: int = 80, address: str = "0.0.0.0") -> None:
        self.port = port
        options: list[Argument] = ["--directory", directory, "--port", port, "--address", address]
        self.process: subprocess.Popen[Any] = host.popen(
            [sys.executable, "-m", "lab.web_server", *options], cwd=PROJECT, stderr=subprocess.PIPE
        )
        host.wait_listening(port, self.process)
