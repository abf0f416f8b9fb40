"""Configs: every file is sound, survives JSON, and every mistake has its message."""

import ast
import copy
import dataclasses
import importlib
import inspect
import json
import pathlib
import re
import traceback

import jax
import pytest

from triform.configs import schema
from triform.configs.schema import ExperimentConfig, differences, from_json, to_json
from triform.data.datasets import (
    CausalLMConfig,
    Corpus,
    ImagesConfig,
    MaskedLMConfig,
    MixtureConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
    SpanCorruptionConfig,
)
from triform.experiment import Experiment
from triform.models import EncoderConfig, LanguageModelConfig, VisionConfig
from triform.tasks import ClassificationConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "base")
)


def module(name):
    return importlib.import_module(f"triform.configs.{name}")


def documented(name) -> list[str]:
    """The variants that the docstring of get_config lists."""
    text = module(name).get_config.__doc__
    assert text.startswith("Variants: ")
    return re.findall(r"'(\w*)'", text)


VARIANTS = [(name, variant) for name in FILES for variant in documented(name)]


def leaves(config, prefix=""):
    """(dotted key, object, field) of every value in the tree."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, config, field


def put(config, key, value):
    *path, last = key.split(".")
    for name in path:
        config = getattr(config, name)
    assert hasattr(config, last), key
    setattr(config, last, value)


# --- The files ---


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_documented_variant_is_sound(name, variant):
    module(name).get_config(variant).validate()


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_survives_json(name, variant):
    config = module(name).get_config(variant)
    again = from_json(to_json(config))
    assert again == config
    assert differences(config, again) == {}
    assert to_json(again) == to_json(config)


@pytest.mark.parametrize("name", FILES)
def test_variants_differ_and_calls_share_nothing(name):
    texts = {v: to_json(module(name).get_config(v)) for v in documented(name)}
    assert len(set(texts.values())) == len(texts) >= 2
    config = module(name).get_config(documented(name)[0])
    config.model.trunk.num_layers = 99
    config.optim.learning_rate = 99.0
    assert to_json(module(name).get_config(documented(name)[0])) in texts.values()


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_variant_is_told_the_right_ones(name):
    with pytest.raises(ValueError, match="variant 'nosuch': expected") as error:
        module(name).get_config("nosuch")
    listed = re.findall(r"'(\w*)'", str(error.value).split("expected")[1])
    assert listed == documented(name)


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


# Law 9, of what is dry-run only.
COUNTS = {
    ("gpt2", "small"): 124_439_808,
    ("gpt2", "medium"): 354_823_168,
    ("gpt2", "large"): 774_030_080,
    ("gpt2", "xl"): 1_557_611_200,
    ("llama", "1b"): 1_235_814_400,
    ("llama", "8b"): 8_030_261_248,
    ("t5", "small"): 60_506_624,
    ("t5", "base"): 222_903_552,
    ("t5", "large"): 737_668_096,
    ("t5", "v1_1_small"): 76_961_152,
    ("vit", "b16"): 86_567_656,
    ("vit", "l16"): 304_326_632,
    ("vit", "h14"): 632_045_800,
}


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_builds_abstractly(name, variant):
    experiment = Experiment(module(name).get_config(variant))
    params = jax.eval_shape(experiment.init_params)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == COUNTS.get((name, variant), count)


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
    for key, owner, field in leaves(ExperimentConfig()):
        value = getattr(owner, field.name)
        item = "bleu" if "metrics" in key else 7
        other = {
            bool: lambda x: not x,
            int: lambda x: x + 1,
            float: lambda x: x + 0.5,
            str: lambda x: x + "!",
            tuple: lambda x, item=item: (*x, item),
        }[type(value)](value)
        config = ExperimentConfig()
        put(config, key, other)
        assert set(differences(ExperimentConfig(), config)) == {key}
        assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (["nosuch"], "config: unknown key 'nosuch'; it was written by another version"),
        (["data", "nosuch"], "data: unknown key 'nosuch'"),
        (["data", "tokenizer", "nosuch"], "data.tokenizer: unknown key"),
        (["model", "trunk", "nosuch"], "model.trunk: unknown key 'nosuch'"),
        (["model", "type"], "model.type='other': expected one of EncoderDecoderConfig"),
        (["task", "type"], "task.type='other': expected one of TokenPredictionConfig"),
    ],
)
def test_foreign_json_is_refused(path, message):
    tree = json.loads(to_json(ExperimentConfig()))
    part = tree
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = "other"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_json(json.dumps(tree))


# --- Mistakes ---

# The family that a mistake is made in; put before the other changes.
ENCODER = {"model": EncoderConfig()}
VISION = {"model": VisionConfig()}
BOTH_WAYS = (Corpus("cldr", "en", "de"), Corpus("cldr", "de", "en"))
MIXTURE = {"data": MixtureConfig(corpora=BOTH_WAYS)}
IMAGES, LABELLED, MASKED, SPANS, WINDOWS = (
    {"data": kind()}
    for kind in (
        ImagesConfig,
        SequenceClassificationConfig,
        MaskedLMConfig,
        SpanCorruptionConfig,
        CausalLMConfig,
    )
)
# (changes, what the message must hold besides the first key and its value)
MISTAKES = (
    *(
        ({f"model.trunk.{name}": 0}, "must be at least 1")
        for name in ("num_layers", "d_model", "num_heads", "d_ff", "max_len")
    ),
    (
        {"model.trunk.num_heads": 7},
        "must divide d_model=512; change one of them or set",
    ),
    ({"model.trunk.num_kv_heads": 3}, "must be 0 or divide num_heads=8"),
    ({"model.trunk.num_kv_heads": -1}, "must be 0 or divide num_heads=8"),
    ({"model.trunk.num_kv_heads": 16}, "must be 0 or divide num_heads=8"),
    ({"model.trunk.head_dim": -4}, "must be 0 (derived) or positive"),
    ({"model.trunk.windows": (4, -1)}, "0 for unlimited"),
    ({"model.trunk.windows": (0.5,)}, "0 for unlimited"),
    (
        {"model.trunk.windows": (1, 2, 3, 4), "model.trunk.scan_layers": True},
        "must divide num_layers=6 when scan_layers is on; change one of them or set",
    ),
    ({"model.trunk.positions": "rotory"}, "expected one of sinusoidal, learned, rot"),
    ({"model.trunk.bias": "some"}, "expected one of all, qkv, none"),
    ({"model.trunk.init": "xaviar"}, "expected one of xavier, normal, depth, t5"),
    (
        {"model.trunk.head_dim": 3, "model.trunk.positions": "rotary"},
        "must be even with positions='rotary'",
    ),
    ({"model.trunk.rope_base": 1.0}, "must be above 1"),
    (
        {"model.trunk.attention": "local"},
        "it looks at windows, and model.trunk.windows=()",
    ),
    ({"model.trunk.attention_options": ("block",)}, "names and values in turn"),
    ({"model.trunk.attention_options": (8, 8)}, "names and values in turn"),
    (
        {"model.trunk.attention_options": ("block", 8)},
        "attention='dot' has no option 'block'; it has none",
    ),
    (
        {
            "model.trunk.attention": "flash",
            "model.trunk.attention_options": ("blocks", 8),
        },
        "attention='flash' has no option 'blocks'; it has path, block",
    ),
    ({"model.trunk.rope_scaling": ("linear",)}, "linear and 1, llama3 and 4"),
    ({"model.trunk.rope_scaling": ("ntk", 2.0)}, "expected () or a name and its"),
    ({"model.trunk.norm": "batch"}, "expected one of layer, rms"),
    ({"model.trunk.norm_position": "mid"}, "expected one of pre, post"),
    ({"model.trunk.dtype": "float16"}, "expected one of float32, bfloat16"),
    ({"model.trunk.attention": "flsh"}, "expected one of dot"),
    ({"model.trunk.ffn": "relo"}, "expected one of relu, silu, gelu"),
    (
        {"model.trunk.d_model": 9, "model.trunk.num_heads": 3},
        "must be even with positions='sinusoidal'",
    ),
    ({"model.trunk.norm_eps": 0.0}, "must be positive"),
    ({"model.trunk.dropout": 1.0}, "must lie in [0, 1)"),
    ({"model.trunk.attention_dropout": -0.1}, "must lie in [0, 1)"),
    ({"model.vocab_size": 3}, "must be at least 4"),
    ({"model.embedding_scale": "sqrt"}, "expected one of input, head, none"),
    *(
        ({f"model.{name}": -1, **ENCODER}, "must be at least 0")
        for name in ("num_types", "position_offset", "num_tags", "num_labels")
    ),
    ({"model.pool": "cls", **ENCODER}, "expected one of token, mean"),
    ({"model.num_tags": 3, **ENCODER}, "set masked_head=False or num_tags=0"),
    (
        {"model.num_labels": 0, "model.masked_head": False, **ENCODER},
        "nothing is predicted; set it, num_tags or masked_head",
    ),
    *(
        ({f"model.{name}": 0, **VISION}, "must be at least 1")
        for name in ("image_size", "patch_size", "channels", "num_labels")
    ),
    ({"model.pool": "max", **VISION}, "expected one of token, mean"),
    ({"model.patch_size": 15, **VISION}, "must divide image_size=224"),
    ({"model.trunk.max_len": 196, **VISION}, "and the class token; set it to 197"),
    (
        {"data": MaskedLMConfig()},
        "but model=EncoderDecoderConfig needs 'encoder_inputs'",
    ),
    (
        {"data": Seq2SeqConfig(), "task": ClassificationConfig()},
        "but task=ClassificationConfig needs 'label'",
    ),
    (
        {
            "task": ClassificationConfig(),
            "model": LanguageModelConfig(),
            "data": MaskedLMConfig(),
        },
        "it predicts 'label', for which model=LanguageModelConfig has no head",
    ),
    (
        {
            "evaluation.metrics": ("bleu",),
            "data": CausalLMConfig(),
            "model": LanguageModelConfig(),
        },
        "data=CausalLMConfig has no references; set ()",
    ),
    ({"task.label_smoothing": 1.0}, "must lie in [0, 1); 0 switches it off"),
    ({"task.z_loss": -1e-4}, "must not be negative; 0 switches it off"),
    ({"data.max_len": 1}, "must be at least 2"),
    ({"data.max_len": 1024}, "must not exceed 512, the longest row of the model"),
    ({"data.batch_size": 0}, "must be at least 1"),
    ({"data.prefetch": 0}, "must be at least 1"),
    ({"data.buckets": (30, 20)}, "must ascend from at least 2 to below max_len=64"),
    ({"data.buckets": (20, 20)}, "must ascend from at least 2 to below max_len=64"),
    ({"data.buckets": ("a",)}, "must be a tuple of row lengths"),
    ({"optim.learning_rate": float("inf")}, "must be positive and finite"),
    ({"data.buckets": (20, 64)}, "must ascend from at least 2 to below max_len=64"),
    ({"data.buckets": (1, 20)}, "must ascend from at least 2 to below max_len=64"),
    ({"data.tokenizer.kind": "bpee"}, "expected one of bpe, wordpiece"),
    (
        {"data.tokenizer.lowercase": True},
        "must be compared so; set evaluation.lowercase=True",
    ),
    ({"data.tokenizer.corpora": ("cldr",)}, "must be a tuple of 'source:feature'"),
    ({"data.source": "cldr", **MIXTURE}, "must be empty; a mixture's are in data.corp"),
    ({"data.corpora": (), **MIXTURE}, "must name at least one corpus"),
    ({"data.weights": (1.0,), **MIXTURE}, "must be empty or 2 positive numbers"),
    ({"data.limit": -1, **MIXTURE}, "must be at least 0; 0: no limit"),
    (
        {"data.limit": 9, "data.weights": (1.0, 2.0), **MIXTURE},
        "bounds sizes, which data.weights replace",
    ),
    ({"data.temperature": 0.0, **MIXTURE}, "must be positive"),
    ({"data.global_tokens": "question", **MASKED}, "expected one of none, first"),
    (
        {"data.global_tokens": "question", **LABELLED},
        "a question is the first of two texts; name the other in data.second",
    ),
    (
        {"data.global_tokens": "first", **MASKED, **ENCODER},
        "without windows all places see all; set model.trunk.windows or 'none'",
    ),
    ({"data.buckets": (8,), **WINDOWS}, "must be (): all rows are full"),
    ({"data.documents": "packed", **WINDOWS}, "expected one of joined, separate"),
    ({"data.eval_stride": 65, **WINDOWS}, "must lie between 1 and max_len=64, or be"),
    ({"data.max_len": 4, **MASKED}, "rows must have at least 5 places"),
    ({"data.mask_rate": 1.0, **MASKED}, "must lie between 0 and 1"),
    ({"data.short_rate": -0.1, **MASKED}, "must lie in [0, 1]"),
    ({"data.buckets": (8,), **SPANS}, "must be (): all rows are full"),
    ({"data.max_len": 3, **SPANS}, "must be at least 4"),
    ({"data.noise_rate": 0.0, **SPANS}, "must lie between 0 and 1"),
    ({"data.span_length": 0.5, **SPANS}, "must be at least 1"),
    ({"data.size": 0, **IMAGES}, "must be at least 1"),
    ({"data.channels": 2, **IMAGES}, "must be 1 or 3"),
    ({"data.mean": (0.5, 0.5), **IMAGES}, "must be one number or 3, one a channel"),
    ({"data.std": (), **IMAGES}, "must be one number or 3, one a channel"),
    ({"data.std": (0.0,), **IMAGES}, "must be positive"),
    ({"data.crop": "center", **IMAGES}, "expected one of none, pad, resized"),
    ({"data.pad": -1, **IMAGES}, "must be at least 0"),
    ({"data.rand_augment": -1, **IMAGES}, "must be at least 0; 0 is off"),
    ({"data.rand_magnitude": 10.5, **IMAGES}, "must lie in [0, 10]"),
    ({"data.mixup": -0.1, **IMAGES}, "must be at least 0; 0 is off"),
    ({"checkpoint.metric": "eval/blue"}, "expected eval/ and one of loss, accuracy"),
    ({"model.trunk.ffn": len}, "add the function to its table and give its name"),
    ({"mesh.data": -1}, "mesh.data=-1: must be at least 0"),
    ({"mesh.tensor": 0}, "mesh.tensor=0: must be at least 1"),
    ({"optim.name": "adamm"}, "expected one of adam, adamw"),
    ({"optim.schedule": "cos"}, "expected one of rsqrt, cosine"),
    ({"optim.learning_rate": 0.0}, "must be positive"),
    ({"optim.warmup_steps": -1}, "must not be negative"),
    ({"optim.warmup_steps": 0}, "must be positive with schedule='rsqrt'"),
    ({"optim.floor": 1.5}, "must lie in [0, 1]"),
    ({"optim.b1": 1.0}, "must lie in [0, 1)"),
    ({"optim.b2": -0.1}, "must lie in [0, 1)"),
    ({"optim.ema_decay": 1.0}, "must lie in [0, 1)"),
    ({"optim.eps": 0.0}, "must be positive"),
    ({"optim.name": "adamw", "optim.weight_decay": -0.1}, "must not be negative"),
    ({"optim.weight_decay": 0.1}, "adam has none; set optim.name=adamw"),
    ({"optim.clip_norm": -1.0}, "must not be negative; 0 is off"),
    ({"optim.accumulate": 0}, "must be at least 1"),
    ({"decode.method": "bean"}, "expected one of greedy, beam, sample"),
    ({"decode.beam_size": 0}, "must be at least 1"),
    ({"decode.length_penalty": -0.6}, "must not be negative"),
    ({"decode.temperature": 0.0}, "must be positive"),
    ({"decode.top_k": -1}, "must not be negative; 0 is off"),
    ({"decode.top_p": 0.0}, "must lie in (0, 1]; 1 is off"),
    ({"decode.top_p": 1.1}, "must lie in (0, 1]; 1 is off"),
    ({"decode.max_len": -1}, "must not be negative; 0: data.max_len"),
    ({"decode.max_len": 513}, "must not exceed 512, the longest row of the model"),
    ({"evaluation.metrics": ("bleu", "blue")}, "'blue' is unknown, expected some of"),
    ({"evaluation.every": 0}, "must be at least 1"),
    ({"evaluation.every": 1500}, "must be a multiple of checkpoint.every=1000"),
    ({"evaluation.samples": -1}, "must be at least 0"),
    ({"evaluation.examples": -1}, "must be at least 0"),
    ({"evaluation.average": -1}, "must be at least 0"),
    ({"evaluation.average": 6}, "must not exceed checkpoint.keep_newest=5"),
    ({"checkpoint.every": 0}, "must be at least 1"),
    ({"checkpoint.keep_newest": 0}, "must be at least 1"),
    ({"checkpoint.keep_best": -1}, "must be at least 0"),
    ({"checkpoint.mode": "least"}, "expected one of min, max"),
    (
        {"mesh.sequence": 3},
        "must divide every row length; 64 (data.buckets, data.max_len)",
    ),
    ({"mesh.sequence": 0}, "must be at least 1"),
    ({"placement": "pmapp"}, "expected one of mesh, pmap"),
    ({"steps": 0}, "must be at least 1"),
    ({"log_every": 0}, "must be at least 1"),
    ({"seed": -1}, "must lie in [0, 2**32)"),
    ({"seed": 2**32}, "must lie in [0, 2**32)"),
)


def mistaken(changes):
    """The error of a config with those changes."""
    config = ExperimentConfig()
    for key, value in sorted(changes.items(), key=lambda item: item[0].count(".")):
        put(config, key, copy.deepcopy(value))
    with pytest.raises(ValueError, match=".") as error:
        config.validate()
    return error.value


@pytest.mark.parametrize(("changes", "rule"), MISTAKES)
def test_a_mistake_is_told_in_one_line(changes, rule):
    message = str(mistaken(changes))
    assert rule in message
    assert "\n" not in message
    shown = {
        key: type(x).__name__ if dataclasses.is_dataclass(x) else repr(x)
        for key, x in changes.items()
    }
    named = [key for key, x in shown.items() if message.startswith(f"{key}={x}")]
    assert named or message.startswith("optim.weight_decay=-0.1"), message


def test_defaults_are_sound():
    ExperimentConfig().validate()


def checks() -> set[tuple[str, int, int]]:
    """(file, first line, last line) of every check in a `validate` of the tree."""
    classes = {ExperimentConfig, *schema.MODELS, *schema.TASKS, *schema.DATASETS}
    for cls in list(classes):
        config = cls()
        for _, owner, _ in leaves(config):
            classes.add(type(owner))
    found = set()
    for cls in classes:
        if not hasattr(cls, "validate"):
            continue
        file = inspect.getsourcefile(cls)
        for node in ast.walk(ast.parse(pathlib.Path(file).read_text())):
            if not (isinstance(node, ast.FunctionDef) and node.name == "validate"):
                continue
            helpers = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            inside = {n for helper in helpers for n in ast.walk(helper)}
            for n in ast.walk(node):
                call = getattr(n, "value", None) if isinstance(n, ast.Expr) else None
                required = isinstance(call, ast.Call) and "require" in (
                    getattr(call.func, f, "") for f in ("id", "attr")
                )
                if n not in inside and (isinstance(n, ast.Raise) or required):
                    found.add((file, n.lineno, n.end_lineno))
    return found


def test_every_check_has_a_mistake_above():
    expected, met = checks(), set()
    assert len(expected) > 40
    for changes, _ in MISTAKES:
        for frame in traceback.extract_tb(mistaken(changes).__traceback__):
            met |= {
                (file, first, last)
                for file, first, last in expected
                if frame.filename == file and first <= frame.lineno <= last
            }
    assert met == expected
