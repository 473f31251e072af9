"""New images get the answers that their cached embeddings got, and a bad file costs its own row."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import embedcache
from embedcache import Predictor
from embedcache.errors import (
    DeviceError,
    EncoderError,
    FingerprintMismatchError,
    OutputError,
    RunNotFoundError,
    RunStateError,
    SettingsError,
)
from embedcache.predicting.chain import rounded
from embedcache.predicting.mask_files import mask_files
from embedcache.stage_two.adaptor import read_adaptor
from embedcache.store.values import from_stored, to_stored

HEADS = ("mlp", "linear", "logistic")


@pytest.fixture(scope="module")
def predictor(run) -> Predictor:
    return Predictor(run.run_dir, device="cpu")


def of_cache(run, label: str, head: str, column: str) -> pd.Series:
    """What the probe said of the test images, by id and class."""
    table = run.probed[label].query(f"head == '{head}' and test == 'internal'")
    return table.set_index([table["id"].astype(str), table["class"].astype(str)])[column]


@pytest.mark.parametrize("head", HEADS)
def test_it_says_of_files_what_the_probe_said_of_their_embeddings(run, head: str) -> None:
    ids = sorted(set(of_cache(run, "opacity", head, "label").index.get_level_values(0)))
    assert len(ids) == 12
    answers = embedcache.predict(run.run_dir, [run.file(i) for i in ids], head=head, device="cpu", batch_size=5)
    assert answers["file"].tolist() == [str(run.file(i)) for i in ids]
    assert (answers["failure"] == "").all()
    columns = {
        "opacity": ("opacity", "opacity"), "two.opacity": ("two", "opacity"), "two.even": ("two", "even"),
        "kind.first": ("kind", "first"), "kind.second": ("kind", "second"), "kind.third": ("kind", "third"),
    }  # fmt: skip
    for column, (label, name) in columns.items():
        for suffix, of_probe in (("", "calibrated"), (".raw", "probability")):
            expected = of_cache(run, label, head, of_probe)[[(i, name) for i in ids]]
            np.testing.assert_allclose(answers[column + suffix], expected, atol=5e-4)
    raw, level = of_cache(run, "opacity", head, "probability"), of_cache(run, "opacity", head, "threshold")
    clear = np.abs(raw - level).to_numpy() > 2e-3
    assert clear.any()
    called = pd.Series(answers["opacity.present"].to_numpy(bool), pd.Index(ids))
    expected = pd.Series((raw >= level).to_numpy(), raw.index.get_level_values(0))
    assert called[expected.index[clear]].tolist() == expected[clear].tolist()
    likeliest = answers[[f"kind.{c}.raw" for c in ("first", "second", "third")]].to_numpy().argmax(axis=1)
    assert answers["kind"].tolist() == [("first", "second", "third")[k] for k in likeliest]
    assert not {"kind.present", "kind.first.present"} & set(answers)


def test_it_gives_the_numbers_of_the_cached_path_on_training_images(run, predictor: Predictor) -> None:
    """Through the stored rows by hand: store, Adaptor, head."""
    frame = run.manifest.frame
    ids = frame.loc[frame["split"] == "train", "id"].tolist()
    head, adaptor = predictor.models.heads["opacity"], read_adaptor(run.run_dir)
    with torch.inference_mode():
        stored = torch.from_numpy(np.array(run.image.embeddings[run.image.rows(ids)], np.float32))
        _, expected = head.module()(adaptor.encode_image(stored))
    answers = predictor.predict([run.file(i) for i in ids])
    np.testing.assert_allclose(answers["opacity"], expected[:, 0].numpy(), atol=5e-4)
    assert np.ptp(answers["opacity"]) > 0.5


def test_masks_lie_in_each_images_own_frame(run, predictor: Predictor, tmp_path: Path) -> None:
    frame = run.manifest.frame
    ids = frame.loc[(frame["split"] == "test"), "id"].tolist()
    answers = predictor.predict([run.file(i) for i in ids], masks=tmp_path / "masks")
    expected = run.masks.query("decoder == 'conv'").set_index("id")["predicted_pixels"]
    for i, file, area in zip(ids, answers["mask"], answers["mask.area"], strict=True):
        with Image.open(file) as picture:
            assert (picture.mode, picture.size) == ("L", (120, 90))
            mask = np.asarray(picture)
        assert set(np.unique(mask)) <= {0, 255}
        assert area == pytest.approx((mask > 0).mean())
        assert area == pytest.approx(expected[i] / 64**2, abs=0.02)
        with Image.open(run.file(i).with_name(f"{i}_mask.png")) as true:
            both, sizes = (np.asarray(true) & (mask > 0)).sum(), np.asarray(true).sum() + (mask > 0).sum()
        if int(i[1:]) % 2:
            assert 2 * both / sizes > 0.6  # mirrored or turned it would be far below
    assert "mask" not in predictor.predict([run.file(ids[0])])


def test_a_bad_file_costs_its_own_row(run, predictor: Predictor, tmp_path: Path) -> None:
    good = [run.file("s001"), run.file("s002")]
    (tmp_path / "text.png").write_text("no image")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(run.file("s003").read_bytes()[:-900])
    files = [good[0], tmp_path / "absent.png", tmp_path / "text.png", cut, tmp_path, good[1]]
    answers = predictor.predict(files, masks=tmp_path / "masks", batch_size=2)
    reasons = ["", "unreadable", "unknown-format", "truncated", "not-a-file", ""]
    assert [failure.partition(":")[0] for failure in answers["failure"]] == reasons
    alone = predictor.predict(good, masks=tmp_path / "alone")
    for name in ("opacity", "two.even.raw", "kind.first", "mask.area"):
        np.testing.assert_allclose(answers[name].to_numpy()[[0, 5]], alone[name], atol=1e-6)
        assert answers[name][1:5].isna().all()
    assert answers["opacity.present"][1:5].isna().all()
    assert len(list((tmp_path / "masks").iterdir())) == 2
    none = predictor.predict([tmp_path / "absent.png"])
    assert none.columns.tolist() == alone.columns.drop(["mask", "mask.area"]).tolist()
    assert predictor.predict([]).empty


def test_dicom_files_are_answered(run, predictor: Predictor) -> None:
    from pydicom.data import get_testdata_file

    answers = predictor.predict([get_testdata_file("CT_small.dcm"), get_testdata_file("rtplan.dcm")])
    assert answers["failure"][0] == ""
    assert 0 <= answers["opacity"][0] <= 1
    assert answers["failure"][1].startswith("no-pixels")


def test_a_turned_and_reduced_jpeg_gets_a_mask_of_its_own_size(run, predictor: Predictor, tmp_path: Path) -> None:
    """As a viewer shows it: upright, at full size, though it is decoded at a fraction."""
    pixels = np.full((1800, 2400), 30, np.uint8)
    pixels[200:900, 1300:2100] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(pixels).save(tmp_path / "large.jpg", exif=exif, quality=90)
    upright = np.rot90(pixels, -1)
    Image.fromarray(upright).save(tmp_path / "upright.png")
    answers = predictor.predict([tmp_path / "large.jpg", tmp_path / "upright.png"], masks=tmp_path)
    masks = [np.asarray(Image.open(file)) > 0 for file in answers["mask"]]
    assert masks[0].shape == masks[1].shape == (2400, 1800)
    assert 0.05 < masks[0].mean() < 0.5
    assert (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum() > 0.9


def test_masks_have_names_of_their_own(tmp_path: Path) -> None:
    files = ["a/x.png", "b/x.dcm", "x-2.png", "1.2.840.7.1", "1.2.840.7.2", "y.mask.png"]
    names = [file.name for file in mask_files(files, tmp_path)]
    assert names == [
        "x.mask.png", "x-2.mask.png", "x-2-2.mask.png", "1.2.840.7.1.mask.png", "1.2.840.7.2.mask.png",
        "y.mask.mask.png",
    ]  # fmt: skip


def test_a_mask_takes_no_files_place(run, predictor: Predictor, tmp_path: Path) -> None:
    """Neither of the user's own mask, nor of an image that is asked for, nor of another call's."""
    shutil.copy(run.file("s001"), tmp_path / "y.png")
    shutil.copy(run.file("s002"), tmp_path / "y.mask.png")
    before = (tmp_path / "y.mask.png").read_bytes()
    with pytest.raises(OutputError, match=r"y\.mask\.png: is there already, and no mask replaces a file"):
        predictor.predict([tmp_path / "y.png"], masks=tmp_path)
    assert (tmp_path / "y.mask.png").read_bytes() == before
    rows = predictor.rows([run.file("s003"), run.file("s005")], masks=tmp_path / "new", batch_size=1)
    assert next(rows)["failure"] == ""
    (tmp_path / "new" / "s005.mask.png").write_text("somebody was faster")
    late = next(rows)
    assert str(late["failure"]).startswith("output: ")
    assert 0 <= late["opacity"] <= 1
    assert (tmp_path / "new" / "s005.mask.png").read_text() == "somebody was faster"


def test_images_come_as_bytes_and_masks_as_arrays(run, predictor: Predictor, tmp_path: Path) -> None:
    files = [run.file("s001"), tmp_path / "absent.png", run.file("s004")]
    given = [files[0].read_bytes(), b"", files[2]]
    answers = list(predictor.answers(given, with_masks=True, batch_size=2))
    assert [answer.file for answer in answers] == ["", "", str(files[2])]
    assert [answer.failure for answer in answers] == ["", "empty-file: the file has no bytes", ""]
    table = predictor.predict([files[0], files[2]], masks=tmp_path / "masks")
    for answer, probability, mask in zip(answers[::2], table["opacity"], table["mask"], strict=True):
        assert answer.values["opacity"] == pytest.approx(probability, abs=1e-6)
        assert answer.mask is not None
        assert np.array_equal(answer.mask, np.asarray(Image.open(mask)) > 0)
    assert answers[1].mask is None
    for wrong, message in (("ab.png", "one image .str."), (Path("ab.png"), "one image"), (b"x", "one image .bytes.")):
        with pytest.raises(SettingsError, match=message):
            predictor.answers(wrong)
    with pytest.raises(SettingsError, match="batch_size is 0, expected at least 1"):
        predictor.predict(files, batch_size=0)


@pytest.mark.parametrize(("spoilt", "reason"), [(np.nan, "not-finite"), (1e6, "overflow"), (0.0, "constant")])
def test_an_embedding_of_no_use_is_no_answer(
    run, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: float, reason: str
) -> None:
    real = predictor.encoder.encode

    def encode(batch, *, tokens=False):
        found = real(batch, tokens=tokens)
        embeddings = found.embeddings.copy()
        embeddings[1] = spoilt
        return replace(found, embeddings=embeddings)

    files = [run.file(f"s00{k}") for k in (1, 2, 3)]
    expected = predictor.predict(files)
    monkeypatch.setattr(predictor.encoder, "encode", encode)
    answers = predictor.predict(files, masks=tmp_path / "masks")
    assert answers["failure"][1].startswith(reason)
    assert answers.loc[1].drop(["file", "failure"]).isna().all()
    assert sorted(file.name for file in (tmp_path / "masks").iterdir()) == ["s001.mask.png", "s003.mask.png"]
    np.testing.assert_allclose(answers["opacity"][[0, 2]], expected["opacity"][[0, 2]], atol=1e-6)


def test_where_memory_runs_out_fewer_go_together(run, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes, most = predictor.encoder.encode, [], 2

    def encode(batch, *, tokens=False):
        sizes.append(len(batch))
        if len(batch) > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return real(batch, tokens=tokens)

    files = [run.file(f"s{k:03d}") for k in range(5)]
    expected = predictor.predict(files)
    monkeypatch.setattr(predictor.encoder, "encode", encode)
    np.testing.assert_allclose(predictor.predict(files)["opacity"], expected["opacity"], atol=1e-6)
    assert sizes == [5, 2, 3, 1, 2]
    most = 0
    with pytest.raises(DeviceError, match="ran out of memory with one image"):
        predictor.predict(files)


@pytest.mark.parametrize("concurrent", [True, False])
def test_threads_may_ask_at_once(run, concurrent: bool, tmp_path: Path) -> None:
    """Each gets the answers and masks of its own files; an encoder that is not for several threads sees one."""
    encoder = embedcache.load_encoder(f"hf:{run.checkpoint}", pooling="mean", device="cpu")
    encoder.concurrent = concurrent
    real, under_way, most = encoder.encode, [], []

    def encode(batch, *, tokens=False):
        under_way.append(1)
        most.append(len(under_way))
        try:
            time.sleep(0.02)
            return real(batch, tokens=tokens)
        finally:
            under_way.pop()

    encoder.encode = encode
    predictor = Predictor(run.run_dir, encoder=encoder)
    chosen = [[run.file(f"s{k:03d}") for k in range(start, 60, 4)] for start in range(4)]
    expected = [predictor.predict(files, masks=tmp_path / f"alone{k}") for k, files in enumerate(chosen)]
    started = threading.Barrier(4)

    def ask(k: int) -> pd.DataFrame:
        started.wait()
        return predictor.predict(chosen[k], masks=tmp_path / "together", batch_size=3)

    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(ask, range(4)), expected, strict=True):
            np.testing.assert_allclose(found["opacity"], alone["opacity"], atol=1e-5)
            for mask, own in zip(found["mask"], alone["mask"], strict=True):
                assert (np.asarray(Image.open(mask)) != np.asarray(Image.open(own))).mean() < 0.01
    assert (max(most) > 1) is concurrent


def test_other_threads_keep_their_cores(run, predictor: Predictor) -> None:
    def cores() -> int:
        with ThreadPoolExecutor(1) as fresh:
            return fresh.submit(torch.get_num_threads).result()

    before = cores(), torch.get_num_threads()
    predictor.predict([run.file("s001")])
    assert (cores(), torch.get_num_threads()) == before


def test_another_encoder_is_refused(run, checkpoints: Path, tmp_path: Path) -> None:
    from embedcache.encoders.random_init import write_tiny

    write_tiny("tiny-vit", tmp_path / "other", seed=1)
    with pytest.raises(FingerprintMismatchError, match=r"expected .* of 'hf:vit', as its weights is another"):
        Predictor(run.run_dir, encoder=f"hf:{tmp_path / 'other'}", device="cpu")
    with pytest.raises(FingerprintMismatchError, match=r"its heads are of encoder 'hf:vit'"):
        Predictor(run.run_dir, encoder=embedcache.load_encoder(f"hf:{tmp_path / 'other'}", device="cpu"))
    shutil.copytree(checkpoints / "vit", tmp_path / "moved")  # the same weights elsewhere
    moved = Predictor(run.run_dir, encoder=f"hf:{tmp_path / 'moved'}", device="cpu")
    assert moved.encoder.record.identity["pooling"] == "mean"  # as chosen then


def test_an_encoder_that_is_gone_is_asked_for(run, tmp_path: Path, image_encoder, checkpoints: Path) -> None:
    """The store's note of its directory is of this machine; the record holds its name alone."""
    shutil.copytree(checkpoints / "vit", tmp_path / "vit")
    encoder = embedcache.load_encoder(f"hf:{tmp_path / 'vit'}", pooling="mean", device="cpu")
    embedcache.extract(run.manifest, encoder, tmp_path / "store")
    store = embedcache.open_store(tmp_path / "store")
    travelling = [tmp_path / "store" / "store.json", *(tmp_path / "store").glob("*.h5")]
    config = embedcache.ProbeConfig(heads=("logistic",), fractions=(1.0,), n_seeds=1, n_draws=20, controls=())
    embedcache.probe(run.manifest, store, label="opacity", config=config).write(tmp_path / "probe")
    assert np.isfinite(embedcache.predict(tmp_path / "probe", [run.file("s001")], device="cpu")["opacity"][0])
    travelling.append(tmp_path / "probe" / "head-logistic.safetensors")
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in travelling)
    shutil.rmtree(tmp_path / "vit")
    with pytest.raises(EncoderError, match=r"a directory 'vit', which is not there any more; .*--encoder hf:DIRECTORY"):
        Predictor(tmp_path / "probe")
    (tmp_path / "probe" / ".encoder").unlink()
    with pytest.raises(EncoderError, match="which is not known here"):
        Predictor(tmp_path / "probe")
    made = embedcache.save_store(tmp_path / "made", store.ids, np.array(store.embeddings))
    embedcache.probe(run.manifest, made, label="opacity", config=config).write(tmp_path / "made_probe")
    for named in (None, f"hf:{checkpoints / 'vit'}"):
        with pytest.raises(EncoderError, match="embeddings made elsewhere, whose record is no encoder's"):
            Predictor(tmp_path / "made_probe", encoder=named, device="cpu")


