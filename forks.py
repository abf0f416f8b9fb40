"""A new workdir that begins as another run was after one of its steps."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from triform import workdir as workdirs
from triform.configs.schema import ExperimentConfig
from triform.data.codecs import files as codec_files
from triform.runtime import files, hosts, metrics, paths, stores
from triform.runtime.checkpoint import Checkpointer, ocp
from triform.runtime.errors import UserError

FILE = "fork.json"  # of a workdir: the run and the step that it was begun with


def parse(text: str) -> tuple[str, int]:
    """(workdir, step) of RUN:STEP; UserError if it is neither."""
    found = re.fullmatch(r"(.+):(\d+)", text)
    if not found:
        raise UserError(
            f"--fork={text}: write RUN:STEP, a workdir and one of its steps"
        )
    return paths.workdir(found[1]), int(found[2])


def begin(workdir: str, config: ExperimentConfig, text: str) -> None:
    """Makes `workdir` what the run of RUN:STEP was after that step; resuming follows.

    Nothing of that run changes. The same command started again does nothing here.
    UserError if there is no such step, if the run cannot go on with this config, or if
    the workdir holds something else.
    """
    source, step = parse(text)
    fork = {"run": source, "step": step}
    if workdirs.saved_config(workdir) is not None:
        if files.read_json(os.path.join(workdir, FILE)) != fork:
            raise UserError(
                f"--fork={text}: workdir={workdir!r} holds another run; name a new one"
            )
        print(f"fork={text}: done before; going on")
        return
    old = workdirs.open_config(source)
    workdirs.require_same(source, old, config)
    folder = workdirs.checkpoint_dir(source)
    with Checkpointer(folder, old.checkpoint) as checkpointer:
        steps = [s for s in checkpointer.steps() if s <= step]
        scores = {s: checkpointer.metrics_of(s) for s in checkpointer.scored(step)}
    if steps[-1:] != [step]:
        shown = ", ".join(map(str, steps)) or "none that early"
        raise UserError(f"--fork={text}: no checkpoint of that step; there are {shown}")
    hosts.here().barrier("looking at the run to fork")
    if hosts.here().is_first:
        _copy(workdir, source, old, steps, scores, fork)
    hosts.here().barrier("copying the run that is forked", hosts.SLOW)
    print(f"forked: {source} after step {step}")


def _copy(
    workdir: str,
    source: str,
    old: ExperimentConfig,
    steps: Sequence[int],
    scores: Mapping[int, Any],
    fork: Mapping[str, Any],
) -> None:
    """Everything up to the last of the steps."""
    folder, step = workdirs.checkpoint_dir(source), steps[-1]
    _copy_steps(folder, workdirs.checkpoint_dir(workdir), steps)
    if files.is_folder(os.path.join(source, "frozen")):
        _copy_steps(
            os.path.join(source, "frozen"), os.path.join(workdir, "frozen"), [0]
        )
    files.write_json(os.path.join(workdir, "scores.json"), scores)
    lines = [x for x in metrics.read_lines(source) if x["step"] <= step]
    with files.replacing(os.path.join(workdir, metrics.FILE)) as f:
        f.writelines(files.dumps(x) + "\n" for x in lines if not _tested(x))
    files.write_json(os.path.join(workdir, FILE), fork)
    # Last: a workdir with a config has all of it.
    workdirs.claim(workdir, old, codec_files.load(stores.local(source), old.data))


def _tested(line: dict) -> bool:
    return "test/loss" in line


def _copy_steps(source: str, target: str, steps: Sequence[int]) -> None:
    """The checkpoints of these steps, those that are there made anew."""
    files.make_folder(target)
    for step in steps:
        # A name that the next save removes, if this is killed.
        part = os.path.join(target, f"{step}{ocp.utils.TMP_DIR_SUFFIX}fork")
        whole = os.path.join(target, str(step))
        for path in (part, whole):
            files.remove_folder(path)
        saved = os.path.join(source, str(step))
        if stores.is_store(target):
            # The config, which is written last, says that all of them are there.
            stores.copy(saved, whole)
            continue
        if stores.is_store(source):
            stores.copy(saved, part)
        else:
            shutil.copytree(saved, part, copy_function=_link_or_copy)
        os.rename(part, whole)


def _link_or_copy(source: str, target: str) -> None:
    """Files of checkpoints never change: a second name takes no space."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
