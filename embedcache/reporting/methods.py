"""The methods of a run as text for a paper, with the items of TRIPOD+AI that it answers by their numbers.

Source of the items: TRIPOD+AI (Collins et al., BMJ 2024;385:e078378). What a run cannot know reads "not provided".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from embedcache.comparing.compare import Comparison
from embedcache.comparing.study import Study, Task
from embedcache.data.audit import AuditReport
from embedcache.data.manifest import SPLITS
from embedcache.report.paper_tables import escaped_markdown as markdown
from embedcache.reporting.gather import plural, versions
from embedcache.stage_two.targets import Target

_MISSING = "not provided"
_ITEMS = (
    ("1", "title"),
    ("2", "abstract"),
    ("3a", "healthcare context"),
    ("3b", "target population and purpose"),
    ("3c", "known health inequalities"),
    ("4", "objectives"),
    ("5a", "sources of data"),
    ("5b", "dates of data"),
    ("6a", "setting"),
    ("6b", "eligibility"),
    ("6c", "treatments"),
    ("7", "preparation of data"),
    ("8a", "outcome"),
    ("8b", "assessors of the outcome"),
    ("8c", "blinding of the outcome"),
    ("9a", "choice of predictors"),
    ("9b", "definition of predictors"),
    ("9c", "assessors of predictors"),
    ("10", "sample size"),
    ("11", "missing data"),
    ("12a", "use of the data in the analysis"),
    ("12b", "handling of predictors"),
    ("12c", "type of model, how it was built and validated internally"),
    ("12d", "heterogeneity across clusters"),
    ("12e", "measures of performance"),
    ("12f", "updating of the model"),
    ("12g", "how predictions were calculated"),
    ("13", "class imbalance"),
    ("14", "fairness"),
    ("15", "output of the model"),
    ("16", "development against evaluation data"),
    ("17", "ethical approval"),
    ("18a", "funding"),
    ("18b", "conflicts of interest"),
    ("18c", "protocol"),
    ("18d", "registration"),
    ("18e", "sharing of data"),
    ("18f", "sharing of code"),
    ("19", "patient and public involvement"),
    ("20a", "flow of participants"),
    ("20b", "characteristics of participants"),
    ("20c", "comparison of predictors in development and evaluation"),
    ("21", "participants and events in each analysis"),
    ("22", "specification of the model"),
    ("23a", "performance with intervals"),
    ("23b", "heterogeneity of performance"),
    ("24", "results of updating"),
    ("25", "interpretation"),
    ("26", "limitations"),
    ("27a", "poor or missing input"),
    ("27b", "users and their expertise"),
    ("27c", "future research"),
)


def methods_text(study: Study, comparison: Comparison, audits: Mapping[str, AuditReport]) -> str:
    """Markdown: a text for the methods of a paper, then each item of TRIPOD+AI with where it is answered.

    Args:
        audits: of each task, see `audits_of`.
    """
    home = study.tasks[0]
    answers = {
        "5a": [line for task in study.tasks for line in _sources(task, audits[task.name])],
        "5b": [line for task in study.tasks for line in _dates(task)],
        "6b": [line for task in study.tasks for line in _eligibility(task)],
        "7": list(_preparation(study)),
        "8a": [_outcome(task, label) for task in study.tasks for label in task.labels],
        "9b": list(_predictors(comparison.encoders)),
        "10": ["All images that every encoder's store has were used; no sample size was calculated."],
        "11": [line for task in study.tasks for line in _missing(task)],
        "12a": [line for task in study.tasks for line in _use_of_data(task, audits[task.name])],
        "12b": list(_handling(home)),
        "12c": list(_models(study)),
        "12d": ["Intervals resample patients, so that images of one patient stay together."],
        "12e": list(_measures(study)),
        "12g": ["Heads were fitted on training images alone; each test image was scored once for each run."],
        "13": [f"Class weights: {home.probe.class_weight}. Label fractions were drawn stratified by the label."],
        "14": _if(comparison.tables, "subgroups", "Scores by sex, age, view and site stand in subgroups.csv."),
        "15": list(_output(home)),
        "16": [line for task in study.tasks[1:] for line in [f"Evaluated on {markdown(task.name)} as well."]],
        "18f": [f"embedcache {versions()['embedcache']}; the commands stand in the report."],
        "20a": [line for task in study.tasks for line in _flow(task)],
        "20b": [line for task in study.tasks for line in _characteristics(task)],
        "21": [line for task in study.tasks for label in task.labels for line in _events(task, label)],
        "22": ["Adaptors, heads and decoders are kept as safetensors in the folder of each pair of encoders."],
        "23a": ["All scores with 95% intervals: scores.csv, tables.md, tables.tex and the report."],
        "23b": _if(comparison.tables, "subgroups", "Gaps between groups, with simultaneous intervals: subgroups.csv."),
        "26": [*map(markdown, comparison.warnings)],
    }
    return "\n".join(_page(study, answers))


def _page(study: Study, answers: Mapping[str, Sequence[str]]) -> Iterator[str]:
    names = dict(_ITEMS)
    yield f"# Methods of {markdown(study.tasks[0].name)}"
    yield ""
    yield "Numbers in brackets are items of TRIPOD+AI (BMJ 2024;385:e078378). Edit before use: a run knows no clinic."
    for title, items in (
        ("Data", ("5a", "5b", "6b", "20a", "20b", "11")),
        ("Outcome", ("8a", "21", "10")),
        ("Predictors", ("7", "9b", "12b")),
        ("Models", ("12a", "12c", "13", "15", "12g", "22")),
        ("Evaluation", ("12e", "12d", "14", "16", "23a", "23b", "18f", "26")),
    ):
        yield f"\n## {title}\n"
        for item in items:
            yield f"**[{item}] {names[item].capitalize()}.** {' '.join(answers.get(item) or [_MISSING + '.'])}\n"
    yield "## TRIPOD+AI\n"
    yield "| item | | answered |"
    yield "|---|---|---|"
    for item, name in _ITEMS:
        yield f"| {item} | {name} | {'above' if answers.get(item) else _MISSING} |"
    yield ""


def _sources(task: Task, report: AuditReport) -> Iterator[str]:
    yield f"{markdown(task.name)}: {len(task.manifest):,} images"
    yield f"of {sum(report.n_patients.values()):,} patients." if report.patients_known else "(patients not all named)."
    yield from (f"{markdown(note)}." for note in task.manifest.about.notes)


def _dates(task: Task) -> Iterator[str]:
    acquired = task.manifest.frame.get("acquired", pd.Series(dtype=object))
    known = sorted(str(value) for value in acquired if isinstance(value, str) and value)
    if known:
        yield f"{markdown(task.name)}: acquired from {markdown(known[0])} to {markdown(known[-1])}."


def _eligibility(task: Task) -> Iterator[str]:
    if task.left_out:
        yield f"{markdown(task.name)}: {task.left_out:,} images were left out, as not every encoder's store has them."


def _preparation(study: Study) -> Iterator[str]:
    for name, path in {**study.tasks[0].images, **study.tasks[0].texts}.items():
        identity = study.store(path).encoder.get("identity", {})
        steps = [_step_words(step) for step in (identity.get("transform") or {}).get("steps", ())]
        if steps:
            yield f"{markdown(name)}: {markdown(', '.join(steps))}."
        elif "max_length" in identity:
            yield f"{markdown(name)}: at most {identity['max_length']} tokens of each report."


def _step_words(step: Mapping[str, Any]) -> str:
    """A step of a transform: its name, and its settings where it has any."""
    parts = []
    for name, settings in step.items():
        said = settings if isinstance(settings, Mapping) else {"": settings}
        given = ", ".join(f"{key} {_value_words(value)}".strip() for key, value in said.items())
        parts.append(f"{name} ({given})" if given else str(name))
    return ", ".join(parts)


def _value_words(value: object) -> str:
    if isinstance(value, Mapping):
        return " x ".join(map(str, value.values()))
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(_value_words, value)) if isinstance(value, list | tuple) else str(value)


def _outcome(task: Task, label: str) -> str:
    target = Target.of(task.manifest, label)
    of = f" ({markdown(', '.join(target.classes))})" if target.n_outputs > 1 else ""
    return f"{markdown(label)} of {markdown(task.name)}, {target.task}{of}; how it was assessed: {_MISSING}."


def _predictors(encoders: pd.DataFrame) -> Iterator[str]:
    for row in encoders.to_dict("records"):
        size = "" if row["parameters"] != row["parameters"] else f", {row['parameters']:,.0f} parameters"
        yield (
            f"{markdown(row['name'])}: frozen {row['modality']} encoder {markdown(row['model'])} "
            f"({row['weights']} weights{size}, {row['dim']} dimensions; exposure to the test data: "
            f"{markdown(row['exposure'])})."
        )


def _missing(task: Task) -> Iterator[str]:
    for label in task.labels:
        target = Target.of(task.manifest, label)
        values = target.values(task.manifest)
        n = int((~target.known(values)).sum())
        yield f"{markdown(label)}: blank for {n:,} of {len(values):,} images, which it is neither fitted nor scored on."
        if values.shape[1] > 1:
            blanks = zip(target.classes, np.isnan(values).sum(axis=0).tolist(), strict=True)
            yield f"Blank by finding: {', '.join(f'{markdown(name)} {k:,}' for name, k in blanks)}; these are masked."


def _use_of_data(task: Task, report: AuditReport) -> Iterator[str]:
    counts = ", ".join(f"{split} {report.n_rows[split]:,}" for split in SPLITS)
    yield f"{markdown(task.name)} was split into {counts} images (rule: {markdown(report.split_rule) or _MISSING});"
    shared = ", ".join(f"{n:,} {plural(kind)}" for kind, n in report.n_shared.items()) or "nothing known"
    yield f"in more than one split: {shared}."


def _handling(task: Task) -> Iterator[str]:
    if task.labels:
        yield "Features were standardised by training rows." if task.probe.standardise else "Features were not scaled."
        yield f"Unit: {task.probe.unit}, pooled by {task.probe.pool}."


def _models(study: Study) -> Iterator[str]:
    home, train = study.tasks[0], study.train
    if home.texts:
        n_seeds = len(train.trainings)
        yield (
            f"An Adaptor ({train.adaptor}; layers: {train.n_layers}, width {train.projection_dim}) was trained on the "
            f"training pairs with loss {train.loss} by AdamW (lr {train.lr:g}, weight decay {train.weight_decay:g}, "
            f"batch {train.batch_size}, at most {train.epochs} epochs, patience {train.patience}) from "
            f"{n_seeds} seed{'' if n_seeds == 1 else 's'}, and then frozen (Freeze the backbones, arXiv 2401.01179)"
            f"{'; runs of heads and decoders took turns on these' if n_seeds > 1 else ''}."
        )
    for task in study.tasks:
        if task.labels:
            amounts = [f"{100 * f:.3g}%" for f in task.probe.fractions] + [f"{s} a class" for s in task.probe.shots]
            yield (
                f"On {markdown(task.name)} heads ({', '.join(task.probe.heads)}) were fitted on {', '.join(amounts)} "
                f"of the training labels, {task.probe.n_seeds} runs each; settings were chosen on validation labels "
                f"({task.probe.valid_labels}), or on folds of the training labels where these were too few."
            )
        if task.segment is not None:
            yield (
                f"Decoders of masks ({', '.join(task.segment.decoders)}) were fitted on tokens at {task.segment.size} "
                f"pixels, {task.segment.n_seeds} runs each."
            )


def _measures(study: Study) -> Iterator[str]:
    yield "AUROC (or accuracy), average precision, and calls at a threshold; Brier score and calibration;"
    yield "95% intervals over a bootstrap of patients and over runs (Student's t)."
    yield (
        "Pairs of encoders were compared on the same images, patients and runs: DeLong's test where each patient has "
        "one row and there is one run, else a paired bootstrap over patients; p-values adjusted for all comparisons "
        "(Holm). None is called better at a p above 0.05, nor where each side was trained once."
    )
    if study.tasks[0].texts and len(study.train.trainings) == 1:
        yield "Each pair's Adaptor was trained once: what another training of it would change is in no interval."


def _output(task: Task) -> Iterator[str]:
    if task.labels:
        threshold = "Youden's J on other images than the test's" if task.probe.threshold == "youden" else "0.5"
        yield f"Probabilities, also after Platt's calibration; threshold: {threshold}."


def _flow(task: Task) -> Iterator[str]:
    n = len(task.manifest)
    yield f"{markdown(task.name)}: {n + task.left_out:,} images, {task.left_out:,} left out, {n:,} used:"
    groups = task.manifest.groups()
    splits = [(split, task.manifest.in_split(split)) for split in SPLITS]
    yield "; ".join(f"{split} {rows.sum():,} of {len(set(groups[rows])):,} patients" for split, rows in splits) + "."


def _characteristics(task: Task) -> Iterator[str]:
    frame = task.manifest.frame
    for split in SPLITS:
        rows = frame[task.manifest.in_split(split)]
        facts = []
        for name in ("sex", "view", "site", "source"):
            counts = rows[name][rows[name] != ""].value_counts() if name in rows else pd.Series(dtype=int)
            if len(counts):
                facts.append(f"{name} " + ", ".join(f"{markdown(str(k))} {n:,}" for k, n in counts.head(8).items()))
        ages = pd.to_numeric(rows["age"], errors="coerce").dropna() if "age" in rows else pd.Series(dtype=float)
        if len(ages):
            low, middle, high = ages.quantile([0.25, 0.5, 0.75])
            facts.append(f"age {middle:.0f} (quartiles {low:.0f} to {high:.0f})")
        if facts:
            yield f"{markdown(task.name)}, {split}: {'; '.join(facts)}."


def _events(task: Task, label: str) -> Iterator[str]:
    target = Target.of(task.manifest, label)
    sides = target.one_vs_rest(target.values(task.manifest))
    for k, name in enumerate(target.classes):
        counts = []
        for split in SPLITS:
            values = sides[task.manifest.in_split(split), k]
            counts.append(f"{split} {int(np.nansum(values)):,} of {int((~np.isnan(values)).sum()):,}")
        yield f"{markdown(name)}: {', '.join(counts)}."


def _if(tables: Mapping[str, pd.DataFrame], name: str, words: str) -> list[str]:
    return [words] if name in tables and len(tables[name]) else []
