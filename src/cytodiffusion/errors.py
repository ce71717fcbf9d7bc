"""Everything that can go wrong for a reason the user can mend.

Each message says what was given, what would do, and what to try next, on one line. The command line
prints the message and exits with 2; anything that is not a `CytoDiffusionError` is a bug.
"""


class CytoDiffusionError(Exception):
    """Base of every error that this package raises on purpose."""


class DataError(CytoDiffusionError):
    """A data set, manifest or split file cannot be used."""


class UnreadableImage(DataError):
    """One image cannot be read; the rest of the batch goes on."""


class LabelError(DataError):
    """A label is not in the taxonomy, or not one of the model's classes."""


class SettingsError(CytoDiffusionError):
    """A setting, preset or command-line value is not one that would do."""


class ModelError(CytoDiffusionError):
    """A model cannot be found, loaded or used for what was asked."""


class ChangedBundle(ModelError):
    """A file of a bundle is missing or is not the file that was released."""


class OutputError(CytoDiffusionError):
    """The output cannot be written: read-only, full, or made for another request."""


class MissingExtra(CytoDiffusionError):
    """An optional dependency is not installed; the message names the pip line."""


def one_line(error: Exception) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
