"""Several stored views of each sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import embedcache
from embedcache import Manifest
from embedcache.data.reports import ReportPolicy
from embedcache.data.views import ViewPolicy
from embedcache.encoders.base import Encoded
from embedcache.errors import FingerprintMismatchError, SettingsError


def test_views_of_images_are_addressed_by_id_and_view(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(13)
    files = manifest.frame["image"].tolist()
    (manifest.root / files[5]).write_bytes(b"")
    (manifest.root / files[7]).write_bytes((manifest.root / files[2]).read_bytes())
    options = {"store_dtype": "float32", "shard_rows": 10, "batch_size": 4}
    report = embedcache.extract(manifest, image_encoder, tmp_path / "s", views=3, **options)
    assert (report.n_asked, report.n_embedded, report.n_failed) == (13, 12, 1)
    store = embedcache.open_store(tmp_path / "s", verify="digest")
    assert embedcache.verify_store(tmp_path / "s") == []
    assert (len(store), store.layout.views) == (36, 3)
    assert store.ids[:6] == ["s000"] * 3 + ["s001"] * 3
    assert store.views[:6].tolist() == [0, 1, 2, 0, 1, 2]
    ids = [i for i in manifest.frame["id"] if i != "s005"]
    for i, file in zip(manifest.frame["id"], files, strict=True):
        if i == "s005":
            continue
        prepared = image_encoder.prepare_views(manifest.path(file), 3, ViewPolicy())
        for view in range(3):
            alone = image_encoder.encode([prepared[view]]).embeddings[0]
            np.testing.assert_allclose(store.gather(store.rows([i], view=view))[0], alone, atol=1e-5)
    plain = embedcache.extract(manifest, image_encoder, tmp_path / "plain", **options)
    assert plain.n_embedded == 12
    np.testing.assert_allclose(
        store.gather(store.rows(ids)), (p := embedcache.open_store(tmp_path / "plain")).gather(p.rows(ids)), atol=1e-5
    )
    first = store.gather(store.rows(ids, view=1))
    assert (np.abs(first - store.gather(store.rows(ids))).max(axis=1) > 1e-4).all()
    np.testing.assert_allclose(first[ids.index("s002")], first[ids.index("s007")], atol=1e-5)  # drawn from the content


def test_views_of_reports_are_samples_of_their_sentences(make_manifest, text_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(8)
    frame = manifest.frame.copy()
    frame["report"] = ["Heart size is normal. The lungs are clear. There is an opacity."] * 4 + ["Clear lungs."] * 4
    same = Manifest(frame, name="same", root=manifest.root)
    report = embedcache.extract(same, text_encoder, tmp_path / "s", views=4, tokens=True)
    assert report.n_embedded == 8
    store = embedcache.open_store(tmp_path / "s", verify="digest")
    lengths = [len(store.tokens[int(store.rows(["s000"], view=v)[0])]) for v in range(4)]
    assert lengths[0] == max(lengths) > min(lengths)
    for view in range(4):
        rows = store.gather(store.rows(["s004", "s005"], view=view))
        np.testing.assert_array_equal(rows[0], store.gather(store.rows(["s004"]))[0])  # one sentence is every view


def test_an_id_has_all_its_views_or_none(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(6)

    class Spoiling:
        """Gives NaN for the second view of one image."""

        def __init__(self) -> None:
            names = ("modality", "dim", "token_dim", "token_grid", "record", "fingerprint", "prepare_views")
            for name in names:
                setattr(self, name, getattr(image_encoder, name))
            self.spoiled = image_encoder.prepare_views(manifest.path(manifest.frame["image"][2]), 2, ViewPolicy())[1]

        def encode(self, batch, *, tokens=False):
            rows = image_encoder.encode(batch).embeddings.copy()
            rows[[p.key == self.spoiled.key for p in batch]] = np.nan
            return Encoded(rows)

    report = embedcache.extract(manifest, Spoiling(), tmp_path / "s", views=2)
    assert [(f.id, f.reason) for f in report.failures] == [("s002", "not-finite")]
    store = embedcache.open_store(tmp_path / "s", verify="digest")
    assert "s002" not in store.ids
    assert len(store) == 10


def test_how_views_are_drawn_is_part_of_the_fingerprint(make_manifest, image_encoder, tmp_path: Path) -> None:
    manifest = make_manifest(4)
    embedcache.extract(manifest, image_encoder, tmp_path / "s", views=2)
    said = json.loads((tmp_path / "s" / "store.json").read_text())["layout"]
    assert (said["views"], said["view_policy"]["rotation_degrees"]) == (2, 10.0)
    for other, told in (
        ({"views": 3}, "stored with views 2, asked for 3"),
        ({"views": 1}, "stored with view_policy .*; views 2, asked for 1"),
        (
            {"views": 2, "view_policy": ViewPolicy(seed=1)},
            "stored with view_policy .*'seed': 0.*, asked for .*'seed': 1",
        ),
    ):
        with pytest.raises(FingerprintMismatchError, match=told):
            embedcache.extract(manifest, image_encoder, tmp_path / "s", **other)
    assert embedcache.extract(manifest, image_encoder, tmp_path / "s", views=2).n_present == 4
    for wrong, message in (
        ({"views": 0}, "views is 0"),
        ({"views": 9, "shard_rows": 8}, "at most shard_rows"),
        ({"view_policy": ViewPolicy()}, "there is no view to draw"),
    ):
        with pytest.raises(ValueError, match=message):
            embedcache.extract(manifest, image_encoder, tmp_path / "t", **wrong)


def test_training_and_repair_take_stores_with_views(make_manifest, image_encoder, text_encoder, tmp_path: Path) -> None:
    from embedcache.stage_two.train import TrainConfig

    manifest = make_manifest(40)
    embedcache.extract(manifest, image_encoder, tmp_path / "i", views=2, shard_rows=16)
    embedcache.extract(manifest, text_encoder, tmp_path / "t", views=2)
    config = TrainConfig(epochs=1, batch_size=8, projection_dim=24, ff_dim=32)
    assert embedcache.train(manifest, tmp_path / "i", tmp_path / "t", tmp_path / "run", config=config).n_train > 8
    shard = next((tmp_path / "i").glob("shard-00001-*.h5"))
    shard.write_bytes(shard.read_bytes()[:-1])
    from embedcache.store.repair import repair_store

    repair_store(tmp_path / "i")
    assert embedcache.extract(manifest, image_encoder, tmp_path / "i", views=2, shard_rows=16).n_embedded == 8
    assert embedcache.verify_store(tmp_path / "i") == []


@pytest.mark.parametrize(("unit", "rule"), [("caption", "clean"), ("caption", "paper"), ("report", "clean")])
def test_views_of_reports_differ_under_every_rule(
    make_manifest, checkpoints: Path, tmp_path: Path, unit: str, rule: str
) -> None:
    """The paper's rule leaves no full stop between the sentences that it keeps."""
    manifest = make_manifest(2)
    frame = manifest.frame.copy()
    frame["report"] = "FINDINGS: Heart size is normal. The lungs are clear today. IMPRESSION: There is an opacity here."
    same = Manifest(frame.iloc[:1], name="same", root=manifest.root)
    policy = ReportPolicy(unit=unit, rule=rule)
    encoder = embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", report=policy, device="cpu")
    embedcache.extract(same, encoder, tmp_path / "s", views=8, tokens=True)
    store = embedcache.open_store(tmp_path / "s")
    assert len({len(store.tokens[row]) for row in range(8)}) > 1


def test_single_sentences_have_no_views(make_manifest, checkpoints: Path, tmp_path: Path) -> None:
    encoder = embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", report=ReportPolicy(unit="sentence"), device="cpu")
    with pytest.raises(SettingsError, match="2 views of single sentences are all alike"):
        embedcache.extract(make_manifest(4), encoder, tmp_path / "s", views=2)
