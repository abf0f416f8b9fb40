"""GPT-2."""

from collections.abc import Mapping
from typing import Any

from triform.interop.mapping import Family, Row, conv1d, linear, norm, table
from triform.interop.settings import (
    THEIR_ACTIVATIONS,
    UNGATED,
    activation,
    need,
    plain_heads,
    unmet,
)
from triform.models import LanguageModelConfig
from triform.models.config import TransformerConfig


def model_config(hf: Mapping[str, Any], weights: Any = None) -> LanguageModelConfig:
    """Our config of its settings."""
    need(hf, "scale_attn_by_inverse_layer_idx", False)
    need(hf, "add_cross_attention", False)
    trunk = TransformerConfig(
        num_layers=hf["n_layer"],
        d_model=hf["n_embd"],
        num_heads=hf["n_head"],
        d_ff=hf["n_inner"] or 4 * hf["n_embd"],
        max_len=hf["n_positions"],
        attention_scale=0.0 if hf["scale_attn_weights"] else 1.0,
        positions="learned",
        norm="layer",
        norm_position="pre",
        norm_eps=hf["layer_norm_epsilon"],
        ffn=activation(hf, "activation_function"),
        init="depth",
        dropout=hf["resid_pdrop"],
        attention_dropout=hf["attn_pdrop"],
    )
    return LanguageModelConfig(
        trunk, vocab_size=hf["vocab_size"], tie_head=hf["tie_word_embeddings"]
    )


def hf_config(config: LanguageModelConfig) -> dict[str, Any]:
    """The settings of a config that has no `obstacles`."""
    trunk = config.trunk
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_layer": trunk.num_layers,
        "n_embd": trunk.d_model,
        "n_head": trunk.num_heads,
        "n_inner": trunk.d_ff,
        "n_positions": trunk.max_len,
        "scale_attn_weights": trunk.attention_scale != 1.0,
        "layer_norm_epsilon": trunk.norm_eps,
        "activation_function": THEIR_ACTIVATIONS[trunk.ffn],
        "resid_pdrop": trunk.dropout,
        "embd_pdrop": trunk.dropout,
        "attn_pdrop": trunk.attention_dropout,
        "tie_word_embeddings": config.tie_head,
    }


def obstacles(config: LanguageModelConfig) -> list[str]:
    """What transformers cannot express."""
    wanted = plain_heads(config) | {
        "trunk.positions": ("learned",),
        "trunk.norm": ("layer",),
        "trunk.norm_position": ("pre",),
        "trunk.bias": ("all",),
        "trunk.ffn": UNGATED,
    }
    wanted["trunk.attention_scale"] += (1.0,)
    return unmet(config, wanted)


def rows(config: LanguageModelConfig) -> list[Row]:
    """The table."""
    theirs, layer = "transformer.h.{i}", "decoder/layer_{i}"
    attention = f"{layer}/self_attention"
    fused = [f"{attention}/{name}" for name in ("query", "key", "value")]
    found = [
        *table("embedding", "transformer.wte"),
        *table("positions/table", "transformer.wpe"),
        *norm(f"{attention}_norm", f"{theirs}.ln_1"),
        *conv1d(fused, f"{theirs}.attn.c_attn"),
        *conv1d(f"{attention}/out", f"{theirs}.attn.c_proj", inputs=2),
        *norm(f"{layer}/feed_forward_norm", f"{theirs}.ln_2"),
        *conv1d(f"{layer}/feed_forward/up", f"{theirs}.mlp.c_fc"),
        *conv1d(f"{layer}/feed_forward/down", f"{theirs}.mlp.c_proj"),
        *norm("decoder/norm", "transformer.ln_f"),
    ]
    if not config.tie_head:
        found += linear("head", "lm_head", bias=False)
    return found


def copies(config: LanguageModelConfig) -> dict[str, str]:
    """The head, if it is the token table."""
    return {"lm_head.weight": "transformer.wte.weight"} if config.tie_head else {}


GPT2 = Family(
    model_type="gpt2",
    config_type=LanguageModelConfig,
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    prefix="transformer.",
    defaults={
        "vocab_size": 50257,
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "n_inner": None,
        "n_positions": 1024,
        "scale_attn_weights": True,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "tie_word_embeddings": True,
    },
    model_config=model_config,
    hf_config=hf_config,
    obstacles=obstacles,
    rows=rows,
    copies=copies,
    heads=("lm_head.",),
    ignored=r"\.attn\.(bias|masked_bias)$",  # the causal mask
)
