"""What is wrong with a configuration, for all modules that find it out."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, what was expected and what came."""
