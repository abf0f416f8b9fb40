"""From a Hugging Face folder to a workdir and back; all or nothing."""

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from triform.configs.schema import ExperimentConfig, to_json
from triform.data import datasets
from triform.data.codecs import text as tokenizer
from triform.experiment import (
    Experiment,
    checkpoint_dir,
    for_these_devices,
    open_workdir,
)
from triform.interop import families, specials
from triform.interop.experiments import experiment_config
from triform.interop.mapping import Family, parameters
from triform.interop.transfer import Import, tensors
from triform.interop.weights import SHARD, Weights, write
from triform.models import EncoderConfig, EncoderDecoderConfig, VisionConfig
from triform.runtime.checkpoint import CheckpointConfig, Checkpointer
from triform.runtime.errors import UserError

HF_CONFIG = "hf_config.json"  # the config.json that was imported
GENERATION = "generation_config.json"
ENCODERS = (EncoderConfig, VisionConfig)
# Without a tokenizer: the ids of ours.
OURS = {
    "pad_token_id": tokenizer.PAD,
    "eos_token_id": tokenizer.EOS,
    "decoder_start_token_id": tokenizer.PAD,
}
# safetensors' names of dtypes, and config.json's.
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Fields of a trunk that say how something is computed or trained, not what.
EXECUTION = {
    "attention": "dot",
    "init": "xavier",
    "dtype": "float32",
    "remat": False,
    "scan_layers": False,
}


