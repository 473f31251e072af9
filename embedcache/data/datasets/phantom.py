"""A generated chest-phantom dataset: drawn radiographs, templated reports, labels and masks.

It exists so that both stages can be run anywhere, on real files, without a licence. The drawings are crude:
two dark lungs, a heart, ribs and noise, with an opacity, an effusion and an enlarged heart as findings. Nothing
measured on it says anything about patients.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from annotated_types import Ge, Gt, Lt
from PIL import Image

from embedcache.data.manifest import Manifest
from embedcache.data.splits import patient_split
from embedcache.errors import ManifestError
from embedcache.fingerprint import fingerprint
from embedcache.progress import Progress
from embedcache.settings import STRICT, check

_DRAWING_VERSION = 1
_SIDES = ("right", "left")  # the patient's right lung is on the image's left
_ZONES = ("upper", "mid", "lower")


@dataclass(frozen=True)
class PhantomConfig:
    """Size and seed of a phantom dataset.

    Args:
        n_images: images in all; a patient has one to seven.
        size: width and height in pixels.
        prevalence: probability of each finding in an image.
    """

    n_images: Annotated[int, Ge(1)] = 1200
    size: Annotated[int, Ge(16)] = 128
    prevalence: Annotated[float, Gt(0), Lt(1)] = 0.35
    seed: int = 0

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class _Anatomy:
    """What a patient's images share, in fractions of the image's width."""

    lung_width: float
    lung_height: float
    centre_y: float
    tissue: float
    air: float


@dataclass(frozen=True)
class _Findings:
    opacity: tuple[str, str] | None  # (side, zone)
    effusion: str | None  # side
    large_heart: bool


def make_phantom(root: str | Path, config: PhantomConfig | None = None) -> Manifest:
    """Draws the dataset below `root`, or reads it back where the same one was drawn before.

    Returns:
        Its manifest, also kept as `root/manifest.parquet`; labels `opacity`, `effusion`, `cardiomegaly`, masks of
        the opacity, splits by patient.

    Raises:
        ManifestError: another dataset lies below `root`.
    """
    root, config = Path(root), config or PhantomConfig()
    marker, manifest_path = root / "phantom.sha256", root / "manifest.parquet"
    identity = fingerprint({**asdict(config), "drawing": _DRAWING_VERSION})
    if marker.exists():
        if marker.read_text() != identity:
            raise ManifestError(
                f"{root}: holds a phantom dataset drawn with other settings; name another root or delete it"
            )
        return Manifest.read(manifest_path)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(config.seed)
    rows: list[dict[str, object]] = []
    with Progress("drawing phantoms", total=config.n_images, unit="image") as progress:
        for patient in range(config.n_images):
            anatomy, sex, age = _draw_patient(rng), rng.choice(["F", "M"]), int(rng.integers(20, 90))
            for study in range(min(int(rng.integers(1, 8)), config.n_images - len(rows))):
                row = _draw_study(root, f"p{patient:04d}-s{study}", len(rows), anatomy, config, rng)
                rows.append({"patient": f"p{patient:04d}", "sex": sex, "age": age, **row})
                progress.advance()
            if len(rows) == config.n_images:
                break
    frame = pd.DataFrame(rows)
    frame["split"] = patient_split(
        frame["patient"].to_numpy(), frame["label.opacity"].to_numpy(), valid=0.1, test=0.25, seed=config.seed
    )
    manifest = Manifest(frame, name="phantom", root=root)
    manifest.write(manifest_path)
    marker.write_text(identity)
    return manifest


def _draw_patient(rng: np.random.Generator) -> _Anatomy:
    return _Anatomy(
        lung_width=rng.uniform(0.15, 0.19),
        lung_height=rng.uniform(0.30, 0.37),
        centre_y=rng.uniform(0.44, 0.50),
        tissue=rng.uniform(0.62, 0.74),
        air=rng.uniform(0.20, 0.30),
    )


def _draw_study(
    root: Path, study: str, number: int, anatomy: _Anatomy, config: PhantomConfig, rng: np.random.Generator
) -> dict[str, object]:
    present = rng.random(3) < config.prevalence
    findings = _Findings(
        opacity=(str(rng.choice(_SIDES)), str(rng.choice(_ZONES))) if present[0] else None,
        effusion=str(rng.choice(_SIDES)) if present[1] else None,
        large_heart=bool(present[2]),
    )
    pixels, mask = _draw(anatomy, findings, config.size, rng)
    suffix = "png" if number % 2 else "jpg"
    image, mask_path = f"images/{study}.{suffix}", f"masks/{study}.png"
    Image.fromarray(pixels).save(root / image, quality=92)  # PNG has no quality and ignores it
    Image.fromarray(mask).save(root / mask_path)
    return {
        "id": study,
        "image": image,
        "mask": mask_path,
        "report": _report(findings, rng),
        "study": study,
        "view": str(rng.choice(["PA", "AP"])),
        "source": suffix,
        "label.opacity": int(present[0]),
        "label.effusion": int(present[1]),
        "label.cardiomegaly": int(present[2]),
    }


def _draw(anatomy: _Anatomy, findings: _Findings, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image and the mask of its opacity, both (size, size) uint8."""
    y, x = np.mgrid[0:size, 0:size] / size
    x = x + rng.normal(0, 0.01)
    y = y + rng.normal(0, 0.01)
    body = 1 / (1 + np.exp((((x - 0.5) / 0.44) ** 4 + ((y - 0.55) / 0.52) ** 4 - 1) * 8))
    image = anatomy.tissue * body
    opacity_mask = np.zeros((size, size), bool)
    for side, centre_x in zip(_SIDES, (0.31, 0.69), strict=True):
        centre_y, width, height = anatomy.centre_y, anatomy.lung_width, anatomy.lung_height
        radius = ((x - centre_x) / width) ** 2 + ((y - centre_y) / height) ** 2
        lung = 1 / (1 + np.exp((radius - 1) * 12))
        image = image * (1 - lung) + anatomy.air * lung
        image = image + 0.04 * lung * np.cos((y + 0.25 * (x - centre_x) ** 2) * 2 * np.pi * 11)  # ribs
        if findings.opacity is not None and findings.opacity[0] == side:
            zone_y = centre_y + (_ZONES.index(findings.opacity[1]) - 1) * 0.5 * height + rng.normal(0, 0.02)
            zone_x = centre_x + rng.normal(0, 0.25) * width
            spread = rng.uniform(0.05, 0.08)
            blob = np.exp(-(((x - zone_x) ** 2 + (y - zone_y) ** 2) / (2 * spread**2)))
            image = image + rng.uniform(0.22, 0.38) * blob * lung
            opacity_mask |= (blob > 0.5) & (lung > 0.5)
        if findings.effusion == side:
            level = centre_y + height * rng.uniform(0.35, 0.6)
            fluid = lung / (1 + np.exp(-(y - level + 0.3 * (x - centre_x) ** 2) * 60))
            image = image * (1 - fluid) + (anatomy.tissue + 0.05) * fluid
    heart_width = rng.uniform(0.20, 0.24) if findings.large_heart else rng.uniform(0.12, 0.16)
    heart = 1 / (1 + np.exp(((((x - 0.54) / heart_width) ** 2 + ((y - 0.63) / 0.15) ** 2) - 1) * 8))
    spine = np.exp(-(((x - 0.5) / 0.05) ** 2)) * body
    image = np.maximum(image, (anatomy.tissue + 0.08) * heart) + 0.10 * spine
    image = rng.uniform(0.9, 1.1) * image + rng.normal(0, 0.03, image.shape)
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return pixels, (opacity_mask * 255).astype(np.uint8)


def _report(findings: _Findings, rng: np.random.Generator) -> str:
    def one_of(*phrases: str) -> str:
        return str(rng.choice(phrases))

    if findings.opacity is not None:
        side, zone = findings.opacity
        lungs = one_of(
            f"There is a focal opacity in the {side} {zone} zone.",
            f"Airspace opacity projecting over the {side} {zone} lung.",
            f"Patchy consolidation in the {zone} zone on the {side}.",
        )
    else:
        lungs = one_of("The lungs are clear.", "No focal opacity.", "Both lungs are clear without consolidation.")
    if findings.effusion is not None:
        fluid = one_of(
            f"Moderate {findings.effusion} pleural effusion.",
            f"Blunting of the {findings.effusion} costophrenic angle by an effusion.",
        )
    else:
        fluid = one_of("No pleural effusion.", "The costophrenic angles are sharp.")
    if findings.large_heart:
        heart = one_of("The heart is enlarged.", "Cardiomegaly.", "The cardiac silhouette is enlarged.")
    else:
        heart = one_of("Heart size is normal.", "The cardiac silhouette is within normal limits.")
    sentences = [lungs, fluid, heart]
    rng.shuffle(sentences)
    return " ".join(sentences)
