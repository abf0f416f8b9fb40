"""Shows what a workdir holds: config, checkpoints, scores, parameters, what is next.

triform inspect WORKDIR [--config]
python -m triform inspect WORKDIR
"""

import contextlib
import sys
from collections.abc import Sequence

import jax
from absl import flags
from flax.traverse_util import flatten_dict

from triform import workdir as workdirs
from triform.configs import schema
from triform.configs.schema import ExperimentConfig
from triform.experiment import Experiment
from triform.interop.workdir import exportable
from triform.runtime import commands, launch, metrics, paths, stores
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import UserError

DEPTH = 2  # names of a parameter's path that make a module


def run(workdir: str) -> str:
    """The report on a workdir; UserError if it is none. Computes nothing."""
    workdir = paths.workdir(workdir)
    config = workdirs.open_config(workdir)
    blocks = [
        _summary(config, workdir),
        _checkpoints(config, workdir),
        _scores(workdir),
        _parameters(workdirs.for_these_devices(config)),
        _next(config, workdir),
    ]
    return "\n\n".join(block for block in blocks if block)


def _summary(config: ExperimentConfig, workdir: str) -> str:
    trunks = [
        f"{name}: {t.num_layers} layers, width {t.d_model}, {t.num_heads} heads, "
        f"{t.ffn} of {t.d_ff}, positions {t.positions}, attention {t.attention}"
        for name, t in config.model.trunks().items()
    ]
    source = getattr(config.data, "source", "")
    rows = {
        "model": type(config.model).__name__,
        "": "\n".join(trunks),
        "task": type(config.task).__name__,
        "data": f"{type(config.data).__name__}, {source}, batches of "
        f"{config.data.batch_size}",
        "optimiser": f"{config.optim.name}, {config.optim.learning_rate:g}, "
        f"{config.optim.schedule}",
        "steps": f"{config.steps:,}",
        "started from": config.init_from or ", ".join(r.source for r in config.init),
        "plugins": ", ".join(commands.path(path) for path in config.plugins),
    }
    lines = [commands.path(workdir)]
    for name, text in rows.items():
        lines += [f"  {name:13}{line}" for line in text.splitlines()]
    return "\n".join(lines)


def _checkpoints(config: ExperimentConfig, workdir: str) -> str:
    with Checkpointer(
        workdirs.checkpoint_dir(workdir), config.checkpoint
    ) as checkpointer:
        steps, best = checkpointer.steps(), checkpointer.best()
        lines = []
        for step in steps:
            found = checkpointer.metrics_of(step) or {}
            score = found.get(config.checkpoint.metric)
            note = f"  {config.checkpoint.metric} {score:.4g}" if score else ""
            lines.append(f"  {step:>9,}{note}{'  best' if step == best else ''}")
        imported = workdirs.is_imported(checkpointer)
    if imported:
        return "imported weights, not trained here"
    done = steps[-1] if steps else 0
    state = "finished" if done >= config.steps else f"{done:,} of {config.steps:,} done"
    return "\n".join([f"checkpoints ({state})", *lines])


def _scores(workdir: str) -> str:
    """The last line of each kind of scores in metrics.jsonl."""
    last: dict[str, dict] = {}
    for line in metrics.read_lines(workdir):
        kind = next((k.partition("/")[0] for k in line if "/" in k), "")
        last[kind] = line
    lines = []
    for kind, line in last.items():
        lines.append(f"{kind} at step {line['step']:,}")
        for name, value in line.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                lines.append(f"  {name:32}{value:.5g}")
    return "\n".join(lines)


def _parameters(config: ExperimentConfig) -> str:
    """Parameters by module, as the config has them."""
    variables = jax.eval_shape(Experiment(config).init_variables)
    sizes: dict[str, int] = {}
    for path, x in flatten_dict(variables["params"]).items():
        name = "/".join(path[:-1][:DEPTH]) or path[0]
        sizes[name] = sizes.get(name, 0) + x.size
    width = max(map(len, sizes), default=0) + 2
    lines = [f"  {name:{width}}{size:>15,}" for name, size in sizes.items()]
    return "\n".join([f"parameters: {sum(sizes.values()):,}", *lines])


def _next(config: ExperimentConfig, workdir: str) -> str:
    lines = [commands.line("train", workdir=workdir)]
    if asked := workdirs.request_command(config, workdir=workdir):
        lines.append(asked)
    lines.append(commands.line("evaluate", workdir=workdir))
    with contextlib.suppress(UserError):  # that it has no counterpart
        exportable(config, stores.local(workdir))
        lines.append(commands.line("export", commands.path(workdir), "HF_DIR"))
    return "\n".join(["next", *(f"  {line}" for line in lines)])


def main(argv: list[str]) -> None:
    """Prints the report, or the whole config."""
    named = [*argv[1:], *([flags.FLAGS.workdir] if flags.FLAGS.workdir else [])]
    if len(named) != 1:
        raise UserError(f"inspect: {len(named)} workdirs are named; name one")
    if flags.FLAGS.config:
        print(schema.to_json(workdirs.open_config(paths.workdir(named[0]))))
        return
    print(run(named[0]))


def define() -> None:
    """Defines the flags."""
    flags.DEFINE_string("workdir", "", "The workdir, if it is not the argument.")
    flags.DEFINE_bool("config", False, "Print the whole config instead, as JSON.")


def cli(argv: Sequence[str], program: str = "inspect") -> None:
    """The program, from the command line to the exit code."""
    launch.launch(main, define, __doc__, argv, answers=True, arguments=True)


if __name__ == "__main__":
    cli(sys.argv)
