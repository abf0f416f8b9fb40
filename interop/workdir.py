"""From a Hugging Face folder to a workdir and back; all or nothing."""

import dataclasses
import os
import tempfile
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from triform.configs.schema import ExperimentConfig, to_json
from triform.data.codecs import files as codec_files
from triform.data.codecs import text as tokenizer
from triform.data.codecs.classes import PLACEHOLDER, Classes
from triform.data.datasets import ImagesConfig
from triform.experiment import Experiment
from triform.interop import (
    families,
    generation,
    peft,
    preprocessor,
    settings,
    tokenizers,
)
from triform.interop.mapping import Family
from triform.interop.staging import all_or_nothing
from triform.interop.suggest import experiment_config
from triform.interop.transfer import Import, tensors
from triform.interop.weights import SHARD, Weights, write
from triform.models import EncoderDecoderConfig, LoRAConfig, ModelConfig
from triform.models.lora import merge
from triform.runtime import optim, stores
from triform.runtime.checkpoint import CheckpointConfig, Checkpointer
from triform.runtime.errors import UserError
from triform.workdir import (
    checkpoint_dir,
    for_these_devices,
    load_variables,
    open_config,
)

HF_CONFIG = "hf_config.json"  # the config.json that was imported
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
    "remat_keeps": "nothing",
    "logit_chunks": 1,
    "scan_layers": False,
}


def _classes(experiment: ExperimentConfig, hf: dict[str, Any]) -> dict[str, Classes]:
    """The classes of the model's head, by field of the data, as a config.json calls
    them.
    """
    found, names = {}, hf.get("id2label") or {}
    for field, size in experiment.data.classes().items():
        count = experiment.model.sizes()[size]
        given = names if len(names) == count else {}
        ordered = [given.get(str(i), PLACEHOLDER.format(i)) for i in range(count)]
        found[field] = Classes(list(map(str, ordered)))
    return found


def _labels(workdir: str, config: ExperimentConfig) -> dict[str, Any]:
    """How a config.json names the classes of a workdir; {} if they have no names."""
    found = codec_files.load_classes(workdir, config.data)
    for field, size in config.data.classes().items():
        count = config.model.sizes().get(size, 0)
        if field in found and not found[field].placeholders and count:
            rest = map(PLACEHOLDER.format, range(found[field].size, count))
            return settings.label_names([*found[field].names, *rest])
    return {}


def _bar(total: int, title: str) -> tqdm:
    return tqdm(
        total=total, desc=title, unit="B", unit_scale=True, disable=None, leave=False
    )


def import_model(
    source: str,
    workdir: str,
    scan_layers: bool = False,
    ignore: Iterable[str] = (),
    adapter: str = "",
) -> list[str]:
    """Makes a workdir of a Hugging Face folder; returns a report, lines.

    `adapter` is a folder of PEFT with LoRA matrices for this model. UserError, in one
    line, if it cannot be done; then there is no workdir.
    """
    for folder in (source, adapter):
        if folder and not os.path.isdir(folder):
            raise UserError(f"{folder}: no such folder; name one with a config.json")
    hf = tokenizers.read_json(source, "config.json")
    if not hf:
        raise UserError(f"{source}: holds no config.json; name a folder with one")
    with all_or_nothing(workdir) as partial, Weights(source) as weights:
        found = Import(weights, hf, scan_layers, ignore)
        model, adapters, kind = found.config, {}, ""
        if adapter:
            model, adapters, kind = peft.load(adapter, found.family, found.config)
        size = sum(x.size for x in adapters.values())
        experiment = experiment_config(model)
        said = _beside(source, hf, experiment)
        missing = tokenizers.bring(source, partial, hf)
        said += _ids_without_rows(partial, model)
        tokenizers.write_json(partial, HF_CONFIG, hf)
        with open(os.path.join(partial, "config.json"), "w", encoding="utf-8") as f:
            f.write(to_json(experiment))
        codec_files.save(_classes(experiment, hf), partial)
        with _bar(found.size(), "reading") as bar:
            params = found.read(bar.update)
        params |= adapters
        _save(partial, params, found, kind)
    report = [
        f"imported {found.architecture}: {found.count():,} parameters, stored as "
        f"{NAMES[found.dtype]}, now float32",
        f"  {workdir}: checkpoint 0, {type(model).__name__}",
    ]
    if adapter:
        report.append(f"  adapters of {adapter}: {size:,} parameters, {NAMES[kind]}")
    if found.ignored:
        report.append(f"  ignored: {', '.join(found.ignored)}")
    if fresh := [path for entry in found.fresh for path, _ in entry.elements]:
        report.append(f"  newly initialised: {', '.join(fresh)}")
    if missing:
        report.append(
            f"  {source} {missing}: put one into {workdir} before text is read or "
            "written"
        )
    return report + [f"  {line}" for line in said]


