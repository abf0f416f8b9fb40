"""Configs: every file is sound, survives JSON, and every mistake has its message."""

import dataclasses
import importlib
import json
import pathlib
import re

import jax
import pytest

from triform import config_flag
from triform.configs.schema import (
    UNKNOWN,
    CausalLMConfig,
    ClassificationConfig,
    EncoderConfig,
    EvaluationSplit,
    ExperimentConfig,
    ImagesConfig,
    InitRule,
    LanguageModelConfig,
    LoRAConfig,
    MaskedLMConfig,
    SpanCorruptionConfig,
    TransformerConfig,
    VisionConfig,
    differences,
    from_json,
    smoke,
    to_json,
    update,
)
from triform.data.datasets import DATASETS
from triform.experiment import Experiment
from triform.models import MODELS
from triform.tasks import TASKS

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = config_flag.names()


def module(name):
    return importlib.import_module(f"triform.configs.{name}")


def complete(config):
    """Resolved, with two classes where their number is left to the data."""
    sizes = config.model.sizes().items()
    return config.resolved({k: 2 for k, size in sizes if size == UNKNOWN})


VARIANTS = [(name, variant) for name in FILES for variant in module(name).VARIANTS]


def leaves(config, prefix=""):
    """(dotted key, object, field) of every value in the tree."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, config, field


# --- The files ---


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_is_sound_and_survives_json(name, variant):
    config = module(name).get_config(variant)
    complete(config).validate()
    for saved in (config, complete(config)):
        again = from_json(to_json(saved))
        assert again == saved
        assert differences(saved, again) == {}
        assert to_json(again) == to_json(saved)


@pytest.mark.parametrize("name", FILES)
def test_variants_differ_and_calls_share_nothing(name):
    texts = {v: to_json(module(name).get_config(v)) for v in module(name).VARIANTS}
    assert len(set(texts.values())) == len(texts) >= 2
    for variant in texts:
        config = module(name).get_config(variant)
        for _, owner, field in leaves(config):
            setattr(owner, field.name, None)
    assert texts == {v: to_json(module(name).get_config(v)) for v in texts}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_variant_is_answered_with_the_choices(name):
    with pytest.raises(ValueError, match="'nosuch'") as error:
        module(name).get_config("nosuch")
    listed = re.findall(r"'(\w*)'", str(error.value))
    assert listed == ["nosuch", *module(name).VARIANTS]
    documented = re.findall(r"'(\w*)'", module(name).get_config.__doc__)
    assert documented == [*module(name).VARIANTS]
    default = module(name).get_config.__defaults__[0]
    assert default in module(name).VARIANTS


@pytest.mark.parametrize("name", FILES)
def test_every_file_opens_with_its_command(name):
    assert f"--config=configs/{name}.py" in module(name).__doc__


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_value_can_be_set_from_the_command_line(name, variant):
    """ml_collections knows neither None nor frozen dataclasses."""
    for key, owner, field in leaves(module(name).get_config(variant)):
        value = getattr(owner, field.name)
        assert value is not None, key
        setattr(owner, field.name, value)  # raises if it is frozen


@pytest.mark.parametrize("name", FILES)
def test_the_smoke_variant_is_tiny(name):
    config = complete(module(name).get_config("smoke"))
    params = jax.eval_shape(Experiment(config).init_variables)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) < 100_000
    assert config.steps <= 10


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_smoke_takes_every_config(name, variant):
    config = module(name).get_config(variant)
    smoke(config)
    complete(config).validate()
    for trunk in config.model.trunks().values():
        assert trunk.num_layers <= 2
    data = config.data
    assert data.train_split == data.eval_split == data.test_split


def test_smoke_keeps_a_cycle_of_layers_and_reaches_wrapped_models():
    trunk = TransformerConfig(
        num_layers=12,
        windows=(8, 0, 0),
        patterns=("none", "strided:4"),
        scan_layers=True,
    )
    config = ExperimentConfig(
        model=LoRAConfig(LanguageModelConfig(trunk)), data=CausalLMConfig()
    )
    config.evaluation.metrics = ()
    config.checkpoint.metric = "eval/loss"
    smoke(config)
    assert config.model.model.trunk.num_layers == 6
    assert config.model.model.vocab_size == 1000
    config.resolved().validate()


def test_changes_are_made_by_key_and_an_unknown_key_is_named():
    config, value = ExperimentConfig(), [1]
    update(config, {"model.trunk.d_ff": 8, "data": {"max_len": 9, "buckets": value}})
    assert (config.model.trunk.d_ff, config.data.max_len) == (8, 9)
    value.append(2)
    assert config.data.buckets == [1]
    for change in ({"data.maxlen": 9}, {"data": {"maxlen": 9}}):
        with pytest.raises(ValueError, match="Seq2SeqConfig has no 'maxlen'"):
            update(config, change)


# --- What follows from the data ---


def images(**fields):
    model = VisionConfig(TransformerConfig(max_len=0), 0, 7, 0, num_labels=10)
    data = ImagesConfig(size=28, channels=1, **fields)
    config = ExperimentConfig(model, ClassificationConfig(), data)
    config.evaluation.metrics = ()
    return config


def test_one_key_sets_the_longest_row_of_data_and_model():
    config = ExperimentConfig()
    config.model.trunk.max_len, config.data.max_len = 0, 96
    config.data.buckets = (16, 32)
    found = config.resolved()
    assert found.model.trunk.max_len == 96
    found.validate()
    assert found.resolved() == found
    assert config.model.trunk.max_len == 0  # it is a copy
    config.model.trunk.max_len = 500
    assert config.resolved() == config  # what is given stays


def test_offsets_and_sides_of_different_lengths_are_counted():
    data = MaskedLMConfig(max_len=512)
    trunk = TransformerConfig(max_len=0)
    model = EncoderConfig(trunk, position_offset=2)
    found = ExperimentConfig(LoRAConfig(model), data=data).resolved()
    assert found.model.model.trunk.max_len == 514
    config = ExperimentConfig(data=SpanCorruptionConfig(max_len=128))
    config.model.trunk.max_len = 0
    assert config.resolved().model.trunk.max_len == 128


def test_images_give_sizes_and_patches():
    found = images(mixup=0.2).resolved()
    assert (found.model.image_size, found.model.channels) == (28, 1)
    assert found.model.trunk.max_len == 17
    found.validate()


def test_the_number_of_classes_may_come_from_the_data():
    config = images()
    assert not config.needs_classes()
    config.model.num_labels = -1
    assert config.needs_classes()
    with pytest.raises(ValueError, match=r"model.num_labels=-1.*give the number"):
        config.resolved().validate()
    found = config.resolved({"num_labels": 150, "num_tags": 3})
    assert found.model.num_labels == 150
    found.validate()


# --- JSON ---


def test_differences_name_key_and_both_values():
    old, new = ExperimentConfig(), ExperimentConfig()
    new.optim.learning_rate = 0.5
    new.model.trunk.windows = (4, 0)
    new.steps = 7
    assert differences(old, new) == {
        "model.trunk.windows": ([], [4, 0]),
        "optim.learning_rate": (1e-3, 0.5),
        "steps": (100_000, 7),
    }


def test_every_value_is_in_the_json():
    """Changing any one of them is a difference, and survives the round trip."""
    items = {
        "evaluation.metrics": "bleu",
        "evaluations": EvaluationSplit("other", "test", scores=("bleu",)),
        "init": InitRule("runs/a:best", (("encoder/", "decoder/"), ("x", "y"))),
        "plugins": "mine.py",
    }
    for key, owner, field in leaves(ExperimentConfig()):
        value = getattr(owner, field.name)
        item = items.get(key, 7)
        other = {
            bool: lambda x: not x,
            int: lambda x: x + 1,
            float: lambda x: x + 0.5,
            str: lambda x: x + "!",
            tuple: lambda x, item=item: (*x, item),
        }[type(value)](value)
        config = ExperimentConfig()
        update(config, {key: other})
        assert set(differences(ExperimentConfig(), config)) == {key}
        assert from_json(to_json(config)) == config


@pytest.mark.parametrize("kind", [*MODELS, *TASKS, *DATASETS])
def test_every_type_survives_json(kind):
    name = next(
        name
        for name, table in (("model", MODELS), ("task", TASKS), ("data", DATASETS))
        if kind in table
    )
    config = ExperimentConfig(**{name: kind()})
    assert json.loads(to_json(config))[name]["type"] == kind.__name__
    assert from_json(to_json(config)) == config


def test_models_in_models_survive_json():
    model = LoRAConfig(EncoderConfig(num_tags=3), ranks=(("query", 2), ("value", 4)))
    config = ExperimentConfig(model=LoRAConfig(model))
    tree = json.loads(to_json(config))["model"]
    types = tree["type"], tree["model"]["type"], tree["model"]["model"]["type"]
    assert types == ("LoRAConfig", "LoRAConfig", "EncoderConfig")
    assert "type" not in tree["model"]["model"]["trunk"]
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        (["nosuch"], ["config: ", "'nosuch'"]),
        (["data", "nosuch"], ["data: ", "'nosuch'"]),
        (["data", "tokenizer", "nosuch"], ["data.tokenizer: ", "'nosuch'"]),
        (["model", "trunk", "nosuch"], ["model.trunk: ", "'nosuch'"]),
        (["model", "type"], ["model.type='other'", *(t.__name__ for t in MODELS)]),
        (["task", "type"], ["task.type='other'", *(t.__name__ for t in TASKS)]),
        (["data", "type"], ["data.type='other'", *(t.__name__ for t in DATASETS)]),
    ],
)
def test_foreign_json_is_refused(path, parts):
    tree = json.loads(to_json(ExperimentConfig()))
    owner = tree
    for name in path[:-1]:
        owner = owner[name]
    owner[path[-1]] = "other"
    with pytest.raises(ValueError, match=".") as error:
        from_json(json.dumps(tree))
    for part in parts:
        assert part in str(error.value)
    words = set(re.findall(r"\w+", str(error.value)))
    assert not words & {t.__name__ for t in (*MODELS, *TASKS, *DATASETS)} - {*parts}
