"""What is wrong with what a user asked for, where more than one module finds it out."""

from ear_ops.errors import EarOpsError


class ConfigError(EarOpsError, ValueError):
    """A setting that cannot be used; the message names it, what was expected and what came."""


class NotComparableError(EarOpsError, ValueError):
    """Runs that were not scored on the same things."""
