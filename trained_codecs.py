"""Codecs that are models of other runs: pictures <-> codes.

A run that reads codes keeps the model that gives them: its workdir is enough.
"""

import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from triform import models
from triform.configs import saving, schema
from triform.data.codecs import Codec
from triform.data.datasets.images import ImagesConfig, in_evaluation, scaling, to_pixels
from triform.models import DiscreteVAEConfig
from triform.runtime import files
from triform.runtime.errors import DataError, UserError

# Of a workdir, by field: the configs of model and data, and the parameters.
CONFIG, PARAMS = "codec_{}.json", "codec_{}.npz"
BATCH = 64  # pictures at once


class PictureCodes:
    """The codes of a discrete VAE, row by row."""

    def __init__(
        self, field: str, model: DiscreteVAEConfig, data: ImagesConfig, params: Any
    ):
        self.field, self.model, self.data, self.params = field, model, data, params
        self.name = f"the discrete VAE of data.{field}"
        self.size, self.grid = model.num_codes, model.grid()
        module = models.build(model)
        self._encode = jax.jit(functools.partial(module.apply, method="encode"))
        self._decode = jax.jit(functools.partial(module.apply, method="decode"))

    def encode(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """int32 [N, grid^2] of pictures uint8 [h, w] or [h, w, c], of any size."""
        scale, shift = scaling(self.data)
        squares = np.stack([in_evaluation(self.data, image) for image in values])
        codes = self._batched(self._encode, squares * scale + shift)
        return codes.reshape(len(codes), -1)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, channels] of codes [N, grid^2]."""
        found = self._batched(self._decode, ids.reshape(-1, self.grid, self.grid))
        return to_pixels(self.data, found)

    def _batched(self, apply: Any, rows: np.ndarray) -> np.ndarray:
        """fn(variables, rows), always of BATCH rows: compiled once."""
        found = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            full = np.zeros((BATCH, *part.shape[1:]), part.dtype)
            full[: len(part)] = part
            found.append(np.asarray(apply({"params": self.params}, full))[: len(part)])
        return np.concatenate(found)

    def digest(self) -> str:
        """Of the config and the parameters."""
        found = hashlib.sha256(self._config().encode())
        for name, x in sorted(self._arrays().items()):
            found.update(name.encode() + np.ascontiguousarray(x).tobytes())
        return found.hexdigest()

    def save(self, workdir: str) -> None:
        """Into two files of a workdir."""
        config, params = _paths(workdir, self.field)
        with files.replacing(params, binary=True) as f:
            np.savez(f, **self._arrays())
        with files.replacing(config) as f:
            f.write(self._config())

    def _config(self) -> str:
        parts = {"model": self.model, "data": self.data}
        tree = {k: saving.tree_of(x, Any) for k, x in parts.items()}
        return json.dumps(tree, indent=1)

    def _arrays(self) -> dict[str, np.ndarray]:
        return flatten_dict(self.params, sep="/")


def from_runs(data: Any, open_run: Callable[[str], Any]) -> dict[str, Codec]:
    """The codecs of the runs that a config of data names, by field.

    `open_run` opens a workdir (see workdir.py). UserError if one is not named or is no
    discrete VAE.
    """
    found: dict[str, Codec] = {}
    for field in data.coded():
        path = getattr(data, field)
        if not path:
            raise UserError(
                f"data.{field}='': name the workdir of a discrete VAE, which "
                "train.py --config=configs/dvae.py makes"
            )
        try:
            run = open_run(path)
        except UserError as error:  # which only knows it as a workdir
            raise type(error)(f"data.{field}: {error}") from error
        model, images = run.config.model, run.config.data
        if not isinstance(model, DiscreteVAEConfig):
            raise UserError(
                f"data.{field}={path!r}: holds a {type(model).__name__}; name the "
                "workdir of a discrete VAE"
            )
        params = jax.device_get(run.variables["params"])
        found[field] = PictureCodes(field, model, images, params)
    return found


def load(workdir: str, data: Any) -> dict[str, Codec]:
    """The codecs that a run saved, by field of its data; DataError if one is damaged.

    Those of which there is nothing are left out: a new run has none yet.
    """
    found: dict[str, Codec] = {}
    for field in data.coded():
        config, params = _paths(workdir, field)
        text = files.read_text(config)
        if text is None:
            continue
        try:
            tree = json.loads(text)
            model, images = (
                saving.from_tree(tree[name], Any, schema.CHOICES, name)
                for name in ("model", "data")
            )
            with np.load(params) as arrays:
                tree = unflatten_dict({k: arrays[k] for k in arrays}, sep="/")
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{config}: it or {os.path.basename(params)} is torn or of another "
                f"version ({error}); restore both, or copy them from another run with "
                "the same codes"
            ) from error
        found[field] = PictureCodes(field, model, images, tree)
    return found


def _paths(workdir: str, field: str) -> tuple[str, str]:
    """Config and parameters of the codec of a field."""
    config, params = (os.path.join(workdir, x.format(field)) for x in (CONFIG, PARAMS))
    return config, params
