"""CheXpert, full size or small, with the reports of CheXpert Plus; its test set; and the 5x200 list of GLoRIA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from embedcache.data.datasets.layout import UNCERTAIN, Asked, Draft, Layout, Option
from embedcache.data.datasets.places import any_file, one_file
from embedcache.data.files import names_in
from embedcache.data.labels import CHEXPERT_LABELS, LABEL_PREFIX, LabelSet, resolve_uncertain
from embedcache.data.splits import in_parts, published_fractions
from embedcache.data.tables import numbers, read_csv, take
from embedcache.errors import ManifestError, SettingsError, some_ids

_TABLES = {"chexpert": "train.csv", "chexbert": "train_cheXbert.csv", "visualchexbert": "train_visualCheXbert.csv"}
_FIRST_BATCH = "CheXpert-v1.0 batch 1*"  # of the full-size download: it holds the tables
_FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
_SEX = {"Female": "F", "Male": "M"}
_N_VALID = 5000  # of the published split
_DEEP = 3  # folders between the root and a patient's, at most
_SET = (LabelSet("chexpert", "multi-label", CHEXPERT_LABELS),)


def _read(root: Path, asked: Asked) -> Draft:
    labeller = asked.options.get("labels") or next(iter(_TABLES))
    if asked.split == "paper" and labeller != next(iter(_TABLES)):
        raise SettingsError(f"chexpert: the published split is drawn by the labels of train.csv, not by {labeller}'s")
    train = _rows(one_file(root, _TABLES[labeller], f"{_FIRST_BATCH}/{_TABLES[labeller]}"))
    valid = _rows(one_file(root, "valid.csv", f"{_FIRST_BATCH}/valid.csv"))
    notes: list[str] = []
    frame = pd.concat([train, valid], ignore_index=True)
    draft = Draft(frame, label_sets=_SET, patients_from="chexpert", notes=notes)
    if asked.split == "paper":
        _publish(draft, len(train))
    else:
        draft.official = np.array([""] * len(train) + ["test"] * len(valid), object)
    draft.frame = draft.frame.assign(**resolve_uncertain(draft.frame, CHEXPERT_LABELS, asked.uncertain))
    draft.frame["image"] = _located(root, draft.frame["below"])
    draft.aside = _located(root, pd.Series(draft.aside, dtype=object)).tolist()
    plus = any_file(root, "df_chexpert_plus*.csv", given=asked.options.get("reports"))
    if plus is not None:
        draft.frame = draft.frame.assign(**_reports(plus, draft.frame, notes))
    draft.frame = draft.frame.drop(columns=["below", "frontal"])
    return draft


def _rows(path: Path) -> pd.DataFrame:
    """A table of images; labels still hold -1 for uncertain."""
    rows = take(
        read_csv(path),
        path,
        {"path": "Path", **{LABEL_PREFIX + name: name for name in CHEXPERT_LABELS}},
        optional={"sex": "Sex", "age": "Age", "side": "Frontal/Lateral", "projection": "AP/PA"},
    )
    for name in CHEXPERT_LABELS:
        rows[LABEL_PREFIX + name] = numbers(rows[LABEL_PREFIX + name], path)
    named = _named(rows.pop("path"), path)
    side, projection = rows.pop("side"), rows.pop("projection")
    view = projection.where(projection != "", side.where(side != "Frontal", ""))
    frontal = named["below"].str.contains("frontal") if (side == "").all() else side == "Frontal"
    sex, age = rows["sex"].map(_SEX).fillna(""), numbers(rows["age"], path)
    return pd.concat([named, rows.assign(sex=sex, age=age, view=view, frontal=frontal)], axis=1)


def _named(paths: pd.Series, table: Path) -> pd.DataFrame:
    """Id, patient and study from paths such as `CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg`."""
    parts = paths.str.extract(r"(?:^|/)((train|valid|test)/)?((patient\d+)/(study\d+)/[^/]+)$")
    wrong = parts[2].isna()
    if wrong.any():
        raise ManifestError(
            f"{table}: path {paths[wrong].iloc[0]!r}, expected .../patient00001/study1/view1_frontal.jpg"
        )
    return pd.DataFrame(
        {
            "id": parts[2],
            "patient": parts[3],
            "study": parts[3] + "/" + parts[4],
            "below": parts[0].fillna("") + parts[2],
        }
    )


def _located(root: Path, below: pd.Series) -> pd.Series:
    """The path of each image, wherever the folder of its patient was unpacked to.

    The full-size download comes in batches, whose folders hold patients with or without a level `train/`. Of several
    folders of one patient the first counts in which the image is.
    """
    keys = below.str.extract(r"(?:(train|valid|test)/)?(patient\d+)/").fillna("")
    folders = _patient_folders(root)
    places: dict[tuple[str, str], list[str]] = {}
    for part, patient in keys.drop_duplicates().itertuples(index=False, name=None):
        holding = sorted(folders.get(patient, [part]), key=lambda place: place.split("/")[-1] != part)
        places[part, patient] = [f"{place}/" if place else "" for place in holding]
    paths = []
    inside = below.str.replace(r"^(?:train|valid|test)/", "", regex=True)
    for key, image in zip(keys.itertuples(index=False, name=None), inside, strict=True):
        prefixes = places[key]
        several = (prefix for prefix in prefixes if len(prefixes) > 1 and (root / f"{prefix}{image}").exists())
        paths.append(next(several, prefixes[0]) + image)
    return pd.Series(paths, below.index, dtype=object)


def _patient_folders(root: Path) -> dict[str, list[str]]:
    """For each folder named `patient...` the folders below the root that hold one of that name."""
    found: dict[str, list[str]] = {}
    level = [""]
    for _ in range(_DEEP):
        deeper = []
        for folder in level:
            names = sorted(names_in(root / folder))
            patients = [name for name in names if name.startswith("patient") and name[7:].isdigit()]
            for name in patients:
                found.setdefault(name, []).append(folder)
            if not patients:
                deeper += [f"{folder}/{name}" if folder else name for name in names if (root / folder / name).is_dir()]
        level = deeper
    return found


def _reports(path: Path, frame: pd.DataFrame, notes: list[str]) -> dict[str, pd.Series]:
    """CheXpert Plus' report of each image's study, and the id that images of one report share.

    Plus may list some of a study's images only. Where it gives them different texts, each keeps its own.
    """
    said = take(read_csv(path, only=("path_to_image", "report")), path, {"path": "path_to_image", "report": "report"})
    said = pd.concat([_named(said.pop("path"), path), said], axis=1)
    said = said[said["report"] != ""].drop_duplicates("id")
    of_study = said.groupby("study", sort=False)["report"].agg(["first", "nunique"])
    agreed = frame["study"].map(of_study["first"].where(of_study["nunique"] == 1))
    report = agreed.where(agreed.notna(), frame["id"].map(said.set_index("id")["report"])).fillna("").astype(object)
    blank = int((report == "").sum())
    if blank:
        notes.append(f"{blank:,} of {len(report):,} images have no report in {path.name}")
    return {"report": report, "report_id": frame["study"].where(agreed.notna(), frame["id"])}


def _publish(draft: Draft, n_train: int) -> None:
    """The published split, faults and all: frontal images; the official validation images are test.

    Of the training table 200 images of each of five findings alone are set aside (an own draw of 5x200, not GLoRIA's);
    of the others 5,000 are drawn for validation by their positions, and these positions are dropped from training as if
    they were rows of the whole table: most of the validation images stay in training too.
    """
    frame = draft.frame
    aside = _set_aside(frame.iloc[:n_train])
    kept = np.flatnonzero(~np.isin(np.arange(n_train), aside))
    drawn = np.random.RandomState(0).choice(len(kept), size=min(_N_VALID, len(kept)), replace=False)
    in_valid, in_train = np.zeros(n_train, bool), np.zeros(n_train, bool)
    in_valid[kept[drawn]] = True
    in_train[kept] = True
    in_train[drawn] = False  # positions among the kept, used as rows of the table
    split = in_parts(
        len(frame), train=np.flatnonzero(in_train), valid=np.flatnonzero(in_valid), test=np.arange(n_train, len(frame))
    )
    used = frame["frontal"].to_numpy(bool) & (split != "")
    draft.notes.append(
        f"{int((~used).sum()):,} images are lateral or in the published code's own draw of 5x200, and were left out"
    )
    draft.aside = frame["below"][~used].tolist()
    draft.frame, draft.split = frame[used].reset_index(drop=True), split[used]
    rows = np.flatnonzero([value.startswith("train") for value in draft.split])
    draft.fraction = published_fractions(len(draft.frame), rows)


def _set_aside(train: pd.DataFrame) -> np.ndarray:
    """Rows of 200 frontal images for each of the five findings, where it is the only one; 'No Finding' is not asked."""
    labels = train[[LABEL_PREFIX + name for name in CHEXPERT_LABELS if name != "No Finding"]].fillna(0.0)
    rows = []
    for finding in _FIVE:
        alone = train["frontal"].to_numpy(bool) & (labels[LABEL_PREFIX + finding] == 1).to_numpy()
        alone &= (labels.drop(columns=LABEL_PREFIX + finding) == 0).all(axis=1).to_numpy()
        members = np.flatnonzero(alone)
        rows.append(members[np.random.RandomState(0).permutation(len(members))[:200]])
    return np.concatenate(rows)


def _read_test(root: Path, asked: Asked) -> Draft:
    """500 studies labelled by radiologists: by image (`test_labels.csv`) or by study (`groundtruth.csv`)."""
    path = one_file(root, "test_labels.csv", "groundtruth.csv")
    table = read_csv(path)
    labels = {LABEL_PREFIX + name: name for name in CHEXPERT_LABELS}
    rows = take(table, path, {"path": ("Path", "Study"), **labels})
    for column in labels:
        rows[column] = numbers(rows[column], path)
    if "Study" in table.columns:
        rows = _views_of(root, rows, path)
    frame = pd.concat([_named(rows.pop("path"), path), rows], axis=1)
    frame["view"] = np.where(frame["id"].str.contains("lateral"), "Lateral", "Frontal")
    frame["image"] = _located(root, frame["below"])
    frame = frame.drop(columns="below")
    official = np.full(len(frame), "test", object)
    return Draft(frame, label_sets=_SET, official=official, patients_from="chexpert")


def _views_of(root: Path, studies: pd.DataFrame, path: Path) -> pd.DataFrame:
    """A row for each image of the studies that is there; a study without images keeps one row, for its frontal view."""
    named = studies["path"].str.extract(r"((?:test/)?patient\d+/study\d+)/?$")[0]
    if named.isna().any():
        wrong = studies["path"][named.isna()].iloc[0]
        raise ManifestError(f"{path}: study {wrong!r}, expected .../test/patient64741/study1")
    places = _located(root, named + "/").str.rstrip("/")
    views = [
        sorted(n for n in names_in(root / place) if n.endswith(".jpg")) or ["view1_frontal.jpg"] for place in places
    ]
    of_image = studies.assign(path=named, view=views).explode("view", ignore_index=True)
    return of_image.assign(path=of_image["path"] + "/" + of_image.pop("view"))


def _read_5x200(root: Path, asked: Asked) -> Draft:
    path = one_file(root, "chexpert_5x200.csv", given=asked.options.get("list"))
    frame = _rows(path)
    labels = frame[[LABEL_PREFIX + name for name in _FIVE]].to_numpy(np.float64) == 1
    wrong = labels.sum(axis=1) != 1
    if wrong.any():
        raise ManifestError(f"{path}: not exactly one of the five findings for {some_ids(frame['id'][wrong])}")
    frame["image"] = _located(root, frame["below"])
    dropped = [LABEL_PREFIX + name for name in CHEXPERT_LABELS]
    frame = frame.drop(columns=["below", "frontal", *dropped]).assign(
        **{"label.5x200": labels.argmax(axis=1).astype(float)}
    )
    sets = (LabelSet("5x200", "multi-class", ("5x200",), _FIVE),)
    return Draft(frame, label_sets=sets, official=np.full(len(frame), "test", object), patients_from="chexpert")


def _tree(*lines: str) -> str:
    return "ROOT/\n" + "".join(f"  {line}\n" for line in lines)


LAYOUT = Layout(
    name="chexpert",
    title="CheXpert",
    tree=_tree(
        "train.csv, valid.csv                  Path, Sex, Age, Frontal/Lateral, AP/PA and 14 labels",
        "train/patient00001/study1/view1_frontal.jpg, valid/...",
        "                                      full size: or the unpacked 'CheXpert-v1.0 batch 2 (train 1)/...'",
        "train_cheXbert.csv                    optional, as is train_visualCheXbert.csv: other labels",
        "df_chexpert_plus_240401.csv           optional: the reports of CheXpert Plus, here or where --reports says",
    ),
    marks=("train.csv", f"{_FIRST_BATCH}/train.csv"),
    read=_read,
    folders=("train", "valid", "CheXpert-v1.0 batch*"),
    published=True,
    options=(
        Option("reports", "CheXpert Plus' df_chexpert_plus_240401.csv.", "path"),
        Option("labels", "Whose labels; by default chexpert.", choices=tuple(_TABLES)),
        UNCERTAIN,
    ),
)

TEST = Layout(
    name="chexpert-test",
    title="CheXpert's test set of 500 studies",
    tree=_tree(
        "test_labels.csv                       Path and 14 labels, a row for each image (CheXlocalize)",
        "groundtruth.csv                       or: Study and 14 labels (cheXpert-test-set-labels)",
        "test/patient64741/study1/view1_frontal.jpg",
    ),
    marks=("test_labels.csv", "groundtruth.csv"),
    read=_read_test,
    folders=("test",),
)

FIVE_BY_200 = Layout(
    name="chexpert-5x200",
    title="GLoRIA's 5x200 list of CheXpert",
    tree=_tree(
        "chexpert_5x200.csv                    GLoRIA's published list, whose draw has no seed; here, or --list",
        "train/patient00001/study1/view1_frontal.jpg",
    ),
    marks=("chexpert_5x200.csv", "train.csv", f"{_FIRST_BATCH}/train.csv", "train/patient*"),
    read=_read_5x200,
    options=(Option("list", "GLoRIA's chexpert_5x200.csv.", "path"),),
)
