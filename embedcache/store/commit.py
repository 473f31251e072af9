"""How bytes become part of a store: written aside, synced, then linked to their name exclusively.

All file writing of the store goes through this module. Nothing is ever opened for writing under its final
name and nothing is replaced: a name, once there, keeps its bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.errors import StoreWriteError
from embedcache.store import layout


@dataclass(frozen=True)
class CommittedShard:
    """What became of one shard: the winner's document, and whether it is ours."""

    document: dict[str, Any]
    won: bool


def make_directory(path: Path) -> None:
    """Creates a store directory, readable by its owner only: embeddings are patient data."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        _sync_directory(path.parent)
    except OSError as error:
        raise StoreWriteError(
            f"{path}: cannot create the store directory ({error.strerror}); name another with --store"
        ) from error


def publish(path: Path, data: bytes) -> bool:
    """Makes `data` appear under `path` whole or not at all.

    Returns:
        True if this call put it there, False if the name was taken before.

    Raises:
        StoreWriteError: the bytes could not be written; the name is as it was.
    """
    with _written_aside(path, data) as temporary:
        won = _link(temporary, path)
    _sync_directory(path.parent)
    return won


def publish_shard(store: Path, number: int, data: bytes, document: dict[str, Any]) -> CommittedShard:
    """Publishes a shard's bytes, then the document that alone makes it count.

    Two writers may both link an `.h5`; the document decides. The loser removes its own bytes, unless they
    are the winner's.

    Args:
        document: what the shard's document says beside file name, SHA-256 and size.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    file = store / layout.shard_file_name(number, sha256)
    doc_path = store / layout.shard_doc_name(number)
    ours = {**document, "file": file.name, "sha256": sha256, "size": len(data)}
    if not doc_path.exists():
        publish(file, data)
        if publish(doc_path, layout.seal(ours)):
            return CommittedShard(ours, won=True)
    winner = layout.unseal(doc_path.read_bytes(), doc_path)
    if winner["file"] != file.name:
        file.unlink(missing_ok=True)
    return CommittedShard(winner, won=False)


def sweep(store: Path) -> int:
    """Removes temporaries whose owner, on this host, is dead; returns how many."""
    host, swept = _host(), 0
    for path in store.glob(".*.tmp"):
        owner = path.name.rsplit(".", 4)  # ('.<name>', host, pid, uuid, 'tmp')
        if len(owner) == 5 and owner[1] == host and owner[2].isdigit() and not _alive(int(owner[2])):
            path.unlink(missing_ok=True)
            swept += 1
    return swept


@contextlib.contextmanager
def _written_aside(path: Path, data: bytes) -> Iterator[Path]:
    temporary = path.parent / f".{path.name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex}.tmp"
    try:
        try:
            _write_synced(temporary, data)
        except OSError as error:
            raise StoreWriteError(
                f"{path}: cannot write {len(data):,} bytes ({error.strerror}); nothing of it was kept. "
                "Mend that and run the same command again: it goes on where it stopped"
            ) from error
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return path.stat().st_ino == temporary.stat().st_ino  # NFS may repeat a link that succeeded
    except OSError as error:
        if path.exists() and path.stat().st_ino == temporary.stat().st_ino:
            return True
        raise StoreWriteError(
            f"{path}: cannot link a written file to its name ({error.strerror}); "
            "the store needs a file system with hard links"
        ) from error
    return True


def _sync_directory(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreWriteError(f"{path}: cannot sync the directory ({error.strerror})") from error


def _host() -> str:
    return socket.gethostname().replace(".", "-") or "localhost"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
