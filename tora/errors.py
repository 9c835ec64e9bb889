"""One small hierarchy; every error pickles, so it crosses processes as itself."""


class ToraError(Exception):
    """Base of all errors that Tora raises on purpose."""


class ConfigError(ToraError, ValueError):
    """The user's input is wrong; one sentence, exit code 2, no traceback."""


class SyncError(ToraError, RuntimeError):
    """A snapshot did not arrive whole in an engine."""


class RolloutError(ToraError, RuntimeError):
    """A rollout worker cannot go on."""
