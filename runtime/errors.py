"""Errors that one line explains: the value, the rule and the fix."""

import re


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


def reason(error: BaseException) -> str:
    """What first went wrong, in one line, without tensorstore's specification."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = " ".join(f"{type(error).__name__}: {error}".split())
    line = re.sub(r" \[tensorstore_spec='.*?'\](?= \[|$)", "", line)
    return line if len(line) < 500 else f"{line[:290]} ... {line[-200:]}"
