"""What a caller asks of a store, checked before anything is loaded or written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from embedcache.data.views import ViewPolicy
from embedcache.encoders.base import Encoder
from embedcache.errors import SettingsError
from embedcache.stage_one.plan import Part
from embedcache.stage_one.rows import layout_for, rows_in_a_shard
from embedcache.store import layout
from embedcache.store.layout import Layout


@dataclass(frozen=True)
class Asked:
    """The settings of `extract` that say what is stored; their meanings are given there.

    Raises:
        SettingsError: names each that is wrong, alone or beside another.
    """

    tokens: bool = False
    store_dtype: str = "float16"
    shard_rows: int = 1024
    batch_size: int | Literal["auto"] = 32
    views: int = 1
    view_policy: ViewPolicy | None = None
    part: tuple[int, int] | None = None
    retry_failed: bool = False

    def __post_init__(self) -> None:
        wrong = []
        for name in ("shard_rows", "views", "batch_size"):
            value = getattr(self, name)
            if (name, value) != ("batch_size", "auto") and (not isinstance(value, int) or value < 1):
                wrong.append(f"{name} is {value!r}, expected at least 1")
        if self.store_dtype not in layout.STORED_DTYPES:
            wrong.append(f"store_dtype {self.store_dtype!r}, expected one of {', '.join(layout.STORED_DTYPES)}")
        if not wrong and self.views == 1 and self.view_policy is not None:
            wrong.append("view_policy was given, but views is 1: there is no view to draw; ask for 2 or more")
        if not wrong and self.views > self.shard_rows:
            wrong.append(f"views is {self.views}, expected at most shard_rows ({self.shard_rows}): an id has one shard")
        if self.part is not None and self.retry_failed:
            wrong.append("retry_failed was given with a part: each part would try every failure; retry without parts")
        if wrong:
            raise SettingsError("; ".join(wrong))
        if self.part is not None:
            Part(*self.part)

    def check(self, encoder: Encoder) -> None:
        """Refuses what this encoder cannot do.

        Raises:
            SettingsError: tokens of an encoder without any, a batch size by memory for a compiled model.
        """
        self.layout(encoder)
        if self.batch_size == "auto" and getattr(encoder, "even_batches", False):
            raise SettingsError(
                f"{encoder.record.name}: batch_size 'auto' for a compiled model, which would be compiled for each size "
                "that is tried; name a size, such as one that 'auto' found without compiling"
            )

    def layout(self, encoder: Encoder) -> Layout:
        return layout_for(
            encoder, store_dtype=self.store_dtype, tokens=self.tokens, views=self.views, view_policy=self.view_policy
        )

    def document(self, encoder: Encoder) -> dict[str, Any]:
        """The store's own document."""
        return layout.store_document(
            encoder=encoder.record.to_json(),
            encoder_fingerprint=encoder.fingerprint,
            modality=encoder.modality,
            store_layout=self.layout(encoder),
        )

    def ids_in_a_shard(self, encoder: Encoder) -> int:
        """Most ids of a shard, by rows and by bytes."""
        return max(min(self.shard_rows, rows_in_a_shard(encoder, self.layout(encoder))) // self.views, 1)
