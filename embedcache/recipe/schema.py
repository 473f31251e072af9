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
from embedcache.encoders.catalogue import Exposure
from embedcache.stage_one.asked import Asked
from embedcache.stage_two.config import TrainConfig
from embedcache.stage_two.probe_config import ProbeConfig
from embedcache.stage_two.retrieve_config import RetrieveConfig
from embedcache.stage_two.segment_config import SegmentConfig
from embedcache.workers.chosen import Backend, Workers

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_RESERVED = {"checkpoints", "dataset", "prompts", "tasks"}  # what else lies in a recipe's cache


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
    weights. `{data.root}` in a source stands for the data's root. `exposure` says which test data it has seen, by
    dataset, where the catalogue does not know.
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
    exposure: dict[str, Exposure] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_origin(self) -> EncoderSection:
        given = [name for name in ("source", "tiny", "random_like") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of source, tiny, random_like; found {', '.join(given) or 'none'}")
        return self

    def options(self) -> dict[str, Any]:
        """What `load_encoder` is asked for beside the name."""
        origin = {"source", "tiny", "random_like", "seed", "exposure"}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in origin}

    @property
    def is_random(self) -> bool:
        """Whether its weights are drawn, not learnt."""
        return self.source is None


class EncodersSection(_Section):
    """Image and text encoders by the names that their stores get; without text encoders there are no Adaptors."""

    image: Annotated[dict[_Name, EncoderSection], Field(min_length=1)]
    text: dict[_Name, EncoderSection] = Field(default_factory=dict)

    @property
    def by_name(self) -> dict[str, EncoderSection]:
        """Those of both modalities."""
        return {**self.image, **self.text}

    @model_validator(mode="after")
    def _own_directories(self) -> EncodersSection:
        taken = sorted(set(self.image) & set(self.text) | (set(self.image) | set(self.text)) & _RESERVED)
        if taken:
            raise ValueError(f"each name becomes a directory, so it must be used once and not be {', '.join(taken)}")
        return self


class ExtractSection(_Section):
    """How stage one runs; see `embedcache.extract`.

    `tokens` may also name the one modality whose tokens are stored of `data`; images of a task's dataset get theirs
    where a task on it segments.
    """

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

    def content(self, modality: str, *, tokens: bool | None = None) -> dict[str, Any]:
        """What determines the work on images or texts, without who does it.

        Args:
            tokens: whether tokens are stored, where that is not for this section to say.
        """
        names = ("store_dtype", "shard_rows", "batch_size", "views", "view_policy", "retry_failed")
        chosen = self.tokens in (True, modality) if tokens is None else tokens
        return {"tokens": chosen, **{name: getattr(self, name) for name in names}}

    def hands(self) -> dict[str, Any]:
        """Who does the work."""
        return {name: getattr(self, name) for name in ("n_threads", "workers", "backend", "address")}


def _check_labels(labels: list[str]) -> None:
    if len(set(labels)) < len(labels):
        raise ValueError(f"labels {', '.join(labels)}: one stands there twice")


class StepsSection(_Section):
    """Who does stage two: independent steps run at the same time, by default in as many processes as cores allow."""

    workers: Annotated[int, Field(ge=1)] | None = None
    backend: Backend = "local"
    address: str | None = None

    def hands(self) -> Workers:
        """The same for the engines."""
        return Workers(self.backend, self.address, self.workers)

    @model_validator(mode="after")
    def _makes_sense(self) -> StepsSection:
        self.hands()
        return self


_Data = Annotated[PhantomData | TableData | DatasetData, Field(discriminator="kind")]


class TaskSection(_Section):
    """Another dataset to score the pairs on, through the same encoders; its reports are not read."""

    data: _Data
    labels: list[str] = Field(default_factory=list)
    probe: ProbeConfig = Field(default_factory=ProbeConfig)
    segment: SegmentConfig | None = None
    zeroshot: str | None = None

    @model_validator(mode="after")
    def _asks_something(self) -> TaskSection:
        if not self.labels and self.segment is None:
            raise ValueError("expected labels to probe, or segment")
        _check_labels(self.labels)
        if self.zeroshot is not None:
            PromptSet.named(self.zeroshot)
        return self


class Recipe(_Section):
    """Everything that a run needs.

    Adaptors are trained on `data`; pairs are scored on it, and on the data of `tasks`.
    """

    name: _Name
    cache: Path
    data: _Data
    encoders: EncodersSection
    extract: ExtractSection = Field(default_factory=ExtractSection)
    train: TrainConfig = Field(default_factory=TrainConfig)
    labels: list[str] = Field(default_factory=list)
    probe: ProbeConfig = Field(default_factory=ProbeConfig)
    segment: SegmentConfig | None = None
    retrieve: RetrieveConfig | None = None
    zeroshot: str | None = None  # a set of prompts, or its file
    tasks: dict[_Name, TaskSection] = Field(default_factory=dict)
    steps: StepsSection = Field(default_factory=StepsSection)

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Recipe:
        segmenting = self.segment is not None or any(task.segment is not None for task in self.tasks.values())
        _check_labels(self.labels)
        if not self.labels and not segmenting and self.retrieve is None and not self.tasks:
            raise ValueError("nothing is scored: expected labels, segment, retrieve, or tasks")
        if self.zeroshot is not None and not self.labels:
            raise ValueError("zeroshot needs labels")
        prompting = self.zeroshot is not None or any(task.zeroshot is not None for task in self.tasks.values())
        if not self.encoders.text and (prompting or self.retrieve is not None):
            raise ValueError("retrieve and zeroshot need a text encoder")
        if self.segment is not None and self.extract.tokens not in (True, "image"):
            raise ValueError("segment needs the tokens of images: set extract.tokens to image, or leave segment out")
        if self.train.attention == "cross-modal" and (segmenting or self.retrieve is not None):
            raise ValueError(
                "segment and retrieve need an Adaptor in which an image does not attend to its report: set "
                "train.attention to self, or leave them out"
            )
        if self.zeroshot is not None:
            PromptSet.named(self.zeroshot)
        if prompting and "tokens" in (self.train.image, self.train.text):
            raise ValueError("zeroshot needs an Adaptor of embeddings, not of tokens; leave one of both out")
        return self
