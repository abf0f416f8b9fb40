"""One small config of every family, and what the tests of all of them share."""

import dataclasses

import jax
import numpy as np

from triform import models
from triform.models import (
    EncoderConfig,
    EncoderDecoderConfig,
    LanguageModelConfig,
    VisionConfig,
)
from triform.models.config import TransformerConfig

VOCAB, LENGTH = 11, 6
SIZES = {"num_layers": 2, "d_model": 8, "num_heads": 2, "d_ff": 12, "max_len": 16}
LLAMA = {
    **{"positions": "rotary", "norm": "rms", "norm_position": "pre", "ffn": "swiglu"},
    "bias": "none",
}
T5 = {
    **{"positions": "relative", "norm": "rms", "norm_position": "pre", "bias": "none"},
    **{"attention_scale": 1.0, "init": "t5"},
}
LEARNED = {"positions": "learned", "ffn": "gelu"}
PERFORMER = {
    "attention": "performer",
    "attention_options": ("features", 6, "chunk", 2),
}


def trunk(**fields):
    return TransformerConfig(**{**SIZES, "dropout": 0.0, **fields})


def lm(tie_head=True, **fields):
    return LanguageModelConfig(trunk(**fields), VOCAB, tie_head)


# Decoder-only, by name.
DECODERS = {
    "gpt2": lm(positions="learned", norm_position="pre", ffn="gelu_tanh", init="depth"),
    "llama": lm(
        False,
        **{**LLAMA, "num_heads": 4, "num_kv_heads": 2, "d_model": 16},
        rope_scaling=("llama3", 4.0, 1.0, 4.0, 8),
    ),
    "mistral": lm(False, **LLAMA, windows=(3,)),
    "qwen2": lm(**{**LLAMA, "bias": "qkv"}, rope_scaling=("linear", 2.0)),
    "yarn, scanned": lm(
        **LLAMA, scan_layers=True, rope_scaling=("yarn", 4.0, 32.0, 1.0, 8, 0.0)
    ),
    "relative, windows": lm(**T5, windows=(2, 0)),
    "performer": lm(**LLAMA, **PERFORMER),
    "performer, scanned, grouped": lm(
        **{**LEARNED, "norm_position": "pre", "scan_layers": True},
        **PERFORMER,
        num_kv_heads=1,
    ),
    "local": lm(**LLAMA, attention="local", windows=(3,)),
    "scanned windows, grouped": lm(
        **{**LLAMA, "num_layers": 4, "windows": (2, 0), "scan_layers": True},
        num_kv_heads=1,
        head_dim=6,
        remat=True,
    ),
}
T5S = {
    "t5": EncoderDecoderConfig(trunk(**T5), VOCAB, embedding_scale="head"),
    "t5 v1.1": EncoderDecoderConfig(
        trunk(**{**T5, "ffn": "geglu"}, scan_layers=True),
        VOCAB,
        tie_head=False,
        embedding_scale="none",
    ),
    "marian": EncoderDecoderConfig(trunk(ffn="silu"), VOCAB, head_bias=True),
    "performer pairs": EncoderDecoderConfig(
        trunk(**PERFORMER, norm_position="pre"), VOCAB
    ),
}
ENCODERS = {
    "bert": EncoderConfig(trunk(**LEARNED, init="normal"), VOCAB),
    "roberta": EncoderConfig(
        trunk(**LEARNED), VOCAB, num_types=1, position_offset=2, num_labels=0
    ),
    "classifier": EncoderConfig(
        trunk(**LEARNED, norm_position="pre"), VOCAB, masked_head=False, num_labels=5
    ),
    "mean classifier": EncoderConfig(
        trunk(**LEARNED, norm_position="pre"), VOCAB, num_labels=5, pool="mean"
    ),
    "tagger": EncoderConfig(
        trunk(**LEARNED), VOCAB, masked_head=False, num_tags=3, num_labels=0
    ),
    "relative encoder": EncoderConfig(trunk(**T5), VOCAB, num_types=0),
}
VISIONS = {
    "vit": VisionConfig(
        trunk(**{**LEARNED, "norm_position": "pre", "max_len": 10}),
        image_size=12,
        patch_size=4,
        channels=1,
        num_labels=3,
    ),
    "vit, mean": VisionConfig(
        trunk(**{**LEARNED, "norm_position": "pre", "max_len": 9}),
        image_size=12,
        patch_size=4,
        channels=1,
        pool="mean",
        num_labels=3,
    ),
}
FAMILIES = {**DECODERS, **T5S, **ENCODERS, **VISIONS}


def batch_of(config, rows=3, seed=0):
    """A batch that the config's model can read, every row full."""
    rng = np.random.default_rng(seed)
    shape = (rows, LENGTH)
    batch = {"inputs": rng.integers(3, VOCAB, shape).astype(np.int32)}
    if "image" in config.reads:
        size = config.image_size
        image = rng.standard_normal((rows, size, size, config.channels))
        return {"image": image.astype(np.float32)}
    if "encoder_inputs" in config.reads:
        batch["encoder_inputs"] = rng.integers(3, VOCAB, shape).astype(np.int32)
        batch["encoder_segments"] = np.ones(shape, np.int32)
    if getattr(config, "num_types", 0) > 1:
        batch["token_type_ids"] = rng.integers(0, 2, shape).astype(np.int32)
    return batch


def with_trunk(config, **fields):
    return dataclasses.replace(
        config, trunk=dataclasses.replace(config.trunk, **fields)
    )


def applied(config):
    return jax.jit(models.build(config).apply)


def real_places(*lengths):
    """int32 [B, LENGTH]: 1 where a row of so many tokens is."""
    return (np.arange(LENGTH) < np.array(lengths)[:, None]).astype(np.int32)
