"""Publishing: all or nothing, first come first kept, nothing left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedcache.errors import FingerprintMismatchError, StoreWriteError
from embedcache.store import commit, layout
from embedcache.store.catalogue import open_or_create
from embedcache.store.layout import Layout


def test_the_first_to_publish_wins(tmp_path: Path) -> None:
    assert commit.publish(tmp_path / "x.json", b"first")
    assert not commit.publish(tmp_path / "x.json", b"second")
    assert (tmp_path / "x.json").read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_shard_counts_through_its_document_alone(tmp_path: Path) -> None:
    ours = commit.publish_shard(tmp_path, 0, [b"bytes ", b"of one"], {"n": 1})
    again = commit.publish_shard(tmp_path, 0, [b"bytes ", b"of one"], {"n": 1})
    assert ours.won
    assert not again.won
    assert again.document["sha256"] == ours.document["sha256"]
    assert (tmp_path / ours.document["file"]).read_bytes() == b"bytes of one"


def test_the_loser_with_other_bytes_leaves_the_winners(tmp_path: Path, monkeypatch) -> None:
    """Both link an .h5 before either document: the document decides and the loser takes its own away."""
    winner = commit.publish_shard(tmp_path, 0, [b"winner"], {})
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: False if self.name == "shard-00000.json" else exists(self))
    loser = commit.publish_shard(tmp_path, 0, [b"loser"], {})
    assert not loser.won
    assert loser.document["sha256"] == winner.document["sha256"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [winner.document["file"], "shard-00000.json"]


def test_a_name_that_a_rival_takes_away_again_is_linked_anew(tmp_path: Path, monkeypatch) -> None:
    """A rival with the same bytes linked them first, lost to a third writer, and removed them under our eyes."""
    real, seen = commit._link, []

    def link(temporary: Path, path: Path) -> bool:
        seen.append(path.name)
        return False if len(seen) == 1 else real(temporary, path)

    monkeypatch.setattr(commit, "_link", link)
    ours = commit.publish_shard(tmp_path, 0, [b"bytes"], {"n": 1})
    assert ours.won
    assert seen[0] == seen[1] == ours.document["file"]
    assert (tmp_path / ours.document["file"]).read_bytes() == b"bytes"


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES])
def test_a_failing_call_is_a_typed_error_and_leaves_nothing(tmp_path: Path, monkeypatch, call: str, code: int) -> None:
    real = getattr(os, call)

    def failing(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(StoreWriteError, match=r"x\.h5.*" + os.strerror(code)):
        commit.publish(tmp_path / "x.h5", b"data")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, call, real)
    assert commit.publish(tmp_path / "x.h5", b"data")


def test_short_writes_are_finished(tmp_path: Path, monkeypatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    commit.publish(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_a_link_that_worked_but_failed_counts(tmp_path: Path, monkeypatch) -> None:
    """NFS may carry out a link and still report an error; the inode tells."""
    real = os.link

    def flaky(source: Path, target: Path) -> None:
        real(source, target)
        raise OSError(errno.EIO, "reply lost")

    monkeypatch.setattr(os, "link", flaky)
    assert commit.publish(tmp_path / "x", b"data")


def test_only_temporaries_of_dead_owners_are_swept(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host = commit._host()
    unreaped = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, unreaped.pid, os.WEXITED | os.WNOWAIT)
    names = {
        "dead": f".shard-00000-0123456789ab.h5.{host}.{int(dead.stdout)}.aa.tmp",
        "dead, and its parent has not asked": f".shard-00000-0123456789ab.h5.{host}.{unreaped.pid}.dd.tmp",
        "alive": f".shard-00000-0123456789ab.h5.{host}.{os.getpid()}.bb.tmp",
        "elsewhere": f".shard-00000-0123456789ab.h5.otherhost.{int(dead.stdout)}.cc.tmp",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"")
    assert commit.sweep(tmp_path) == 2
    unreaped.wait()
    assert {p.name for p in tmp_path.iterdir()} == {names["alive"], names["elsewhere"]}


def test_a_store_refuses_another_encoder(tmp_path: Path) -> None:
    def document(encoder_fingerprint: str, dtype: str) -> dict:
        return layout.store_document(
            encoder={}, modality="image", encoder_fingerprint=encoder_fingerprint, store_layout=Layout(dtype, 4)
        )

    open_or_create(tmp_path / "s", document("one", "float16"))
    open_or_create(tmp_path / "s", document("one", "float16"))
    with pytest.raises(FingerprintMismatchError, match=r"expected .*another encoder.*--store"):
        open_or_create(tmp_path / "s", document("two", "float16"))
    with pytest.raises(FingerprintMismatchError):
        open_or_create(tmp_path / "s", document("one", "float32"))


def test_names_of_files_round_trip() -> None:
    assert layout.plan_number(layout.plan_name(7)) == 7
    assert layout.shard_doc_number(layout.shard_doc_name(123456)) == 123456
    assert layout.shard_file_name(3, "ab" * 32) == "shard-00003-abababababab.h5"
    assert layout.shard_doc_number("shard-00003-abababababab.h5") is None