def test_a_record_does_not_run_somebodys_code(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as the encoder's name, nor as the place that is noted beside a head."""
    from embedcache.stage_two.files import read_tensors, write_tensors

    tensors, metadata = read_tensors(run.run_dir / "probes" / "opacity" / "head-linear.safetensors")
    (tmp_path / "probe").mkdir()
    (tmp_path / "evil.py").write_text("raise SystemExit('somebody's code ran')")
    (tmp_path / "evil:make").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def written(name: str, location: str, **loading: object) -> Path:
        said = json.loads(metadata["head"])
        said["source"]["encoder"]["loading"] |= {"name": name, **loading}
        said["source"]["adaptor_digest"] = ""
        write_tensors(tmp_path / "probe" / "head-linear.safetensors", tensors, {"head": json.dumps(said)})
        (tmp_path / "probe" / ".encoder").write_text(location)
        return tmp_path / "probe"

    with pytest.raises(EncoderError, match=r"own code, which is run only if you name it: --encoder py:evil:make"):
        Predictor(written("py:evil:make", "", is_directory=False))
    for name, location in (("hf:vit", "py:evil:make"), ("py:evil:make", "py:evil:make"), ("hf:vit", "hf:evil:make")):
        with pytest.raises(EncoderError, match=r"not there any more|own code"):
            Predictor(written(name, location, is_directory=True))
    with pytest.raises(EncoderError, match="a record with options trust_remote_code, which this version does not know"):
        Predictor(written("hf:vit", "", options={"trust_remote_code": True}), encoder=f"hf:{tmp_path}")


def test_a_run_without_heads_says_what_to_run(run, tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match=r"no head there that answers for new images; .*embedcache probe"):
        Predictor(tmp_path)
    with pytest.raises(FileNotFoundError, match="no head there"):
        Predictor(tmp_path / "absent")
    with pytest.raises(RunNotFoundError, match="no head 'knn'; it has linear, logistic, mlp"):
        Predictor(run.run_dir, head="knn")
    with pytest.raises(RunNotFoundError, match="no decoder 'paper'; it has conv, linear"):
        Predictor(run.run_dir, decoder="paper")
    with pytest.raises(RunNotFoundError, match=r"a folder of several runs; name one in it: 'run'"):
        Predictor(run.run_dir.parent)
    with pytest.raises(RunNotFoundError, match=r"behind an Adaptor, which is not there"):
        Predictor(run.run_dir / "probes" / "opacity")
    masks_only = Predictor(tmp_path_with(run, tmp_path / "masks_only", ["masks"]), device="cpu")
    with pytest.raises(SettingsError, match="decoders of masks alone; name a folder for masks"):
        masks_only.predict([run.file("s001")])
    heads_only = Predictor(tmp_path_with(run, tmp_path / "heads_only", ["probes"]), device="cpu")
    with pytest.raises(SettingsError, match="no decoder of masks"):
        heads_only.predict([run.file("s001")], masks=tmp_path)


def tmp_path_with(run, folder: Path, parts: list[str]) -> Path:
    """A copy of the run with some of its folders."""
    folder.mkdir()
    for name in ("adaptor.safetensors", "config.json"):
        shutil.copy(run.run_dir / name, folder)
    for part in parts:
        shutil.copytree(run.run_dir / part, folder / part)
    return folder


def test_models_that_do_not_belong_together_are_refused(run, tmp_path: Path) -> None:
    folder = tmp_path_with(run, tmp_path / "mixed", ["probes"])
    with torch.no_grad():
        other = read_adaptor(folder)
        other.logit_scale += 1
    other.save_pretrained(folder)
    with pytest.raises(FingerprintMismatchError, match="its Adaptor is another than its heads or decoders"):
        Predictor(folder)
    made = embedcache.save_store(tmp_path / "made", run.image.ids, np.array(run.image.embeddings))
    config = embedcache.ProbeConfig(heads=("logistic",), fractions=(1.0,), n_seeds=1, n_draws=20, controls=())
    embedcache.probe(run.manifest, made, label="even", config=config).write(folder / "probes" / "even")
    with pytest.raises(RunStateError, match=r"of several encoders \(external, hf:vit\)"):
        Predictor(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_outputs_are_rounded_as_the_store_rounds(dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=(50, 7, 33)).astype(np.float32)
    values[3] = 0
    codes, scales = to_stored(values, dtype)
    expected = from_stored(codes, dtype, scales).astype(np.float32)
    np.testing.assert_allclose(rounded(torch.from_numpy(values), dtype).numpy(), expected, rtol=1e-6, atol=0)


def test_a_coarse_store_and_a_coarse_encoder_are_met(run, tmp_path: Path) -> None:
    """Heads of an int8 store, on an encoder that computes in bfloat16; without rounding they are ten times as far."""
    encoder = embedcache.load_encoder(f"hf:{run.checkpoint}", device="cpu", compute_dtype="bfloat16")
    embedcache.extract(run.manifest, encoder, tmp_path / "store", store_dtype="int8", tokens=True)
    config = embedcache.ProbeConfig(heads=("logistic",), fractions=(1.0,), n_seeds=1, n_draws=20, controls=())
    result = embedcache.probe(run.manifest, tmp_path / "store", label="opacity", config=config)
    result.write(tmp_path / "probe")
    table = result.predictions.query("test == 'internal'")
    files = [run.file(i) for i in table["id"].astype(str)]
    # in the store's own batches: a bfloat16 product depends on its neighbours
    answers = Predictor(tmp_path / "probe", device="cpu").predict(files)
    np.testing.assert_allclose(answers["opacity.raw"], table["probability"], atol=5e-3)
    assert np.abs(answers["opacity.raw"] - table["probability"].to_numpy()).mean() < 1e-3


def test_what_is_to_be_known_is_noted(run, tmp_path: Path) -> None:
    frame = run.manifest.frame.assign(study=run.manifest.frame["patient"], view="PA")
    frame["split"] = np.where(frame["split"] == "valid", "train", frame["split"])
    rare = (np.arange(len(frame)) % 30 == 0).astype(float)
    frame["label.even"] = np.where(frame["split"] == "train", rare, frame["label.even"])
    manifest = run.manifest.with_frame(frame)

    def notes(**settings: object) -> str:
        config = embedcache.ProbeConfig(
            heads=("linear",), fractions=(1.0,), n_seeds=1, n_draws=20, controls=(), **settings
        )
        embedcache.probe(manifest, run.image, label="two", config=config).write(tmp_path / "probe")
        return "; ".join(Predictor(tmp_path / "probe", device="cpu").notes)

    plain = "two: head linear, fitted on 48 labels"
    assert notes() == f"{plain}; two: not calibrated for even, as too few labels were left to do it by"
    pooled = notes(unit="study", pool="prob_mean")
    assert "two: thresholds and calibration fitted on each study as a whole" in pooled
    assert "two: the head fitted on each patient as a whole" in notes(unit="patient")
    assert "two: fitted on frontal images alone" in notes(views="frontal")


def test_a_label_without_the_head_that_is_asked_for_is_answered_by_another(run, tmp_path: Path) -> None:
    folder = tmp_path_with(run, tmp_path / "some", ["probes"])
    (folder / "probes" / "kind" / "head-mlp.safetensors").unlink()
    predictor = Predictor(folder, head="mlp", device="cpu")
    assert {label: head.name for label, head in predictor.models.heads.items()} == {
        "kind": "linear", "opacity": "mlp", "two": "mlp"
    }  # fmt: skip
    assert "kind: has no head mlp" in predictor.notes


def test_columns_of_one_name_are_refused(run, tmp_path: Path) -> None:
    frame = run.manifest.frame
    manifest = run.manifest.with_frame(frame.assign(**{"label.failure": frame["label.opacity"]}))
    config = embedcache.ProbeConfig(heads=("logistic",), fractions=(1.0,), n_seeds=1, n_draws=20, controls=())
    embedcache.probe(manifest, run.image, label="failure", config=config).write(tmp_path)
    with pytest.raises(SettingsError, match="two columns of answers would be called 'failure'"):
        Predictor(tmp_path, device="cpu")
