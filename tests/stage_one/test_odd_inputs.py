"""A hundred odd and malformed inputs among good ones: each by its id and reason, the good rows' bits untouched."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import embedcache
from embedcache import Manifest
from embedcache.data.reports import ReportPolicy

sys.path.append(str(Path(__file__).parent.parent / "data"))
from dicoms import bad_dicoms, grey, saved
from odd_images import write_bad, write_good

CANARY = "CANARYzQ9"


def ledger_and_rows(store: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    opened = embedcache.open_store(store, verify="digest")
    rows = {i: opened.embeddings[k].tobytes() for k, i in enumerate(opened.ids)}
    return {f.id: f.reason for f in opened.failures}, rows


def test_images(tmp_path: Path, image_encoder) -> None:
    root = tmp_path / "images"
    root.mkdir()
    reasons = write_bad(root)
    for name, (content, reason) in bad_dicoms().items():
        (root / name).write_bytes(content)
        reasons[name] = reason
    reasons |= {"../outside.png": "outside-root|missing", "": "no-path", "folder.png/x.png": "missing"}
    Image.new("L", (9, 9), 5).save(tmp_path / "outside.png")
    good = write_good(root)
    for k in range(40):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (40, 40), dtype=np.uint8)).save(
            root / f"g{k:02d}.png"
        )
    good += [f"g{k:02d}.png" for k in range(40)]
    good.remove("constant.png")
    order = np.random.default_rng(0).permutation(len(reasons) + len(good))
    listed = [[*reasons, *good][k] for k in order]
    frame = pd.DataFrame({"id": [f"{k:03d} {name}" for k, name in enumerate(listed)], "image": listed})
    frame["report"] = "x"
    # a run of the same plan in which every bad file is a good one
    mended = frame.assign(image=[good[0] if name in reasons else name for name in listed])
    options = {"shard_rows": 32, "batch_size": 5, "n_threads": 4, "store_dtype": "float32"}
    with_bad = embedcache.extract(Manifest(frame, name="m", root=root), image_encoder, tmp_path / "bad", **options)
    embedcache.extract(Manifest(mended, name="m", root=root), image_encoder, tmp_path / "good", **options)
    found, rows = ledger_and_rows(tmp_path / "bad")
    assert with_bad.n_asked == len(listed) == with_bad.n_embedded + with_bad.n_failed
    assert with_bad.n_failed == len(reasons) >= 65
    for sample_id, reason in found.items():
        assert reason in reasons[sample_id.partition(" ")[2]].split("|"), (sample_id, reason)
    _, undisturbed = ledger_and_rows(tmp_path / "good")
    assert set(rows) == set(frame["id"]) - set(found)
    assert all(undisturbed[i] == row for i, row in rows.items())


def bad_reports() -> dict[str, tuple[str, str]]:
    """Reports that cannot be encoded as captions, and their reason."""
    blanks = ["", " ", "\n", "\t \r\n", "\x0b\x0c", "\u2003\u2028", "\xa0"]
    nuls = [f"{CANARY}\0", "\0", f"lungs\0{CANARY} clear"]
    lone = [f"{CANARY}\ud800", "\udfff lungs", "a\ud83d b"]
    wordless = ["...", "___", "- - -", "1.", "?!", "____ / ____", "\u200b.", "(), ;", "\ufeff\u200b"]
    headings = ["IMPRESSION:", "FINDINGS:\n\nIMPRESSION:\n", "INDICATION:\n\nHISTORY:\n", "TECHNIQUE:\nCOMPARISON:\n"]
    by_reason = {
        "empty-report": blanks,
        "nul": nuls,
        "not-unicode": lone,
        "too-short|no-section": [*wordless, *headings],
    }
    listed = [(text, reason) for reason, texts in by_reason.items() for text in texts]
    return {f"bad{k:02d}": case for k, case in enumerate(listed)}


def odd_reports() -> list[str]:
    """Odd reports that can be encoded."""
    return [
        "normal", "NORMAL.", "x" * 5000, "lung " * 30_000, "Überprüfung der Lunge: o.B.", "صورة الصدر طبيعية",
        "胸部正常。", "no\u200bspace", "\u202eright to left", "Heart 3.2 cm.\r\nNo effusion.\x0cEnd", "e\u0301dema",
        "<script>alert(1)</script>", "=cmd|' /C calc'!A0", "\x1b[31mred\x1b[0m", "🫁 clear", "FINDINGS: clear",
        "1. One.\n2. Two.", "?" * 50 + "a", "a" * 100 + " " * 100_000 + "b", "https://example.org/x?y=z",
    ]  # fmt: skip


def test_reports(tmp_path: Path, text_encoder, capfd) -> None:
    bad, odd = bad_reports(), odd_reports()
    texts = {i: text for i, (text, _) in bad.items()} | {f"odd{k:02d}": text for k, text in enumerate(odd)}
    texts |= {f"good{k:02d}": f"The lungs are clear, {k}." for k in range(40)}
    ids = [list(texts)[k] for k in np.random.default_rng(0).permutation(len(texts))]
    frame = pd.DataFrame({"id": ids, "image": "x.png", "report": pd.Series([texts[i] for i in ids], dtype=object)})
    frame["report_id"] = frame["id"]
    report = embedcache.extract(
        Manifest(frame, name="m", root=tmp_path), text_encoder, tmp_path / "s", shard_rows=16, batch_size=4
    )
    assert report.n_asked == len(texts) == report.n_embedded + report.n_failed
    found = {f.id: f for f in report.failures}
    assert set(found) == set(bad)
    for i, (_, reason) in bad.items():
        assert found[i].reason in reason.split("|"), (i, found[i].reason)
    # buckets of other texts move a row's last bits; without the bad ones the buckets are the same
    kept = frame[~frame["id"].isin(bad)].reset_index(drop=True)
    plan = {"shard_rows": 4096, "batch_size": 4, "store_dtype": "float32"}
    embedcache.extract(Manifest(frame, name="m", root=tmp_path), text_encoder, tmp_path / "with", **plan)
    embedcache.extract(Manifest(kept, name="m", root=tmp_path), text_encoder, tmp_path / "without", **plan)
    _, rows = ledger_and_rows(tmp_path / "with")
    assert ledger_and_rows(tmp_path / "without")[1] == rows
    shown = capfd.readouterr()
    told = json.dumps(report.to_json()) + shown.out + shown.err
    assert CANARY not in told
    for file in (tmp_path / "s").iterdir():
        assert CANARY.encode() not in file.read_bytes()


def test_it_is_a_hundred() -> None:
    from odd_images import bad_images, good_images

    n_images = len(bad_images()) + 5 + len(bad_dicoms()) + 3
    assert n_images + len(bad_reports()) + len(odd_reports()) + len(good_images()) >= 100
    assert n_images + len(bad_reports()) >= 85


def test_sentences_of_bad_reports_fail_by_the_reports_id(tmp_path: Path, checkpoints) -> None:
    encoder = embedcache.load_encoder(f"hf:{checkpoints / 'bert'}", report=ReportPolicy(unit="sentence"), device="cpu")
    bad = bad_reports()
    frame = pd.DataFrame(
        {"id": list(bad), "image": "x.png", "report": pd.Series([text for text, _ in bad.values()], dtype=object)}
    )
    report = embedcache.extract(Manifest(frame, name="m", root=tmp_path), encoder, tmp_path / "s")
    assert {f.id for f in report.failures} == set(bad)
    assert report.n_embedded == 0


def test_nothing_of_a_patient_is_kept_or_told(tmp_path: Path, image_encoder, caplog, recwarn, capfd) -> None:
    """DICOM files full of canaries, sound and broken, through a whole extraction."""
    import base64
    import logging

    from test_dicom import CANARY as OF_PATIENT
    from test_dicom import with_canaries

    root = tmp_path / "files"
    root.mkdir()
    for k in range(6):
        tags = {} if k % 2 else {"Rows": 999, "PhotometricInterpretation": OF_PATIENT}
        content = saved(with_canaries(grey(top=1000 + 200 * k), **tags))
        (root / f"{k}.dcm").write_bytes(content[: -100 * (k == 5)] if k == 5 else content)
    ids = [f"s{k}" for k in range(6)]
    frame = pd.DataFrame({"id": ids, "image": [f"{k}.dcm" for k in range(6)], "report": "x"})
    caplog.set_level(logging.DEBUG)
    caplog.clear()  # what pydicom said while these files were made
    recwarn.clear()
    capfd.readouterr()
    report = embedcache.extract(Manifest(frame, name="m", root=root), image_encoder, tmp_path / "store")
    assert (report.n_embedded, report.n_failed) == (2, 4)
    captured = capfd.readouterr()
    told = json.dumps(report.to_json()) + captured.out + captured.err + caplog.text
    told += "".join(str(warning.message) for warning in recwarn.list)
    kept = b"".join(path.read_bytes() for path in (tmp_path / "store").iterdir())
    forms = [OF_PATIENT.encode(), OF_PATIENT.encode("utf-16-le"), base64.b64encode(OF_PATIENT.encode())]
    for form in forms:
        assert form not in told.encode()
        assert form not in kept
