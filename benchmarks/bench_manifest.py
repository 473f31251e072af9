"""A manifest of all of MIMIC-CXR: generated tables of 377,110 images, a report file for each of 227,827 studies.

Each part runs in a process of its own, whose largest memory is told. What a plain loop over the same files takes
(`open().read()` of every report, one after the other) stands beside it.

    python benchmarks/bench_manifest.py [--images 377110] [--json]
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import pandas as pd
from measuring import Goal, Result, table

_N_IMAGES, _N_STUDIES, _N_PATIENTS = 377_110, 227_827, 65_379  # of MIMIC-CXR-JPG
_LABELS = (
    "Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,Lung Opacity,"
    "No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
)
_SENTENCES = (
    "The lungs are clear without focal consolidation.",
    "There is no pleural effusion or pneumothorax.",
    "The cardiomediastinal silhouette is within normal limits.",
    "Moderate left pleural effusion with adjacent atelectasis is unchanged.",
    "An endotracheal tube ends 4 cm above the carina.",
    "Mild pulmonary edema has improved since the prior study.",
    "No acute osseous abnormality is detected.",
)


@click.command()
@click.option("--images", "n_images", default=_N_IMAGES, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to generate; by default a temporary folder.")
@click.option("--json", "as_json", is_flag=True)
def main(n_images: int, folder: Path | None, as_json: bool) -> None:
    """Generate MIMIC-CXR's tables and reports, and build its manifest."""
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        _generate(work / "mimic", n_images)
        results = list(_measure(work, n_images))
    finally:
        shutil.rmtree(work)
    click.echo(json.dumps([result.as_json() for result in results]) if as_json else table(results))


def _measure(work: Path, n_images: int):
    whole = n_images == _N_IMAGES
    loop = _in_process(_LOOP, work / "mimic")
    for split in ("patient", "paper"):
        made = _in_process(_BUILD, work / "mimic", split, work / f"{split}.parquet")
        yield Result(
            f"manifest of {made['rows']:,} rows, split {split}",
            made["seconds"],
            "s",
            ratio=made["seconds"] / loop["seconds"],
            of_what="build / reading every report in a plain loop",
            goal=Goal("value", 120, "<=") if whole else None,
        )
        yield Result("its memory", made["gigabytes"], "GB", goal=Goal("value", 4, "<=") if whole else None)
    audited = _in_process(_AUDIT, work / "patient.parquet")
    yield Result("its audit, files not compared", audited["seconds"], "s")
    yield Result("memory of that", audited["gigabytes"], "GB")


_BUILD = """
import sys
from embedcache.data.datasets.load import build_dataset
built = build_dataset("mimic-cxr", sys.argv[1], split=sys.argv[2])
built.manifest.write(sys.argv[3])
assert not built.absent and (built.manifest.frame["report"] != "").all()
done = {"rows": len(built.manifest)}
"""
_AUDIT = """
import sys
from embedcache.data.audit import audit
from embedcache.data.manifest import Manifest
report = audit(Manifest.read(sys.argv[1]), files=False)
assert not report.leaks and not report.missing
done = {}
"""
_LOOP = """
import os, sys
for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        if name.endswith(".txt"):
            open(os.path.join(folder, name)).read()
done = {}
"""
_AROUND = """
import json, resource, time
began = time.perf_counter()
{}
done["seconds"] = time.perf_counter() - began
done["gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps(done))
"""


def _in_process(code: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, "-c", _AROUND.format(code), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _generate(root: Path, n_images: int) -> None:
    """Tables in the official form, an empty file for each image, and reports of some 600 characters."""
    rng = np.random.default_rng(0)
    n_studies, n_patients = n_images * _N_STUDIES // _N_IMAGES, n_images * _N_PATIENTS // _N_IMAGES
    of_study = np.sort(np.concatenate([np.arange(n_studies), rng.integers(0, n_studies, n_images - n_studies)]))
    of_patient = np.sort(np.concatenate([np.arange(n_patients), rng.integers(0, n_patients, n_studies - n_patients)]))
    studies, patients = 50_000_000 + np.arange(n_studies), 10_000_000 + np.arange(n_patients)
    digests = [hashlib.md5(str(k).encode(), usedforsecurity=False).hexdigest() for k in range(n_images)]
    ids = ["-".join(d[k : k + 8] for k in range(0, 32, 8)) + "-" + d[:8] for d in digests]
    subject = patients[of_patient[of_study]]
    frame = pd.DataFrame(
        {
            "dicom_id": ids,
            "subject_id": subject,
            "study_id": studies[of_study],
            "PerformedProcedureStepDescription": "CHEST (PA AND LAT)",
            "ViewPosition": rng.choice(["PA", "AP", "LATERAL", "LL", ""], n_images),
            "Rows": 3056,
            "Columns": 2544,
            "StudyDate": 21800506,
            "StudyTime": "213014.531",
        }
    )
    split = rng.choice(["train", "validate", "test"], n_patients, p=[0.97, 0.01, 0.02])
    labels = pd.DataFrame({"subject_id": patients[of_patient], "study_id": studies})
    for name in _LABELS.split(","):
        labels[name] = rng.choice(["1.0", "0.0", "-1.0", ""], n_studies, p=[0.15, 0.1, 0.05, 0.7])
    root.mkdir(parents=True)
    _write(frame, root / "mimic-cxr-2.0.0-metadata.csv.gz")
    of_split = frame[["dicom_id", "study_id", "subject_id"]].assign(split=split[of_patient[of_study]])
    _write(of_split, root / "mimic-cxr-2.0.0-split.csv.gz")
    _write(labels, root / "mimic-cxr-2.0.0-chexpert.csv.gz")
    images_of = np.split(np.arange(n_images), np.cumsum(np.bincount(of_study, minlength=n_studies))[:-1])
    for k, patient in enumerate(patients[of_patient]):
        folder = root / f"files/p{str(patient)[:2]}/p{patient}"
        study = folder / f"s{studies[k]}"
        study.mkdir(parents=True)
        said = rng.choice(_SENTENCES, 10)
        (folder / f"s{studies[k]}.txt").write_text(
            f"                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n\n INDICATION:  {k}\n\n"
            f" FINDINGS:\n\n {' '.join(said[:7])}\n\n IMPRESSION:\n\n {' '.join(said[7:])}\n"
        )
        for image in images_of[k]:
            (study / f"{ids[image]}.jpg").touch()


def _write(frame: pd.DataFrame, path: Path) -> None:
    with gzip.open(path, "wt", compresslevel=1) as file:
        frame.to_csv(file, index=False)


if __name__ == "__main__":
    main()
