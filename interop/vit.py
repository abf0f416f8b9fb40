"""The Vision Transformer."""

from typing import Any

from triform.interop import settings
from triform.interop.bert import SIZES
from triform.interop.mapping import IMAGE, LEAD, Family, Row, linear, norm, same
from triform.models import VisionConfig


def _side(name: str, default: int) -> settings.Setting:
    """Of a square; a list of two equal sides, too."""

    def read(hf: settings.Given) -> int:
        value = hf[name]
        if isinstance(value, int):
            return value
        if len(set(value)) != 1:
            advice = "import another checkpoint"
            raise settings.refused(
                name, value, "images and patches are square here", advice
            )
        return value[0]

    return settings.Setting(name, name, default, read, settings.copied(name))


SETTINGS = (
    *settings.EXACT,
    *SIZES,
    *settings.blocks("layer", "pre", "all", "learned"),
    *settings.UNGROUPED,
    settings.UNSCALED,
    settings.FULL,
    settings.fixed("pool", "token"),
    settings.equal("trunk.dropout", "hidden_dropout_prob", 0.0),
    settings.equal("trunk.attention_dropout", "attention_probs_dropout_prob", 0.0),
    _side("image_size", 224),
    _side("patch_size", 16),
    settings.equal("channels", "num_channels", 3),
    settings.only("qkv_bias", True, written=True),
)


def read(hf: settings.Given, weights: Any) -> dict[str, Any]:
    """Number of classes."""
    return {"num_labels": settings.labels(hf)}


def write(config: VisionConfig) -> dict[str, Any]:
    """Names of the classes."""
    return settings.unnamed(config.num_labels)


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
    settings=SETTINGS,
    read=read,
    write=write,
    rows=rows,
    heads=("classifier.",),
    fresh=("label_head",),
)
