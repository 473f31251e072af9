"""Everything that a report shows, gathered from a finished run."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Iterator, Mapping
from importlib.metadata import version

import pandas as pd

from embedcache import __version__
from embedcache.comparing.compare import Comparison
from embedcache.comparing.run_folder import finished_at
from embedcache.comparing.study import Study, Task
from embedcache.data.audit import AuditReport, audit
from embedcache.report.contents import Contents
from embedcache.reporting.examples import mask_examples, retrieval_examples
from embedcache.reporting.maps import embedding_maps
from embedcache.stage_two.tensors import input_digests

_LIBRARIES = ("torch", "numpy", "h5py", "scikit-learn", "transformers", "open_clip_torch", "timm")


def gathered(study: Study, comparison: Comparison, audits: Mapping[str, AuditReport], *, with_images: bool) -> Contents:
    """What the page shows.

    Args:
        audits: of each task, see `audits_of`.
        with_images: also thumbnails of patients' images.
    """
    return Contents(
        name=study.tasks[0].name,
        made=f"{finished_at(study.run_dir) or 'not finished'}, embedcache {__version__}",
        data=[line for task in study.tasks for line in _described(task, audits[task.name])],
        verdicts=comparison.verdicts,
        warnings=comparison.warnings,
        notes=comparison.notes,
        tables=comparison.tables,
        differences=comparison.differences,
        encoders=comparison.encoders,
        curves=training_curves(study),
        audit=[fact for report in audits.values() for fact in _facts(report, len(audits) > 1)],
        provenance=list(_provenance(study)),
        commands=commands(study),
        maps=list(embedding_maps(study)),
        retrieval=list(retrieval_examples(study, with_images=with_images)),
        masks=list(mask_examples(study, with_images=with_images)),
        has_images=with_images,
    )


def audits_of(study: Study) -> dict[str, AuditReport]:
    """Of each task's manifest by its name, files compared by what stage one read of them."""
    stores = {task.name: study.store(next(iter(task.images.values()))) for task in study.tasks}
    return {t.name: audit(t.manifest, files=input_digests(stores[t.name]), look=False) for t in study.tasks}


def training_curves(study: Study) -> pd.DataFrame:
    """A row for each epoch of each Adaptor: `image`, `text`, `epoch`, `train_loss`, `valid_loss`."""
    rows = []
    for pair in study.pairs:
        path = study.run_dir / pair.folder / "metrics.jsonl"
        for line in path.read_text("utf-8").splitlines() if pair.text else ():
            entry = json.loads(line)
            losses = {name: entry.get(name) for name in ("epoch", "train_loss", "valid_loss")}
            rows.append({"image": pair.image, "text": pair.text, **losses})
    return pd.DataFrame(rows, columns=["image", "text", "epoch", "train_loss", "valid_loss"])


def commands(study: Study) -> list[str]:
    """That run it again, without the names of folders of this machine: a page is passed on."""
    folder = shlex.quote(study.run_dir.resolve().name)
    if (study.run_dir / "recipe.yaml").is_file():
        return [f"embedcache run {folder}/recipe.yaml", f"embedcache report {folder}"]
    task = study.tasks[0]
    words = ["embedcache", "compare", *task.images, *(word for name in task.texts for word in ("--text", name))]
    words += ["--manifest", f"{folder}/data/{study.data_path(task).name}"]
    words += [word for label in task.labels for word in ("--label", label)]
    return [f"{shlex.join(words)}  # names stand for stores; all settings: {folder}/config.yaml"]


def plural(kind: str) -> str:
    """Of what an audit counts."""
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"


def versions() -> dict[str, str]:
    """Of Python, this package and what computes."""
    found = {"Python": platform.python_version(), "embedcache": __version__}
    return found | {name: version(name) for name in _LIBRARIES}


def _described(task: Task, report: AuditReport) -> Iterator[str]:
    rows = ", ".join(f"{split} {n:,}" for split, n in report.n_rows.items())
    people = f"{sum(report.n_patients.values()):,} patients" if report.patients_known else "patients not all named"
    yield f"{task.name}: {len(task.manifest):,} images ({rows}), {people}, the same for every encoder"
    if task.left_out:
        yield f"{task.name}: {task.left_out:,} images left out, as not every store has them"
    yield from (f"{task.name}: {note}" for note in task.manifest.about.notes)


def _facts(report: AuditReport, named: bool) -> Iterator[tuple[str, str]]:
    of = f"{report.name}: " if named else ""
    yield f"{of}images in each split", ", ".join(f"{split} {n:,}" for split, n in report.n_rows.items())
    yield f"{of}patients in each split", ", ".join(f"{split} {n:,}" for split, n in report.n_patients.items())
    yield f"{of}rows that do not name their patient", f"{report.n_without_patient:,}"
    yield f"{of}rule of the splits", report.split_rule or "not provided"
    for kind, n in report.n_shared.items():
        yield f"{of}{plural(kind)} in more than one split", f"{n:,}"
    for shared in report.shared:
        yield (
            f"{of}{plural(shared.kind)} in {shared.left} and {shared.right}",
            f"{shared.n:,}, of {shared.n_left:,} and {shared.n_right:,} rows",
        )
    for balance in report.balance:
        counts = ", ".join(f"{n:,}" for n in balance.n_of_class)
        yield f"{of}{balance.label} in {balance.split}", f"{counts} of its classes, {balance.n_known:,} known"
    for shortcut in report.shortcuts:
        said = f"{shortcut.metric} {shortcut.value:.3f} where chance is {shortcut.chance:.3f}"
        yield f"{of}{shortcut.label} told by {shortcut.column} alone", f"{said}, {shortcut.n_test:,} test rows"


def _provenance(study: Study) -> Iterator[tuple[str, str]]:
    yield from ((name, value) for name, value in versions().items())
    yield "machine", f"{platform.system()} {platform.machine()}"
    for task in study.tasks:
        for name, path in {**task.images, **task.texts}.items():
            store = study.store(path)
            yield f"store of {name} on {task.name}", f"{store.fingerprint}, content {store.content[:16]}"
            yield f"encoder {name}", store.encoder_fingerprint
        yield f"manifest {task.name}", task.digest
    for name, value in vars(study.train).items():
        yield f"training: {name}", str(value)
    for task in study.tasks:
        for name, value in vars(task.probe).items():
            yield f"probes on {task.name}: {name}", str(value)
