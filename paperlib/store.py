"""A store of results: one checked, atomically written record for every cell of a sweep.

A store is a folder. A record `<key>.json` appears in one step, whole and on disk, or not at all:

    lock <key>.part -> write -> fsync -> rename to <key>.json -> fsync of the folder

(Should the last one fail, the record is there for as long as the machine stands.)

`<key>.part` is at once the claim on the cell, the room kept for its record, and the temporary
file. Its lock is the kernel's (flock): it ends with the process that holds it, however that ends,
so no claim outlives its owner and none has to be guessed stale. Across machines this needs a
shared file system that carries locks (NFS version 4, Lustre mounted with flock, GPFS).
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from paperlib.grid import from_json, to_json

try:
    import fcntl
except ImportError:  # no flock on Windows: reading works, running asks for WSL
    fcntl = None

# Bytes kept for a record before its cell runs, so that a full disk shows before the work is done.
ROOM = 65536

# A record's first bytes; 64 hex digits of SHA-256 over the body follow, then the body.
_HEAD, _MIDDLE, _TAIL = b'{"sha256":"', b'","record":', b"}\n"
_BODY = len(_HEAD) + 64 + len(_MIDDLE)

_held: set[int] = set()


def _let_go_in_child() -> None:
    # A forked child shares its parent's locks and would keep them after the parent's death.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


class CorruptRecord(ValueError):
    """A record that is half-written, changed, or in another's place."""


@dataclass
class Claim:
    """The sole right to run one cell, held while its `.part` file is locked."""

    store: Store
    key: str
    descriptor: int
    written: bool = False

    def write(self, record: dict) -> None:
        """Put the record in place, in one step.

        Raises:
            OSError: if the disk is full or cannot be written; no record is there then.
        """
        body = to_json(record).encode()
        digest = hashlib.sha256(body).hexdigest().encode()
        data = memoryview(_HEAD + digest + _MIDDLE + body + _TAIL)
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        while data:
            data = data[os.write(self.descriptor, data) :]
        os.ftruncate(self.descriptor, os.lseek(self.descriptor, 0, os.SEEK_CUR))
        os.fsync(self.descriptor)
        os.replace(self.store.part(self.key), self.store.file(self.key))
        self.written = True
        # The record is there: if this fails, and the machine as well, its cell runs once more.
        with suppress(OSError):
            _sync_folder(self.store.path)


class Store:
    """A folder of records, made if it is not there.

    Args:
        path: the folder; for a sweep over several machines, one that all of them see.

    Raises:
        OSError: if the folder cannot be made.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Open the folder."""
        self.path = Path(path).absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        self.id = self._identity()

    def _identity(self) -> str:
        """The name in `store.json`, by which a worker knows that it sees the driver's folder."""
        marker = self.path / "store.json"
        if not marker.exists():
            draft = self.path / f"store-{uuid.uuid4().hex}.part"
            try:
                with open(draft, "w") as file:
                    file.write(to_json({"format": 1, "id": uuid.uuid4().hex}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.link(draft, marker)  # unlike a rename, this leaves the marker of a faster one
            except FileExistsError:
                pass
            finally:
                draft.unlink(missing_ok=True)
            _sync_folder(self.path)
        try:
            found = from_json(marker.read_text())
        except ValueError as error:
            raise ValueError(f"{marker} is damaged: delete it, the records stay") from error
        if found.get("format") != 1:
            raise ValueError(f"{self.path} is a store of format {found.get('format')}, expected 1")
        return found["id"]

    def file(self, key: str) -> str:
        """Where the record of a cell is."""
        return f"{self.path}/{key}.json"

    def part(self, key: str) -> str:
        """Where the claim on a cell is."""
        return f"{self.path}/{key}.part"

    def read(self, key: str) -> dict | None:
        """The record of a cell, None if there is none.

        Raises:
            CorruptRecord: if the file is not what was written.
        """
        data = self._load(key)
        return None if data is None else _whole(key, data)

    def _load(self, key: str) -> bytes | None:
        try:
            descriptor = os.open(self.file(key), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            data = os.read(descriptor, ROOM)
            while more := os.read(descriptor, ROOM):
                data += more
        finally:
            os.close(descriptor)
        return data

    def keys(self) -> list[str]:
        """The names of all records, whole or not, sorted."""
        names = os.listdir(self.path)
        return sorted(n[:-5] for n in names if n.endswith(".json") and n != "store.json")

    def read_all(self, keys: Iterable[str]) -> tuple[dict[str, dict], list[str]]:
        """The whole records among `keys` by key, and the keys of the corrupt ones."""
        keys = list(keys)
        shares = [keys[i : i + 200] for i in range(0, len(keys), 200)]
        records, corrupt = {}, []
        # Threads, because on a cold or remote disk nearly all the time is spent waiting.
        with ThreadPoolExecutor(16) as readers:
            loaded = readers.map(lambda share: [self._load(key) for key in share], shares)
            for key, data in zip(keys, itertools.chain.from_iterable(loaded), strict=True):
                try:
                    if data is not None:
                        records[key] = _whole(key, data)
                except CorruptRecord:
                    corrupt.append(key)
        return records, corrupt

    @contextmanager
    def claim(self, key: str) -> Iterator[Claim | None]:
        """The sole right to run a cell, or None while another process has it.

        Raises:
            OSError: if there is no room for a record.
        """
        descriptor = self._lock(key)
        if descriptor is None:
            yield None
            return
        claim = Claim(self, key, descriptor)
        try:
            _keep_room(descriptor)
            yield claim
        finally:
            # What cannot be tidied up claims nothing without its lock: no reason to lose a result.
            with suppress(OSError):
                if not claim.written:  # after a write, a file of that name is another's claim
                    os.unlink(self.part(key))
            _held.discard(descriptor)
            with suppress(OSError):
                os.close(descriptor)

    def _lock(self, key: str) -> int | None:
        if fcntl is None:
            raise OSError("a sweep needs the file locks of Linux, macOS or WSL")
        while True:
            descriptor = os.open(self.part(key), os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between open and lock its owner may have renamed or removed the file.
                if os.path.samestat(os.fstat(descriptor), os.stat(self.part(key))):
                    _held.add(descriptor)
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def _whole(key: str, data: bytes) -> dict:
    """The record of a file's bytes, if they are what was written for this cell."""
    body = data[_BODY : -len(_TAIL)]
    digest = hashlib.sha256(body).hexdigest().encode()
    if data != _HEAD + digest + _MIDDLE + body + _TAIL:
        raise CorruptRecord(f"record {key} does not match its checksum")
    record = from_json(body)
    if record["key"] != key:
        raise CorruptRecord(f"record {key} holds the cell {record['key']}")
    return record


def _keep_room(descriptor: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, ROOM)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