def _beside(source: str, hf: dict[str, Any], config: ExperimentConfig) -> list[str]:
    """Takes over what a folder says beside the weights; a line for each setting that
    has no counterpart.
    """
    lines = []
    if config.model.generates():
        given = generation.settings_of(
            hf, tokenizers.read_json(source, generation.NAME)
        )
        config.decode, lines = generation.taken(given, config.model)
    if isinstance(config.data, ImagesConfig):
        given = tokenizers.read_json(source, preprocessor.NAME)
        lines += preprocessor.taken(given, config.data)
    return lines


# Special tokens that a model reads: they must have a row.
READ = ("bos", "cls", "sep", "mask")


def _ids_without_rows(workdir: str, model: ModelConfig) -> list[str]:
    """A line for ids of the tokenizer that the model has no row for.

    UserError if one of them is a special token that every text brings.
    """
    path, rows = tokenizer.find(workdir), model.sizes().get("vocab_size", 0)
    tok = tokenizer.load(path) if path else None
    if tok is None or not rows:
        return []
    decoded = ("start",) if "S" in model.longest() else ()
    for role in (*READ, *decoded):
        if (i := getattr(tok.specials, role)) is not None and i >= rows:
            raise UserError(
                f"the tokenizer's {role} token has id {i}, the model {rows} rows; add "
                "rows with transformers' resize_token_embeddings, or use the "
                "tokenizer of these weights"
            )
    if tok.vocab_size <= rows:
        return []
    names = ", ".join(map(repr, tok.pieces[rows : rows + 4])) or "unnamed ones"
    return [
        f"the tokenizer has {tok.vocab_size} ids, the model {rows}: texts with "
        f"{names} are refused; as padding they are not read"
    ]


def _save(
    workdir: str, params: dict[str, np.ndarray], found: Import, adapter_dtype: str
) -> None:
    """Checkpoint 0; the arrays are taken as they are, not copied."""
    cpu = jax.local_devices(backend="cpu")[0]
    paths = list(params)
    tree = {path: jax.device_put(params.pop(path), cpu) for path in paths}
    about = {
        "model_type": found.family.model_type,
        "architecture": found.architecture,
        "dtype": found.dtype,
        "odd_dtypes": found.odd,
        "adapter_dtype": adapter_dtype,
    }
    meta = {"imported": about, "params_only": True}
    state = {"params": unflatten_dict(tree, sep="/")}
    os.makedirs(checkpoint_dir(workdir))
    with Checkpointer(checkpoint_dir(workdir), CheckpointConfig()) as checkpointer:
        checkpointer.save(0, state, meta=meta, wait=True)


def export_model(
    workdir: str,
    target: str,
    checkpoint: str = "best",
    shard: int = SHARD,
    adapter: bool = False,
) -> list[str]:
    """Makes a Hugging Face folder of a workdir; returns a report, lines.

    LoRA matrices are merged into the weights; with `adapter` they alone are written, as
    PEFT does. UserError, in one line, if transformers cannot express the model; then
    there is no folder.
    """
    config = open_config(workdir)
    lora = config.model if isinstance(config.model, LoRAConfig) else None
    model = lora.model if lora else config.model
    beside = stores.local(workdir)
    original = tokenizers.read_json(beside, HF_CONFIG)
    family, hf = _described(config, original)
    if adapter:
        _require_adapter(config, lora)
    with all_or_nothing(target) as partial:
        params, about, which = _restore(workdir, config, checkpoint)
        if adapter:
            kind = about.get("adapter_dtype") or "F32"
            count = peft.save(partial, family, lora, params, kind)
            return [
                f"exported adapters of {which}: {count:,} parameters, {NAMES[kind]}",
                f"  {target}: load it with peft.PeftModel.from_pretrained",
            ]
        if lora:
            merged = merge(unflatten_dict(params, sep="/"), lora)
            params = _flat(jax.device_get(merged))
        dtype, odd = about.get("dtype", "F32"), about.get("odd_dtypes", {})
        known = tokenizers.give(beside, partial, config, family)
        known = _special_ids(family, known)
        if not original:
            hf = known | hf
        hf.pop("torch_dtype", None)
        hf["dtype"] = NAMES[dtype]
        hf |= _labels(beside, config)
        tokenizers.write_json(partial, "config.json", hf)
        _write_beside(partial, config, known, original)
        found = tensors(family, model, params, dtype, odd)
        with _bar(sum(t.size() for t in found), "writing") as bar:
            for size in write(partial, found, shard):
                bar.update(size)
    count = sum(x.size for x in params.values())
    return [
        f"exported {which} as {hf['architectures'][0]}: {count:,} parameters, "
        f"{NAMES[dtype]}",
        f"  {target}: load it with transformers.{_auto(hf)}.from_pretrained",
    ]


