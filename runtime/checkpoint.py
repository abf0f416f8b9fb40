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
import os
import shutil
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from triform.runtime.checksum import checksums
from triform.runtime.errors import CheckpointError

_log = logging.getLogger(__name__)
_FULL = ("No space left", "Disk quota exceeded")
GROUP = 1 << 26  # bytes that are read at a time, or one array
# What may fail while the stored bytes are fine.
_NOT_CORRUPT = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE")


class _Corrupt(Exception):
    """What is stored for a step is not what was saved."""


def _untold(record: logging.LogRecord) -> bool:
    """False for the four tracebacks that orbax logs of a failure it also raises."""
    told = ("run() raised an exception", "Handler Commit", "Save Finalize thread")
    return not (record.exc_info and any(sign in str(record.msg) for sign in told))


logging.getLogger("absl").addFilter(_untold)


@dataclasses.dataclass
class CheckpointConfig:
    """How often to save (read by the training loop), and which steps to retain.

    Steps that are no multiple of `every`, saved on an interruption, are retained while
    they are the newest only: they must not change what an uninterrupted run would keep.
    """

    every: int = 1000  # steps between saves
    keep_newest: int = 5  # checkpoints kept for being the last ones
    keep_best: int = 1  # and for having the best scores
    metric: str = "eval/loss"  # judges which step is best
    mode: str = "min"  # 'min' or 'max': which value of the metric is better

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
        if "://" not in directory:  # orbax refuses relative paths on save
            directory = os.path.abspath(directory)
        self._config = config
        self._pending: int | None = None  # the step that is being saved
        self._wrote = False
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
            ),
        )
        self.directory = self._manager.directory
        self._corrupt = self.directory.parent / "corrupt"
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
        return [s for s in steps if s != self._pending or self._path(s).exists()]

    def latest(self) -> int | None:
        """The newest finished step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The finished step with the best metric (ties: the newest), or None."""
        return next(iter(self._ranked(self.steps())), None)

    def meta_of(self, step: int) -> Mapping[str, Any]:
        """The caller's dict of a finished step; CheckpointError if it is corrupt."""
        try:
            return self._read_meta(step)["user"]
        except _Corrupt as problem:
            raise CheckpointError(
                f"step {step} in {self.directory} is corrupt ({problem})"
            ) from problem

    def metrics_of(self, step: int) -> Mapping[str, float]:
        """What was recorded for a step; empty if nothing was."""
        return self._metrics.get(step, {})

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps the metrics of a saved step, by which the best step is found."""
        self._metrics[step] = {name: float(value) for name, value in metrics.items()}
        self._write_scores()

    def on_schedule(self) -> list[int]:
        """The finished steps that an uninterrupted run would have, oldest first."""
        steps = self.steps()
        return [s for s in steps if s % self._config.every == 0 or s == steps[-1]]

    def _read_scores(self) -> dict[int, Mapping[str, float]]:
        if not self._scores.exists():
            return {}
        try:
            saved = json.loads(self._scores.read_text()).items()
            return {int(s): {k: float(x) for k, x in m.items()} for s, m in saved}
        except (ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self._scores}: {error}; remove it to go on without the scores"
            ) from error

    def _write_scores(self) -> None:
        if jax.process_index() == 0:
            part = self._scores.with_suffix(".tmp")
            strict = {  # JSON has no infinity
                step: {k: x if math.isfinite(x) else str(x) for k, x in found.items()}
                for step, found in self._metrics.items()
            }
            part.write_text(json.dumps(strict, indent=1, allow_nan=False))
            part.replace(self._scores)

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
        self.wait()
        leaves = _flatten(state)
        stored = {path: _storage(leaf) for path, leaf in leaves.items() if leaf.size}
        self._prepare(step, sum(array.nbytes for array in stored.values()))
        arrays = {path: _describe(leaf) for path, leaf in leaves.items()}
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
            raise self._save_failed(_reason(error)) from error
        if not accepted:
            raise self._save_failed("orbax refused the step")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the pending save; raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(_reason(error)) from error
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
        for found in reversed(self.steps()):
            try:
                return self._read(found, abstract_state)
            except _Corrupt as problem:
                problems.append(f"step {found}: {problem}")
                self._move_aside(found, problem)
        if problems:
            raise CheckpointError(
                f"no intact checkpoint in {self.directory} ({'; '.join(problems)}); "
                f"look into {self._corrupt}, or start in a new directory"
            )
        return None

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
        if not self._wrote:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Only a writer may do this: a reader would ruin a save in progress.
            if jax.process_index() == 0:
                for path in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                    path.rmtree()
            self._wrote = True
        if (free := self._free()) < size:
            self._pending = step
            sizes = f"{size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
            raise self._save_failed(f"No space left: {sizes}")

    def _free(self) -> float:
        """Free bytes where checkpoints are written; infinite for object stores."""
        local = "://" not in str(self.directory)
        return shutil.disk_usage(self.directory).free if local else math.inf

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

    def _move_aside(self, step: int, problem: _Corrupt) -> None:
        """Move a corrupt step out of the way, so that its number can be saved again."""
        names = (f"{step}.{copy}" if copy else str(step) for copy in itertools.count())
        target = next(p for p in map(self._corrupt.joinpath, names) if not p.exists())
        if jax.process_index() == 0:
            self._corrupt.mkdir(parents=True, exist_ok=True)
            self._path(step).rename(target)
        multihost_utils.sync_global_devices(f"moved checkpoint {step}")
        self._manager.reload()
        if self._metrics.pop(step, None):
            self._write_scores()
        _log.warning("checkpoint %s: %s; moved to %s", step, problem, target)

    def _read_meta(self, step: int) -> dict[str, Any]:
        try:
            meta = ocp.JsonCheckpointHandler().restore(self._path(step) / "meta")
            body, intact = meta["body"], meta["crc32"] == _crc(meta["body"])
        except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
            raise _Corrupt(f"meta is unreadable: {_reason(error)}") from error
        if not intact:
            raise _Corrupt("meta does not match its checksum")
        return body

    def _read_or_fail(self, step: int | None, abstract: Any, prefix: str = "") -> Any:
        """`_read`, where the caller asked for this step and no other."""
        if step not in self.steps():
            raise CheckpointError(
                f"no checkpoint of step {step} in {self.directory}; "
                f"the steps there are {self.steps()}"
            )
        try:
            return self._read(step, abstract, prefix)
        except _Corrupt as problem:
            raise CheckpointError(
                f"step {step} in {self.directory} is corrupt ({problem}); "
                f"use another step of {self.steps()}"
            ) from problem

    def _read(self, step: int, abstract: Any, prefix: str = "") -> tuple[Any, Any]:
        """(tree, user meta) of a step, verified; the leaves are under `prefix`."""
        wanted = _flatten(abstract, prefix)
        leaves, body, problem = {}, {"user": None}, None
        try:
            body = self._read_meta(step)
            saved = {p: d for p, d in body["arrays"].items() if p.startswith(prefix)}
            _require_same(step, saved, wanted)
            leaves = self._read_arrays(step, saved, wanted)
        except _Corrupt as error:
            problem = error
        if jax.process_count() > 1:  # all processes go on with the same step
            intact = multihost_utils.process_allgather(np.array(problem is None))
            if not intact.all() and problem is None:
                problem = _Corrupt("another process found it corrupt")
        if problem is not None:
            raise problem
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), body["user"]

    def _read_arrays(self, step: int, saved: dict, wanted: dict) -> list[jax.Array]:
        stored = {path: _storage(leaf) for path, leaf in wanted.items()}
        items = {p: x for p, x in stored.items() if x.size}  # orbax refuses empty ones
        arrays = {}
        try:
            for part in _groups(items):
                how = [ocp.ArrayRestoreArgs(sharding=x.sharding) for x in part.values()]
                how = dict(zip(part, how, strict=True))
                what = {"item": part, "restore_args": how, "partial_restore": True}
                request = ocp.args.Composite(state=ocp.args.PyTreeRestore(**what))
                arrays |= self._manager.restore(step, args=request)["state"]
                jax.block_until_ready(arrays)
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # the machine's fault, not the checkpoint's
        except Exception as error:
            if any(sign in _reason(error) for sign in _NOT_CORRUPT):
                raise
            raise _Corrupt(f"unreadable: {_reason(error)}") from error
        sums = checksums(arrays)
        bad = [path for path in arrays if sums[path] != saved[path]["checksum"]]
        if bad:
            raise _Corrupt(f"checksum mismatch in {_some(bad)}")
        for path, x in stored.items():
            if not x.size:
                arrays[path] = jnp.zeros(x.shape, x.dtype, device=x.sharding)
            if impl := saved[path].get("key"):
                arrays[path] = jax.random.wrap_key_data(arrays[path], impl=impl)
        return [arrays[path] for path in wanted]


def _groups(arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Parts of about GROUP bytes: what is read is in memory twice until it is placed.

    Large ones come first, while little else is there.
    """
    groups, size = [{}], 0
    for path, x in sorted(arrays.items(), key=lambda item: -item[1].size):
        size += x.size * x.dtype.itemsize
        if size > GROUP and groups[-1]:
            groups.append({})
            size = x.size * x.dtype.itemsize
        groups[-1][path] = x
    return groups


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{path: leaf}, the paths as they are named in a checkpoint."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
        if name in flat:
            raise CheckpointError(f"two leaves have the path {name}; rename one")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            rule = "a state holds jax.Arrays only; convert it with jnp.asarray"
            raise CheckpointError(f"{name} is a {type(leaf).__name__}: {rule}")
        flat[name] = leaf
    return flat


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storage(leaf: Any) -> Any:
    """The array that is stored for a leaf: a typed key's raw data, else the leaf."""
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf) if _is_key(leaf) else leaf
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    raw = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def _describe(leaf: Any) -> dict[str, Any]:
    described = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if isinstance(leaf, jax.Array) and _is_key(leaf):
        described["key"] = str(jax.random.key_impl(leaf))
    return described


def _require_same(step: int, saved: dict, wanted: dict) -> None:
    """Raise CheckpointError, naming the first leaves, if other arrays were saved."""
    show = "{dtype}{shape}".format
    new = {path: show(**_describe(leaf)) for path, leaf in wanted.items()}
    old = {path: show(**described) for path, described in saved.items()}
    differ = [
        f"{path} (saved {old.get(path, 'nothing')}, wanted {new.get(path, 'nothing')})"
        for path in {**new, **old}
        if old.get(path) != new.get(path)
    ]
    if differ:
        raise CheckpointError(
            f"step {step} was saved by another model or optimiser: {_some(differ)}; "
            "restore with the config it was saved with, or use a new directory"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" * (len(names) > 3))


def _reason(error: BaseException) -> str:
    """What first went wrong, in one line, without tensorstore's specification."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = " ".join(f"{type(error).__name__}: {error}".split())
    line = line.partition(" [tensorstore_spec=")[0]
    return line if len(line) < 500 else f"{line[:290]} ... {line[-200:]}"


def _crc(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