@contextlib.contextmanager
def _all_or_nothing(target: str) -> Iterator[str]:
    """A folder that becomes `target` if all goes well, and nothing otherwise.

    UserError if `target` is there and not empty.
    """
    target = os.path.abspath(target)
    if os.path.exists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise UserError(f"{target}: is there and not empty; name a new folder")
    part = f"{target}.part"
    # Left by one that was killed.
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    try:
        yield part
        os.replace(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _bar(total: int, title: str) -> tqdm:
    return tqdm(
        total=total, desc=title, unit="B", unit_scale=True, disable=None, leave=False
    )


def import_model(
    source: str, workdir: str, scan_layers: bool = False, ignore: Iterable[str] = ()
) -> list[str]:
    """Makes a workdir of a Hugging Face folder; returns what to say of it, lines.

    UserError, in one line, if it cannot be done; then there is no workdir.
    """
    if not os.path.isdir(source):
        raise UserError(f"{source}: no such folder; name one with a config.json")
    hf = specials.read_json(source, "config.json")
    if not hf:
        raise UserError(f"{source}: holds no config.json; name a folder with one")
    with _all_or_nothing(workdir) as part, Weights(source) as weights:
        found = Import(weights, hf, scan_layers, ignore)
        experiment = experiment_config(found.config)
        missing = specials.bring(source, part, hf)
        specials.write_json(part, HF_CONFIG, hf)
        with open(os.path.join(part, "config.json"), "w") as f:
            f.write(to_json(experiment))
        with _bar(found.size(), "reading") as bar:
            params = found.read(bar.update)
        _save(part, params, found)
    said = [
        f"imported {found.architecture}: {found.count():,} parameters, stored as "
        f"{NAMES[found.dtype]}, now float32",
        f"  {workdir}: checkpoint 0, {type(found.config).__name__}",
    ]
    if found.ignored:
        said.append(f"  ignored: {', '.join(found.ignored)}")
    if fresh := [path for entry in found.fresh for path, _ in entry.places]:
        said.append(f"  newly initialised: {', '.join(fresh)}")
    if missing:
        said.append(
            f"  {source} {missing}: put one into {workdir} before text is read or "
            "written"
        )
    return said


def _save(workdir: str, params: dict[str, np.ndarray], found: Import) -> None:
    """Checkpoint 0; the arrays are taken as they are, not copied."""
    cpu = jax.local_devices(backend="cpu")[0]
    paths = list(params)
    tree = {path: jax.device_put(params.pop(path), cpu) for path in paths}
    about = {
        "model_type": found.family.model_type,
        "architecture": found.architecture,
        "dtype": found.dtype,
        "odd_dtypes": found.odd,
    }
    meta = {"imported": about, "params_only": True}
    state = {"params": unflatten_dict(tree, sep="/")}
    os.makedirs(checkpoint_dir(workdir))
    with Checkpointer(checkpoint_dir(workdir), CheckpointConfig()) as checkpointer:
        checkpointer.save(0, state, meta=meta, wait=True)


def export_model(
    workdir: str, target: str, checkpoint: str = "best", shard: int = SHARD
) -> list[str]:
    """Makes a Hugging Face folder of a workdir; returns what to say of it, lines.

    UserError, in one line, if transformers cannot express the model; then there is no
    folder.
    """
    config = open_workdir(workdir)
    original = specials.read_json(workdir, HF_CONFIG)
    family, hf = _settings(config.model, original)
    _require_parameters(config, family)
    with _all_or_nothing(target) as part:
        params, about, which = _restore(workdir, config, family, checkpoint)
        dtype, odd = about.get("dtype", "F32"), about.get("odd_dtypes", {})
        known = specials.give(workdir, part, config.model.longest())
        known = _special_ids(family, known)
        if not original:
            hf = known | hf
        hf.pop("torch_dtype", None)
        hf["dtype"] = NAMES[dtype]
        specials.write_json(part, "config.json", hf)
        written = os.path.exists(os.path.join(part, GENERATION))
        if known and not written and not isinstance(config.model, ENCODERS):
            specials.write_json(part, GENERATION, known)
        found = tensors(family, config.model, params, dtype, odd)
        with _bar(sum(t.size() for t in found), "writing") as bar:
            for size in write(part, found, shard):
                bar.update(size)
    count = sum(x.size for x in params.values())
    return [
        f"exported {which} as {hf['architectures'][0]}: {count:,} parameters, "
        f"{NAMES[dtype]}",
        f"  {target}: load it with transformers.{_auto(hf)}.from_pretrained",
    ]


def _special_ids(family: Family, known: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of special tokens, so that no class fills in its own."""
    found = {k: v for k, v in known.items() if v is not None}
    if family.config_type is not EncoderDecoderConfig:
        found.pop("decoder_start_token_id", None)
        return found
    found = OURS | found
    if family.model_type == "marian":  # what ends a text that is cut
        found["forced_eos_token_id"] = found["eos_token_id"]
    return found


def _auto(hf: dict[str, Any]) -> str:
    """The class of transformers that loads it."""
    kinds = {
        "ForPreTraining": "AutoModelForPreTraining",
        "ForMaskedLM": "AutoModelForMaskedLM",
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForTokenClassification": "AutoModelForTokenClassification",
        "ForImageClassification": "AutoModelForImageClassification",
        "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
        "MTModel": "AutoModelForSeq2SeqLM",
    }
    name = hf["architectures"][0]
    return next(
        (v for k, v in kinds.items() if name.endswith(k)), "AutoModelForCausalLM"
    )


def _settings(config: Any, original: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """(family, config.json): the imported one as far as it still holds."""
    if not original:
        family = families.family_for(config)
        return family, families.hf_config(config, family)
    family = families.family_of(original)
    ours = families.hf_config(config, family)
    if _meaning(families.model_config(original)) == _meaning(config):
        ours = {"architectures": ours["architectures"]}
    return family, original | ours


def _meaning(config: Any) -> Any:
    return dataclasses.replace(
        config, trunk=dataclasses.replace(config.trunk, **EXECUTION)
    )


def _require_parameters(config: ExperimentConfig, family: Family) -> None:
    """UserError if the model's batches left parameters of the family unused."""
    data = config.data
    has = datasets.empty(data, 1, data.lengths()[0], config.model.limits())
    if missing := [key for key in family.reads if key not in has]:
        shown = getattr(data, "global_tokens", "none")
        raise UserError(
            f"data.global_tokens={shown!r}: batches without {missing[0]!r} trained "
            f"none of their projections, which transformers' {family.model_type} has; "
            "it can be exported after training with 'first'"
        )


def _restore(
    workdir: str, config: ExperimentConfig, family: Family, which: str
) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """(parameters, what was recorded at an import, description)."""
    folder = checkpoint_dir(workdir)
    with Checkpointer(folder, config.checkpoint) as checkpointer:
        step = _step(checkpointer, which)
        about = checkpointer.meta_of(step) if step is not None else {}
        if step is None or (config.optim.ema_decay and not about.get("params_only")):
            experiment = Experiment(for_these_devices(config))
            tree, name = experiment.load_params(checkpointer, which)
            return flatten_dict(jax.device_get(tree), sep="/"), {}, name
        cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        place = functools.partial(jax.ShapeDtypeStruct, sharding=cpu)
        shapes = parameters(config.model, family.reads)
        tree = {path: place(x.shape, x.dtype) for path, x in shapes.items()}
        tree = checkpointer.restore_params(unflatten_dict(tree, sep="/"), step)
    params = {k: np.asarray(x) for k, x in flatten_dict(tree, sep="/").items()}
    return params, about.get("imported", {}), f"step {step}"


def _step(checkpointer: Checkpointer, which: str) -> int | None:
    """The step that best, latest or a number names; None for what is no single one."""
    steps = checkpointer.steps()
    if which == "best" and steps:
        best = checkpointer.best()
        return steps[-1] if best is None else best
    if which == "latest" and steps:
        return steps[-1]
    return int(which) if which.isdigit() and int(which) in steps else None
