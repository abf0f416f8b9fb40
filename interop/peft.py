"""LoRA adapters of PEFT in and out: adapter_config.json, adapter_model.safetensors."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from triform.interop.mapping import Entry, Family, canonical, entries, parameters
from triform.interop.tokenizers import read_json, write_json
from triform.interop.weights import DTYPES, Tensor, Weights, write_file
from triform.models import (
    EncoderDecoderConfig,
    LanguageModelConfig,
    LoRAConfig,
    ModelConfig,
)
from triform.runtime.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SIDES = (".lora_A.weight", ".lora_B.weight")  # [r, in] and [out, r]
TASKS = {LanguageModelConfig: "CAUSAL_LM", EncoderDecoderConfig: "SEQ_2_SEQ_LM"}
# What is read, and what only describes: which modules have adapters, the tensors say.
READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern")
READ += ("alpha_pattern", "peft_type", "bias", "init_lora_weights")
DESCRIPTIONS = ("task_type", "auto_mapping", "peft_version", "revision")
DESCRIPTIONS += ("base_model_name_or_path", "inference_mode", "target_modules")
DESCRIPTIONS += ("exclude_modules", "layers_to_transform", "layers_pattern")
DESCRIPTIONS += ("fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config")
# Ways to initialise that leave the base model's weights as they are.
INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The two matrices of one module of theirs."""

    a: np.ndarray  # [in, r]
    b: np.ndarray  # [r, out]
    scale: float  # factor on their product


def load(
    folder: str, family: Family, model: ModelConfig
) -> tuple[LoRAConfig, dict[str, np.ndarray], str]:
    """(config, {path: float32} of the adapters alone, their dtype) for `model`.

    Where modules that share a kernel of ours by layers have other ranks or none, the
    missing rows are zeros; other scales are multiplied into lora_b. Both leave the
    function as it is. UserError for what we do not do.
    """
    given = _checked(folder)
    adapters, dtype = _read(folder, given)
    kernels = _kernels(family, model)
    names = canonical(family, [f"{module}.weight" for module in adapters])
    if unknown := sorted(set(names) - set(kernels)):
        raise UserError(
            f"{folder}: adapters of {', '.join(unknown)}, which this model does not "
            "have; name the folder of the model that they were trained for"
        )
    found = [
        (kernels[k], adapters[n.removesuffix(".weight")]) for k, n in names.items()
    ]
    ranks: dict[str, int] = {}
    for entry, adapter in found:
        for path, _ in entry.elements:
            name = _layerless(path)
            ranks[name] = max(ranks.get(name, 0), adapter.a.shape[1])
    rank = given["r"]
    config = LoRAConfig(
        model,
        rank=rank,
        alpha=float(given["lora_alpha"]),
        rslora=given.get("use_rslora") or False,
        targets=tuple(f"^{name}$" for name in sorted(ranks)),
        ranks=tuple((f"^{k}$", n) for k, n in sorted(ranks.items()) if n != rank),
        dropout=given.get("lora_dropout") or 0.0,
    )
    config.validate()
    shapes = parameters(config, family.reads)
    params = {
        path: np.zeros(x.shape, np.float32)
        for path, x in shapes.items()
        if path.rpartition("/")[2] in ("lora_a", "lora_b")
    }
    for entry, adapter in found:
        _fill(entry, adapter, config, params, folder)
    return config, params, dtype


def _checked(folder: str) -> dict[str, Any]:
    """The settings; UserError for those that we do not do."""
    given = read_json(folder, CONFIG)
    if not given:
        raise UserError(f"{folder}: holds no {CONFIG}; name a folder that PEFT saved")
    accepted = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": INITS}
    for name, value in given.items():
        choices = accepted.get(name, () if name not in READ + DESCRIPTIONS else None)
        if choices is not None and value and value not in choices:
            rule = f"expected {' or '.join(map(repr, choices)) or 'none'}"
            raise UserError(
                f"{CONFIG}: {name}={value!r}: {rule}; train without it, or merge the "
                "adapter with PEFT's merge_and_unload and import the model"
            )
    for name in ("r", "lora_alpha"):
        if not given.get(name):
            raise UserError(f"{CONFIG}: {name} is missing; copy the file again")
    return given


def _read(folder: str, given: Mapping[str, Any]) -> tuple[dict[str, Adapter], str]:
    """({module: adapter}, dtype) of a folder."""
    found: dict[str, Adapter] = {}
    with Weights(folder, WEIGHTS) as weights:
        modules = {
            name.removesuffix(side)
            for name in weights.names
            for side in SIDES
            if name.startswith(PREFIX) and name.endswith(side)
        }
        expected = {module + side for module in modules for side in SIDES}
        if odd := sorted(expected ^ set(weights.names)):
            raise UserError(
                f"{folder}: expected {' and '.join(SIDES)} of every module, but "
                f"{', '.join(odd)} is alone or of another kind; train such modules "
                "without adapters"
            )
        kinds = sorted({weights.dtype(name) for name in weights.names})
        if not set(kinds) <= set(DTYPES):
            raise UserError(
                f"{folder}: stored as {', '.join(kinds)}: adapters can be imported "
                f"from {', '.join(DTYPES)}; convert them"
            )
        for module in sorted(modules):
            a, b = (weights.read(module + side).astype(np.float32) for side in SIDES)
            name = module.removeprefix(PREFIX)
            alpha = _of(name, given.get("alpha_pattern"), given["lora_alpha"])
            root = len(a) ** 0.5 if given.get("use_rslora") else len(a)
            found[name] = Adapter(a.T, b.T, alpha / root)
    return found, kinds[0] if len(kinds) == 1 else "F32"


