"""LLaMA, Mistral and Qwen2: one block, other biases and windows."""

import functools
from collections.abc import Mapping
from typing import Any

from triform.interop.mapping import Family, Row, linear, norm, table
from triform.interop.settings import (
    EXACT,
    THEIR_ACTIVATIONS,
    activation,
    refused,
    rope,
    rope_parameters,
    shortest_cycle,
    unmet,
)
from triform.models import LanguageModelConfig
from triform.models.config import TransformerConfig

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
# Our `bias` of each; LLaMA's is a setting.
BIASES = {"Llama": ("none", "all"), "Mistral": ("none",), "Qwen2": ("qkv",)}


def _bias(hf: Mapping[str, Any]) -> str:
    if hf["model_type"] == "mistral":
        return "none"
    if hf["model_type"] == "qwen2":
        return "qkv"
    attention, rest = hf["attention_bias"], hf["mlp_bias"]
    if attention != rest:
        rule = f"with mlp_bias={rest} only the same value can be imported"
        raise refused("attention_bias", attention, rule, "import another checkpoint")
    return "all" if attention else "none"


def _windows(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """The shortest cycle of windows over the layers; () without any."""
    count, width = hf["num_hidden_layers"], hf.get("sliding_window")
    if hf["model_type"] == "mistral":
        return (width,) if width else ()
    if hf["model_type"] != "qwen2" or not (hf["use_sliding_window"] and width):
        return ()
    first = hf["max_window_layers"]
    kinds = hf["layer_types"] or [
        "sliding_attention" if i >= first else "full_attention" for i in range(count)
    ]
    known = {"full_attention": 0, "sliding_attention": width}
    if len(kinds) != count or not set(kinds) <= set(known):
        rule = f"expected {count} of {', '.join(known)}"
        raise refused("layer_types", kinds, rule, "import another checkpoint")
    windows = tuple(known[kind] for kind in kinds)
    return shortest_cycle(windows) if any(windows) else ()


def model_config(hf: Mapping[str, Any], weights: Any = None) -> LanguageModelConfig:
    """Our config of any one's settings."""
    heads, groups = hf["num_attention_heads"], hf["num_key_value_heads"]
    width = hf["head_dim"] or hf["hidden_size"] // heads
    trunk = TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        d_model=hf["hidden_size"],
        num_heads=heads,
        num_kv_heads=0 if groups in (None, heads) else groups,
        head_dim=0 if width * heads == hf["hidden_size"] else width,
        d_ff=hf["intermediate_size"],
        max_len=hf["max_position_embeddings"],
        windows=_windows(hf),
        positions="rotary",
        **rope(hf),
        norm="rms",
        norm_position="pre",
        norm_eps=hf["rms_norm_eps"],
        ffn=activation(hf, "hidden_act", gated=True),
        bias=_bias(hf),
        init="normal",
        dropout=0.0,
        attention_dropout=hf["attention_dropout"] or 0.0,
    )
    return LanguageModelConfig(
        trunk, vocab_size=hf["vocab_size"], tie_head=hf["tie_word_embeddings"]
    )


