"""The fields of a recipe, typed. Unknown fields are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from embedcache.data.datasets.load import layout_named
from embedcache.data.datasets.phantom import PhantomConfig
from embedcache.data.prompts import PromptSet
from embedcache.data.radiograph import DecodePolicy
from embedcache.data.reports import ReportPolicy
from embedcache.data.views import ViewPolicy
from embedcache.encoders.base import Pooling
from embedcache.stage_one.asked import Asked
from embedcache.stage_one.workers import Backend, Workers
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.probe_config import ProbeConfig
from embedcache.stage_two.retrieve_config import RetrieveConfig
from embedcache.stage_two.segment_config import SegmentConfig

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_RESERVED = {"checkpoints", "dataset", "prompts"}  # what else lies in a recipe's cache


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PhantomData(_Section):
    """The generated phantom dataset, drawn below `root` if it is not there."""

    kind: Literal["phantom"]
    root: Path
    config: PhantomConfig = Field(default_factory=PhantomConfig)


class SplitSection(_Section):
    """Splits by patient, balanced by a label; for a table that has none."""

    by: str
    valid: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: int = 0

    @model_validator(mode="after")
    def _leaves_some(self) -> SplitSection:
        if self.valid + self.test >= 1:
            raise ValueError(f"valid {self.valid} and test {self.test} leave nothing to train on")
        return self


class TableData(_Section):
    """A CSV or Parquet table below `root`.

    `columns` gives the table's column for each of the manifest's, where they differ.
    """

    kind: Literal["table"]
    root: Path
    table: str
    columns: dict[str, str] = Field(default_factory=dict)
    split: SplitSection | None = None


class DatasetData(_Section):
    """A public dataset in its official folder, by name; see `embedcache manifest --help` and `load_dataset`."""

    kind: Literal["dataset"]
    name: str
    root: Path
    split: Literal["patient", "paper"] = "patient"
    task: str | None = None
    seed: int = 0
    valid: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(ge=0, lt=1)] = 0.2
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> DatasetData:
        layout_named(self.name).check(self.task, dict(self.options))
        return self


class EncoderSection(_Section):
    """One encoder: a `source` that `load_encoder` takes, or random weights.

    `tiny` writes a tiny random checkpoint; `random_like` writes the architecture of a local checkpoint with random
    weights. `{data.root}` in a source stands for the data's root.
    """

    source: str | None = None
    tiny: Literal["tiny-vit", "tiny-resnet", "tiny-bert"] | None = None
    random_like: str | None = None
    seed: int = 0
    pooling: Pooling | None = None
    layer: int | None = None
    transform: Literal["paper"] | None = None
    image_size: Annotated[int, Field(ge=1)] | None = None
    token_grid: Annotated[int, Field(ge=1)] | None = None
    decode: DecodePolicy | None = None
    max_length: Annotated[int, Field(ge=3)] | None = None
    report: ReportPolicy | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> EncoderSection:
        given = [name for name in ("source", "tiny", "random_like") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of source, tiny, random_like; found {', '.join(given) or 'none'}")
        return self

    def options(self) -> dict[str, Any]:
        """What `load_encoder` is asked for beside the name."""
        origin = {"source", "tiny", "random_like", "seed"}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in origin}

    @property
    def is_random(self) -> bool:
        """Whether its weights are drawn, not learnt."""
        return self.source is None


class EncodersSection(_Section):
    """Image and text encoders by the names that their stores get."""

    image: Annotated[dict[_Name, EncoderSection], Field(min_length=1)]
    text: Annotated[dict[_Name, EncoderSection], Field(min_length=1)]

    @model_validator(mode="after")
    def _own_directories(self) -> EncodersSection:
        taken = sorted(set(self.image) & set(self.text) | (set(self.image) | set(self.text)) & _RESERVED)
        if taken:
            raise ValueError(f"each name becomes a directory, so it must be used once and not be {', '.join(taken)}")
        return self


class ExtractSection(_Section):
    """How stage one runs; see `embedcache.extract`. `tokens` may also name the one modality whose tokens are stored."""

    tokens: bool | Literal["image", "text"] = False
    store_dtype: Literal["float16", "float32", "bfloat16", "int8"] = "float16"
    shard_rows: Annotated[int, Field(ge=1)] = 1024
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 32
    views: Annotated[int, Field(ge=1)] = 1
    view_policy: ViewPolicy | None = None
    retry_failed: bool = False
    n_threads: Annotated[int, Field(ge=1)] | None = None
    workers: Annotated[int, Field(ge=1)] | None = None
    backend: Backend = "local"
    address: str | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> ExtractSection:
        Asked(**self.content("image"))
        Workers(self.backend, self.address, self.workers, self.n_threads)
        return self

    def content(self, modality: str) -> dict[str, Any]:
        """What determines the work on images or texts, without who does it."""
        names = ("store_dtype", "shard_rows", "batch_size", "views", "view_policy", "retry_failed")
        return {"tokens": self.tokens in (True, modality), **{name: getattr(self, name) for name in names}}

    def hands(self) -> dict[str, Any]:
        """Who does the work."""
        return {name: getattr(self, name) for name in ("n_threads", "workers", "backend", "address")}


class Recipe(_Section):
    """Everything that a run needs."""

    name: _Name
    cache: Path
    data: Annotated[PhantomData | TableData | DatasetData, Field(discriminator="kind")]
    encoders: EncodersSection
    extract: ExtractSection = Field(default_factory=ExtractSection)
    train: TrainConfig = Field(default_factory=TrainConfig)
    labels: Annotated[list[str], Field(min_length=1)]
    probe: ProbeConfig = Field(default_factory=ProbeConfig)
    segment: SegmentConfig | None = None
    retrieve: RetrieveConfig | None = None
    zeroshot: str | None = None  # a set of prompts, or its file

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Recipe:
        if self.segment is not None and self.extract.tokens not in (True, "image"):
            raise ValueError("segment needs the tokens of images: set extract.tokens to image, or leave segment out")
        if self.train.attention == "cross-modal" and (self.segment is not None or self.retrieve is not None):
            raise ValueError(
                "segment and retrieve need an Adaptor in which an image does not attend to its report: set "
                "train.attention to self, or leave them out"
            )
        if self.zeroshot is not None:
            PromptSet.named(self.zeroshot)
            if "tokens" in (self.train.image, self.train.text):
                raise ValueError("zeroshot needs an Adaptor of embeddings, not of tokens; leave one of both out")
        return self
