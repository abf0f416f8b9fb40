"""One small config of every family, and what the tests of all of them share."""

import dataclasses

import jax
import numpy as np

from triform import models
from triform.models import (
    AutoencoderConfig,
    ContrastiveConfig,
    DiscreteVAEConfig,
    DistillationConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    LanguageModelConfig,
    LoRAConfig,
    PianoRollConfig,
    ProteinConfig,
    RecommenderConfig,
    TextToImageConfig,
    VisionConfig,
)
from triform.models.config import RopeConfig, TransformerConfig

VOCAB, LENGTH = 11, 6
SIZES = {"num_layers": 2, "d_model": 8, "num_heads": 2, "d_ff": 12, "max_len": 16}
LLAMA = {
    **{"positions": "rotary", "norm": "rms", "norm_position": "pre", "ffn": "swiglu"},
    "bias": "none",
}
T5 = {
    **{"positions": "relative", "norm": "rms", "norm_position": "pre", "bias": "none"},
    **{"attention_options": ("scale", 1.0), "init": "t5"},
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
        rope=RopeConfig(scaling="llama3", factor=4.0, length=8),
    ),
    "mistral": lm(False, **LLAMA, windows=(3,)),
    "qwen2": lm(
        **{**LLAMA, "bias": "qkv"}, rope=RopeConfig(scaling="linear", factor=2.0)
    ),
    "yarn, scanned": lm(
        **LLAMA, scan_layers=True, rope=RopeConfig(10_000.0, "yarn", 4.0, 8)
    ),
    "relative, windows": lm(**T5, windows=(2, 0)),
    "relative keys": lm(
        positions="relative_keys", norm_position="pre", ffn="gelu", max_len=6
    ),
    "relative keys, scanned, grouped": lm(
        **{**SIZES, "num_layers": 4, "num_heads": 4, "max_len": 16},
        positions="learned_relative_keys",
        norm_position="pre",
        scan_layers=True,
        num_kv_heads=2,
        windows=(3, 0),
    ),
    "performer": lm(**LLAMA, **PERFORMER),
    "performer, scanned, grouped": lm(
        **{**LEARNED, "norm_position": "pre", "scan_layers": True},
        **PERFORMER,
        num_kv_heads=1,
    ),
    "local": lm(**LLAMA, attention="local", windows=(3,)),
    "patterns, parallel": lm(
        **{**LLAMA, "num_layers": 4, "block": "parallel"},
        patterns=("strided:2", "none"),
        windows=(0, 0, 0, 3),
    ),
    "scanned patterns": lm(
        **{**LLAMA, "num_layers": 4, "scan_layers": True},
        patterns=("fixed:2", "strided:3"),
    ),
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
    "parallel pairs": EncoderDecoderConfig(
        trunk(block="parallel", ffn="swiglu", windows=(2,)), VOCAB
    ),
    "query norm pairs": EncoderDecoderConfig(
        trunk(block="query_norm", norm_position="pre"), VOCAB
    ),
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
    "esm": ProteinConfig(
        trunk(positions="rotary_float16", norm_position="pre", ffn="gelu"),
        VOCAB,
        num_labels=2,
        mask_id=5,
    ),
    "embedded masks": ProteinConfig(
        trunk(**LEARNED),
        VOCAB,
        masked_head=False,
        num_tags=3,
        mask_id=5,
        masked_share=0.0,
    ),
    "relative keys encoder": EncoderConfig(
        trunk(positions="relative_keys", max_len=6), VOCAB, num_types=0
    ),
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
ADAPTED = {
    "lora": LoRAConfig(DECODERS["gpt2"], rank=2, dropout=0.1),
    "lora, scanned": LoRAConfig(
        DECODERS["scanned windows, grouped"],
        rank=3,
        targets=("kernel$",),
        ranks=(("feed_forward", 1),),
    ),
    "lora of pairs": LoRAConfig(T5S["t5 v1.1"], targets=("attention/.*kernel$",)),
    "lora of an encoder": LoRAConfig(ENCODERS["bert"], targets=("kernel$",)),
}
OTHERS = {
    "distillation": DistillationConfig(ENCODERS["bert"], ENCODERS["tagger"]),
    "autoencoder": AutoencoderConfig(image_size=8, channels=1, width=4),
    "discrete vae": DiscreteVAEConfig(
        image_size=8, channels=1, num_codes=7, width=4, stages=1, blocks=1
    ),
    "dalle": TextToImageConfig(
        trunk(
            positions="none",
            norm_position="pre",
            num_layers=3,
            patterns=("row:6:3", "column:6:3", "conv:3:6:3"),
        ),
        VOCAB,
        num_codes=13,
        text_len=6,
        grid=3,
    ),
    "sasrec": RecommenderConfig(
        trunk(**LEARNED, norm_position="pre", block="query_norm"), VOCAB
    ),
    "bert4rec": RecommenderConfig(
        trunk(**LEARNED), VOCAB, causal=False, scale=False, output_layer=True
    ),
    "contrastive": ContrastiveConfig(
        trunk(**LEARNED, norm_position="pre"),
        trunk(**LEARNED, norm_position="pre"),
        VOCAB,
        image_size=8,
        patch_size=4,
        channels=1,
        width=5,
    ),
    "piano roll": PianoRollConfig(
        trunk(positions="learned_relative_keys", norm_position="pre"), num_keys=5
    ),
}
FAMILIES = {**DECODERS, **T5S, **ENCODERS, **VISIONS, **ADAPTED, **OTHERS}


def batch_of(config, rows=3, seed=0):
    """A batch that the config's model can read, every row full."""
    rng = np.random.default_rng(seed)
    sizes, batch = dict.fromkeys("LST", LENGTH) | {"B": rows, **config.axes()}, {}
    for name, (axes, dtype) in config.reads().items():
        shape = [sizes[a] for a in axes]
        if dtype == "float32":
            batch[name] = rng.standard_normal(shape).astype(dtype)
        elif name.endswith("segments"):
            batch[name] = np.ones(shape, dtype)
        else:
            batch[name] = rng.integers(3, VOCAB, shape).astype(dtype)
    if config.sizes().get("num_types", 0) > 1:
        types = rng.integers(0, 2, (rows, LENGTH))
        batch["token_type_ids"] = types.astype(np.int32)
    return batch


def with_trunk(config, **fields):
    if config.wraps():
        return dataclasses.replace(config, model=with_trunk(config.model, **fields))
    return dataclasses.replace(
        config, trunk=dataclasses.replace(config.trunk, **fields)
    )


def applied(config):
    return jax.jit(models.build(config).apply)


def real_positions(*lengths):
    """int32 [B, LENGTH]: 1 where a row of so many tokens is."""
    return (np.arange(LENGTH) < np.array(lengths)[:, None]).astype(np.int32)
