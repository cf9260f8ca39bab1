"""What the server remembers: files, jobs, events, checkpoints and models, in SQLite, behind five verbs.

Each kind of record has a table of the same form: its JSON beside an id, an owner (the job an event belongs to, say) and
a number that counts up. Lists go by that number, so pages stay stable while records are added; a deleted record leaves
its number behind, so a page can still begin after it. `Store.move` is the one way a job's status changes: compare and
set, along the arrows of TRANSITIONS.

The database is in WAL mode with every commit synced to disk, so what a caller was told survives a power cut. Each
thread has a connection of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from tunery.errors import ConfigError
from tunery.serve.records import (
    TRANSITIONS,
    Checkpoint,
    Digest,
    Event,
    File,
    Job,
    JobError,
    JobStatus,
    Model,
    Work,
)

Order = Literal["asc", "desc"]

Record = File | Job | Event | Checkpoint | Model | Digest | Work
R = TypeVar("R", File, Job, Event, Checkpoint, Model, Digest, Work)

_TABLES: Mapping[type, str] = {
    File: "files",
    Job: "jobs",
    Event: "events",
    Checkpoint: "checkpoints",
    Model: "models",
    Digest: "digests",
    Work: "work",
}


@dataclass(frozen=True)
class Page(Generic[R]):
    """A stretch of a list, and whether more follows."""

    data: list[R]
    has_more: bool = False

    @property
    def first_id(self) -> str | None:
        """Of the first record; None on an empty page."""
        return self.data[0].id if self.data else None

    @property
    def last_id(self) -> str | None:
        """Of the last record: `after` of the next page."""
        return self.data[-1].id if self.data else None


# --------------------------------------------------------------------------- the database

_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        *(
            f"CREATE TABLE {table} (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, "
            "owner TEXT NOT NULL, body TEXT)"  # body: JSON, NULL once deleted
            for table in _TABLES.values()
        ),
        "CREATE INDEX events_by_job ON events (owner, number)",
        "CREATE INDEX checkpoints_by_job ON checkpoints (owner, number)",
        "CREATE INDEX jobs_by_status ON jobs (json_extract(body, '$.status'))",
    ),
)
"""Statements that lead from one version of the database (PRAGMA user_version) to the next."""


class UnknownRecordError(LookupError):
    """A page was asked for after a record that never was."""


class Store:
    """The database.

    Args:
        path: its file; the folder is made.

    Raises:
        ConfigError: it was made by a newer version, or is not a database.
    """

    def __init__(self, path: Path):
        self.path = path
        self._local = threading.local()
        self._connections: dict[threading.Thread, sqlite3.Connection] = {}
        self._guard = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._migrate()
        except sqlite3.DatabaseError as error:
            self.close()
            raise ConfigError(f"{path} cannot be used: {error}", "restore it, or start in another folder") from error
        except ConfigError:
            self.close()
            raise

    def _connection(self) -> sqlite3.Connection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            # isolation_level None: transactions are ours to begin. Another thread only ever closes it.
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            self._local.connection = connection
            with self._guard:
                for thread in [thread for thread in self._connections if not thread.is_alive()]:
                    self._connections.pop(thread).close()
                self._connections[threading.current_thread()] = connection
        return connection

    def _migrate(self) -> None:
        with self.transaction():
            database = self._connection()
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version > len(_MIGRATIONS):
                raise ConfigError(
                    f"{self.path} was made by a newer version of tunery", "update tunery, or start in another folder"
                )
            for statements in _MIGRATIONS[version:]:
                for statement in statements:
                    database.execute(statement)
            database.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")

    def close(self) -> None:
        """Close the connections of all threads; no thread may use the store any more."""
        with self._guard:
            for connection in self._connections.values():
                connection.close()
            self._connections.clear()
        self._local = threading.local()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written within this context is kept together, or (after an exception) not at all.

        No other thread writes meanwhile. A context inside another one belongs to it.
        """
        database = self._connection()
        if database.in_transaction:
            yield
            return
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
            database.commit()
        except BaseException:
            database.rollback()
            raise

    def add(self, record: Record, owner: str = "") -> bool:
        """Keep a record; False (and nothing changes) if there is, or was, one with this id."""
        table = _TABLES[type(record)]
        with self.transaction():
            done = self._connection().execute(
                f"INSERT OR IGNORE INTO {table} (id, owner, body) VALUES (?, ?, ?)", (record.id, owner, _encode(record))
            )
            return done.rowcount == 1

    def get(self, kind: type[R], record_id: str) -> R | None:
        """A record by its id; None if there is none."""
        query = f"SELECT body FROM {_TABLES[kind]} WHERE id = ? AND body IS NOT NULL"
        row = self._connection().execute(query, (record_id,)).fetchone()
        return _decode(kind, row[0]) if row else None

    def owner(self, kind: type[R], record_id: str) -> str | None:
        """What a record belongs to; None if there is no such record."""
        query = f"SELECT owner FROM {_TABLES[kind]} WHERE id = ? AND body IS NOT NULL"
        row = self._connection().execute(query, (record_id,)).fetchone()
        return row[0] if row else None

    def update(self, kind: type[R], record_id: str, **changes: object) -> R:
        """Change fields of a record (a job's status: by `move`).

        Raises:
            KeyError: there is no such record.
        """
        if kind is Job and "status" in changes:
            raise ValueError("a job's status changes by move")
        return self._replace(kind, record_id, changes)

    def _replace(self, kind: type[R], record_id: str, changes: Mapping[str, object]) -> R:
        with self.transaction():
            before = self.get(kind, record_id)
            if before is None:
                raise KeyError(record_id)
            after: R = dataclasses.replace(before, **changes)  # type: ignore[type-var]
            if after != before:
                query = f"UPDATE {_TABLES[kind]} SET body = ? WHERE id = ?"
                self._connection().execute(query, (_encode(after), record_id))
            return after

    def delete(self, kind: type[R], record_id: str) -> bool:
        """Forget a record's content; False if there was none. Its id is not used again."""
        query = f"UPDATE {_TABLES[kind]} SET body = NULL WHERE id = ? AND body IS NOT NULL"
        with self.transaction():
            return self._connection().execute(query, (record_id,)).rowcount == 1

    def list(
        self,
        kind: type[R],
        *,
        owner: str | None = None,
        where: Mapping[str, object] | None = None,
        metadata: Mapping[str, str] | None = None,
        after: str | None = None,
        limit: int | None = None,
        order: Order = "desc",
    ) -> Page[R]:
        """A page of records, by the order they were added in.

        Args:
            owner: only what belongs to it.
            where: only records whose fields have these values (or one of them, if a tuple is given).
            metadata: only jobs whose metadata have these pairs, among others.
            after: begin behind the record with this id, which may have been deleted since.
            limit: the most records; None for all.
            order: "desc": newest first.

        Raises:
            UnknownRecordError: there never was a record `after`.
        """
        table = _TABLES[kind]
        tests, values = _tests(owner, where or {}, metadata or {})
        if after is not None:
            row = self._connection().execute(f"SELECT number FROM {table} WHERE id = ?", (after,)).fetchone()
            if row is None:
                raise UnknownRecordError(after)
            tests.append(f"number {'<' if order == 'desc' else '>'} ?")
            values.append(row[0])
        query = f"SELECT body FROM {table} WHERE {' AND '.join(tests)} ORDER BY number {order} LIMIT ?"
        rows = self._connection().execute(query, (*values, -1 if limit is None else limit + 1)).fetchall()
        records = [_decode(kind, body) for (body,) in rows[:limit]]
        return Page(records, has_more=len(rows) > len(records))

    def move(self, job_id: str, to: JobStatus, *, expected: Collection[str], **changes: object) -> Job | None:
        """Change a job's status, and other fields with it, if its status is one of those expected.

        Returns:
            The job as it is now; None if its status was another one, in which case nothing changes.

        Raises:
            ValueError: there is no arrow from one of the expected statuses to the new one.
        """
        if wrong := [status for status in expected if to not in TRANSITIONS[status]]:
            raise ValueError(f"a job does not go from {wrong[0]} to {to}")
        with self.transaction():
            job = self.get(Job, job_id)
            if job is None or job.status not in expected:
                return None
            return self._replace(Job, job_id, {**changes, "status": to})


def _tests(
    owner: str | None, where: Mapping[str, object], metadata: Mapping[str, str]
) -> tuple[list[str], list[object]]:
    """Conditions of a query, and their values. Names of fields are ours; everything from outside is a value."""
    tests, values = ["body IS NOT NULL"], []
    if owner is not None:
        tests.append("owner = ?")
        values.append(owner)
    for name, wanted in where.items():
        among = wanted if isinstance(wanted, tuple) else (wanted,)
        tests.append(f"json_extract(body, '$.{name}') IN ({', '.join('?' * len(among))})")
        values += among
    for key, value in metadata.items():
        tests.append("EXISTS (SELECT 1 FROM json_each(body, '$.metadata') WHERE key = ? AND value = ?)")
        values += [key, value]
    return tests, values


def _encode(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record), ensure_ascii=False, allow_nan=False)


def _decode(kind: type[R], body: str) -> R:
    values = json.loads(body)
    if kind is Job and values["error"] is not None:
        values["error"] = JobError(**values["error"])
    return kind(**values)
