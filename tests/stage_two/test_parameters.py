"""How many parameters are trained, by the records of the stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import embedcache
from embedcache import TrainConfig
from embedcache.errors import JoinError
from embedcache.stage_two.parameters import parameter_table


def store(path: Path, name: str, modality: str, dim: int, parameters: int | None):
    notes = {} if parameters is None else {"parameters": parameters}
    record = {"name": name, "identity": {"name": name}, "notes": notes}
    return embedcache.save_store(path / name, ["a"], np.ones((1, dim), np.float32), modality=modality, record=record)


def test_the_papers_over_90_percent_fewer(tmp_path: Path) -> None:
    """DINOv2-S and BERT-base have 22.1 M and 109.5 M parameters; the paper's total with them is 143.5 M."""
    image = store(tmp_path, "dinov2-s", "image", 384, 22_056_576)
    text = store(tmp_path, "bert", "text", 768, 109_482_240)
    (row,) = parameter_table([text, image], TrainConfig()).to_dict("records")
    assert row["trained"] == 11_912_705
    assert row["total"] == 22_056_576 + 109_482_240 + 11_912_705
    assert round(row["total"] / 1e6, 1) == 143.5
    assert row["end_to_end"] == 22_056_576 + 109_482_240 + 768 * (384 + 768) + 1
    assert row["fewer"] > 0.9


def test_what_a_record_does_not_say_is_unknown(tmp_path: Path) -> None:
    image, text = store(tmp_path, "a", "image", 8, None), store(tmp_path, "b", "text", 6, 100)
    (row,) = parameter_table([image, text], TrainConfig(adaptor="linear", projection_dim=4)).to_dict("records")
    assert row["trained"] == 4 * (8 + 6) + 1
    assert all(pd.isna(row[name]) for name in ("frozen", "total", "end_to_end", "fewer"))


def test_every_pair_has_a_row_and_both_modalities_are_needed(tmp_path: Path) -> None:
    images = [store(tmp_path, f"i{k}", "image", 8, 10) for k in range(2)]
    texts = [store(tmp_path, f"t{k}", "text", 8, 10) for k in range(3)]
    assert len(parameter_table([*images, *texts], TrainConfig())) == 6
    with pytest.raises(JoinError, match="no text store among"):
        parameter_table(images, TrainConfig())


def test_stage_one_records_how_many_there_are(make_manifest, image_encoder, tmp_path: Path) -> None:
    embedcache.extract(make_manifest(4), image_encoder, tmp_path / "s")
    recorded = embedcache.open_store(tmp_path / "s").encoder["notes"]["parameters"]
    assert recorded == sum(p.numel() for p in image_encoder._module.parameters())