def _write_beside(
    folder: str, config: ExperimentConfig, known: dict[str, Any], hf: dict[str, Any]
) -> None:
    """What belongs to the weights besides config.json."""
    if config.model.generates():
        original = tokenizers.read_json(folder, generation.NAME)
        before = generation.settings_of(hf, original)
        longest = max(shape["L"] for shape in config.data.shapes())
        ours = generation.given_back(config.decode, config.model, longest, before)
        content = generation.merged(original or known, ours)
        if content and content != original:
            tokenizers.write_json(folder, generation.NAME, content)
    if isinstance(config.data, ImagesConfig):
        original = tokenizers.read_json(folder, preprocessor.NAME)
        content = preprocessor.given_back(config.data, original)
        tokenizers.write_json(folder, preprocessor.NAME, content)


def exportable(config: ExperimentConfig, folder: str = "") -> str:
    """The class of transformers that a run of this config becomes.

    `folder` is its workdir, or holds its tokenizer as a workdir does. UserError that
    says what transformers cannot express.
    """
    original = tokenizers.read_json(folder, HF_CONFIG) if folder else {}
    family, hf = _described(config, original)
    if folder:
        with tempfile.TemporaryDirectory() as target:
            tokenizers.give(folder, target, config, family)
    return hf["architectures"][0]


def _described(
    config: ExperimentConfig, original: dict[str, Any]
) -> tuple[Family, dict[str, Any]]:
    """(family, config.json) of a run; UserError if it has none."""
    model = config.model
    model = model.model if isinstance(model, LoRAConfig) else model
    family, hf = _settings(model, original)
    _require_parameters(config, family)
    return family, hf


def _special_ids(family: Family, known: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of special tokens, so that no class fills in its own."""
    found = {k: v for k, v in known.items() if v is not None}
    if family.config_type is not EncoderDecoderConfig:
        found.pop("decoder_start_token_id", None)
        return found
    found = OURS | found
    if family.model_type == "marian":  # what ends a shortened text
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
    """The config without what says how it is computed or trained."""
    usual = settings.plain(config)
    trunk = dataclasses.replace(usual.trunk, **EXECUTION)
    return dataclasses.replace(usual, trunk=trunk)


def _require_parameters(config: ExperimentConfig, family: Family) -> None:
    """UserError if the model's batches left parameters of the family unused."""
    data = config.data
    if missing := [field for field in family.reads if field not in data.spec()]:
        shown = getattr(data, "global_tokens", "none")
        raise UserError(
            f"data.global_tokens={shown!r}: batches without {missing[0]!r} trained "
            f"none of their projections, which transformers' {family.model_type} has; "
            "it can be exported after training with 'first'"
        )


def _require_adapter(config: ExperimentConfig, lora: LoRAConfig | None) -> None:
    """UserError if something else than the adapters differs from the base model."""
    if lora is None:
        raise UserError(
            f"model={type(config.model).__name__}: has no adapters; leave out --adapter"
        )
    state = jax.eval_shape(Experiment(for_these_devices(config)).make_state)
    trained, _ = optim.partition(state.variables()["params"], config.optim.train)
    if others := [x for x in _flat(trained) if x.rpartition("/")[2][:5] != "lora_"]:
        raise UserError(
            f"optim.train={config.optim.train}: {others[0]} is trained besides the "
            "adapters; leave out --adapter to export the merged weights"
        )


def _flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def _restore(
    workdir: str, config: ExperimentConfig, which: str
) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """(parameters, what was recorded at an import, description)."""
    experiment = Experiment(for_these_devices(config))
    with Checkpointer(checkpoint_dir(workdir), config.checkpoint) as checkpointer:
        variables, step, name = load_variables(experiment, checkpointer, which)
        about = checkpointer.meta_of(step).get("imported", {})
    params = {k: np.asarray(x) for k, x in _flat(variables["params"]).items()}
    return params, about, name
