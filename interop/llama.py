"""LLaMA, Mistral and Qwen2: one block, other biases and windows."""

import functools
from typing import Any

from triform.interop import settings
from triform.interop.mapping import Family, Row, linear, norm, table
from triform.models import LanguageModelConfig


def _settings(width: int, groups: int | None, length: int, vocab_size: int) -> tuple:
    """What the three share; the numbers are defaults of theirs."""
    return (
        *settings.EXACT,
        settings.UNSCALED,
        *settings.blocks("rms", "pre", "", "rotary"),
        settings.equal("vocab_size", "vocab_size", vocab_size),
        settings.equal("tie_head", "tie_word_embeddings", False),
        settings.equal("trunk.num_layers", "num_hidden_layers", 32),
        settings.equal("trunk.d_model", "hidden_size", 4096),
        settings.equal("trunk.num_heads", "num_attention_heads", 32),
        settings.Setting(
            *("trunk.num_kv_heads", "num_key_value_heads", groups),
            read=lambda hf: hf["num_key_value_heads"] or 0,
            write=lambda config: config.trunk.kv_heads(),
        ),
        settings.Setting(
            *("trunk.head_dim", "head_dim"),
            read=lambda hf: (
                hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
            ),
            write=lambda config: config.trunk.head_width(),
        ),
        settings.equal("trunk.d_ff", "intermediate_size", width),
        settings.choice("trunk.ffn", "hidden_act", "silu", settings.GATED),
        settings.equal("trunk.max_len", "max_position_embeddings", length),
        settings.Setting(
            "trunk.rope",
            "rope_parameters",
            None,
            settings.rope,
            settings.rope_parameters,
        ),
        settings.equal("trunk.norm_eps", "rms_norm_eps", 1e-6),
        settings.Setting(
            *("trunk.attention_dropout", "attention_dropout", 0.0),
            read=lambda hf: hf["attention_dropout"] or 0.0,
            write=lambda config: config.trunk.attention_dropout,
        ),
        settings.preset("trunk.dropout", 0.0),
        settings.preset("trunk.init", "normal"),
    )


def _bias(hf: settings.Given) -> str:
    attention, rest = hf["attention_bias"], hf["mlp_bias"]
    if attention != rest:
        rule = f"with mlp_bias={rest} only the same value can be imported"
        raise settings.refused(
            "attention_bias", attention, rule, "import another checkpoint"
        )
    return "all" if attention else "none"


def _biased(config: LanguageModelConfig) -> bool:
    return config.trunk.bias == "all"


def _width(config: LanguageModelConfig) -> int | None:
    return max(config.trunk.windows, default=0) or None


def _layer_types(hf: settings.Given) -> tuple[int, ...]:
    """Qwen2's window of every layer."""
    count, width = hf["num_hidden_layers"], hf["sliding_window"]
    if not (hf["use_sliding_window"] and width):
        return ()
    first = hf["max_window_layers"]
    kinds = hf["layer_types"] or [
        "sliding_attention" if i >= first else "full_attention" for i in range(count)
    ]
    known = {"full_attention": 0, "sliding_attention": width}
    if len(kinds) != count or not set(kinds) <= set(known):
        rule = f"expected {count} of {', '.join(known)}"
        raise settings.refused("layer_types", kinds, rule, "import another checkpoint")
    return tuple(known[kind] for kind in kinds)


def _qwen2_windows(config: LanguageModelConfig) -> dict[str, Any]:
    windows = settings.windows_of(config)
    return {
        "use_sliding_window": any(windows),
        "sliding_window": _width(config),
        "layer_types": [
            "sliding_attention" if w else "full_attention" for w in windows
        ],
        "max_window_layers": next(
            (i for i, w in enumerate(windows) if w), len(windows)
        ),
    }


def limits(config: LanguageModelConfig, name: str) -> list[str]:
    """What transformers' windows and heads cannot express."""
    trunk, found = config.trunk, []
    kept = {w for w in trunk.windows if w or name == "Mistral"}
    if name != "Llama" and len(kept) > 1:
        rule = {"Mistral": "the same in all layers", "Qwen2": "one width"}[name]
        found.append(f"model.trunk.windows={trunk.windows}: expected {rule}")
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


def _family(name: str, *settings: settings.Setting, **fields: Any) -> Family:
    return Family(
        model_type=name.lower(),
        config_type=LanguageModelConfig,
        architectures=(f"{name}ForCausalLM", f"{name}Model"),
        prefix="model.",
        settings=settings,
        limits=functools.partial(limits, name=name),
        rows=rows,
        copies=copies,
        heads=("lm_head.",),
        ignored=r"rotary_emb\.inv_freq$",
        **fields,
    )


LLAMA = _family(
    "Llama",
    *_settings(11008, None, 2048, 32000),
    settings.FULL,
    settings.Setting(
        "trunk.bias", "attention_bias", False, _bias, _biased, ("none", "all")
    ),
    settings.Setting("", "mlp_bias", False, lambda hf: None, _biased),
)
MISTRAL = _family(
    "Mistral",
    *_settings(14336, 8, 131072, 32000),
    settings.fixed("trunk.bias", "none"),
    settings.Setting(
        *("trunk.windows", "sliding_window", 4096),
        read=lambda hf: (hf["sliding_window"] or 0,),
        write=_width,
    ),
)
QWEN2 = _family(
    "Qwen2",
    *_settings(22016, 32, 32768, 151936),
    settings.fixed("trunk.bias", "qkv"),
    settings.Setting("trunk.windows", "layer_types", None, _layer_types),
    write=_qwen2_windows,
    defaults={
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
)
