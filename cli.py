"""What the entry points share: flags, and mistakes answered in one line."""

import dataclasses
import difflib
import errno
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

from triform.datasets import DataError
from triform.runtime.checkpoint import CheckpointError


class UserError(Exception):
    """A mistake that one line explains: the value, the rule and the fix."""


def launch(main: Callable[[list[str]], int | None]) -> None:
    """Parses the flags, runs main, exits with its code.

    A mistake of the user ends it with one line on standard error and code 1.
    """
    # A log file shows the plan while the run compiles, not afterwards.
    sys.stdout.reconfigure(line_buffering=True)
    app.run(lambda argv: _answered(lambda: main(argv)), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    return _answered(lambda: flags.FLAGS(argv), fail=True)


def _answered(call: Callable[[], Any], fail: bool = False) -> Any:
    # JAX reports every accelerator it did not find at INFO.
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return call()
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was left half done", file=sys.stderr)
        sys.exit(130)
    except (UserError, DataError, CheckpointError) as error:
        text = str(error)
    except BrokenPipeError:
        # Whoever reads our output has enough, as in `generate.py ... | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        name = error.filename or "the workdir or the cache"
        text = f"{error.strerror}: {name}; free disk space and start again"
    except flags.Error as error:
        # A get_config that raised comes with its traceback: the last line says it.
        lines = [x for x in str(error).strip().splitlines() if x.strip()]
        text = lines[-1].strip().removeprefix("ValueError: ")
    except (KeyError, AttributeError) as error:
        text = _config_error(error)
        if not text:
            raise
    print(f"error: {text}", file=sys.stderr)
    if fail:
        sys.exit(1)
    return 1


def _config_error(error: Exception) -> str:
    """One line for what ml_collections raises on an unknown key; '' for the rest."""
    found = re.search(r"Field (\w+) not found on dataclass .*'([\w.]+)'", str(error))
    if found:
        key, path = found.groups()
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        names = [f.name for f in dataclasses.fields(kind)]
        close = difflib.get_close_matches(key, names, 1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(names)}"
        return f"unknown config key {key!r}: no field of {name}; {hint}"
    if "get_config" in str(error):
        path = flags.FLAGS["config"].value
        return f"--config: {path or 'the file'} defines no get_config(variant)"
    return ""


def config_flag() -> Any:
    """The value of --config; UserError if its file could not be loaded."""
    config = flags.FLAGS.config
    try:
        config.validate  # noqa: B018  (a file that failed to load raises on any access)
    except OSError as error:
        path = " ".join(a for a in sys.argv if a.startswith("--config=")) or "--config"
        raise UserError(f"{path}: no such file; name one of configs/*.py") from error
    return config
