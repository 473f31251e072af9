"""How bytes become part of a store: written aside, synced, then linked to their name exclusively.

All writing of stores, and all reading of their documents, goes through `disk`, one system call a method, so that faults
can be put under it. Nothing is ever opened for writing under its final name and nothing is replaced: a name, once
there, keeps its bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import stat
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from embedcache.errors import StoreFormatError, StoreNotFoundError, StoreWriteError
from embedcache.fingerprint import digest_file
from embedcache.store import layout

Piece = bytes | memoryview


class Disk:
    """The system calls that the store makes to write, and to read its documents."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, data: Piece) -> int:
        return os.write(descriptor, data)

    def seek(self, descriptor: int, offset: int) -> None:
        os.lseek(descriptor, offset, os.SEEK_SET)

    def allocate(self, descriptor: int, size: int) -> None:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(descriptor, 0, size)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def mkdir(self, path: Path) -> None:
        path.mkdir(mode=0o700)

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, path: Path) -> bytes:
        return path.read_bytes()


disk = Disk()


@dataclass(frozen=True)
class CommittedShard:
    """What became of one shard: the winner's document, and whether it is ours."""

    document: dict[str, Any]
    won: bool


def make_directory(path: Path) -> None:
    """Creates a directory and those above it, readable by their owner only: embeddings are patient data."""
    if path.is_dir():
        return
    try:
        if not path.parent.is_dir():
            make_directory(path.parent)
        with contextlib.suppress(FileExistsError):
            disk.mkdir(path)
        disk.sync_directory(path.parent)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file of that name is there")
    except OSError as error:
        if isinstance(error, StoreWriteError):
            raise
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
    with _written_aside(path, [data]) as written:
        won = _link(written.path, path)
    _sync(path.parent)
    return won


def publish_shard(store: Path, number: int, image: Iterable[Piece], document: dict[str, Any]) -> CommittedShard:
    """Publishes a shard's bytes, then the document that alone makes it count.

    Two writers may both link an `.h5`; the document decides. The loser removes its own bytes, unless they
    are the winner's.

    Args:
        image: the bytes of the file, read once.
        document: what the shard's document says beside file name, SHA-256 and size.

    Raises:
        StoreWriteError: the bytes could not be written.
        StoreFormatError: the shard's name is taken by a damaged file.
    """
    doc_path = store / layout.shard_doc_name(number)
    if doc_path.exists():
        return CommittedShard(read_document(doc_path), won=False)
    with _written_aside(doc_path.with_suffix(".h5"), image) as written:
        file = store / layout.shard_file_name(number, written.sha256)
        while not (_link(written.path, file) or _is_same(file, written)):
            pass  # a rival with the same bytes has just lost to a third and taken them away
    _sync(store)
    ours = {**document, "file": file.name, "sha256": written.sha256, "size": written.size}
    if publish(doc_path, layout.seal(ours)):
        return CommittedShard(ours, won=True)
    winner = read_document(doc_path)
    if winner["file"] != file.name:
        with contextlib.suppress(OSError):  # another loser with the same bytes may have removed it
            disk.unlink(file)
    return CommittedShard(winner, won=False)


def publish_packed(path: Path, image: Iterable[Piece], size: int, document: dict[str, Any]) -> None:
    """Publishes a store that is one file: its document in a user block, then the HDF5 part.

    Args:
        image: the bytes after the user block, read once; the file may be larger than memory.
        size: of the whole file: space is allocated before the first byte is written.
        document: what the user block says beside SHA-256 and size.

    Raises:
        StoreWriteError: the bytes could not be written, or the name is taken.
    """
    with _written_aside(path, image, size=size, packed=document) as written:
        if not _link(written.path, path):
            raise StoreWriteError(f"{path}: is there already; name another file, or remove it first")
    _sync(path.parent)


