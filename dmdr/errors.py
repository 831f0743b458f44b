"""What can go wrong for a user. Each class says in one line what was asked, what was found and what to do.

`stages` maps each to an exit code (sysexits.h): config 64, data 65, missing input 66, non-finite 70, store 74.
"""


class ConfigError(ValueError):
    """The config, or a flag, cannot mean anything; change it. Never retried."""


class DataError(ValueError):
    """An input was found but is broken: truncated, wrong shape, wrong digest, too many bad lines. Never retried."""


class InputMissing(FileNotFoundError):
    """An input is not where the config says. Never retried."""


class NonFinite(FloatingPointError):
    """A loss or an image stopped being a number; nothing of that step was kept."""


class StoreError(OSError):
    """The artifact store, or the local disk, refused to read or write. Worth a retry."""
