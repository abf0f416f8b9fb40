"""ESM-2: BERT's tensors around other norms, rotary positions and token dropout."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from triform.interop import settings
from triform.interop.bert import BERT, architecture, head_limits, heads
from triform.interop.mapping import Family, Row, linear, norm, same, table
from triform.models import ProteinConfig
from triform.models.config import RopeConfig, TransformerConfig
from triform.models.positions import rotary_frequencies

# The share of masked tokens that transformers' code has, 0.15 * 0.8.
MASKED_SHARE = 0.12
FREQUENCIES = "esm.rotary_embeddings.inv_freq"
# Our positions -> dtype in which the weights' rotary frequencies were trained.
TRAINED_IN = {
    "rotary": jnp.dtype("float32"),
    "rotary_float16": jnp.dtype("float16"),
    "rotary_bfloat16": jnp.dtype("bfloat16"),
}


def _never(theirs: str) -> settings.Setting:
    """A key that is absent, null or false."""

    def read(hf: settings.Given) -> None:
        if hf[theirs]:
            rule, advice = "only false can be imported", "import an ESM-2"
            raise settings.refused(theirs, hf[theirs], rule, advice)

    return settings.Setting("", theirs, False, read, lambda config: False)


def _scheme(hf: settings.Given) -> str:
    kind = hf["position_embedding_type"]
    if kind != "rotary":
        rule, advice = "only 'rotary' can be imported", "import an ESM-2"
        raise settings.refused("position_embedding_type", kind, rule, advice)
    return "rotary"


SETTINGS = (
    *settings.EXACT,
    settings.fixed("trunk.norm", "layer"),
    settings.fixed("trunk.norm_position", "pre"),
    *settings.UNGROUPED,
    settings.UNSCALED,
    settings.FULL,
    settings.fixed("trunk.bias", "all"),
    settings.fixed("trunk.ffn", "gelu"),
    settings.fixed("num_types", 0),
    settings.fixed("position_offset", 0),
    settings.preset("trunk.init", "normal"),
    settings.equal("trunk.num_layers", "num_hidden_layers", 12),
    settings.equal("trunk.d_model", "hidden_size", 768),
    settings.equal("trunk.num_heads", "num_attention_heads", 12),
    settings.equal("trunk.d_ff", "intermediate_size", 3072),
    settings.equal("trunk.max_len", "max_position_embeddings", 1026),
    settings.equal("trunk.norm_eps", "layer_norm_eps", 1e-12),
    settings.equal("trunk.dropout", "hidden_dropout_prob", 0.1),
    settings.equal("trunk.attention_dropout", "attention_probs_dropout_prob", 0.1),
    settings.Setting(
        *("trunk.positions", "position_embedding_type", "absolute"),
        read=_scheme,
        write=lambda config: "rotary",
        accepted=tuple(TRAINED_IN),
    ),
    settings.Setting(
        *("trunk.rope", "rope_theta", 10_000.0),
        read=lambda hf: RopeConfig(float(hf["rope_theta"])),
        write=lambda config: config.trunk.rope.base,
    ),
    settings.equal("vocab_size", "vocab_size", 33),
    settings.Setting(
        *("mask_id", "mask_token_id", 32),
        read=lambda hf: 32 if hf["mask_token_id"] is None else hf["mask_token_id"],
        write=settings.copied("mask_id"),
    ),
    settings.Setting(
        *("masked_share", "token_dropout", False),
        read=lambda hf: MASKED_SHARE if hf["token_dropout"] else 0.0,
        write=lambda config: config.masked_share > 0,
        accepted=(MASKED_SHARE, 0.0),
    ),
    _never("emb_layer_norm_before"),
    _never("is_folding_model"),
    _never("is_decoder"),
    _never("add_cross_attention"),
    settings.Setting("", "tie_word_embeddings", write=lambda config: True),
)


def read(hf: settings.Given, weights: Any) -> dict[str, Any]:
    """The heads, and in which dtype the rotary frequencies were trained.

    Those of published weights are rounded to float16, and others give other logits
    (huggingface/transformers#19587).
    """
    found = heads(hf, weights)
    if weights is None or FREQUENCIES not in weights.names:
        return found
    given = np.asarray(weights.read(FREQUENCIES), np.float32)
    trunk = TransformerConfig(
        d_model=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        rope=RopeConfig(float(hf["rope_theta"])),
    )
    rates = rotary_frequencies(trunk)[0].astype(np.float32)
    for positions, dtype in TRAINED_IN.items():
        # Powers in float32 differ in their last bits: a few may round the other way.
        near = {"rtol": 4 * float(jnp.finfo(dtype).eps), "atol": 0}
        exact = np.array_equal(given, given.astype(dtype).astype(np.float32))
        if exact and given.shape == rates.shape and np.allclose(given, rates, **near):
            found["trunk.positions"] = positions
    if "trunk.positions" in found:
        return found
    raise settings.refused(
        "rope_theta",
        hf["rope_theta"],
        f"the weights' {FREQUENCIES} are others",
        "use the config.json of these weights",
    )


def constants(config: ProteinConfig) -> dict[str, np.ndarray]:
    """The rotary frequencies, which transformers takes from the weights."""
    rates = rotary_frequencies(config.trunk)[0].astype(np.float32)
    return {FREQUENCIES: rates.astype(TRAINED_IN[config.trunk.positions])}


def limits(config: ProteinConfig) -> list[str]:
    """What transformers' heads and rotary positions cannot express."""
    scaling = settings.fixed("trunk.rope.scaling", "none")
    return head_limits(config, "Esm") + settings.obstacles([scaling], config)


def rows(config: ProteinConfig) -> list[Row]:
    """The table."""
    theirs, layer = "esm.encoder.layer.{i}", "encoder/layer_{i}"
    attention, feed = f"{layer}/self_attention", f"{layer}/feed_forward"
    found = [
        *table("embedding", "esm.embeddings.word_embeddings"),
        *norm(f"{attention}_norm", f"{theirs}.attention.LayerNorm"),
        *linear(f"{attention}/query", f"{theirs}.attention.self.query"),
        *linear(f"{attention}/key", f"{theirs}.attention.self.key"),
        *linear(f"{attention}/value", f"{theirs}.attention.self.value"),
        *linear(f"{attention}/out", f"{theirs}.attention.output.dense", inputs=2),
        *norm(f"{feed}_norm", f"{theirs}.LayerNorm"),
        *linear(f"{feed}/up", f"{theirs}.intermediate.dense"),
        *linear(f"{feed}/down", f"{theirs}.output.dense"),
        *norm("encoder/norm", "esm.encoder.emb_layer_norm_after"),
    ]
    if config.masked_head:
        found += linear("masked_head/dense", "lm_head.dense")
        found += norm("masked_head/norm", "lm_head.layer_norm")
        found += same("masked_bias", "lm_head.bias")
    if config.num_tags:
        found += linear("tag_head", "classifier")
    if config.num_labels:
        found += linear("pooler", "classifier.dense")
        found += linear("label_head", "classifier.out_proj")
    return found


def copies(config: ProteinConfig) -> dict[str, str]:
    """The masked head's matrix, which is the table."""
    if not config.masked_head:
        return {}
    return {"lm_head.decoder.weight": "esm.embeddings.word_embeddings.weight"}


ESM = Family(
    model_type="esm",
    config_type=ProteinConfig,
    architectures=(
        *("EsmForMaskedLM", "EsmForSequenceClassification"),
        *("EsmForTokenClassification", "EsmModel"),
    ),
    prefix="esm.",
    settings=SETTINGS,
    read=read,
    write=functools.partial(architecture, name="Esm"),
    limits=limits,
    rows=rows,
    defaults={"hidden_act": "gelu"},  # it is no setting of theirs
    copies=copies,
    heads=("lm_head.", "classifier."),
    # A table of positions is in the files, but the model has none.
    ignored=r"embeddings\.(position_ids|position_embeddings\.weight)$",
    left_out=r"^esm\.contact_head\.",
    constants=constants,
    # Older files repeat the frequencies in every layer; the pooler of the body is the
    # first half of the classifier.
    renamed=(
        *BERT.renamed,
        (r"encoder\.layer\.[\d*]+\.attention\.self\.(?=rotary_embeddings)", ""),
        (r"^esm\.pooler\.dense\.", "classifier.dense."),
    ),
    fresh=("label_head", "pooler"),
)