def _of(module: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """A module's value, by PEFT's rule: the first pattern that matches its end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _kernels(family: Family, model: ModelConfig) -> dict[str, Entry]:
    """{tensor: entry} of the kernels."""
    found = entries(family, model, parameters(model, family.reads))
    return {x.name: x for x in found if x.elements[0][0].endswith("/kernel")}


def _layerless(path: str) -> str:
    """The path as patterns of LoRAConfig see it."""
    return re.sub(r"(layers/)?layer_\d+/", "", path)


def _pair(path: str) -> tuple[str, str]:
    module = path.removesuffix("kernel")
    return f"{module}lora_a", f"{module}lora_b"


def _fill(
    entry: Entry,
    adapter: Adapter,
    config: LoRAConfig,
    params: Mapping[str, np.ndarray],
    folder: str,
) -> None:
    """Writes an adapter into the parameters of its kernels."""
    rank, start = adapter.a.shape[1], 0
    for path, i in entry.elements:
        names = _pair(path)
        if names[0] not in params:
            raise UserError(
                f"{folder}: {entry.name} has an adapter, and {path} cannot have one "
                "here; train it without"
            )
        # Views, so that what is assigned arrives in the parameters.
        a, b = (params[name] if i is None else params[name][i] for name in names)
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)
        stop = start + b.shape[1]
        if len(a) != len(adapter.a) or stop > adapter.b.shape[1]:
            raise UserError(
                f"{folder}: the adapter of {entry.name} is of "
                f"{len(adapter.a)} inputs and {adapter.b.shape[1]} outputs, the "
                f"kernel of {len(a)} and {b.shape[1]}; name the model that it was "
                "trained for"
            )
        a[:, :rank] = adapter.a
        b[:rank] = adapter.b[:, start:stop]
        if (ours := config.scale(a.shape[1])) != adapter.scale:
            b[:rank] *= adapter.scale / ours
        start = stop


def save(
    folder: str,
    family: Family,
    config: LoRAConfig,
    params: Mapping[str, np.ndarray],
    dtype: str = "F32",
) -> int:
    """Writes a folder that PEFT loads over the exported base model.

    Returns the number of parameters written, in `dtype`.
    """
    ranks, alphas, matrices = {}, {}, {}
    for module, adapter in _adapters(family, config, params):
        rank = adapter.a.shape[1]
        alpha = adapter.scale * (rank**0.5 if config.rslora else rank)
        if rank != config.rank:
            ranks[module] = rank
        if not math.isclose(alpha, config.alpha, rel_tol=1e-12):
            alphas[module] = alpha
        for side, x in zip(SIDES, (adapter.a.T, adapter.b.T), strict=True):
            matrices[f"{PREFIX}{module}{side}"] = x
    modules = sorted({name.removeprefix(PREFIX)[: -len(SIDES[0])] for name in matrices})
    alpha = float(config.alpha)
    settings = {
        "peft_type": "LORA",
        "task_type": TASKS.get(type(config.model)),
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": config.rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": modules,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": family.model_type == "gpt2",
    }
    write_json(folder, CONFIG, settings)
    tensors = [
        Tensor(name, x.shape, dtype, lambda x=x: x) for name, x in matrices.items()
    ]
    for _ in write_file(f"{folder}/{WEIGHTS}", tensors):
        pass
    return sum(x.size for x in matrices.values())


def _adapters(
    family: Family, config: LoRAConfig, params: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, Adapter]]:
    """(module of theirs, its adapter)."""
    kernels = _kernels(family, config.model)
    for entry in kernels.values():
        parts = []
        for (path, i), shape in zip(entry.elements, entry.shapes, strict=True):
            names = _pair(path)
            if names[0] in params:
                a, b = (params[n] if i is None else params[n][i] for n in names)
                a, b = a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)
                parts.append(Adapter(a, b, config.scale(len(b))))
            else:  # a fused kernel, of which only others have adapters: of rank 0
                a, b = np.zeros((shape[0], 0)), np.zeros((0, math.prod(shape[1:])))
                parts.append(Adapter(a, b, 0.0))
        if any(part.a.size for part in parts):
            yield entry.name.removesuffix(".weight"), _joined(parts)


def _joined(parts: list[Adapter]) -> Adapter:
    """One adapter of kernels that lie side by side in one matrix of theirs."""
    first = parts[0]
    if all(np.array_equal(part.a, first.a) for part in parts):
        return Adapter(first.a, np.concatenate([p.b for p in parts], 1), first.scale)
    scale = max(part.scale for part in parts)
    b = np.zeros([sum(p.b.shape[axis] for p in parts) for axis in (0, 1)], np.float32)
    row = column = 0
    for part in parts:
        rows, columns = part.b.shape
        part_b = part.b * (part.scale / scale)
        b[row : row + rows, column : column + columns] = part_b
        row, column = row + rows, column + columns
    return Adapter(np.concatenate([p.a for p in parts], 1), b, scale)
