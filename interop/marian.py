"""Marian: translation models of the OPUS-MT project."""

from typing import Any

from triform.interop import settings
from triform.interop.mapping import LEAD, Family, Row, linear, norm, same, table
from triform.models import EncoderDecoderConfig

SETTINGS = (
    *settings.EXACT,
    *settings.UNGROUPED,
    settings.UNSCALED,
    settings.FULL,
    *settings.blocks("layer", "post", "all", "sinusoidal"),
    settings.fixed("trunk.norm_eps", 1e-5),  # of every norm, no setting
    settings.equal("vocab_size", "vocab_size", 58101),
    settings.alike("decoder_vocab_size", "vocab_size", "vocab_size"),
    settings.equal("trunk.d_model", "d_model", 1024),
    settings.equal("trunk.num_layers", "encoder_layers", 12),
    settings.alike("decoder_layers", "encoder_layers", "trunk.num_layers", 12),
    settings.equal("trunk.d_ff", "encoder_ffn_dim", 4096),
    settings.alike("decoder_ffn_dim", "encoder_ffn_dim", "trunk.d_ff", 4096),
    settings.equal("trunk.num_heads", "encoder_attention_heads", 16),
    settings.alike(
        "decoder_attention_heads", "encoder_attention_heads", "trunk.num_heads", 16
    ),
    settings.equal("trunk.max_len", "max_position_embeddings", 1024),
    settings.choice("trunk.ffn", "activation_function", "gelu", settings.ACTIVATIONS),
    settings.equal("trunk.dropout", "dropout", 0.1),
    settings.equal("trunk.attention_dropout", "attention_dropout", 0.0),
    settings.choice(
        *("embedding_scale", "scale_embedding", False), {True: "input", False: "none"}
    ),
    settings.equal("share_embeddings", "share_encoder_decoder_embeddings", True),
    settings.equal("tie_head", "tie_word_embeddings", True),
    settings.only("normalize_before", False),
    settings.only("normalize_embedding", False),
    settings.only("add_final_layer_norm", False),
    settings.only("static_position_embeddings", True, written=True),
    settings.only("is_encoder_decoder", True, written=True),
    settings.only("is_decoder", False),
)


def read(hf: settings.Given, weights: Any) -> dict[str, Any]:
    """Whether the head has a bias; UserError for a head that cannot be."""
    tied = hf["tie_word_embeddings"]
    if hf["share_encoder_decoder_embeddings"] and not tied:
        rule = "a shared table is the head's too"
        advice = "set share_encoder_decoder_embeddings to false as well"
        raise settings.refused("tie_word_embeddings", tied, rule, advice)
    return {"head_bias": weights is None or "final_logits_bias" in weights.names}


def limits(config: EncoderDecoderConfig) -> list[str]:
    """A shared table is the head's, too."""
    shared = [settings.fixed("tie_head", True)] * config.share_embeddings
    return settings.obstacles(shared, config)


def rows(config: EncoderDecoderConfig) -> list[Row]:
    """The table."""
    source = "shared" if config.share_embeddings else "encoder.embed_tokens"
    found = table("embedding", f"model.{source}")
    if not config.share_embeddings:
        found += table("target_embedding", "model.decoder.embed_tokens")
    if not config.tie_head:
        found += linear("head", "lm_head", bias=False)
    if config.head_bias:
        found += same("head_bias", "final_logits_bias", LEAD)
    for stack in ("encoder", "decoder"):
        theirs, layer = f"model.{stack}.layers.{{i}}", f"{stack}/layer_{{i}}"
        parts = {"self_attention": "self_attn"}
        if stack == "decoder":
            parts["cross_attention"] = "encoder_attn"
        for ours, name in parts.items():
            here, there = f"{layer}/{ours}", f"{theirs}.{name}"
            found += linear(f"{here}/query", f"{there}.q_proj")
            found += linear(f"{here}/key", f"{there}.k_proj")
            found += linear(f"{here}/value", f"{there}.v_proj")
            found += linear(f"{here}/out", f"{there}.out_proj", inputs=2)
            found += norm(f"{here}_norm", f"{there}_layer_norm")
        found += linear(f"{layer}/feed_forward/up", f"{theirs}.fc1")
        found += linear(f"{layer}/feed_forward/down", f"{theirs}.fc2")
        found += norm(f"{layer}/feed_forward_norm", f"{theirs}.final_layer_norm")
    return found


def copies(config: EncoderDecoderConfig) -> dict[str, str]:
    """The tables of the stacks and the head, where they are one."""
    tables = [f"model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]
    if config.share_embeddings:
        return dict.fromkeys([*tables, "lm_head.weight"], "model.shared.weight")
    return {"lm_head.weight": tables[1]} if config.tie_head else {}


MARIAN = Family(
    model_type="marian",
    config_type=EncoderDecoderConfig,
    architectures=("MarianMTModel", "MarianModel"),
    prefix="model.",
    settings=SETTINGS,
    read=read,
    limits=limits,
    rows=rows,
    copies=copies,
    heads=("lm_head.", "final_logits_bias"),
    # Sinusoids.
    ignored=r"embed_positions\.weight$",
)
