"""Does the directory keep what it was given, through kill -9 too, and refuse what is none of its files?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serval_core.controller.authentication import Moment, Signed
from serval_core.controller.directory import (
    IN_MEMORY,
    Changes,
    DirectoryFailed,
    Instance,
    SqliteDirectory,
    StoredRegistration,
)
from serval_core.controller.policy import PrefixPolicy, Requirement
from serval_core.errors import OurMistake
from serval_core.names import parse_service

from .memory import HOST, OTHER, SERVICE, WALL, Router, register, unregister


def stored(service: str = "76568", address: int = HOST, expires_at: float = WALL + 50) -> StoredRegistration:
    return StoredRegistration(parse_service(service), address, 1, 2, 50.0, WALL, expires_at, b"\1" * 32)


def test_what_was_written_is_read_after_reopening(tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "er" / "directory.sqlite")
    directory = SqliteDirectory(path)
    moment = (Signed(b"\1" * 32, HOST, SERVICE), Moment(7, 8))
    directory.write(Changes([stored(), stored(address=OTHER)], [], [moment]))
    directory.write(Changes([stored("0xabcd:16")], [Instance(SERVICE, OTHER)]))
    directory.close()
    again = SqliteDirectory(path)
    assert set(again.registrations(WALL)) == {stored(), stored("0xabcd:16")}
    assert again.moments(0) == [moment]
    again.write(Changes(forget_before_us=8))
    assert again.moments(0) == []
    again.close()


def test_expired_registrations_are_deleted_at_the_start() -> None:
    directory = SqliteDirectory(IN_MEMORY)
    directory.write(Changes([stored(expires_at=WALL - 1), stored("80")]))
    assert directory.registrations(WALL) == [stored("80")]
    assert directory.registrations(0) == [stored("80")]


def test_lookup_finds_the_longest_prefix_that_is_alive() -> None:
    directory = SqliteDirectory(IN_MEMORY)
    directory.write(
        Changes(
            [
                stored("0xab:8"),
                stored("0xabcd:16"),
                stored("0xabcd:16", OTHER),
                stored("0xabcdef:24", expires_at=WALL - 1),
            ]
        )
    )
    found = directory.lookup(parse_service("0xabcdef01").service_id, WALL)
    assert {each.address for each in found} == {HOST, OTHER}
    assert directory.lookup(parse_service("0xab01").service_id, WALL) == [stored("0xab:8")]
    assert directory.lookup(parse_service("0x11").service_id, WALL) == []


def test_everything_survives_kill_9(tmp_path: Path) -> None:
    """The writer dies in the middle of its life; nothing that it had written is missing."""
    path = tmp_path / "directory.sqlite"
    program = f"""
import os, signal
from tests.serval_core.controller.test_directory import *
directory = SqliteDirectory({str(path)!r})
for number in range(1, 101):
    directory.write(Changes([stored(str(number))]))
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], timeout=60, check=False
    )
    assert result.returncode == -signal.SIGKILL
    directory = SqliteDirectory(str(path))
    assert len(directory.registrations(WALL)) == 100
    directory.close()


def test_a_router_restarts_with_its_registrations(tmp_path: Path) -> None:
    path = str(tmp_path / "directory.sqlite")
    before = Router(directory=SqliteDirectory(path))
    for service in ("1", "2", "3"):
        before.receive(register(parse_service(service)))
    before.receive(unregister(parse_service("3")))
    before.advance(1)
    # No goodbye: the process was killed. Ten seconds later there is another one.
    after = Router(PrefixPolicy(parse_service("2"), Requirement.NOBODY), directory=SqliteDirectory(path))
    after.now += 11
    assert after.role.restore(after.now, after.wall) == 1
    assert after.rules() == {("1", "10.0.0.1", 1, 1)}
    assert after.role.counters["not_restored"] == 1
    after.advance(38)
    assert len(after.rules()) == 1
    after.advance(2)
    assert after.rules() == set()
    assert SqliteDirectory(path).registrations(0) == []


def test_a_full_disk_costs_memory_of_the_past_only(tmp_path: Path) -> None:
    """The store fails for a while; the router goes on, says so, and catches up."""
    path = tmp_path / "directory.sqlite"
    directory = SqliteDirectory(str(path))
    router = Router(directory=directory)
    other = SqliteDirectory(str(path))
    other._database.execute("BEGIN EXCLUSIVE")
    directory._database.execute("PRAGMA busy_timeout = 1")
    router.receive(register())
    router.advance(1)
    assert router.role.registrations.counters["directory_failures"] >= 1
    assert router.news[-1][0] == "directory_failed"
    assert len(router.rules()) == 1
    with pytest.raises(DirectoryFailed):
        directory.write(Changes([stored()]))
    other._database.execute("ROLLBACK")
    router.advance(10)
    assert len(other.registrations(0)) == 1


def test_a_locked_directory_is_tried_again_now_and_then(tmp_path: Path) -> None:
    """Each attempt holds up everything else for a moment, so that a flood of registrations must not cause one each."""
    path = str(tmp_path / "directory.sqlite")
    directory, other = SqliteDirectory(path), SqliteDirectory(path)
    (waits_ms,) = directory._database.execute("PRAGMA busy_timeout").fetchone()
    assert waits_ms <= 50
    router = Router(directory=directory)
    other._database.execute("BEGIN EXCLUSIVE")
    for number in range(1, 51):
        router.receive(register(parse_service(str(number))))
        router.receive(unregister(parse_service(str(number))))
        router.advance(0.01)
    router.receive(register())
    assert router.role.registrations.counters["directory_failures"] == 1
    router.advance(5)
    assert router.role.registrations.counters["directory_failures"] == 2
    other._database.execute("ROLLBACK")
    router.advance(5)
    assert len(other.registrations(0)) == 1


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are notes, " * 1000)
    with pytest.raises(OurMistake, match="cannot be used"):
        SqliteDirectory(str(text))
    assert text.read_text().startswith("these are notes")
    newer = tmp_path / "newer.sqlite"
    directory = SqliteDirectory(str(newer))
    directory._database.execute("PRAGMA user_version = 99")
    directory.close()
    with pytest.raises(OurMistake, match="another version"):
        SqliteDirectory(str(newer))
    (tmp_path / "file").write_text("")
    with pytest.raises(OurMistake, match="cannot be made"):
        SqliteDirectory(str(tmp_path / "file" / "directory.sqlite"))
    assert os.listdir(tmp_path).count("notes.txt") == 1


def test_many_changes_are_written_bit_by_bit_and_all_before_the_end(tmp_path: Path) -> None:
    """The stack must not stand still for thousands of refreshes."""
    directory = SqliteDirectory(str(tmp_path / "directory.sqlite"))
    router = Router(directory=directory, messages_per_host_s=1e6, registrations_per_host=10_000)
    for number in range(1, 2501):
        router.receive(register(parse_service(str(number))))
        router.now += 0.001
    role = router.role.registrations
    for written in (1000, 2000, 2500):
        assert role.next_timeout() is not None
        role.handle_timeouts(router.now, router.wall)
        assert len(directory.registrations(0)) == written
    for number in range(1, 2501):
        router.receive(unregister(parse_service(str(number))))
        router.now += 0.001
    role.stop(router.now, router.wall)
    assert directory.registrations(0) == []
