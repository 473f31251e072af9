"""Answers for new image files: calibrated probabilities, and masks in each image's own frame."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from embedcache.data.frames import Frame, frame_steps
from embedcache.device import count_cores, full_precision, is_out_of_memory, moved
from embedcache.encoders.base import Encoder, Prepared
from embedcache.encoders.recorded import load_recorded
from embedcache.errors import DeviceError, FingerprintMismatchError, InputError, SettingsError
from embedcache.predicting.answer_rows import FAILURE, Row, Said, answer_rows, known_of, table
from embedcache.predicting.chain import AnswerChain
from embedcache.predicting.mask_files import mask_files, write_mask
from embedcache.predicting.run_models import read_run
from embedcache.progress import Progress
from embedcache.stage_one.pipeline import batched
from embedcache.stage_one.prepare import Outcome, in_order

_QUICKLY_DONE = 64  # images


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


class Predictor:
    """An encoder with a run's Adaptor, heads and decoder, loaded once and asked any number of times.

    May be asked by several threads at once.

    Args:
        run_dir: a run of `train` after `probe` or `segment` with it; or a folder that one of these wrote without an
            Adaptor.
        encoder: where to take the encoder from, such as `hf:` and a directory, or the encoder itself; by default it is
            loaded as the run's record says. Any other than the run's is refused.
        head: which head answers where a label has several: `mlp`, `linear` or `logistic`; the first by default.
        decoder: likewise `paper`, `conv` or `linear`.
        trust_remote_code, allow_pickle: as of `load_encoder`; consents are not taken from a record.

    Raises:
        RunNotFoundError: nothing there that answers.
        EncoderError: the encoder cannot be found.
        FingerprintMismatchError: it is another one than the run's.

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
        source = self.models.source
        if encoder is None or isinstance(encoder, str):
            self.encoder = load_recorded(
                source.encoder,
                encoder=encoder,
                here=source.location,
                device=device,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
            )
        else:
            self.encoder = encoder
        if self.encoder.fingerprint != source.fingerprint:
            raise FingerprintMismatchError(
                f"{run_dir}: its heads are of encoder {source.encoder.get('name', 'external')!r} "
                f"({source.fingerprint[:12]}...), found {self.encoder.record.name!r} "
                f"({self.encoder.fingerprint[:12]}...)"
            )
        self._chain = AnswerChain(self.models).to(self.encoder.device)
        self._steps = frame_steps(source.encoder) if self.models.decoder else []
        self._threshold = self.models.decoder.threshold if self.models.decoder else 0.5
        self._encoding = contextlib.nullcontext() if getattr(self.encoder, "concurrent", False) else threading.Lock()
        self.notes = tuple(note for head in self.models.heads.values() for note in known_of(head))

    def predict(
        self, paths: Iterable[str | Path], *, masks: str | Path | None = None, batch_size: int = 16
    ) -> pd.DataFrame:
        """Answers for image files, a row for each in their order.

        Args:
            masks: a folder: each image's mask is written there as `<name>.mask.png`, 255 inside and 0 outside, in the
                image's own height and width.
            batch_size: images that go through the encoder together.

        Returns:
            `file`. For each label the calibrated probability, under its name, then `<label>.raw`, as the head says it,
            and `<label>.present`, whether that reaches the threshold chosen in training; of a set of labels, and of
            classes, these columns are named `<label>.<class>`, and `<label>` itself is the likeliest class. With
            `masks`, `mask` (its file) and `mask.area` (share of the image). Last `failure`: why a file has no answer,
            blank where it has one.

        Raises:
            SettingsError: masks of a run without a decoder, or nothing else of a run without heads.
            DeviceError: memory ran out.
            OutputError: a mask cannot be written.
        """
        files = [Path(path) for path in paths]
        if masks is not None and self.models.decoder is None:
            raise SettingsError(
                f"{self.models.run_dir}: no decoder of masks; run 'embedcache segment --run-dir', or leave masks out"
            )
        if masks is None and not self.models.heads:
            raise SettingsError(f"{self.models.run_dir}: decoders of masks alone; name a folder for masks (--masks)")
        names = None if masks is None else mask_files(files, Path(masks))
        rows: list[Row] = [{} for _ in files]
        jobs = (partial(self._prepared, file) for file in files)
        outcomes = in_order(jobs, n_threads=count_cores(), ahead=2 * batch_size)
        with (
            full_precision,
            closing(outcomes),
            ThreadPoolExecutor(count_cores(), "masks") as writing,
            Progress("predicting", total=len(files), unit="image", shown=len(files) > _QUICKLY_DONE) as progress,
        ):
            for batch in batched(_usable(outcomes, rows), batch_size):
                numbers, images = [k for k, _ in batch], [prepared for _, prepared in batch]
                said, found = self._answered(images, with_masks=names is not None)
                for k, row in zip(numbers, answer_rows(self.models.heads.values(), said, len(images)), strict=True):
                    rows[k] |= row
                progress.advance(len(images))
                if names is None or found is None:
                    continue
                places = [Frame.of(self._steps, image.size) for image in images if image.size is not None]
                write = partial(write_mask, threshold=self._threshold)
                for k, row in zip(numbers, writing.map(write, [names[k] for k in numbers], places, found), strict=True):
                    rows[k] |= row
        return table(files, rows, self.models.heads.values(), with_masks=masks is not None)

    def _prepared(self, file: Path) -> Sequence[Prepared]:
        return [self.encoder.prepare(file)]

    def _answered(self, images: Sequence[Prepared], *, with_masks: bool) -> tuple[list[Said], np.ndarray | None]:
        """Of each head what it says, and the probabilities of masks in the encoder's frame, (b, H, W)."""
        device = self.encoder.device
        try:
            with self._encoding:
                encoded = self.encoder.encode(images, tokens=with_masks)
            with torch.inference_mode():
                embeddings = moved(torch.from_numpy(encoded.embeddings), device)
                tokens = None if encoded.tokens is None else moved(torch.from_numpy(encoded.tokens), device)
                said, masks = self._chain(embeddings, tokens)
                on_host = [(raw.cpu().numpy(), calibrated.cpu().numpy()) for raw, calibrated in said]
                return on_host, None if masks is None else masks.cpu().numpy()
        except Exception as error:  # anything else is raised again
            if not is_out_of_memory(error):
                raise
            raise DeviceError(
                f"{self.encoder.record.name} ran out of memory with {len(images)} images; name a smaller batch size "
                "(--batch-size), or another device"
            ) from None


def _usable(outcomes: Iterable[Outcome], rows: Sequence[Row]) -> Iterator[tuple[int, Prepared]]:
    """The number of each good file and its input; of a bad one its row says why."""
    for k, outcome in enumerate(outcomes):
        if isinstance(outcome, InputError):
            rows[k][FAILURE] = f"{outcome.reason}: {outcome}"
        else:
            yield k, outcome[0]
