"""Uploaded files and results: bytes in one folder under the file's id, facts in the store.

A file is received under a temporary name, synced and renamed, and only then noted, so what is noted is whole. What the
client calls it is kept as a fact and never used as a path. The bytes of a file do not change, so a job may hold its own
link to them, and deleting the file does not reach it.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tunery.paths import sync_folder, write_atomic
from tunery.serve.api_errors import FULL_DISK, ApiError, not_found, shorten
from tunery.serve.records import Digest, File, new_id
from tunery.serve.store import Order, Page, Store, UnknownRecordError

UPLOAD_PURPOSE = "fine-tune"
RESULT_PURPOSE = "fine-tune-results"
DEFAULT_LIMIT = 512 << 20
"""Most bytes of a file, as at OpenAI."""
SHORTEST_LIFE, LONGEST_LIFE = 3600, 2_592_000
"""`expires_after.seconds`: from an hour to thirty days."""
MOST_LISTED = 10_000
LONGEST_NAME = 255

_CHUNK = 1 << 20
_INCOMING = ".incoming-"


class Files:
    """The files of a server.

    Args:
        folder: of the bytes; it is made.
        store: of the facts.
        max_bytes: of one file.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        *,
        max_bytes: int = DEFAULT_LIMIT,
        clock: Callable[[], float] = time.time,
    ):
        self.folder, self.max_bytes = folder, max_bytes
        self._store, self._clock = store, clock
        folder.mkdir(parents=True, exist_ok=True)

    def recover(self) -> None:
        """Remove what a crash left: uploads that were not finished, bytes of files that are not noted."""
        for entry in self.folder.iterdir():
            if entry.name.startswith(_INCOMING) or self._store.get(File, entry.name) is None:
                entry.unlink(missing_ok=True)

    # ----------------------------------------------------------------- receiving

    def upload(
        self, stream: BinaryIO | Iterable[bytes], filename: str, purpose: str, expires: int | None = None
    ) -> File:
        """Keep a file.

        Args:
            stream: an open binary file, or its bytes in pieces.
            filename: what the client calls it.
            purpose: "fine-tune".
            expires: seconds after which it is deleted; None for never.

        Raises:
            ApiError: 400 for another purpose, a life too short or too long, or no bytes; 413 for too many bytes; 507
                for a full disk. Nothing is kept then.
        """
        self._check(purpose, expires)
        pieces = iter(lambda: stream.read(_CHUNK), b"") if hasattr(stream, "read") else stream  # type: ignore[union-attr]
        with self._receiving() as incoming:
            for piece in pieces:
                incoming.write(piece)
            return self._keep(incoming, filename, purpose, expires)

    async def receive(
        self, pieces: AsyncIterable[bytes], filename: str, purpose: str, expires: int | None = None
    ) -> File:
        """As `upload`, from pieces that arrive one by one; the disk is written to in a thread."""
        self._check(purpose, expires)
        with self._receiving() as incoming:
            async for piece in pieces:
                await asyncio.to_thread(incoming.write, piece)
            return await asyncio.to_thread(self._keep, incoming, filename, purpose, expires)

    def _check(self, purpose: str, expires: int | None) -> None:
        if purpose != UPLOAD_PURPOSE:
            raise ApiError(
                400,
                f"Unsupported value: 'purpose' {shorten(purpose)!r}. This server has a use for files with purpose "
                f"{UPLOAD_PURPOSE!r}.",
                code="invalid_value",
                param="purpose",
            )
        if expires is not None and not SHORTEST_LIFE <= expires <= LONGEST_LIFE:
            raise ApiError(
                400,
                f"Invalid 'expires_after.seconds': {expires}. It goes from {SHORTEST_LIFE} to {LONGEST_LIFE}.",
                code="invalid_value",
                param="expires_after.seconds",
            )

    @contextlib.contextmanager
    def _receiving(self) -> Iterator[_Incoming]:
        with _full_disk():
            incoming = _Incoming(self.folder / new_id(_INCOMING), self.max_bytes)
            try:
                yield incoming
            finally:
                incoming.discard()

    def _keep(self, incoming: _Incoming, filename: str, purpose: str, expires: int | None) -> File:
        if not incoming.size:
            raise ApiError(400, "The file is empty.", code="empty_file", param="file")
        now = int(self._clock())
        file = File(
            id=new_id("file-"),
            bytes=incoming.size,
            created_at=now,
            filename=filename[:LONGEST_NAME] or "file",
            purpose=purpose,
            expires_at=None if expires is None else now + expires,
        )
        incoming.finish(self.folder / file.id)
        self._note(file, incoming.sha256)
        return file

    def _note(self, file: File, sha256: str) -> None:
        with self._store.transaction():
            self._store.add(file)
            self._store.add(Digest(file.id, sha256))

    def add_result(self, file_id: str, filename: str, content: bytes) -> File:
        """Keep a result under this id. Adding it again changes nothing."""
        write_atomic(self.folder / file_id, content)
        file = File(file_id, len(content), int(self._clock()), filename, RESULT_PURPOSE)
        self._note(file, hashlib.sha256(content).hexdigest())
        return self._store.get(File, file_id) or file

    # ----------------------------------------------------------------- giving

    def get(self, file_id: str) -> File:
        """A file's facts.

        Raises:
            ApiError: 404, there is no such file, or it has expired.
        """
        file = self._store.get(File, file_id)
        if file is None or self._expired(file):
            raise not_found("File", file_id)
        return file

    def list(
        self, purpose: str | None = None, limit: int = MOST_LISTED, order: Order = "desc", after: str | None = None
    ) -> Page[File]:
        """A page of the files.

        Raises:
            ApiError: 400, there never was a file `after`.
        """
        self.sweep()
        where = {} if purpose is None else {"purpose": purpose}
        try:
            return self._store.list(File, where=where, after=after, limit=min(limit, MOST_LISTED), order=order)
        except UnknownRecordError:
            raise ApiError(400, f"Invalid 'after': no such File: {shorten(str(after))}", param="after") from None

    def content(self, file_id: str) -> Path:
        """Where a file's bytes are.

        Raises:
            ApiError: 404, as `get`; also if its bytes are gone.
        """
        path = self.folder / self.get(file_id).id
        if not path.is_file():
            raise not_found("File", file_id)
        return path

    def sha256(self, file_id: str) -> str:
        """Of a file's bytes, in hexadecimal.

        Raises:
            ApiError: 404, as `get`.
        """
        digest = self._store.get(Digest, self.get(file_id).id)
        assert digest is not None  # noted with the file
        return digest.sha256

    def link(self, file_id: str, target: Path) -> None:
        """Give a file's bytes a second name, which stays when the file is deleted.

        Raises:
            ApiError: 404, as `get`.
        """
        source = self.content(file_id)
        try:
            with _full_disk():
                link_or_copy(source, target)
        except FileNotFoundError:  # deleted in this moment
            raise not_found("File", file_id) from None

    # ----------------------------------------------------------------- deleting

    def delete(self, file_id: str) -> None:
        """Delete a file. A job that was created with it keeps its own link.

        Raises:
            ApiError: 404, as `get`.
        """
        self._remove(self.get(file_id))

    def sweep(self) -> None:
        """Delete the files whose time is over."""
        for file in self._expiring():
            self._remove(file)

    def _expiring(self) -> builtins.list[File]:
        return [file for file in self._store.list(File).data if self._expired(file)]

    def _expired(self, file: File) -> bool:
        return file.expires_at is not None and file.expires_at <= self._clock()

    def _remove(self, file: File) -> None:
        with self._store.transaction():
            self._store.delete(File, file.id)
            self._store.delete(Digest, file.id)
        (self.folder / file.id).unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file: a hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


class _Incoming:
    """A file on its way in: written, counted and hashed piece by piece."""

    def __init__(self, path: Path, most: int):
        self.size, self._most, self._path = 0, most, path
        self._hash = hashlib.sha256()
        self._file = open(path, "xb")  # noqa: SIM115 (closed by finish or discard)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.size > self._most:
            raise ApiError(
                413,
                f"the file is larger than {self._most:,} bytes, the limit here",
                code="file_too_large",
                param="file",
            )
        self._hash.update(piece)
        self._file.write(piece)

    def finish(self, target: Path) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._path, target)
        sync_folder(target.parent)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is not wanted any more
            self._file.close()
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """A full disk, in words."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise ApiError(
            507, "The disk of the server is full: free some space and try again.", type="server_error", code="disk_full"
        ) from error
