"""Answers for new image files: calibrated probabilities, and masks in each image's own frame."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from embedcache.data.frames import Frame, frame_steps
from embedcache.device import count_cores, full_precision, is_out_of_memory, moved, release_memory
from embedcache.encoders.base import Encoder, Prepared
from embedcache.encoders.recorded import load_recorded
from embedcache.errors import DeviceError, FingerprintMismatchError, InputError, OutputError, SettingsError
from embedcache.predicting.answer_rows import AREA, FAILURE, FILE, MASK, Row, answer_row, columns, known_of
from embedcache.predicting.chain import AnswerChain, rounded
from embedcache.predicting.mask_files import mask_files, write_mask
from embedcache.predicting.run_models import read_run
from embedcache.progress import Progress
from embedcache.stage_one.pipeline import batched
from embedcache.stage_one.prepare import Outcome, in_order
from embedcache.stage_one.rows import unusable

Image = str | Path | bytes
_QUICKLY_DONE = 64  # images: fewer show no progress


def predict(
    run_dir: str | Path,
    paths: Iterable[str | Path],
    *,
    masks: str | Path | None = None,
    encoder: str | Encoder | None = None,
    head: str | None = None,
    decoder: str | None = None,
    device: str = "auto",
    batch_size: int = 16,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> pd.DataFrame:
    """What a run says of new image files, DICOM included; a bad file costs its own row. See `Predictor`.

    Args:
        paths: image files, each of any format that the encoder reads.
        masks: a folder for masks, where the run has a decoder.

    Returns:
        As `Predictor.predict`.
    """
    predictor = Predictor(
        run_dir,
        encoder=encoder,
        head=head,
        decoder=decoder,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    return predictor.predict(paths, masks=masks, batch_size=batch_size)


@dataclass(frozen=True, eq=False)
class Answer:
    """What is said of one image.

    Args:
        file: as it was named; blank where its bytes were given.
        values: probabilities by column, as of `Predictor.predict`; empty where it failed.
        mask: (h, w) bool in the image's own frame, where masks were asked for.
        failure: why there is no answer; blank where there is one.
    """

    file: str
    values: Row
    mask: np.ndarray | None = None
    failure: str = ""


class Predictor:
    """An encoder with a run's Adaptor, heads and decoder, loaded once and asked any number of times.

    May be asked by several threads at once.

    Args:
        run_dir: a run of `train` after `probe` or `segment` with it; or a folder that one of these wrote without an
            Adaptor.
        encoder: where to take the encoder from, such as `hf:` and a directory, or the encoder itself; by default it is
            loaded as the run's record says. Any other than the run's is refused.
        head: which head answers for a label that has several: `mlp`, `linear` or `logistic`; the first by default.
        decoder: likewise `paper`, `conv` or `linear`.
        device: of an encoder that is loaded here.
        trust_remote_code, allow_pickle: as of `load_encoder`; consents are not taken from a record.

    Raises:
        RunNotFoundError: nothing there that answers.
        EncoderError: the encoder cannot be found.
        FingerprintMismatchError: it is another one than the run's.
        SettingsError: two labels whose columns would have one name.

    Attributes:
        notes: what is to be known of these answers.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        encoder: str | Encoder | None = None,
        head: str | None = None,
        decoder: str | None = None,
        device: str = "auto",
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        self.models = read_run(run_dir, head=head, decoder=decoder)
        self._heads, source = list(self.models.heads.values()), self.models.source
        self._columns = columns(self._heads, self.models.run_dir)
        if encoder is None or isinstance(encoder, str):
            self.encoder = load_recorded(
                source.encoder,
                encoder=encoder,
                here=source.location,
                device=device,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
            )
        elif encoder.fingerprint != source.fingerprint:
            raise FingerprintMismatchError(
                f"{run_dir}: its heads are of encoder {source.encoder.get('name', 'external')!r} "
                f"({source.fingerprint[:12]}...), found {encoder.record.name!r} "
                f"({encoder.fingerprint[:12]}...)"
            )
        else:
            self.encoder = encoder
        self._chain = AnswerChain(self.models).to(self.encoder.device)
        self._steps = frame_steps(source.encoder) if self.models.decoder else []
        self._encoding = contextlib.nullcontext() if getattr(self.encoder, "concurrent", False) else threading.Lock()
        self.notes = (*self.models.notes, *(note for head in self._heads for note in known_of(head)))

    def predict(
        self, paths: Iterable[str | Path], *, masks: str | Path | None = None, batch_size: int = 16
    ) -> pd.DataFrame:
        """Answers for image files, a row for each in their order.

        Args:
            masks: a folder: each image's mask is written there as `<name>.mask.png`, 255 inside and 0 outside, in the
                image's own height and width. No file is replaced.
            batch_size: images that go through the encoder together.

        Returns:
            `file`. For each label the calibrated probability, under its name, then `<label>.raw`, as the head says it,
            and `<label>.present`, whether that reaches the threshold chosen in training; of a set of labels, and of
            classes, these columns are named `<label>.<class>`, and `<label>` itself is the likeliest class. With
            `masks`, `mask` (its file) and `mask.area` (share of the image). Last `failure`: why a file has no answer,
            or no mask; blank where it has one.

        Raises:
            SettingsError: masks of a run without a decoder, or nothing else of a run without heads.
            DeviceError: memory ran out.
            OutputError: a file is where a mask is to be.
        """
        rows = list(self.rows(paths, masks=masks, batch_size=batch_size))
        kinds = {name: self._columns[name] for name in self.columns(with_masks=masks is not None)}
        return pd.DataFrame(
            {name: pd.Series([row.get(name) for row in rows], dtype=kind) for name, kind in kinds.items()}
        )

    def columns(self, *, with_masks: bool) -> list[str]:
        """Names of the columns of `predict`."""
        return [name for name in self._columns if with_masks or name not in (MASK, AREA)]

    def rows(
        self, paths: Iterable[str | Path], *, masks: str | Path | None = None, batch_size: int = 16
    ) -> Iterator[Row]:
        """The rows of `predict` as they come, batch by batch; arguments and errors are the same."""
        files = _listed(paths)
        if masks is None and not self._heads:
            raise SettingsError(f"{self.models.run_dir}: decoders of masks alone; name a folder for masks (--masks)")
        names = None if masks is None else mask_files([str(file) for file in files], Path(masks))
        return self._rows(self.answers(files, with_masks=masks is not None, batch_size=batch_size), len(files), names)

    def _rows(self, answers: Generator[Answer], n: int, names: Sequence[Path] | None) -> Iterator[Row]:
        shown = n > _QUICKLY_DONE
        with Progress("predicting", total=n, unit="image", shown=shown) as progress, closing(answers):
            for k, answer in enumerate(answers):
                row: Row = {FILE: answer.file, **answer.values, FAILURE: answer.failure}
                if names is not None and answer.mask is not None:
                    try:
                        write_mask(names[k], answer.mask)
                        row |= {MASK: str(names[k]), AREA: float(answer.mask.mean())}
                    except OutputError as error:
                        row[FAILURE] = f"output: {error}"
                progress.advance()
                yield row

    def answers(self, images: Iterable[Image], *, with_masks: bool = False, batch_size: int = 16) -> Generator[Answer]:
        """Answers in memory, in the order of the images, batch by batch: for a server.

        Args:
            images: files, or the bytes of files.
            with_masks: give masks too.

        Raises:
            SettingsError: masks of a run without a decoder.
            DeviceError: memory ran out with one image.
        """
        if batch_size < 1:
            raise SettingsError(f"batch_size is {batch_size}, expected at least 1")
        if with_masks and self.models.decoder is None:
            raise SettingsError(
                f"{self.models.run_dir}: no decoder of masks; run 'embedcache segment --run-dir', or leave masks out"
            )
        given = _listed(images)
        return self._in_batches(given, with_masks, batch_size)

    def _in_batches(self, images: Sequence[Image], with_masks: bool, batch_size: int) -> Generator[Answer]:
        files = ["" if isinstance(image, bytes) else str(image) for image in images]
        outcomes = in_order(map(self._job, images), n_threads=count_cores(), ahead=2 * batch_size)
        with full_precision, closing(outcomes), ThreadPoolExecutor(count_cores(), "masks") as placing:
            for batch in batched(zip(files, outcomes, strict=True), batch_size):
                yield from self._answered(batch, with_masks, placing)

    def _job(self, image: Image) -> Callable[[], Sequence[Prepared]]:
        prepare: Callable[[Any], Prepared] = self.encoder.prepare  # an image encoder takes bytes as well
        return lambda: [prepare(image)]

    def _answered(
        self, batch: Sequence[tuple[str, Outcome]], with_masks: bool, placing: ThreadPoolExecutor
    ) -> Iterator[Answer]:
        """Answers for images of which some may not have been readable."""
        good = [outcome[0] for _, outcome in batch if not isinstance(outcome, InputError)]
        said = iter(self._said(good, with_masks, placing) if good else ())
        for file, outcome in batch:
            if isinstance(outcome, InputError):
                yield Answer(file, {}, failure=f"{outcome.reason}: {outcome}")
            else:
                values, mask, failure = next(said)
                yield Answer(file, values, mask, failure)

    def _said(
        self, images: Sequence[Prepared], with_masks: bool, placing: ThreadPoolExecutor
    ) -> list[tuple[Row, np.ndarray | None, str]]:
        """Values, mask and failure of each image; where memory runs out, of half of them at a time."""
        try:
            return self._computed(images, with_masks, placing)
        except Exception as error:  # anything else is raised again
            if not is_out_of_memory(error):
                raise
        release_memory(self.encoder.device)
        if len(images) == 1:
            raise DeviceError(
                f"{self.encoder.record.name} ran out of memory with one image; name another device (--device)"
            )
        half = len(images) // 2
        return [*self._said(images[:half], with_masks, placing), *self._said(images[half:], with_masks, placing)]

    def _computed(
        self, images: Sequence[Prepared], with_masks: bool, placing: ThreadPoolExecutor
    ) -> list[tuple[Row, np.ndarray | None, str]]:
        device, decoder = self.encoder.device, self.models.decoder
        with self._encoding:
            encoded = self.encoder.encode(images, tokens=with_masks)
        with torch.inference_mode():
            embeddings = moved(torch.from_numpy(encoded.embeddings), device)
            tokens = None if encoded.tokens is None else moved(torch.from_numpy(encoded.tokens), device)
            answers, maps = self._chain(embeddings, tokens)
            on_host = [(raw.cpu().numpy(), calibrated.cpu().numpy()) for raw, calibrated in answers]
        bad_tokens = np.zeros(len(images), bool)
        if encoded.tokens is not None:
            bad_tokens = ~np.isfinite(encoded.tokens).all(axis=(1, 2))
        dtype = self.models.source.dtype
        stored = rounded(torch.from_numpy(encoded.embeddings), dtype).numpy()
        faults = unusable(encoded.embeddings, stored, bad_tokens, dtype)
        placed: Iterable[np.ndarray | None] = [None] * len(images)
        if maps is not None and decoder is not None:
            place = partial(_placed, steps=self._steps, threshold=decoder.threshold)
            placed = placing.map(place, images, maps.cpu().numpy())
        found: list[tuple[Row, np.ndarray | None, str]] = []
        for k, mask in enumerate(placed):
            if k in faults:
                found.append(({}, None, f"{faults[k][0]}: {faults[k][1]}"))
                continue
            values = Row()
            for head, (raw, calibrated) in zip(self._heads, on_host, strict=True):
                values |= answer_row(head, raw[k], calibrated[k])
            found.append((values, mask, ""))
        return found


def _placed(image: Prepared, probabilities: np.ndarray, *, steps: Sequence[Any], threshold: float) -> np.ndarray:
    """The mask of an image in its own frame, (h, w) bool."""
    if image.size is None:
        raise SettingsError("the encoder does not tell how large an image is (Prepared.size), so no mask can be placed")
    return Frame.of(steps, image.size).to_image(probabilities) > threshold


def _listed(images: Iterable[Image]) -> list[Image]:
    if isinstance(images, str | bytes | Path):
        raise SettingsError(f"one image ({type(images).__name__}), expected a list of them: [image]")
    return list(images)
