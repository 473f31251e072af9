"""What of a run answers for new images: its Adaptor, a head for each label, a decoder of masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from embedcache.errors import FingerprintMismatchError, RunNotFoundError, RunStateError, some_ids
from embedcache.stage_two.adaptor import CONFIG, Adaptor, adaptor_digest, read_adaptor
from embedcache.stage_two.decoders import DECODERS
from embedcache.stage_two.kept import KEPT_HEADS, Kept, KeptDecoder, KeptHead, Source, kept_in, read_kept


@dataclass(frozen=True, eq=False)
class RunModels:
    """Models that are all of one encoder.

    Args:
        adaptor: None where nothing here is behind one.
        heads: by label.
        decoder: of masks, where there is one.
        notes: what is to be known of the choice.
    """

    run_dir: Path
    adaptor: Adaptor | None
    heads: Mapping[str, KeptHead]
    decoder: KeptDecoder | None
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> Source:
        """What the encoder is, and where it was found, if any of them knows."""
        models: list[Kept] = [*self.heads.values(), *([] if self.decoder is None else [self.decoder])]
        sources = [model.source for model in models]
        return next((source for source in sources if source.location), sources[0])


def read_run(run_dir: str | Path, *, head: str | None = None, decoder: str | None = None) -> RunModels:
    """Reads a run directory, or a folder that `embedcache probe` or `embedcache segment` wrote.

    Args:
        head: which of several heads of a label is taken; by default the first of `KEPT_HEADS`. A label that does not
            have it is answered by another, which is noted.
        decoder: which of several decoders; by default the first of `DECODERS`.

    Raises:
        RunNotFoundError: nothing there that answers, or not what is asked for; says what to run.
        RunStateError: models of several encoders.
        FingerprintMismatchError: models behind another Adaptor than the one there.
    """
    folder = Path(run_dir)
    kept = [read_kept(file) for file in kept_in(folder)]
    heads = [k for k in kept if isinstance(k, KeptHead)]
    decoders = [k for k in kept if isinstance(k, KeptDecoder) and decoder in (None, k.name)]
    if (head is not None and head not in {k.name for k in heads}) or not (heads or decoders or decoder):
        raise _nothing(folder, "head", head, [k.name for k in heads])
    if not decoders and decoder is not None:
        raise _nothing(folder, "decoder", decoder, [k.name for k in kept if isinstance(k, KeptDecoder)])
    by_choice = sorted(heads, key=lambda k: (k.name == head, -KEPT_HEADS.index(k.name)))
    by_label = dict(sorted({k.target.name: k for k in by_choice}.items()))  # the last of a label stays
    notes = tuple(f"{label}: has no head {head}" for label, k in by_label.items() if head not in (None, k.name))
    decoders = sorted(decoders, key=lambda k: DECODERS.index(k.name))[:1]
    used: list[Kept] = [*by_label.values(), *decoders]
    if len({k.source.fingerprint for k in used}) > 1:
        names = sorted({str(k.source.encoder.get("name", "external")) for k in used})
        raise RunStateError(
            f"{folder}: holds heads and decoders of several encoders ({', '.join(names)}); name the folder of one"
        )
    adaptor = _adaptor(folder, used)
    return RunModels(folder, adaptor, by_label, decoders[0] if decoders else None, notes)


def _adaptor(folder: Path, used: Sequence[Kept]) -> Adaptor | None:
    """The Adaptor that they are behind."""
    digests = {k.source.adaptor_digest for k in used} - {""}
    if not digests:
        return None
    if not (folder / CONFIG).is_file():
        raise RunNotFoundError(
            f"{folder}: its heads or decoders are behind an Adaptor, which is not there; name the run directory that "
            "'embedcache train' wrote, with them in its folders probes/LABEL and masks"
        )
    adaptor = read_adaptor(folder)
    if digests != {adaptor_digest(adaptor)}:
        raise FingerprintMismatchError(
            f"{folder}: its Adaptor is another than its heads or decoders were fitted behind; run 'embedcache probe' "
            "and 'embedcache segment' again with --run-dir"
        )
    return adaptor


def _nothing(folder: Path, kind: str, name: str | None, there: Sequence[str]) -> RunNotFoundError:
    wanted = kind if name is None else f"{kind} {name!r}"
    if there:
        return RunNotFoundError(f"{folder}: no {wanted}; it has {', '.join(sorted(set(there)))}")
    below = sorted({p.parent.name for p in (*folder.glob("*/probes"), *folder.glob("*/masks"))})
    if below:
        return RunNotFoundError(f"{folder}: a folder of several runs; name one in it: {some_ids(below)}")
    return RunNotFoundError(
        f"{folder}: no {wanted} there that answers for new images; name a run directory of 'embedcache train' after "
        "'embedcache probe MANIFEST STORE --label LABEL --run-dir RUN' (heads mlp, linear or logistic, one view at a "
        "time), or after 'embedcache segment'"
    )
