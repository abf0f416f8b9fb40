"""Mistakes in a config are answered in one line, with value, rule and fix."""

import copy
import dataclasses
import re

import pytest
from test_configs import leaves

from triform.configs.schema import (
    CausalLMConfig,
    ClassificationConfig,
    Corpus,
    EncoderConfig,
    EvaluationSplit,
    ExperimentConfig,
    ImagesConfig,
    InitRule,
    LanguageModelConfig,
    LoRAConfig,
    MaskedLMConfig,
    MixtureConfig,
    OptimConfig,
    RegressionConfig,
    RopeConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
    SpanCorruptionConfig,
    TransformerConfig,
    VisionConfig,
    update,
)
from triform.data.datasets import DATASETS
from triform.models import MODELS
from triform.tasks import TASKS

# The family in which a mistake is made; set before the other changes.
ENCODER = {"model": EncoderConfig()}
DECODER = {"model": LanguageModelConfig()}
VISION = {
    "model": VisionConfig(),
    "data": ImagesConfig(),
    "task": ClassificationConfig(),
    "evaluation.metrics": (),
}
BOTH_WAYS = (Corpus("cldr", "en", "de"), Corpus("cldr", "de", "en"))
MIXTURE = {"data": MixtureConfig(corpora=BOTH_WAYS)}
IMAGES, LABELLED, MASKED, SPANS, STREAM = (
    {"data": kind()}
    for kind in (
        ImagesConfig,
        SequenceClassificationConfig,
        MaskedLMConfig,
        SpanCorruptionConfig,
        CausalLMConfig,
    )
)
CLASSES = {
    "model": EncoderConfig(masked_head=False, num_labels=3),
    "task": ClassificationConfig(),
    **LABELLED,
    "evaluation.metrics": (),
}
# (changes, then parts of the message: what else it depends on, what to change)
MISTAKES = (
    # The trunk
    ({"model.trunk.num_heads": 7}, "d_model=512", "head_dim"),
    ({"model.trunk.num_kv_heads": 3}, "num_heads=8"),
    ({"model.trunk.num_kv_heads": 16}, "num_heads=8"),
    ({"model.trunk.windows": (4, -1)}, "0 for unlimited"),
    ({"model.trunk.windows": (0.5,)}, "0 for unlimited"),
    (
        {"model.trunk.windows": (1, 2, 3, 4), "model.trunk.scan_layers": True},
        "num_layers=6",
        "scan_layers=False",
    ),
    ({"model.trunk.patterns": ("strided",)}, "strided:8"),
    ({"model.trunk.positions": "rotory"}, "sinusoidal, learned, rotary"),
    ({"model.trunk.bias": "some"}, "all, qkv, none"),
    ({"model.trunk.block": "sparse"}, "standard"),
    ({"model.trunk.init": "xaviar"}, "xavier, normal, depth, t5"),
    ({"model.trunk.head_dim": 3, "model.trunk.positions": "rotary"}, "even"),
    ({"model.trunk.rope.base": 1.0}, "above 1"),
    ({"model.trunk.rope.scaling": "ntk"}, "linear, llama3, yarn"),
    ({"model.trunk.rope.factor": 2.0}, "scaling='none'", "1.0"),
    ({"model.trunk.attention": "local"}, "windows=()", "'flash'"),
    ({"model.trunk.attention_options": ("block",)}, "('block', 128)"),
    ({"model.trunk.attention_options": (8, 8)}, "('block', 128)"),
    ({"model.trunk.attention_options": ("block", 8)}, "'dot'", "'block'", "scale"),
    (
        {
            "model.trunk.attention": "flash",
            "model.trunk.attention_options": ("blocks", 8),
        },
        "'flash'",
        "path, block",
    ),
    ({"model.trunk.attention_options": ("scale", 0.0)}, "positive", "('scale', 1.0)"),
    ({"model.trunk.norm": "batch"}, "layer, rms"),
    ({"model.trunk.norm_position": "mid"}, "pre, post"),
    ({"model.trunk.dtype": "float16"}, "float32, bfloat16"),
    ({"model.trunk.attention": "flsh"}, "dot, flash, local"),
    ({"model.trunk.ffn": "relo"}, "relu, silu, gelu"),
    ({"model.trunk.ffn": len}, "relu, silu, gelu"),
    (
        {"model.trunk.d_model": 9, "model.trunk.num_heads": 3},
        "even",
        "positions='sinusoidal'",
    ),
    ({"model.trunk.norm_eps": 0.0}, "positive"),
    ({"model.trunk.dropout": 1.0}, "[0, 1)"),
    # Models
    ({"model.vocab_size": 3}, "at least 4"),
    ({"model.embedding_scale": "sqrt"}, "input, head, none"),
    ({"model.pool": "cls", **ENCODER, **MASKED}, "token, mean"),
    (
        {"model.num_tags": 3, **ENCODER, **MASKED},
        "masked_head=False",
        "num_tags=0",
    ),
    (
        {"model.num_labels": 0, "model.masked_head": False, **ENCODER, **MASKED},
        "num_tags",
        "masked_head",
    ),
    ({"model.num_labels": -1, **CLASSES}, "give the number"),
    ({"model.num_labels": -2, **CLASSES}, "at least 0"),
    ({"model.pool": "max", **VISION}, "token, mean"),
    ({"model.patch_size": 15, **VISION}, "image_size=224"),
    # Do the parts fit?
    (MASKED, "data=MaskedLMConfig", "EncoderDecoderConfig", "'encoder_inputs'"),
    (
        {"data": Seq2SeqConfig(), "task": ClassificationConfig()},
        "task=ClassificationConfig",
        "'label'",
    ),
    (
        {"task": ClassificationConfig(), **DECODER, **MASKED},
        "'label'",
        "model=LanguageModelConfig",
        "targets",
    ),
    (
        {**CLASSES, "data.target": "number", "task": RegressionConfig()},
        "data=SequenceClassificationConfig",
        "model.num_labels=3",
        "model.num_labels=1",
    ),
    ({"data.max_len": 1024}, "512", "model.trunk.max_len", "model.trunk.max_len=0"),
    ({"data.max_source_len": 1024}, "512", "model.trunk.max_len"),
    ({"decode.max_len": 513}, "512", "model.trunk.max_len"),
    (
        {"model.position_offset": 2, "data.max_len": 512, **ENCODER, **MASKED},
        "510",
        "model.trunk.max_len",
    ),
    ({"data.size": 32, **VISION}, "model.image_size=224", "model.image_size=0"),
    ({"data.channels": 1, **VISION}, "model.channels=3", "model.channels=0"),
    (
        {"data.max_len": 1024, **STREAM, "model": LoRAConfig()},
        "512",
        "model.model.trunk.max_len=0",
    ),
    ({"mesh.sequence": 3}, "64", "data.max_len", "data.buckets"),
    (
        {"data.global_tokens": "first", **MASKED, **ENCODER},
        "model.trunk.windows",
        "'none'",
    ),
    # Tasks
    ({"task.label_smoothing": 1.0}, "[0, 1)", "0 switches it off"),
    ({"task.z_loss": -1e-4}, "0 switches it off"),
    # Data
    ({"data.max_len": 1}, "at least 2"),
    *(
        ({"data.buckets": given}, "max_len=64", "ascend")
        for given in ((30, 20), (20, 20), (20, 64), (1, 20))
    ),
    ({"data.buckets": ("a",)}, "row lengths"),
    ({"data.tokenizer.kind": "bpee"}, "bpe, wordpiece"),
    ({"data.tokenizer.corpora": ("cldr",)}, "multi30k_translate:en"),
    ({"data.source": "cldr", **MIXTURE}, "data.corpora"),
    ({"data.corpora": (), **MIXTURE}, "at least one"),
    ({"data.weights": (1.0,), **MIXTURE}, "2 positive numbers"),
    ({"data.limit": 9, "data.weights": (1.0, 2.0), **MIXTURE}, "data.weights"),
    ({"data.temperature": 0.0, **MIXTURE}, "positive"),
    ({"data.global_tokens": "question", **MASKED}, "none, first"),
    ({"data.global_tokens": "question", **LABELLED}, "data.second"),
    ({"data.buckets": (8,), **STREAM}, "()"),
    ({"data.documents": "packed", **STREAM}, "joined, separate"),
    ({"data.eval_stride": 65, **STREAM}, "max_len=64"),
    ({"data.max_len": 4, **MASKED}, "at least 5"),
    ({"data.mask_rate": 1.0, **MASKED}, "between 0 and 1"),
    ({"data.short_rate": 1.1, **MASKED}, "[0, 1]"),
    ({"data.buckets": (8,), **SPANS}, "()"),
    ({"data.max_len": 3, **SPANS}, "at least 4"),
    ({"data.noise_rate": 0.0, **SPANS}, "between 0 and 1"),
    ({"data.span_length": 0.5, **SPANS}, "at least 1"),
    ({"data.channels": 2, **IMAGES}, "1 or 3"),
    ({"data.mean": (0.5, 0.5), **IMAGES}, "one number or 3"),
    ({"data.std": (), **IMAGES}, "one number or 3"),
    ({"data.std": (0.0,), **IMAGES}, "positive"),
    ({"data.crop": "center", **IMAGES}, "none, pad, resized"),
    ({"data.rand_magnitude": 10.5, **IMAGES}, "[0, 10]"),
    # Optimiser and decoding
    ({"optim.name": "adamm"}, "adam, adamw"),
    ({"optim.schedule": "cos"}, "rsqrt, cosine"),
    ({"optim.train": ("(",)}, "pattern"),
    ({"optim.learning_rate": float("inf")}, "finite"),
    ({"optim.warmup_steps": 0}, "schedule='rsqrt'"),
    ({"optim.floor": 1.5}, "[0, 1]"),
    ({"optim.b1": 1.0}, "[0, 1)"),
    ({"optim.ema_decay": 1.0}, "[0, 1)"),
    ({"optim.name": "adamw", "optim.weight_decay": -0.1}, "negative"),
    ({"optim.weight_decay": 0.1}, "optim.name=adamw"),
    ({"decode.method": "bean"}, "greedy, beam, sample"),
    ({"decode.top_p": 1.1}, "(0, 1]", "1 is off"),
    # Evaluation and checkpoints
    ({"evaluation.metrics": ("bleu", "blue")}, "'blue'", "bleu, bleu_moses, chrf"),
    (
        {**DECODER, **STREAM, "evaluation.metrics": ("bleu",)},
        "data=CausalLMConfig",
        "set ()",
    ),
    ({"evaluation.average": 6}, "checkpoint.keep_newest=5"),
    ({"checkpoint.metric": "eval/blue"}, "eval/loss", "eval/accuracy", "eval/bleu"),
    ({"checkpoint.mode": "least"}, "min, max"),
    ({"evaluations": (EvaluationSplit("a b", "test"),)}, "'a b'", "word"),
    ({"evaluations": (EvaluationSplit("test", "test"),)}, "'test'", "taken"),
    ({"evaluations": (EvaluationSplit("eval", "test"),)}, "'eval'", "choose another"),
    ({"evaluations": (EvaluationSplit("a", ""),)}, "split=''"),
    ({"evaluation.examples": -1}, "evaluation.examples=-1"),
    ({"evaluations": (EvaluationSplit("a", "b", "", ("blue",)),)}, "'blue'", "bleu"),
    # The experiment
    ({"placement": "pmapp"}, "mesh, pmap"),
    ({"seed": 2**32}, "[0, 2**32)"),
    ({"init_from": "/a", "init": (InitRule("b"),)}, "only one"),
    ({"init": (InitRule(""),)}, "source=''", "workdir"),
    ({"init": (InitRule("a", (("(", ""),)),)}, "'('", "correct it"),
)


