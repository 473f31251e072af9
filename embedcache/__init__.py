"""embedcache: encode radiographs and reports once, train on the cached embeddings in minutes.

Public names are loaded when first used, so that `import embedcache` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Manifest": "embedcache.data.manifest",
    "load_dataset": "embedcache.data.datasets.load",
    "caption": "embedcache.data.reports",
    "load_encoder": "embedcache.encoders.load",
    "extract": "embedcache.stage_one.extract",
    "open_store": "embedcache.store.store",
    "save_store": "embedcache.store.save",
    "verify_store": "embedcache.store.verify",
    "repair_store": "embedcache.store.repair",
    "pack_store": "embedcache.store.rewrite",
    "drop_ids": "embedcache.store.rewrite",
    "import_store": "embedcache.store.exchange",
    "export_store": "embedcache.store.exchange",
    "Adaptor": "embedcache.stage_two.adaptor",
    "contrastive_loss": "embedcache.stage_two.losses",
    "siglip_loss": "embedcache.stage_two.losses",
    "mask_loss": "embedcache.stage_two.losses",
    "TrainConfig": "embedcache.stage_two.config",
    "train": "embedcache.stage_two.train",
    "train_many": "embedcache.stage_two.train",
    "grid": "embedcache.stage_two.train",
    "ProbeConfig": "embedcache.stage_two.probe_config",
    "probe": "embedcache.stage_two.probe",
    "RetrieveConfig": "embedcache.stage_two.retrieve_config",
    "retrieve": "embedcache.stage_two.retrieve",
    "PromptSet": "embedcache.data.prompts",
    "ZeroShotConfig": "embedcache.stage_two.zeroshot",
    "zero_shot": "embedcache.stage_two.zeroshot",
    "SegmentConfig": "embedcache.stage_two.segment_config",
    "segment": "embedcache.stage_two.segment",
    "compare": "embedcache.comparing.compare",
    "write_report": "embedcache.reporting.write",
    "predict": "embedcache.predicting.predictor",
    "Predictor": "embedcache.predicting.predictor",
    "export_onnx": "embedcache.predicting.exporting",
    "EmbedCacheError": "embedcache.errors",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'embedcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
