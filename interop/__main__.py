"""Hugging Face weights in and out.

python -m triform.interop import HF_DIR WORKDIR [--scan_layers] [--ignore=PATTERN]
python -m triform.interop export WORKDIR HF_DIR [--checkpoint=best]
"""

import argparse
import ctypes
import errno
import os
import shlex
import signal
import sys
from collections.abc import Sequence

import jax

from triform.experiment import open_workdir
from triform.interop.workdir import export_model, import_model
from triform.models import EncoderDecoderConfig, LanguageModelConfig
from triform.runtime.errors import TriformError, UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see python -m triform.interop --help")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(
        prog="python -m triform.interop",
        description="Hugging Face weights in and out.",
    )
    commands = top.add_subparsers(dest="command", required=True)
    into = commands.add_parser(
        "import", help="a Hugging Face folder becomes a workdir", allow_abbrev=False
    )
    into.add_argument("source", metavar="HF_DIR")
    into.add_argument("target", metavar="WORKDIR", help="a new folder")
    into.add_argument(
        "--scan_layers", action="store_true", help="one stacked array for all layers"
    )
    into.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out tensors whose names match, such as '*.pooler.*'; repeatable",
    )
    out = commands.add_parser(
        "export", help="a workdir becomes a Hugging Face folder", allow_abbrev=False
    )
    out.add_argument("source", metavar="WORKDIR")
    out.add_argument("target", metavar="HF_DIR", help="a new folder")
    out.add_argument("--checkpoint", default="best", help="or latest, average:K, STEP")
    return top


def run(argv: Sequence[str]) -> list[str]:
    """Does what the command line says; returns what to print."""
    args = parser().parse_args(argv)
    if args.command == "export":
        return export_model(args.source, args.target, args.checkpoint)
    said = import_model(args.source, args.target, args.scan_layers, args.ignore)
    return said + _next(args.target)


def _next(workdir: str) -> list[str]:
    """The commands that go on from here."""
    config, shown = open_workdir(workdir), shlex.quote(workdir)
    python = shlex.quote(os.path.relpath(sys.executable))
    said = []
    if isinstance(config.model, (LanguageModelConfig, EncoderDecoderConfig)):
        said.append(f'  {python} generate.py --workdir={shown} --input="..."')
    said.append(
        f"  {python} train.py --config=configs/NAME.py --config.init_from={shown} "
        "--workdir=DIR"
    )
    said.append(f"  {python} -m triform.interop export {shown} HF_DIR")
    return ["next:", *said]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; a mistake is answered in one line on standard error."""
    try:
        lines = run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    except TriformError as error:
        text = str(error)
    except OSError as error:
        if not error.filename and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "the target"
        text = f"{error.strerror}: {where}; mend it or name another folder"
    else:
        print("\n".join(lines))
        return 0
    print(f"error: {text}", file=sys.stderr)
    return 1


def _give_back_memory() -> None:
    """Has the C library return what is freed, where it is glibc.

    By default it keeps blocks of up to 32 MB, of which reading a checkpoint frees many.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        threshold = -3  # M_MMAP_THRESHOLD
        mallopt(threshold, 1 << 20)


if __name__ == "__main__":
    _give_back_memory()
    # Weights are moved, not computed with: an accelerator stays free.
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