def read_document(path: Path) -> dict[str, Any]:
    """Reads a sealed document.

    Raises:
        StoreNotFoundError: it is not there.
        StoreFormatError: it cannot be read, or is damaged.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise StoreFormatError(f"{path}: no regular file, expected a document; it was not opened")
        data = disk.read(path)
    except FileNotFoundError as error:
        raise StoreNotFoundError(f"{path}: no such document; run 'embedcache verify {path.parent}'") from error
    except OSError as error:
        raise StoreFormatError(f"{path}: cannot be read ({error.strerror}); nothing was changed") from error
    return layout.unseal(data, path)


def set_aside(path: Path, folder: Path) -> Path:
    """Moves a published file, or whatever else has its name, out of the way into `folder`; gives its place there."""
    make_directory(folder)
    for k in range(10_000):
        target = folder / (f"{path.name}.{k}" if k else path.name)
        if os.path.lexists(target):
            continue
        if not stat.S_ISREG(path.lstat().st_mode):  # a directory or a link: there are no bytes to lose by a rename
            disk.rename(path, target)
            _sync(path.parent)
            return target
        if _link(path, target):
            _sync(folder)
            try:
                disk.unlink(path)
            except OSError as error:
                raise StoreWriteError(f"{path}: cannot be moved to {target} ({error.strerror})") from error
            _sync(path.parent)
            return target
    raise StoreWriteError(f"{folder}: no free name for {path.name}; empty it first")


def sweep(folder: Path, *, of: str = "") -> int:
    """Removes temporaries whose owner, on this host, is dead; returns how many.

    Args:
        of: only those of the file of this name, in a folder that is not ours alone.
    """
    swept = 0
    for path in folder.glob(".*.tmp"):
        if of and not path.name.startswith(f".{of}."):
            continue
        owner = path.name.rsplit(".", 4)  # ('.<name>', host, pid, uuid, 'tmp')
        if len(owner) == 5 and owner[1] == _host() and owner[2].isdigit() and not _alive(int(owner[2])):
            with contextlib.suppress(OSError):
                disk.unlink(path)
                swept += 1
    return swept


def temporary_name(path: Path) -> Path:
    """Where to write what is to be called `path`: beside it, under a name that says whose it is."""
    return path.parent / f".{path.name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex}.tmp"


@dataclass(frozen=True)
class _Written:
    path: Path
    sha256: str
    size: int


@contextlib.contextmanager
def _written_aside(
    path: Path, pieces: Iterable[Piece], *, size: int | None = None, packed: dict[str, Any] | None = None
) -> Iterator[_Written]:
    """A temporary beside `path` with all of the pieces on disk; it is gone at the end.

    Args:
        size: where known, allocated first, so that a full disk is met before the first piece.
        packed: a document for the user block before the pieces, sealed with their SHA-256.
    """
    temporary = temporary_name(path)
    try:
        try:
            written = _write_synced(temporary, pieces, size, packed)
        except OSError as error:
            if isinstance(error, StoreWriteError):  # of reading another store while writing this one
                raise
            raise StoreWriteError(
                f"{path}: cannot write{f' {size:,} bytes' if size else ''} ({error.strerror}; {_free(path.parent)}); "
                "nothing of it was kept. Mend that and run the same command again: it goes on where it stopped"
            ) from error
        yield written
    finally:
        with contextlib.suppress(OSError):
            disk.unlink(temporary)


def _write_synced(path: Path, pieces: Iterable[Piece], size: int | None, packed: dict[str, Any] | None) -> _Written:
    descriptor = disk.create(path)
    sha256, n_written = hashlib.sha256(), 0
    try:
        if size is not None:
            disk.allocate(descriptor, size)
        if packed is not None:
            disk.seek(descriptor, layout.USER_BLOCK_BYTES)
            n_written = layout.USER_BLOCK_BYTES
        for piece in pieces:
            sha256.update(piece)
            n_written += len(piece)
            _write_all(descriptor, piece)
        if packed is not None:
            disk.seek(descriptor, 0)
            sealed = {**packed, "sha256": sha256.hexdigest(), "size": n_written}
            _write_all(descriptor, layout.seal(sealed).ljust(layout.USER_BLOCK_BYTES))
        disk.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.close(descriptor)
        raise
    disk.close(descriptor)
    return _Written(path, sha256.hexdigest(), n_written)


def _write_all(descriptor: int, piece: Piece) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[disk.write(descriptor, rest) :]


def _link(temporary: Path, path: Path) -> bool:
    """Links a written file to its name; False if the name was taken by another file."""
    try:
        disk.link(temporary, path)
    except OSError as error:
        # NFS may repeat a link that succeeded, or report an error for it: the inode tells
        if path.exists() and path.stat().st_ino == temporary.stat().st_ino:
            return True
        if isinstance(error, FileExistsError):
            return False
        raise StoreWriteError(
            f"{path}: cannot link a written file to its name ({error.strerror}); "
            "the store needs a file system with hard links"
        ) from error
    return True


def _is_same(file: Path, written: _Written) -> bool:
    """Whether a name that was taken has the bytes it names; False if it is free by now.

    Raises:
        StoreFormatError: other bytes, on which nothing is built.
    """
    try:
        found = file.lstat()
        same = stat.S_ISREG(found.st_mode) and found.st_size == written.size and digest_file(file) == written.sha256
    except FileNotFoundError:
        return False
    if not same:
        raise StoreFormatError(
            f"{file}: not the bytes that its name gives, SHA-256 {written.sha256[:12]}... expected: damaged before it "
            f"counted; run 'embedcache repair {file.parent}', then the same command again"
        )
    return True


def _sync(directory: Path) -> None:
    try:
        disk.sync_directory(directory)
    except OSError as error:
        raise StoreWriteError(
            f"{directory}: cannot sync the directory ({error.strerror}); run the same command again"
        ) from error


def _free(directory: Path) -> str:
    try:
        free = os.statvfs(directory)
    except OSError:
        return "free space unknown"
    return f"{free.f_bavail * free.f_frsize:,} bytes free"


@cache
def _host() -> str:
    """This host, this boot and this container: only there does a process id mean the same process."""
    facts = []
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            facts.append(str(Path(path).readlink()) if path.endswith("pid") else Path(path).read_text())
    name = socket.gethostname().replace(".", "-") or "localhost"
    return f"{name}-{hashlib.sha256(''.join(facts).encode()).hexdigest()[:8]}"


def _alive(pid: int) -> bool:
    """Whether a process may still write; one that has ended and that nobody has reaped may not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):  # gone meanwhile, or a system that does not tell
        return True
