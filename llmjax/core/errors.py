"""The ways a command ends badly, each with its exit status."""


class LlmjaxError(Exception):
    """A fault the user can act on; its text is the one line the command line prints."""

    exit_status = 1


class RunError(LlmjaxError):
    """The work failed: a missing file, an empty corpus, a loss that is not a number."""


class ConfigError(LlmjaxError, ValueError):
    """Wrong use: an unknown field, a value of the wrong type, sizes that do not fit together."""

    exit_status = 2


class RestartRequested(LlmjaxError):
    """Stopped on purpose; a launcher should start the same command again."""

    exit_status = 75
