"""The errors of the recipe that more than one of its modules raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ear_ops.errors import EarOpsError


class ConfigError(EarOpsError, ValueError):
    """A setting cannot be used. The message names the setting, what was expected and what came."""


class NotComparableError(EarOpsError, ValueError):
    """The runs were not scored on the same items."""


@contextmanager
def refused_settings() -> Iterator[None]:
    """Turn the refusal of an argument into a ConfigError.

    Put it around a single call that checks what the user chose, such as a layer that the model lacks. Around more, a
    fault of the package would look like a mistake of the user.

    Raises:
        ConfigError: the call inside raised a ValueError or TypeError that is not an error of the package.
    """
    try:
        yield
    except EarOpsError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
