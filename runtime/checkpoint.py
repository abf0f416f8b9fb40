"""Checkpoints: one orbax manager, plus checksums, retention and recovery.

`<directory>/<step>` holds two items that appear together or not at all: `state`, a
flat mapping from leaf path ('params/embed/kernel') to array, and `meta`, a JSON with
the caller's dict and each array's shape, dtype and checksum. Leaves are named by path,
so no class is needed to read a checkpoint. `<directory>/../scores.json` holds what
evaluation found for each step, afterwards: a step is safe before it is scored.

Orbax restores a flipped byte silently, drops a save it refuses without an error, and
may retain the best step in place of the newest: this file exists to prevent that.
"""

import dataclasses
import itertools
import json
import logging
import math
import shutil
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from triform.runtime import files, hosts, lazy, read_errors, stores
from triform.runtime.checksum import checksums
from triform.runtime.errors import CheckpointError, reason
from triform.runtime.leaves import (
    describe,
    flatten,
    groups,
    require_same,
    some,
    storage,
)
from triform.runtime.read_errors import Corrupt

ocp = lazy.Module("orbax.checkpoint")  # 0.2 s, which --help and a dry run need not

_log = logging.getLogger(__name__)
_FULL = ("No space left", "Disk quota exceeded")


@dataclasses.dataclass
class CheckpointConfig:
    """How often to save, and which checkpoints to keep.

    Steps that are no multiple of `every`, saved on an interruption, are retained while
    they are the newest only: they must not change what an uninterrupted run would keep.
    """

    every: int = 1000  # steps between checkpoints
    keep_newest: int = 5  # number of newest checkpoints to keep
    keep_best: int = 1  # number of best checkpoints to keep, by `metric`
    metric: str = "eval/loss"  # which metric selects the best checkpoint
    mode: str = "min"  # min: lower values of the metric are better; max: higher

    def validate(self) -> None:
        """Raise ValueError for a setting that cannot work."""
        for name, least in (("every", 1), ("keep_newest", 1), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"checkpoint.{name}={getattr(self, name)}: must be at least "
                    f"{least}; set checkpoint.{name}={least} or more"
                )
        if self.mode not in ("min", "max"):
            raise ValueError(
                f"checkpoint.mode={self.mode!r}: expected one of min, max; "
                "set min for a loss, max for an accuracy"
            )


