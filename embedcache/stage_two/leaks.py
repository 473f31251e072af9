"""What is scored and was learnt from: test images among an Adaptor's own, another dataset that is not quite another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from embedcache.data.audit import leak_warning, overlaps, unknown_overlaps
from embedcache.data.manifest import Manifest
from embedcache.output import write_whole
from embedcache.stage_two.pairs import Pairs
from embedcache.stage_two.tensors import input_digests
from embedcache.store.store import Store

_TRAINED_ON = "trained_on.parquet"


def write_trained_on(run_dir: Path, pairs: Pairs) -> None:
    """Keeps beside a run which images it learns from: their ids, and digests of their files where these are known.

    Raises:
        OutputError: it cannot be written.
    """
    side = pairs.image
    digests = side.store.input_digests[side.rows[side.index[:, 0]]]
    table = pd.DataFrame({"id": pairs.ids, "digest": [d.tobytes().hex() if d.any() else "" for d in digests]})
    write_whole(run_dir / _TRAINED_ON, lambda path: table.to_parquet(path, index=False), mode=0o600)


def leak_words(manifest: Manifest, store: Store, run_dir: str | Path | None, tested: Iterable[str]) -> str:
    """One line on what splits share and on what an Adaptor has seen; blank where there is nothing to say.

    Args:
        run_dir: of the Adaptor; None for none.
        tested: ids of the test images, in `store`; none where it is no test.
    """
    seen = "" if run_dir is None else seen_warning(run_dir, manifest.name, tested, store)
    return "; ".join(filter(None, [leak_warning(manifest, input_digests(store)), seen]))


def seen_warning(run_dir: str | Path, name: str, tested: Iterable[str], store: Store) -> str:
    """A warning where an Adaptor learnt from images that it is tested on: by their files, else by their ids.

    Args:
        run_dir: a run that may be older than these records; then nothing is known, and nothing said.
        name: of the dataset.
        tested: ids of the test images, in `store`.
    """
    path, tested, digests = Path(run_dir) / _TRAINED_ON, list(tested), input_digests(store)
    if not path.is_file():
        return ""
    seen = pd.read_parquet(path)
    files, ids = set(seen["digest"]) - {""}, set(seen["id"][seen["digest"] == ""])
    shared = sum(digests[i].hex() in files if i in digests else i in ids for i in tested)
    if not shared:
        return ""
    return (
        f"{name}: of {len(tested)} tested {shared} are among the images that the Adaptor learnt from: "
        "scores on test are too good"
    )


def overlap_warnings(ours: Manifest, theirs: Manifest, our_store: Store, their_store: Store) -> list[str]:
    """What another dataset has in common with what heads learn from, and what cannot be told."""
    files = [{i: digest.hex() for i, digest in input_digests(s).items()} for s in (our_store, their_store)]
    found = [
        f"{s.n} {s.kind}s stand in {s.left} and in {s.right}: the external score is too good"
        for s in overlaps([ours, theirs], files)
        if s.is_leak and s.left in (f"{ours.name}:train", f"{ours.name}:valid")
    ]
    return found + unknown_overlaps([ours, theirs])