def error_of(changes):
    """The message of a config with those changes, one line."""
    config = ExperimentConfig()
    update(config, dict(sorted(changes.items(), key=lambda item: item[0].count("."))))
    with pytest.raises(ValueError, match=".") as error:
        config.resolved().validate()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("row", MISTAKES, ids=lambda row: str(next(iter(row[0]))))
def test_a_mistake_is_answered_with_value_and_fix(row):
    changes, *parts = row
    message = error_of(changes)
    for part in parts:
        assert part in message
    named = [
        key
        for key, x in changes.items()
        if f"{key}={type(x).__name__ if dataclasses.is_dataclass(x) else repr(x)}"
        in message
    ]
    assert named or message.startswith(("evaluations: ", "init: ")), message


def test_defaults_are_sound():
    ExperimentConfig().validate()


def configs_of_all_types():
    """One for every model, task and kind of data, complete."""
    for name, table in (("model", MODELS), ("task", TASKS), ("data", DATASETS)):
        for kind in table:
            config = ExperimentConfig(**{name: kind()})
            update(config, MIXTURE if kind is MixtureConfig else {})
            config.model.derive({"H": 224, "W": 224, "C": 3}, {})
            yield config


def numbers():
    """(dotted key, config that has it) of every number of every type."""
    seen = {(OptimConfig, "weight_decay")}  # whose rule depends on the optimiser
    for config in configs_of_all_types():
        for key, owner, field in leaves(config):
            where = type(owner), field.name
            if type(getattr(owner, field.name)) in (int, float) and where not in seen:
                seen.add(where)
                yield pytest.param(key, config, id=f"{type(owner).__name__}-{key}")


@pytest.mark.parametrize(("key", "config"), [*numbers()])
def test_a_number_far_below_zero_is_refused_by_name(key, config):
    config = copy.deepcopy(config)
    update(config, {key: -(10**9)})
    part, _, rest = key.partition(".")
    checked = getattr(config, part) if rest else ExperimentConfig(**{key: -(10**9)})
    with pytest.raises(ValueError, match=re.escape(key.rpartition(".")[2])) as error:
        checked.validate()
    assert str(-(10**9)) in str(error.value)


def test_rope_is_checked_inside_every_trunk():
    trunk = TransformerConfig(rope=RopeConfig(base=0.5))
    with pytest.raises(ValueError, match=r"rope\.base=0\.5"):
        ExperimentConfig(model=EncoderConfig(trunk), **MASKED).validate()