def hf_config(config: LanguageModelConfig, name: str) -> dict[str, Any]:
    """The settings of a config that has no `obstacles`."""
    trunk = config.trunk
    found = {
        "architectures": [f"{name}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": trunk.d_model,
        "intermediate_size": trunk.d_ff,
        "num_hidden_layers": trunk.num_layers,
        "num_attention_heads": trunk.num_heads,
        "num_key_value_heads": trunk.kv_heads(),
        "head_dim": trunk.head_width(),
        "hidden_act": THEIR_ACTIVATIONS[trunk.ffn],
        "max_position_embeddings": trunk.max_len,
        "rms_norm_eps": trunk.norm_eps,
        "tie_word_embeddings": config.tie_head,
        "attention_dropout": trunk.attention_dropout,
        "rope_parameters": rope_parameters(trunk),
    }
    if name == "Llama":
        biased = trunk.bias == "all"
        return found | {"attention_bias": biased, "mlp_bias": biased}
    width = max(trunk.windows, default=0)
    found["sliding_window"] = width or None
    if name == "Qwen2":
        cycle = trunk.windows or (0,)
        windows = [cycle[i % len(cycle)] for i in range(trunk.num_layers)]
        kinds = ["sliding_attention" if w else "full_attention" for w in windows]
        found |= {
            "use_sliding_window": bool(width),
            "layer_types": kinds,
            "max_window_layers": next(
                (i for i, w in enumerate(windows) if w), trunk.num_layers
            ),
        }
    return found


def obstacles(config: LanguageModelConfig, name: str) -> list[str]:
    """What transformers cannot express."""
    trunk = config.trunk
    wanted = {
        "trunk.attention": EXACT,
        "trunk.attention_scale": (0.0, trunk.head_width() ** -0.5),
        "trunk.positions": ("rotary",),
        "trunk.norm": ("rms",),
        "trunk.norm_position": ("pre",),
        "trunk.ffn": ("swiglu", "geglu"),
        "trunk.bias": {
            "Llama": ("none", "all"),
            "Mistral": ("none",),
            "Qwen2": ("qkv",),
        }[name],
    }
    found = unmet(config, wanted)
    widths = set(trunk.windows)
    fits = {
        "Llama": not any(widths),
        "Mistral": len(widths) <= 1,
        "Qwen2": len(widths - {0}) <= 1,
    }[name]
    if not fits:
        rule = {
            "Llama": "none",
            "Mistral": "the same in all layers",
            "Qwen2": "one width",
        }
        found.append(f"model.trunk.windows={trunk.windows}: expected {rule[name]}")
    if name == "Llama" and trunk.d_model % trunk.num_heads:
        found.append(
            f"model.trunk.num_heads={trunk.num_heads}: expected a divisor of d_model="
            f"{trunk.d_model}"
        )
    return found


def rows(config: LanguageModelConfig) -> list[Row]:
    """The table."""
    theirs, layer = "model.layers.{i}", "decoder/layer_{i}"
    attention, feed = f"{layer}/self_attention", f"{layer}/feed_forward"
    bias = config.trunk.bias
    outer, inner = bias == "all", bias != "none"
    found = [
        *table("embedding", "model.embed_tokens"),
        *norm(f"{attention}_norm", f"{theirs}.input_layernorm", bias=False),
        *linear(f"{attention}/query", f"{theirs}.self_attn.q_proj", inner),
        *linear(f"{attention}/key", f"{theirs}.self_attn.k_proj", inner),
        *linear(f"{attention}/value", f"{theirs}.self_attn.v_proj", inner),
        *linear(f"{attention}/out", f"{theirs}.self_attn.o_proj", outer, inputs=2),
        *norm(f"{feed}_norm", f"{theirs}.post_attention_layernorm", bias=False),
        *linear(f"{feed}/gate", f"{theirs}.mlp.gate_proj", outer),
        *linear(f"{feed}/up", f"{theirs}.mlp.up_proj", outer),
        *linear(f"{feed}/down", f"{theirs}.mlp.down_proj", outer),
        *norm("decoder/norm", "model.norm", bias=False),
    ]
    if not config.tie_head:
        found += linear("head", "lm_head", bias=False)
    return found


def copies(config: LanguageModelConfig) -> dict[str, str]:
    """The head, if it is the token table."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_head else {}


def _family(name: str, **defaults: Any) -> Family:
    return Family(
        model_type=name.lower(),
        config_type=LanguageModelConfig,
        architectures=(f"{name}ForCausalLM", f"{name}Model"),
        prefix="model.",
        defaults=DEFAULTS | defaults,
        model_config=model_config,
        hf_config=functools.partial(hf_config, name=name),
        obstacles=functools.partial(obstacles, name=name),
        rows=rows,
        copies=copies,
        heads=("lm_head.",),
        ignored=r"rotary_emb\.inv_freq$",
    )


LLAMA = _family("Llama", attention_bias=False, mlp_bias=False)
MISTRAL = _family(
    "Mistral",
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    sliding_window=4096,
)
QWEN2 = _family(
    "Qwen2",
    vocab_size=151936,
    intermediate_size=22016,
    max_position_embeddings=32768,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
    layer_types=None,
)
