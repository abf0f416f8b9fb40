"""Marian: translation models of the OPUS-MT project."""

from collections.abc import Mapping
from typing import Any

from triform.interop.mapping import LEAD, Family, Row, linear, norm, same, table
from triform.interop.settings import (
    THEIR_ACTIVATIONS,
    UNGATED,
    activation,
    need,
    plain_heads,
    refused,
    unmet,
)
from triform.models import EncoderDecoderConfig
from triform.models.config import TransformerConfig

EPS = 1e-5  # of every norm, no setting

# Seq2Seq of settings that are one here.
_EQUAL = (
    ("decoder_layers", "encoder_layers"),
    ("decoder_ffn_dim", "encoder_ffn_dim"),
    ("decoder_attention_heads", "encoder_attention_heads"),
    ("decoder_vocab_size", "vocab_size"),
)


def model_config(hf: Mapping[str, Any], weights: Any = None) -> EncoderDecoderConfig:
    """Our config of its settings."""
    need(hf, "normalize_before", False)
    need(hf, "normalize_embedding", False)
    need(hf, "add_final_layer_norm", False)
    need(hf, "static_position_embeddings", True)
    need(hf, "is_decoder", False)
    for name, other in _EQUAL:
        if hf[name] not in (None, hf[other]):
            rule = f"both stacks are alike here, {other}={hf[other]}"
            raise refused(name, hf[name], rule, "import another checkpoint")
    shared, tied = hf["share_encoder_decoder_embeddings"], hf["tie_word_embeddings"]
    if shared and not tied:
        rule = "a shared table is the head's too"
        advice = "set share_encoder_decoder_embeddings to false as well"
        raise refused("tie_word_embeddings", tied, rule, advice)
    trunk = TransformerConfig(
        num_layers=hf["encoder_layers"],
        d_model=hf["d_model"],
        num_heads=hf["encoder_attention_heads"],
        d_ff=hf["encoder_ffn_dim"],
        max_len=hf["max_position_embeddings"],
        positions="sinusoidal",
        norm="layer",
        norm_position="post",
        norm_eps=EPS,
        ffn=activation(hf, "activation_function"),
        dropout=hf["dropout"],
        attention_dropout=hf["attention_dropout"],
    )
    return EncoderDecoderConfig(
        trunk,
        vocab_size=hf["vocab_size"],
        share_embeddings=shared,
        tie_head=tied,
        head_bias=weights is None or "final_logits_bias" in weights.names,
        embedding_scale="input" if hf["scale_embedding"] else "none",
    )


def hf_config(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The settings of a config that has no `obstacles`."""
    trunk = config.trunk
    both = {
        "layers": trunk.num_layers,
        "ffn_dim": trunk.d_ff,
        "attention_heads": trunk.num_heads,
    }
    return {
        "architectures": ["MarianMTModel"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "decoder_vocab_size": config.vocab_size,
        "d_model": trunk.d_model,
        **{f"encoder_{k}": v for k, v in both.items()},
        **{f"decoder_{k}": v for k, v in both.items()},
        "max_position_embeddings": trunk.max_len,
        "activation_function": THEIR_ACTIVATIONS[trunk.ffn],
        "dropout": trunk.dropout,
        "attention_dropout": trunk.attention_dropout,
        "scale_embedding": config.embedding_scale == "input",
        "share_encoder_decoder_embeddings": config.share_embeddings,
        "tie_word_embeddings": config.tie_head,
        "static_position_embeddings": True,
    }


def obstacles(config: EncoderDecoderConfig) -> list[str]:
    """What transformers cannot express."""
    wanted = plain_heads(config) | {
        "embedding_scale": ("input", "none"),
        "tie_head": (True,) if config.share_embeddings else (True, False),
        "trunk.positions": ("sinusoidal",),
        "trunk.norm": ("layer",),
        "trunk.norm_position": ("post",),
        "trunk.norm_eps": (EPS,),
        "trunk.bias": ("all",),
        "trunk.ffn": UNGATED,
    }
    return unmet(config, wanted)


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
    defaults={
        "vocab_size": 58101,
        "decoder_vocab_size": None,
        "max_position_embeddings": 1024,
        "encoder_layers": 12,
        "encoder_ffn_dim": 4096,
        "encoder_attention_heads": 16,
        "decoder_layers": 12,
        "decoder_ffn_dim": 4096,
        "decoder_attention_heads": 16,
        "activation_function": "gelu",
        "d_model": 1024,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "scale_embedding": False,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
    },
    model_config=model_config,
    hf_config=hf_config,
    obstacles=obstacles,
    rows=rows,
    copies=copies,
    heads=("lm_head.", "final_logits_bias"),
    # Sinusoids.
    ignored=r"embed_positions\.weight$",
)