class Checkpointer:
    """Saves and restores pytrees of jax.Arrays; leaving it waits for the pending save.

    In a run of several processes every process makes the same calls.
    """

    def __init__(self, directory: str, config: CheckpointConfig) -> None:
        config.validate()
        directory, self._remote = stores.for_orbax(directory)
        self._config = config
        self._pending: int | None = None  # the step that is being saved
        self._wrote = False
        # What no store can do is to rename a folder once all is written.
        atomicity = ocp.path.atomicity.CommitFileTemporaryPath if self._remote else None
        _wait_without_devices()
        self._manager = ocp.CheckpointManager(
            directory,
            item_handlers={
                # Trained weights hardly compress; zstd would take the host's cores.
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                create=False,  # a reader must not create a misspelt directory
                preservation_policy=self,
                temporary_path_class=atomicity,
                async_options=ocp.AsyncOptions(timeout_secs=int(hosts.SLOW)),
            ),
        )
        self.directory = self._manager.directory
        self._scores = self.directory.parent / "scores.json"
        self._metrics = self._read_scores()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if kind is None:
                raise
            _log.error("%s", failure)  # must not hide the error that ended the run

    def steps(self) -> list[int]:
        """The finished steps, oldest first."""
        steps = sorted(self._manager.all_steps())
        return [s for s in steps if s != self._pending or self._is_committed(s)]

    def latest(self) -> int | None:
        """The newest finished step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The finished step with the best metric (ties: the newest), or None."""
        return next(iter(self._ranked(self.steps())), None)

    def meta_of(self, step: int) -> Mapping[str, Any]:
        """The caller's dict of a finished step; CheckpointError if it is corrupt."""
        return self._meta(step)["user"]

    def described(self, step: int) -> dict[str, Any]:
        """Shape, dtype and checksum by path of a step; CheckpointError if corrupt."""
        return self._meta(step)["arrays"]

    def _meta(self, step: int) -> dict[str, Any]:
        self._require(step)
        try:
            return self._read_meta(step)
        except Corrupt as problem:
            raise CheckpointError(
                f"step {step} in {self.directory} is corrupt ({problem})"
            ) from problem

    def metrics_of(self, step: int) -> Mapping[str, float]:
        """What was recorded for a step; empty if nothing was."""
        return self._metrics.get(step, {})

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps the metrics of a saved step, by which the best step is found."""
        self.wait()  # a step that could not be saved has none
        self._metrics[step] = {name: float(value) for name, value in metrics.items()}
        self._write_scores()

    def scored(self, last: int) -> list[int]:
        """The steps up to `last` for which something was recorded."""
        return [s for s in self._metrics if s <= last]

    def forget(self, after: int) -> dict[int, Mapping[str, float]]:
        """Takes out, and returns, what was recorded for later steps."""
        gone = {s: self._metrics.pop(s) for s in [*self._metrics] if s > after}
        if gone:
            self._write_scores()
        return gone

    def on_schedule(self) -> list[int]:
        """The finished steps that an uninterrupted run would have, oldest first."""
        steps = self.steps()
        return [s for s in steps if s % self._config.every == 0 or s == steps[-1]]

    def _read_scores(self) -> dict[int, Mapping[str, float]]:
        text = files.read_text(str(self._scores))
        if text is None:
            return {}
        try:
            saved = json.loads(text).items()
            return {int(s): {k: float(x) for k, x in m.items()} for s, m in saved}
        except (ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self._scores}: {error}; remove it to go on without the scores"
            ) from error

    def _write_scores(self) -> None:
        if hosts.here().is_first:
            with files.replacing(str(self._scores)) as f:
                f.write(files.dumps(self._metrics, indent=1))

    def save(
        self,
        step: int,
        state: Any,
        *,
        meta: Mapping[str, Any],
        wait: bool = False,
    ) -> None:
        """Save a step; returns once `state` is on the host and may be donated.

        Raises CheckpointError if this save cannot start, or if the one before it
        failed in the background.
        """
        hosts.here().barrier(f"saving step {step}", hosts.SLOW)  # names who is late
        self.wait()
        leaves = flatten(state)
        stored = {path: storage(leaf) for path, leaf in leaves.items() if leaf.size}
        self._prepare(step, sum(array.nbytes for array in stored.values()))
        arrays = {path: describe(leaf) for path, leaf in leaves.items()}
        for path, checksum in checksums(stored).items():
            arrays[path]["checksum"] = checksum
        body = {"user": dict(meta), "arrays": arrays}
        body = json.loads(json.dumps(body))  # as it will be read back
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(stored),
            meta=ocp.args.JsonSave({"crc32": _crc(body), "body": body}),
        )
        self._pending = step
        try:
            accepted = self._manager.save(step, args=items)
        except Exception as error:
            raise self._save_failed(reason(error)) from error
        if not accepted:
            raise self._save_failed("orbax refused the step")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the pending save; raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(reason(error)) from error
        self._pending = None

    def close(self) -> None:
        """Wait for the pending save and release the manager."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(
        self, abstract_state: Any, step: int | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """(state, meta) with the shapes and shardings of `abstract_state`.

        Without a step: the newest intact one, or None if nothing was saved; corrupt
        ones on the way are moved to `<directory>/../corrupt/` with a warning. Raises
        CheckpointError if all are corrupt, if the step asked for is missing or
        corrupt, or if other arrays were saved than are wanted.
        """
        self.wait()
        self._manager.reload()
        if step is not None:
            return self._read_or_fail(step, abstract_state)
        problems = []
        for found in reversed(hosts.here().broadcast("saved steps", self.steps())):
            try:
                return self._read(found, abstract_state)
            except Corrupt as problem:
                read_errors.check_readable(found, self.directory)
                problems.append(f"step {found}: {problem}")
                target = self._move(found, "corrupt")
                _log.warning("checkpoint %s: %s; moved to %s", found, problem, target)
        if problems:
            raise CheckpointError(
                f"no intact checkpoint in {self.directory} ({'; '.join(problems)}); "
                f"look into {self._beside('corrupt')}, or start in a new directory"
            )
        self._check_nothing_was_lost()
        return None

    def set_aside(self, steps: Sequence[int]) -> list[Any]:
        """Moves finished steps to `<directory>/../set_aside/`; returns their folders.

        They count as never saved: their scores go, and their numbers are free.
        """
        self.wait()
        return [self._move(step, "set_aside") for step in steps]

    def _check_nothing_was_lost(self) -> None:
        """CheckpointError if steps were saved here once and none is left."""
        folders = [self._beside(name) for name in ("corrupt", "set_aside")]
        found = [x for folder in folders for x in _listed(folder)]
        kept = [str(x) for x in found if x.name.partition(".")[0].isdigit()]
        if kept or self._metrics:
            scored = f"{self._scores} knows {', '.join(map(str, self._metrics))}"
            where = ", ".join(kept) or scored
            raise CheckpointError(
                f"no checkpoint in {self.directory}, but steps were saved once "
                f"({where}); move one back, or start in a new directory"
            )

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
        """The parameters alone (default: of the newest step), checksums verified.

        Moves nothing. Raises CheckpointError if the step is missing or corrupt, or
        holds other parameters than are wanted.
        """
        self.wait()
        self._manager.reload()
        step = self.latest() if step is None else step
        return self._read_or_fail(step, abstract_params, prefix="params/")[0]

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Orbax's question which steps to keep: the newest and the best."""
        del context
        steps = sorted(info.step for info in checkpoints)
        scheduled = [s for s in steps if s % self._config.every == 0]
        keep = {*steps[-1:], *scheduled[-self._config.keep_newest :]}
        keep.update(self._ranked(steps)[: self._config.keep_best])
        return [info.step in keep for info in checkpoints]

    def _ranked(self, steps: list[int]) -> list[int]:
        """The steps that have the metric, best first."""
        sign = 1 if self._config.mode == "min" else -1
        values = {s: self.metrics_of(s).get(self._config.metric) for s in steps}
        scored = [
            (sign * value, -step)
            for step, value in values.items()
            if value is not None and math.isfinite(value)
        ]
        return [-step for _, step in sorted(scored)]

    def _path(self, step: int) -> Any:
        return self.directory / str(step)

    def _prepare(self, step: int, size: int) -> None:
        """Refuse a save that cannot succeed; clear what killed saves left behind."""
        newest = self.latest()
        if newest is not None and step <= newest:
            raise CheckpointError(
                f"step {step} cannot be saved: {self.directory} already holds step "
                f"{newest}, and steps must increase; save a later step or restore first"
            )
        stores.check(str(self.directory))
        if not self._wrote:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Only a writer may do this: a reader would ruin a save in progress.
            if hosts.here().is_first:
                for path in self._uncommitted():
                    path.rmtree()
            self._wrote = True
        if (free := self._free()) < size:
            self._pending = step
            sizes = f"{size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
            raise self._save_failed(f"No space left: {sizes}")

    def _is_committed(self, step: int) -> bool:
        """Is everything of a step written?"""
        return (self._path(step) / (stores.COMMITTED if self._remote else "")).exists()

    def _uncommitted(self) -> list[Any]:
        """The folders of saves that were not completed."""
        if not self._remote:
            sign = ocp.utils.TMP_DIR_SUFFIX
            found = self.directory.glob(f"*{sign}*")
            return [x for x in found if x.name.partition(sign)[0].isdigit()]
        steps = [int(x.name) for x in _listed(self.directory) if x.name.isdigit()]
        return [self._path(s) for s in steps if not self._is_committed(s)]

    def _free(self) -> float:
        """Free bytes where checkpoints are written; infinite for object stores."""
        return math.inf if self._remote else shutil.disk_usage(self.directory).free

    def _save_failed(self, reason: str) -> CheckpointError:
        """The error for the pending step, which counts as never begun afterwards."""
        step, self._pending = self._pending, None
        self._wrote = False  # its temporary files go before the next save
        self._manager.reload()  # orbax already forgot the steps that it would remove
        fix = "remove the cause and save again"
        if any(sign in reason for sign in _FULL):
            fix = "free disk space or lower checkpoint.keep_newest, then save again"
        return CheckpointError(
            f"step {step} could not be saved in {self.directory}: {reason}; "
            f"the newest intact step is {self.latest()}; {fix}"
        )

    def _beside(self, name: str) -> Any:
        return self.directory.parent / name

    def _move(self, step: int, folder: str) -> Any:
        """Moves a step out of the way, so that its number can be saved again."""
        names = (f"{step}.{copy}" if copy else str(step) for copy in itertools.count())
        there = {path.name for path in _listed(self._beside(folder))}
        target = self._beside(folder) / next(x for x in names if x not in there)
        target = type(target)(hosts.here().broadcast("a free name", str(target)))
        if hosts.here().is_first:
            files.move_folder(str(self._path(step)), str(target))
        hosts.here().barrier(f"moving checkpoint {step}")
        self._manager.reload()
        if self._metrics.pop(step, None):
            self._write_scores()
        return target

    def _read_meta(self, step: int) -> dict[str, Any]:
        try:
            meta = ocp.JsonCheckpointHandler().restore(self._path(step) / "meta")
            body, intact = meta["body"], meta["crc32"] == _crc(meta["body"])
        except Exception as error:
            raise read_errors.classify(error, step, self.directory) from error
        if not intact:
            raise Corrupt("meta does not match its checksum")
        return body

    def _require(self, step: int | None) -> None:
        if step not in self.steps():
            raise CheckpointError(
                f"no checkpoint of step {step} in {self.directory}; "
                f"the steps there are {self.steps()}"
            )

    def _read_or_fail(self, step: int | None, abstract: Any, prefix: str = "") -> Any:
        """`_read`, where the caller asked for this step and no other."""
        self._require(step)
        try:
            return self._read(step, abstract, prefix)
        except Corrupt as problem:
            raise CheckpointError(
                f"step {step} in {self.directory} is corrupt ({problem}); "
                f"use another step of {self.steps()}"
            ) from problem

    def _read(self, step: int, abstract: Any, prefix: str = "") -> tuple[Any, Any]:
        """(tree, user meta) of a step, verified; the leaves are under `prefix`."""
        wanted = flatten(abstract, prefix)
        body = read_errors.by_all(f"reading step {step}", lambda: self._read_meta(step))
        saved = {p: d for p, d in body["arrays"].items() if p.startswith(prefix)}
        require_same(step, saved, wanted)
        leaves = self._read_arrays(step, saved, wanted)
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), body["user"]

    def _read_arrays(self, step: int, saved: dict, wanted: dict) -> list[jax.Array]:
        stored = {path: storage(leaf) for path, leaf in wanted.items()}
        items = {p: x for p, x in stored.items() if x.size}  # orbax refuses empty ones
        what = f"reading the arrays of step {step}"
        arrays = read_errors.by_all(what, lambda: self._load_arrays(step, items))
        sums = checksums(arrays)
        bad = [path for path in arrays if sums[path] != saved[path]["checksum"]]
        if bad:
            raise Corrupt(f"checksum mismatch in {some(bad)}")
        for path, x in stored.items():
            if not x.size:
                arrays[path] = jnp.zeros(x.shape, x.dtype, device=x.sharding)
            if impl := saved[path].get("key"):
                arrays[path] = jax.random.wrap_key_data(arrays[path], impl=impl)
        return [arrays[path] for path in wanted]

    def _load_arrays(self, step: int, items: dict[str, Any]) -> dict[str, jax.Array]:
        """What is stored, as this process needs it; waits for no other process."""
        arrays, handler = {}, ocp.PyTreeCheckpointHandler()
        read_errors.hush()
        try:
            for part in groups(items):
                how = [ocp.ArrayRestoreArgs(sharding=x.sharding) for x in part.values()]
                how = dict(zip(part, how, strict=True))
                what = {"item": part, "restore_args": how, "partial_restore": True}
                request = ocp.args.PyTreeRestore(**what)
                arrays |= handler.restore(self._path(step) / "state", args=request)
                jax.block_until_ready(arrays)
        except jax.errors.JaxRuntimeError:
            raise  # the device's fault
        except Exception as error:
            raise read_errors.classify(error, step, self.directory) from error
        finally:
            handler.close()
        return arrays


def _wait_without_devices() -> None:
    """Makes orbax's processes wait through the coordination service, with a timeout."""
    name = "experimental_orbax_use_distributed_barrier"
    if hosts.here().count == 1:
        return
    _ = ocp.CheckpointManager  # orbax defines its flags when it is imported
    if name in flags.FLAGS:
        flags.FLAGS[name].value = True
        flags.FLAGS[name].present += 1  # read before the command line, in a notebook


def _listed(folder: Any) -> list[Any]:
    """What is in a folder, sorted; nothing if it does not exist."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _crc(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
