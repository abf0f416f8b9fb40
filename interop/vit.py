"""The Vision Transformer."""

from collections.abc import Mapping
from typing import Any

from triform.interop.mapping import IMAGE, LEAD, Family, Row, linear, norm, same
from triform.interop.settings import (
    THEIR_ACTIVATIONS,
    UNGATED,
    activation,
    label_names,
    labels,
    need,
    plain_heads,
    refused,
    unmet,
)
from triform.models import VisionConfig
from triform.models.config import TransformerConfig


def _side(hf: Mapping[str, Any], name: str) -> int:
    value = hf[name]
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        advice = "import another checkpoint"
        raise refused(name, value, "images and patches are square here", advice)
    return value[0]


def model_config(hf: Mapping[str, Any], weights: Any = None) -> VisionConfig:
    """Our config of its settings."""
    need(hf, "qkv_bias", True)
    trunk = TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        d_model=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        d_ff=hf["intermediate_size"],
        positions="learned",
        norm="layer",
        norm_position="pre",
        norm_eps=hf["layer_norm_eps"],
        ffn=activation(hf, "hidden_act"),
        init="normal",
        dropout=hf["hidden_dropout_prob"],
        attention_dropout=hf["attention_probs_dropout_prob"],
    )
    config = VisionConfig(
        trunk,
        image_size=_side(hf, "image_size"),
        patch_size=_side(hf, "patch_size"),
        channels=hf["num_channels"],
        num_labels=labels(hf),
    )
    trunk.max_len = config.tokens()
    return config


def hf_config(config: VisionConfig) -> dict[str, Any]:
    """The settings of a config that has no `obstacles`."""
    trunk = config.trunk
    return {
        "architectures": ["ViTForImageClassification"],
        "hidden_size": trunk.d_model,
        "num_hidden_layers": trunk.num_layers,
        "num_attention_heads": trunk.num_heads,
        "intermediate_size": trunk.d_ff,
        "hidden_act": THEIR_ACTIVATIONS[trunk.ffn],
        "hidden_dropout_prob": trunk.dropout,
        "attention_probs_dropout_prob": trunk.attention_dropout,
        "layer_norm_eps": trunk.norm_eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "qkv_bias": True,
        **label_names(config.num_labels),
    }


def obstacles(config: VisionConfig) -> list[str]:
    """What transformers cannot express."""
    wanted = plain_heads(config) | {
        "pool": ("token",),
        "trunk.positions": ("learned",),
        "trunk.norm": ("layer",),
        "trunk.norm_position": ("pre",),
        "trunk.bias": ("all",),
        "trunk.ffn": UNGATED,
    }
    return unmet(config, wanted)


def rows(config: VisionConfig) -> list[Row]:
    """The table."""
    theirs, layer = "vit.encoder.layer.{i}", "encoder/layer_{i}"
    attention, feed = f"{layer}/self_attention", f"{layer}/feed_forward"
    patches = "vit.embeddings.patch_embeddings.projection"
    inner = f"{theirs}.attention.attention"
    return [
        *same("token", "vit.embeddings.cls_token"),
        *same("positions/table/embedding", "vit.embeddings.position_embeddings", LEAD),
        *same("patches/kernel", f"{patches}.weight", IMAGE),
        *same("patches/bias", f"{patches}.bias"),
        *norm(f"{attention}_norm", f"{theirs}.layernorm_before"),
        *linear(f"{attention}/query", f"{inner}.query"),
        *linear(f"{attention}/key", f"{inner}.key"),
        *linear(f"{attention}/value", f"{inner}.value"),
        *linear(f"{attention}/out", f"{theirs}.attention.output.dense", inputs=2),
        *norm(f"{feed}_norm", f"{theirs}.layernorm_after"),
        *linear(f"{feed}/up", f"{theirs}.intermediate.dense"),
        *linear(f"{feed}/down", f"{theirs}.output.dense"),
        *norm("encoder/norm", "vit.layernorm"),
        *linear("label_head", "classifier"),
    ]


VIT = Family(
    model_type="vit",
    config_type=VisionConfig,
    architectures=("ViTForImageClassification", "ViTModel"),
    prefix="vit.",
    defaults={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
    },
    model_config=model_config,
    hf_config=hf_config,
    obstacles=obstacles,
    rows=rows,
    copies=lambda config: {},
    heads=("classifier.",),
    fresh=("label_head",),
)
