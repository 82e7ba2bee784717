"""The errors of the package; wrong arguments raise the built-in ``TypeError`` and ``ValueError``."""

from __future__ import annotations


class EarOpsError(Exception):
    """Base class of the errors that this package defines: its user can mend what the message names."""


class BackendUnavailableError(EarOpsError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""
