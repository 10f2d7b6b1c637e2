"""Where does a service router keep its registrations, so that it has them again after a restart?

`Directory` is the interface; `SqliteDirectory` the store that comes with us. A store that several routers share
has to offer the same. Times are seconds since 1970, since they outlive the process; addresses are host-order
integers.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from serval_core.controller.authentication import Moment, Signed
from serval_core.errors import OurMistake, ServalError
from serval_core.names import ServiceID, ServicePrefix

IN_MEMORY = ":memory:"
_SCHEMA_VERSION = 1
# How long somebody else's lock is waited for: at the start, and later, when everything else waits too.
_BUSY_TIMEOUT_S = 1.0
_BUSY_TIMEOUT_LATER_MS = 50
_SCHEMA = """
CREATE TABLE registration (
    bits INTEGER NOT NULL, service BLOB NOT NULL, address INTEGER NOT NULL,
    priority INTEGER NOT NULL, weight INTEGER NOT NULL, lifetime_s REAL NOT NULL,
    registered_at REAL NOT NULL, expires_at REAL NOT NULL, public_key BLOB NOT NULL,
    PRIMARY KEY (bits, service, address)
) WITHOUT ROWID;
CREATE TABLE moment (
    public_key BLOB NOT NULL, address INTEGER NOT NULL, bits INTEGER NOT NULL, service BLOB NOT NULL,
    timestamp_us INTEGER NOT NULL, counter INTEGER NOT NULL,
    PRIMARY KEY (public_key, address, bits, service)
) WITHOUT ROWID;
"""


class DirectoryFailed(ServalError):
    """The store did not do what it was asked. The message is one sentence; asking again later may help."""


class Instance(NamedTuple):
    """What identifies a registration: a host that serves a prefix."""

    prefix: ServicePrefix
    address: int


class StoredRegistration(NamedTuple):
    """A registration as it is kept. `public_key` is empty for one that was not signed."""

    prefix: ServicePrefix
    address: int
    priority: int
    weight: int
    lifetime_s: float
    registered_at: float
    expires_at: float
    public_key: bytes


class Changes(NamedTuple):
    """What has become different. It is stored as a whole or not at all."""

    put: Collection[StoredRegistration] = ()
    removed: Collection[Instance] = ()
    moments: Collection[tuple[Signed, Moment]] = ()
    forget_before_us: int = 0  # moments from before then are of no use


class Directory(Protocol):
    """A store of registrations. Every method but `close` may raise DirectoryFailed."""

    def registrations(self, wall: float) -> Sequence[StoredRegistration]:
        """All that have not expired at `wall`; the others are deleted."""

    def moments(self, since_us: int) -> Sequence[tuple[Signed, Moment]]:
        """The latest signed messages from `since_us` on, oldest first; older ones are deleted."""

    def lookup(self, service_id: ServiceID, wall: float) -> Sequence[StoredRegistration]:
        """The registrations with the longest prefix that covers `service_id`."""

    def write(self, changes: Changes) -> None:
        """Store the changes: in vain only if this raises."""

    def close(self) -> None:
        """Let go of the store."""


class SqliteDirectory:
    """A file, or ":memory:". What `write` has stored survives kill -9 of the process (WAL); after a power
    failure the last moments may be missing, and the hosts' next refresh brings them back.
    """

    def __init__(self, path: str) -> None:
        """Open the file, and make it if there is none. OurMistake when that is impossible."""
        try:
            if path != IN_MEMORY:
                Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
            self._prepare(path)
        except OSError as error:
            raise OurMistake(f"the directory {path} cannot be made: {error.strerror}") from None
        except sqlite3.Error as error:
            raise OurMistake(
                f"the directory {path} cannot be used: {error}; name a file of its own (router.directory)"
            ) from None

    def _prepare(self, path: str) -> None:
        database = self._database
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")
        elif version != _SCHEMA_VERSION:
            raise OurMistake(
                f"the directory {path} was written by another version ({version}, not {_SCHEMA_VERSION}): "
                "name another file (router.directory)"
            )
        database.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_LATER_MS}")

    def registrations(self, wall: float) -> Sequence[StoredRegistration]:
        try:
            self._database.execute("DELETE FROM registration WHERE expires_at <= ?", (wall,))
            return self._select("1", ())
        except sqlite3.Error as error:
            raise DirectoryFailed(f"the directory cannot be read: {error}") from error

    def moments(self, since_us: int) -> Sequence[tuple[Signed, Moment]]:
        try:
            self._database.execute("DELETE FROM moment WHERE timestamp_us < ?", (since_us,))
            rows = self._database.execute(
                "SELECT public_key, address, bits, service, timestamp_us, counter FROM moment"
                " ORDER BY timestamp_us, counter"
            )
            return [
                (Signed(key, address, _prefix(bits, service)), Moment(timestamp_us, counter))
                for key, address, bits, service, timestamp_us, counter in rows
            ]
        except sqlite3.Error as error:
            raise DirectoryFailed(f"the directory cannot be read: {error}") from error

    def lookup(self, service_id: ServiceID, wall: float) -> Sequence[StoredRegistration]:
        try:
            lengths = self._database.execute("SELECT DISTINCT bits FROM registration ORDER BY bits DESC")
            for (bits,) in lengths.fetchall():
                prefix = ServicePrefix.of(service_id, bits)
                found = self._select(
                    "bits = ? AND service = ? AND expires_at > ?", (bits, bytes(prefix.service_id), wall)
                )
                if found:
                    return found
        except sqlite3.Error as error:
            raise DirectoryFailed(f"the directory cannot be read: {error}") from error
        return []

    def write(self, changes: Changes) -> None:
        database = self._database
        try:
            database.execute("BEGIN IMMEDIATE")
            try:
                database.executemany(
                    "DELETE FROM registration WHERE bits = ? AND service = ? AND address = ?",
                    [(*_columns(each.prefix), each.address) for each in changes.removed],
                )
                database.executemany(
                    "INSERT OR REPLACE INTO registration"
                    " (bits, service, address, priority, weight, lifetime_s, registered_at, expires_at, public_key)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [(*_columns(each.prefix), *each[1:]) for each in changes.put],
                )
                database.executemany(
                    "INSERT OR REPLACE INTO moment (public_key, address, bits, service, timestamp_us, counter)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (signed.public_key, signed.address, *_columns(signed.prefix), *moment)
                        for signed, moment in changes.moments
                    ],
                )
                if changes.forget_before_us:
                    database.execute("DELETE FROM moment WHERE timestamp_us < ?", (changes.forget_before_us,))
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:  # a full disk may have ended it
                    database.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise DirectoryFailed(f"the directory cannot be written: {error}") from error

    def close(self) -> None:
        self._database.close()

    def _select(self, condition: str, values: tuple[object, ...]) -> list[StoredRegistration]:
        rows = self._database.execute(
            "SELECT bits, service, address, priority, weight, lifetime_s, registered_at, expires_at, public_key"
            f" FROM registration WHERE {condition}",
            values,
        )
        return [StoredRegistration(_prefix(bits, service), *rest) for bits, service, *rest in rows]


def _columns(prefix: ServicePrefix) -> tuple[int, bytes]:
    return prefix.bits, bytes(prefix.service_id)


def _prefix(bits: int, service: bytes) -> ServicePrefix:
    return ServicePrefix(ServiceID(service), bits)
