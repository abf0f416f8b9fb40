"""What the entry points share: flags, and mistakes answered in one line."""

import contextlib
import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags

from triform.runtime import compile_cache, host, hosts, paths, stores, streams
from triform.runtime.errors import TriformError, UserError

Main = Callable[[list[str]], int | None]
HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull"}


def launch(
    main: Main,
    define: Callable[[], None],
    about: str,
    argv: Sequence[str],
    *,
    prepare: Callable[[list[str]], list[str]] = list,
    answers: bool = False,
    passes_on: bool = False,
    arguments: bool = False,
) -> None:
    """Parses the flags, runs main, exits with its code.

    A mistake of the user ends it with one line on standard error and code 1.

    Args:
      main: gets the name of the program, and what `passes_on` leaves.
      define: defines the flags.
      about: what --help shows, before the flags.
      argv: the name of the program and its flags.
      prepare: argv -> argv without what is no flag of `define`.
      answers: standard output is what the program is for; otherwise it is a log, and
        the program goes on without it.
      passes_on: the program computes nothing; flags that are not its own are main's
        arguments, for the programs that it starts.
      arguments: words that are no flags are main's arguments.
    """
    streams.prepare(needed=answers)

    def parse(given: list[str]) -> list[str]:
        known = set(flags.FLAGS)
        define()
        if HELP & set(given[1:]):
            _print_help(about, sorted(set(flags.FLAGS) - known))
            sys.exit(0)
        if not passes_on:
            host.prepare()
            compile_cache.prepare()
        return flags.FLAGS(prepare(given), known_only=passes_on)

    def run(rest: list[str]) -> int | None:
        if len(rest) > 1 and not (passes_on or arguments):
            raise UserError(
                f"unexpected argument {rest[1]!r}: write --config.KEY=VALUE, "
                "--input='TEXT'"
            )
        with hosts.together(one_line):
            return main(rest)

    def answered(rest: list[str]) -> int | None:
        code = _answered(lambda: run(rest))
        hosts.here().exit(code or 0)
        return code

    app.run(
        answered,
        argv=list(argv),
        flags_parser=lambda given: _answered(lambda: parse(given), fail=True),
    )


def _print_help(about: str, names: Sequence[str]) -> None:
    print(f"{about.strip()}\n\nFlags:")
    for name in names:
        print(_shown(flags.FLAGS[name]))


def _shown(flag: flags.Flag) -> str:
    """'  --name  what it means (default)'."""
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    default = "" if flag.default in (None, "", False) else f" (default {flag.default})"
    return f"  {name:22}{flag.help}{default}"


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
        return _flag_error(error)
    return ""


def _flag_error(error: flags.Error) -> str:
    """One line for a flag that is unknown or has a value that it cannot have."""
    if missing := re.search(r"Flag (--\w+) must have a value other", str(error)):
        return f"{missing[1]} is missing: add {missing[1]}=VALUE"
    if not isinstance(error, flags.UnrecognizedFlagError):
        return " ".join(str(error).split())
    name = error.flagname
    close = difflib.get_close_matches(name, [*flags.FLAGS], 1)
    if close:
        return f"unknown flag --{name}: did you mean --{close[0]}?"
    return f"unknown flag --{name}: --help lists the flags"


def workdir_flag(name: str = "workdir") -> str:
    """The workdir that a flag gives: as `folder_flag`, or on an object store."""
    value = flags.FLAGS[name].value
    return paths.workdir(value) if stores.is_store(value) else folder_flag(name)


def folder_flag(name: str) -> str:
    """The absolute path that a flag gives; UserError if it is empty or a file."""
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is empty: name a folder")
    if os.path.isfile(paths.absolute(value)):
        raise UserError(f"--{name}={value}: is a file; name a folder")
    return paths.absolute(value)


def file_flag(name: str) -> str:
    """The absolute path of a file to write, '' without one; UserError if it cannot be.

    Asked before the work whose result goes there.
    """
    value = flags.FLAGS[name].value
    path = paths.absolute(value) if value else ""
    folder = os.path.dirname(path)
    if path and (os.path.isdir(path) or not os.path.isdir(folder)):
        raise UserError(f"--{name}={value}: name a file in a folder that exists")
    if path and not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(f"--{name}={value}: cannot be written; name another file")
    return path
