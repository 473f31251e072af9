"""The errors that embedcache raises: what was found, where, what was expected, what to run next.

Each also subclasses the builtin kind that a caller would expect. `exit_code` is what the command line
returns: 2 for a user's mistake, 1 for a fault.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator


class EmbedCacheError(Exception):
    """Base of all errors raised on purpose by embedcache."""

    exit_code = 1

    def __str__(self) -> str:  # KeyError would show the repr of its argument
        return str(self.args[0]) if self.args else ""


class UserError(EmbedCacheError):
    """Something the user named or wrote can be mended by the user."""

    exit_code = 2


class ManifestError(UserError, ValueError):
    """A manifest that cannot be read or breaks its contract."""


class DatasetError(UserError, ValueError):
    """A folder that is not a dataset as it is published, or a split or task that a dataset does not have."""


class OutputError(UserError, OSError):
    """A file that cannot be written where it was asked for."""


class LabelMapError(UserError, ValueError):
    """A label map that cannot be read, or does not fit a manifest."""


class InputError(UserError, ValueError):
    """One sample cannot be used; it costs its own row only.

    Args:
        reason: short stable code, such as `missing` or `truncated`; kept in the failure ledger.
        message: one line without the content of the input.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str]]:
        return InputError, (self.reason, str(self))


class EncoderError(UserError, ValueError):
    """An encoder that cannot be loaded as asked."""


class StoreNotFoundError(UserError, FileNotFoundError):
    """No store at the path."""


class StoreFormatError(EmbedCacheError, ValueError):
    """A file of a store is damaged, foreign, or of a version that this code does not read."""


class StoreWriteError(EmbedCacheError, OSError):
    """A file of a store could not be written; nothing of it counts."""


class NoRoomError(StoreWriteError):
    """A store that the disk cannot hold; nothing was written."""

    exit_code = 2


class SettingsError(UserError, ValueError):
    """Settings that make no sense, alone or together."""


class NoTokensError(UserError, AttributeError):
    """Tokens asked of a store that holds embeddings alone."""


class RepairError(UserError, ValueError):
    """A store that cannot be repaired from what is left of it."""


class ImportFormatError(UserError, ValueError):
    """Embeddings made by another tool that are not as that tool writes them."""


class FingerprintMismatchError(UserError, ValueError):
    """Values computed by one encoder were about to be mixed with, or taken for, another's."""


class DeviceError(UserError, ValueError):
    """A device that this machine does not have."""


class WorkerError(EmbedCacheError, RuntimeError):
    """Worker processes that cannot be reached, or that die over and over."""


class RunNotFoundError(UserError, FileNotFoundError):
    """No trained Adaptor in a run directory."""


class RunStateError(UserError, ValueError):
    """A run directory that holds another run, or a checkpoint that cannot be read."""


class MissingIdsError(UserError, KeyError):
    """Ids that a store does not hold."""


class JoinError(UserError, ValueError):
    """Images and reports that do not belong together."""


class TrainingError(EmbedCacheError, ArithmeticError):
    """Training met values that it cannot go on with."""


class ExportError(EmbedCacheError, ArithmeticError):
    """A graph that does not give what it was made from gives."""


class RecipeError(UserError, ValueError):
    """A recipe with wrong, unknown or missing fields."""


@contextlib.contextmanager
def refusing(reason: str, message: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """What a library raises over one input becomes an `InputError`, so that it costs its own row only.

    A library may quote the input: of its error only the class is told, in the message as in the traceback.

    Args:
        kinds: errors that can come of the input; others are faults of the code and end the run.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except kinds as error:
        raise InputError(reason, f"{message} ({type(error).__name__})") from None


def some_ids(ids: Iterable[str], limit: int = 5) -> str:
    """Names the first few ids for a message, escaped, and counts the rest."""
    listed = list(ids)
    shown = ", ".join(repr(i) for i in listed[:limit])
    return shown if len(listed) <= limit else f"{shown} and {len(listed) - limit} more"
