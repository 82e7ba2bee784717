"""The errors of the package; wrong arguments raise the built-in ``TypeError`` and ``ValueError``."""

from __future__ import annotations

from reprlib import Repr

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class EarOpsError(Exception):
    """Base class of the errors that this package defines: its user can mend what the message names."""


class BackendUnavailableError(EarOpsError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


def shown(value: object) -> str:
    """The `repr` of a value for a message, cut where the value is long or nested deeply."""
    return _SHORT.repr(value)
