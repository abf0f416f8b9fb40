"""GPT-2."""

from triform.interop import settings
from triform.interop.mapping import Family, Row, conv1d, linear, norm, table
from triform.models import LanguageModelConfig


def _inner(hf: settings.Given) -> int:
    return hf["n_inner"] or 4 * hf["n_embd"]


SETTINGS = (
    *settings.EXACT,
    *settings.UNGROUPED,
    settings.FULL,
    *settings.blocks("layer", "pre", "all", "learned"),
    settings.equal("vocab_size", "vocab_size", 50257),
    settings.equal("tie_head", "tie_word_embeddings", True),
    settings.equal("trunk.num_layers", "n_layer", 12),
    settings.equal("trunk.d_model", "n_embd", 768),
    settings.equal("trunk.num_heads", "n_head", 12),
    settings.Setting(
        "trunk.d_ff", "n_inner", None, _inner, settings.copied("trunk.d_ff")
    ),
    settings.equal("trunk.max_len", "n_positions", 1024),
    settings.choice(
        *("trunk.attention_options", "scale_attn_weights", True),
        {True: (), False: ("scale", 1.0)},
    ),
    settings.equal("trunk.norm_eps", "layer_norm_epsilon", 1e-5),
    settings.choice(
        "trunk.ffn", "activation_function", "gelu_new", settings.ACTIVATIONS
    ),
    settings.equal("trunk.dropout", "resid_pdrop", 0.1),
    settings.also("embd_pdrop", "trunk.dropout"),
    settings.equal("trunk.attention_dropout", "attn_pdrop", 0.1),
    settings.preset("trunk.init", "depth"),
    settings.only("scale_attn_by_inverse_layer_idx", False),
    settings.only("add_cross_attention", False),
)


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
    settings=SETTINGS,
    rows=rows,
    copies=copies,
    heads=("lm_head.",),
    ignored=r"\.attn\.(bias|masked_bias)$",  # the causal mask
)
