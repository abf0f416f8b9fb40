"""Hugging Face weights in and out.

python -m triform.interop import HF_DIR WORKDIR [--scan_layers] [--ignore=PATTERN]
    [--adapter=PEFT_DIR]
python -m triform.interop export WORKDIR DIR [--checkpoint=best] [--adapter]
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence

import jax

from triform.interop.workdir import export_model, import_model
from triform.runtime import commands, host, paths, streams
from triform.runtime.errors import UserError
from triform.runtime.launch import one_line
from triform.workdir import open_config, request_command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(
        prog=shlex.join(commands.start("import")[:-1]),
        description="Hugging Face weights in and out.",
    )
    kinds = top.add_subparsers(dest="command", required=True)
    into = kinds.add_parser(
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
    into.add_argument(
        "--adapter", default="", metavar="PEFT_DIR", help="LoRA matrices for the model"
    )
    out = kinds.add_parser(
        "export", help="a workdir becomes a Hugging Face folder", allow_abbrev=False
    )
    out.add_argument("source", metavar="WORKDIR")
    out.add_argument("target", metavar="DIR", help="a new folder")
    out.add_argument("--checkpoint", default="best", help="or latest, average:K, STEP")
    out.add_argument(
        "--adapter",
        action="store_true",
        help="write the LoRA matrices alone, for peft, in place of merged weights",
    )
    return top


def run(argv: Sequence[str]) -> list[str]:
    """Does what the command line says; returns what to print."""
    args = parser().parse_args(argv)
    # A shell expands ~ in front of a word only, not in --adapter=~/x.
    if isinstance(args.adapter, str) and args.adapter:
        args.adapter = paths.absolute(args.adapter)
    source, target = args.source, args.target
    if args.command == "export":
        checkpoint = args.checkpoint
        return export_model(source, target, checkpoint, adapter=args.adapter)
    options = args.scan_layers, args.ignore, args.adapter
    return import_model(source, target, *options) + _next(target)


def _next(workdir: str) -> list[str]:
    """The commands that go on from here."""
    shown, lines = commands.path(workdir), ["next:"]
    if asked := request_command(open_config(workdir), workdir=workdir):
        lines.append(f"  {asked}")
    start = commands.line("train", "--config=NAME", **{"config.init_from": shown})
    lines.append(f"  {start} --workdir=DIR")
    lines.append(f"  {commands.line('export', shown, 'HF_DIR')}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; a mistake is answered in one line on standard error."""
    try:
        print("\n".join(run(sys.argv[1:] if argv is None else argv)))
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        text = one_line(error)
        if not text:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 1
    return 0


def cli(argv: Sequence[str], program: str = "") -> int:
    """The program, from the command line to the exit code."""
    streams.prepare()
    host.return_freed_memory()
    # Weights are moved, not computed with: an accelerator stays free.
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return main([program, *argv[1:]] if program else argv[1:])


if __name__ == "__main__":
    sys.exit(cli(sys.argv))
