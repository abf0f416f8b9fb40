"""Errors that one line explains: the value, the rule and the fix."""


class TriformError(Exception):
    """Base of every error that a user can mend. Programs print it as one line."""


class UserError(TriformError):
    """A setting, path or request that cannot be used."""


class DataError(TriformError, ValueError):
    """Data that cannot be read or used; names the source and the example."""


class CheckpointError(TriformError, RuntimeError):
    """A checkpoint that cannot be saved or restored."""


class HostsError(TriformError, RuntimeError):
    """Another process of the same run is missing, late or different."""
