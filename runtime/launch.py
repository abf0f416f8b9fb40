"""What the entry points share: flags, and mistakes answered in one line."""

import contextlib
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

import jax
from absl import app, flags

from triform.runtime import host, paths, streams
from triform.runtime.errors import TriformError, UserError


def launch(
    main: Callable[[list[str]], int | None],
    *,
    answers: bool = False,
    passes_on: bool = False,
) -> None:
    """Parses the flags, runs main, exits with its code.

    A mistake of the user ends it with one line on standard error and code 1.
    `answers`: standard output is what the program is for; otherwise it is a log, and
    the program goes on without it. `passes_on`: the program computes nothing; flags
    that are not its own are main's arguments, for the programs that it starts.
    """
    streams.prepare(needed=answers)

    def parse(argv: list[str]) -> list[str]:
        if not passes_on:
            host.prepare()
        return flags.FLAGS(argv, known_only=passes_on)

    def run(argv: list[str]) -> int | None:
        if len(argv) > 1 and not passes_on:
            raise UserError(
                f"unexpected argument {argv[1]!r}: write --config.KEY=VALUE, "
                "--input='TEXT'"
            )
        return main(argv)

    app.run(
        lambda argv: _answered(lambda: run(argv)),
        flags_parser=lambda argv: _answered(lambda: parse(argv), fail=True),
    )


def _answered(call: Callable[[], Any], fail: bool = False) -> Any:
    # JAX reports every accelerator it did not find at INFO.
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return call()
    except KeyboardInterrupt:
        # Not sys.exit: tearing XLA down while it compiles crashes the interpreter.
        with contextlib.suppress(OSError):
            os.write(2, b"\ninterrupted\n")
        os._exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename == streams.OUTPUT:
            # Whoever reads our output has enough, as in `generate.py ... | head`.
            return 0
        text = one_line(error)
        if not text:
            raise
    print(f"error: {text}", file=sys.stderr)
    if fail:
        sys.exit(1)
    return 1


def one_line(error: Exception) -> str:
    """What to tell the user of an error that they can correct; '' for the others."""
    if isinstance(error, TriformError):
        return str(error)
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            name = error.filename or "the workdir or the cache"
            return f"{error.strerror}: {name}; free disk space and start again"
        name = error.filename
        return f"{error.strerror}: {name}; mend or name another path" if name else ""
    if isinstance(error, jax.errors.JaxRuntimeError):
        if "RESOURCE_EXHAUSTED" not in str(error):
            return ""
        return (
            f"out of memory ({str(error).splitlines()[0]:.200}); lower "
            "data.batch_size, raise optim.accumulate or set model.trunk.remat=True"
        )
    if isinstance(error, flags.Error):
        # A get_config that raised comes with its traceback: the last line says it.
        lines = [x for x in str(error).strip().splitlines() if x.strip()]
        text = lines[-1].strip().removeprefix("ValueError: ")
        named = any(a.startswith("--config=") for a in sys.argv)
        if "config" in flags.FLAGS and not named:
            text += "; name an experiment with --config=configs/NAME.py"
        return text
    if isinstance(error, (KeyError, AttributeError)):
        return _config_error(error)
    return ""


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


def folder_flag(name: str) -> str:
    """The absolute path that a flag gives; UserError if it is empty or a file."""
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is empty: name a folder")
    if os.path.isfile(paths.absolute(value)):
        raise UserError(f"--{name}={value}: is a file; name a folder")
    return paths.absolute(value)


def config_flag() -> Any:
    """The value of --config; UserError if its file could not be loaded."""
    config = flags.FLAGS.config
    try:
        config.validate  # noqa: B018  (a file that failed to load raises on any access)
    except OSError as error:
        path = " ".join(a for a in sys.argv if a.startswith("--config=")) or "--config"
        raise UserError(f"{path}: no such file; name one of configs/*.py") from error
    return config
