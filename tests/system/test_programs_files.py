"""Do scp and git carry files and histories through the translators?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from through_chain import GIT, SSH

from lab.chain import Chain
from lab.hosts import Host
from lab.traffic import hash_file, write_random_file

pytestmark = pytest.mark.usefixtures("nothing_left")

SSHD_PRIVILEGE_SEPARATION = Path("/run/sshd")
GIT_ENVIRONMENT = os.environ | {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}


@pytest.fixture(scope="module")
def ssh_options(chain: Chain) -> Iterator[list[str]]:
    """An sshd on the server with keys and configuration of its own; the options for scp to use it."""
    directory = chain.directory / "ssh"
    directory.mkdir(mode=0o700)
    for name in ("host", "user"):
        chain.server.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name])
    (directory / "authorized_keys").write_text((directory / "user.pub").read_text())
    (directory / "sshd_config").write_text(
        f"""
        Port {SSH}
        ListenAddress {chain.direct}
        HostKey {directory}/host
        PidFile {directory}/sshd.pid
        AuthorizedKeysFile {directory}/authorized_keys
        PermitRootLogin prohibit-password
        PasswordAuthentication no
        UsePAM no
        StrictModes no
        Subsystem sftp internal-sftp
        """
    )
    SSHD_PRIVILEGE_SEPARATION.mkdir(exist_ok=True)
    log = directory / "sshd.log"
    server = chain.server.popen(["/usr/sbin/sshd", "-D", "-f", directory / "sshd_config", "-E", log])
    chain.server.wait_listening(SSH, server)
    options = {
        "IdentityFile": directory / "user",
        "UserKnownHostsFile": directory / "known",
        "BatchMode": "yes",
    }
    pairs = [f"{name}={value}" for name, value in (options | {"StrictHostKeyChecking": "accept-new"}).items()]
    yield ["-F", "none", "-P", str(SSH), *(word for pair in pairs for word in ("-o", pair))]
    server.terminate()
    server.wait(10)


def test_scp_copies_there_and_back(chain: Chain, ssh_options: list[str]) -> None:
    here, there, back = (chain.directory / name for name in ("scp-here", "scp-there", "scp-back"))
    digest = write_random_file(here, 20_000_003, seed=1)
    remote = f"root@{chain.front}:{there}"
    chain.client.run(["scp", "-q", *ssh_options, here, remote], timeout_s=60)
    assert hash_file(there) == digest
    chain.client.run(["scp", "-q", *ssh_options, remote, back], timeout_s=60)
    assert hash_file(back) == digest


def git(host: Host, *words: str | Path) -> str:
    return str(host.run(["git", *words], env=GIT_ENVIRONMENT, timeout_s=60).stdout)


def test_git_clones_a_repository_and_pushes_to_it(chain: Chain) -> None:
    repositories, work, clone = (chain.directory / name for name in ("repositories", "work", "clone"))
    bare = repositories / "project.git"
    git(chain.server, "init", "-q", "--bare", "-b", "main", bare)
    git(chain.server, "clone", "-q", bare, work)
    for number in range(20):
        write_random_file(work / f"file{number}", 300_000, seed=number)
        git(chain.server, "-C", work, "add", ".")
        git(chain.server, "-C", work, "commit", "-q", "-m", f"commit {number}")
    git(chain.server, "-C", work, "push", "-q", "origin", "HEAD:main")
    options = [f"--base-path={repositories}", "--export-all", "--enable=receive-pack", "--reuseaddr"]
    daemon = chain.server.popen(
        ["git", "daemon", *options, f"--port={GIT}", f"--listen={chain.direct}"], env=GIT_ENVIRONMENT
    )
    chain.server.wait_listening(GIT, daemon)

    url = f"git://{chain.front}:{GIT}/project.git"
    git(chain.client, "clone", "-q", url, clone)
    assert git(chain.client, "-C", clone, "rev-parse", "HEAD") == git(
        chain.server, "-C", work, "rev-parse", "HEAD"
    )
    git(chain.client, "-C", clone, "fsck", "--full", "--strict")
    for number in range(20):
        assert hash_file(clone / f"file{number}") == hash_file(work / f"file{number}")

    write_random_file(clone / "more", 3_000_000, seed=99)
    git(chain.client, "-C", clone, "add", ".")
    git(chain.client, "-C", clone, "commit", "-q", "-m", "from the client")
    git(chain.client, "-C", clone, "push", "-q", "origin", "HEAD:main")
    assert git(chain.server, "-C", bare, "rev-parse", "main") == git(
        chain.client, "-C", clone, "rev-parse", "HEAD"
    )
    git(chain.server, "-C", bare, "fsck", "--full", "--strict")
    daemon.terminate()
    daemon.wait(10)
