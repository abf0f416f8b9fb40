"""Codecs that are models of other runs: pictures <-> codes.

A run that reads codes keeps the model that gives them: its workdir is enough.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from triform import models
from triform.configs import plugins, saving, schema
from triform.data.codecs import Codec
from triform.data.datasets.images import ImagesConfig, in_evaluation, scaling, to_pixels
from triform.models import DiscreteVAEConfig
from triform.runtime import files
from triform.runtime.errors import DataError, UserError

FOLDER = "codec_{}"  # of a workdir: config.json and parameters of the codec of a field
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
        return hashlib.sha256(self._config().encode() + self._arrays()).hexdigest()

    def save(self, workdir: str) -> None:
        """Into a folder of a workdir."""
        folder = os.path.join(workdir, FOLDER.format(self.field))
        os.makedirs(folder, exist_ok=True)
        with files.replacing(os.path.join(folder, "config.json")) as f:
            f.write(self._config())
        with files.replacing(os.path.join(folder, "params.npz"), binary=True) as f:
            f.write(self._arrays())

    def _config(self) -> str:
        parts = {"model": self.model, "data": self.data}
        return json.dumps({k: saving.tree_of(x, Any) for k, x in parts.items()}, indent=1)

    def _arrays(self) -> bytes:
        return arrays_to_bytes(flatten_dict(self.params, sep="/"))
