"""T5 and T5 v1.1."""

from typing import Any

from triform.interop import settings
from triform.interop.mapping import Family, Row, linear, norm, same, table
from triform.models import EncoderDecoderConfig
from triform.models.positions import RELATIVE_BUCKETS, RELATIVE_MAX_DISTANCE

# Only 'gated-gelu' means the tanh approximation.
FEED_FORWARDS = settings.ACTIVATIONS | {"gated-gelu": "geglu"}
FEED_FORWARDS |= {f"gated-{theirs}": ours for theirs, ours in settings.GATED.items()}
TABLES = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
)


def _dropout(hf: settings.Given) -> float:
    return hf["dropout_rate"]


SETTINGS = (
    *settings.EXACT,
    settings.FULL,
    *settings.blocks("rms", "pre", "none", "relative"),
    settings.fixed("trunk.attention_options", ("scale", 1.0)),
    settings.fixed("trunk.num_kv_heads", 0),
    settings.fixed("share_embeddings", True),
    settings.fixed("head_bias", False),
    settings.equal("vocab_size", "vocab_size", 32128),
    settings.equal("trunk.d_model", "d_model", 512),
    settings.Setting(
        *("trunk.head_dim", "d_kv", 64),
        read=lambda hf: hf["d_kv"],
        write=lambda config: config.trunk.head_width(),
    ),
    settings.equal("trunk.d_ff", "d_ff", 2048),
    settings.equal("trunk.num_layers", "num_layers", 6),
    settings.alike("num_decoder_layers", "num_layers", "trunk.num_layers"),
    settings.equal("trunk.num_heads", "num_heads", 8),
    settings.equal("trunk.max_len", "n_positions", 512),
    settings.equal("trunk.norm_eps", "layer_norm_epsilon", 1e-6),
    settings.choice("trunk.ffn", "feed_forward_proj", "relu", FEED_FORWARDS),
    settings.equal("trunk.dropout", "dropout_rate", 0.1),
    settings.Setting("trunk.attention_dropout", read=_dropout),
    settings.preset("trunk.init", "t5"),
    # False is what releases before 5 take for `scale_decoder_outputs`, too.
    settings.Setting(
        "", "tie_word_embeddings", True, lambda hf: None, settings.copied("tie_head")
    ),
    settings.Setting("embedding_scale", accepted=("head", "none")),
    settings.only("relative_attention_num_buckets", RELATIVE_BUCKETS, written=True),
    settings.only(
        "relative_attention_max_distance", RELATIVE_MAX_DISTANCE, written=True
    ),
    settings.only("is_encoder_decoder", True, written=True),
    settings.only("is_decoder", False),
)


def _tied(weights: Any) -> bool:
    head, names = "lm_head.weight", weights.names
    tables = [name for name in TABLES if name in names]
    return head not in names or not tables or weights.same(head, tables[0])


def read(hf: settings.Given, weights: Any) -> dict[str, Any]:
    """The head; it is tied if the weights say so.

    transformers 5 ties every head that is not stored, and keeps apart whether it is
    scaled; older configs say both by tie_word_embeddings.
    """
    together = hf["tie_word_embeddings"]
    scaled = hf.get("scale_decoder_outputs", together)
    tied = together if weights is None else _tied(weights)
    if together and not tied and "scale_decoder_outputs" not in hf:
        rule = "lm_head.weight differs from the token table"
        advice = "set it to false (T5 v1.1), or add scale_decoder_outputs"
        raise settings.refused("tie_word_embeddings", together, rule, advice)
    return {"tie_head": tied, "embedding_scale": "head" if scaled else "none"}


def write(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Whether the head is scaled."""
    return {"scale_decoder_outputs": config.embedding_scale == "head"}


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
        if config.trunk.ffn in settings.GATED.values():
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
    settings=SETTINGS,
    read=read,
    write=write,
    rows=rows,
    copies=copies,
    # Stored by the first releases, read by nothing.
    ignored=r"EncDecAttention\.relative_attention_bias\.weight$",
)
