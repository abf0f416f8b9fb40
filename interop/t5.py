"""T5 and T5 v1.1."""

from collections.abc import Mapping
from typing import Any

from triform.interop.mapping import Family, Row, linear, norm, same, table
from triform.interop.settings import (
    ACTIVATIONS,
    EXACT,
    GATED,
    need,
    refused,
    unmet,
)
from triform.models import EncoderDecoderConfig
from triform.models.config import TransformerConfig
from triform.models.positions import RELATIVE_BUCKETS, RELATIVE_MAX_DISTANCE

# What feed_forward_proj says -> ours. Only 'gated-gelu' means the tanh approximation.
FEED_FORWARDS = ACTIVATIONS | {
    "gated-gelu": "geglu",
    **{f"gated-{k}": GATED[v] for k, v in ACTIVATIONS.items() if v in GATED},
}


TABLES = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
)


def _tied(weights: Any) -> bool:
    head, names = "lm_head.weight", weights.names
    tables = [name for name in TABLES if name in names]
    return head not in names or not tables or weights.same(head, tables[0])


def model_config(hf: Mapping[str, Any], weights: Any = None) -> EncoderDecoderConfig:
    """Our config of its settings; the head is tied if the weights say so.

    transformers 5 ties every head that is not stored, and keeps apart whether it is
    scaled; older configs say both by tie_word_embeddings.
    """
    need(hf, "relative_attention_num_buckets", RELATIVE_BUCKETS)
    need(hf, "relative_attention_max_distance", RELATIVE_MAX_DISTANCE)
    need(hf, "is_decoder", False)
    need(hf, "is_encoder_decoder", True)
    layers = hf["num_layers"]
    if hf["num_decoder_layers"] not in (None, layers):
        rule = f"both stacks have one depth here, num_layers={layers}"
        value, advice = hf["num_decoder_layers"], "import another checkpoint"
        raise refused("num_decoder_layers", value, rule, advice)
    kind = hf["feed_forward_proj"]
    if kind not in FEED_FORWARDS:
        rule = f"those that can be imported are {', '.join(FEED_FORWARDS)}"
        advice = "add it to models.transformer.FFNS"
        raise refused("feed_forward_proj", kind, rule, advice)
    together = hf["tie_word_embeddings"]
    scaled = hf.get("scale_decoder_outputs", together)
    tied = together if weights is None else _tied(weights)
    if together and not tied and "scale_decoder_outputs" not in hf:
        rule = "lm_head.weight differs from the token table"
        advice = "set it to false (T5 v1.1), or add scale_decoder_outputs"
        raise refused("tie_word_embeddings", together, rule, advice)
    trunk = TransformerConfig(
        num_layers=layers,
        d_model=hf["d_model"],
        num_heads=hf["num_heads"],
        head_dim=0 if hf["d_kv"] * hf["num_heads"] == hf["d_model"] else hf["d_kv"],
        d_ff=hf["d_ff"],
        max_len=hf["n_positions"],
        attention_scale=1.0,
        positions="relative",
        norm="rms",
        norm_position="pre",
        norm_eps=hf["layer_norm_epsilon"],
        ffn=FEED_FORWARDS[kind],
        bias="none",
        init="t5",
        dropout=hf["dropout_rate"],
        attention_dropout=hf["dropout_rate"],
    )
    return EncoderDecoderConfig(
        trunk,
        vocab_size=hf["vocab_size"],
        tie_head=tied,
        embedding_scale="head" if scaled else "none",
    )


def hf_config(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The settings of a config that has no `obstacles`."""
    trunk = config.trunk
    kinds = {ours: theirs for theirs, ours in reversed(FEED_FORWARDS.items())}
    scaled = config.embedding_scale == "head"
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": trunk.d_model,
        "d_kv": trunk.head_width(),
        "d_ff": trunk.d_ff,
        "num_layers": trunk.num_layers,
        "num_decoder_layers": trunk.num_layers,
        "num_heads": trunk.num_heads,
        "n_positions": trunk.max_len,
        "relative_attention_num_buckets": RELATIVE_BUCKETS,
        "relative_attention_max_distance": RELATIVE_MAX_DISTANCE,
        "layer_norm_epsilon": trunk.norm_eps,
        "feed_forward_proj": kinds[trunk.ffn],
        "dropout_rate": trunk.dropout,
        # False is what releases before 5 take for both.
        "tie_word_embeddings": config.tie_head,
        "scale_decoder_outputs": scaled,
    }


def obstacles(config: EncoderDecoderConfig) -> list[str]:
    """What transformers cannot express."""
    wanted = {
        "share_embeddings": (True,),
        "head_bias": (False,),
        "embedding_scale": ("head", "none"),
        "trunk.attention": EXACT,
        "trunk.attention_scale": (1.0,),
        "trunk.num_kv_heads": (0, config.trunk.num_heads),
        "trunk.windows": ((),),
        "trunk.positions": ("relative",),
        "trunk.norm": ("rms",),
        "trunk.norm_position": ("pre",),
        "trunk.bias": ("none",),
        "trunk.ffn": tuple(dict.fromkeys(FEED_FORWARDS.values())),
    }
    return unmet(config, wanted)


def rows(config: EncoderDecoderConfig) -> list[Row]:
    """The table."""
    found = table("embedding", "shared")
    for stack in ("encoder", "decoder"):
        theirs, layer = f"{stack}.block.{{i}}.layer", f"{stack}/layer_{{i}}"
        parts = [("self_attention", f"{theirs}.0", "SelfAttention")]
        if stack == "decoder":
            parts.append(("cross_attention", f"{theirs}.1", "EncDecAttention"))
        for ours, there, name in parts:
            for part in ("query", "key", "value", "out"):
                found += linear(
                    f"{layer}/{ours}/{part}",
                    f"{there}.{name}.{part[0]}",
                    bias=False,
                    inputs=2 if part == "out" else 1,
                )
            found += norm(f"{layer}/{ours}_norm", f"{there}.layer_norm", bias=False)
        there, feed = f"{theirs}.{len(parts)}", f"{layer}/feed_forward"
        dense = f"{there}.DenseReluDense"
        if config.trunk.ffn in GATED.values():
            found += linear(f"{feed}/gate", f"{dense}.wi_0", bias=False)
            found += linear(f"{feed}/up", f"{dense}.wi_1", bias=False)
        else:
            found += linear(f"{feed}/up", f"{dense}.wi", bias=False)
        found += linear(f"{feed}/down", f"{dense}.wo", bias=False)
        found += norm(f"{feed}_norm", f"{there}.layer_norm", bias=False)
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found += same(f"{stack}/relative_bias/embedding", bias)
        found += norm(f"{stack}/norm", f"{stack}.final_layer_norm", bias=False)
    if not config.tie_head:
        found += linear("head", "lm_head", bias=False)
    return found


def copies(config: EncoderDecoderConfig) -> dict[str, str]:
    """The token table, once a stack, and the head, if it is the table."""
    table, *stacks = TABLES
    return dict.fromkeys(stacks + ["lm_head.weight"] * config.tie_head, table)


T5 = Family(
    model_type="t5",
    config_type=EncoderDecoderConfig,
    architectures=("T5ForConditionalGeneration", "T5Model"),
    prefix="",
    defaults={
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_decoder_layers": None,
        "num_heads": 8,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "dropout_rate": 0.1,
        "tie_word_embeddings": True,
    },
    model_config=model_config,
    hf_config=hf_config,
    obstacles=obstacles,
    rows=rows,
    copies=copies,
    # Stored by the first releases, read by nothing.
    ignored=r"EncDecAttention\.relative_attention_bias\.weight$",
)
