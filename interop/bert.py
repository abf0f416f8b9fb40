"""BERT and RoBERTa."""

import functools
from collections.abc import Mapping
from typing import Any

from triform.interop.mapping import Family, Row, linear, norm, same, table
from triform.interop.settings import (
    THEIR_ACTIVATIONS,
    UNGATED,
    activation,
    label_names,
    labels,
    need,
    plain_heads,
    refused,
    unmet,
)
from triform.models import EncoderConfig
from triform.models.config import TransformerConfig

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def _heads(hf: Mapping[str, Any], weights: Any) -> dict[str, Any]:
    """Which heads an architecture has.

    The body alone comes with the head that it is mostly fine-tuned for, freshly made.
    """
    kind = hf["architectures"][0]
    for name in ("Bert", "Roberta"):
        kind = kind.removeprefix(name)
    stored = () if weights is None else weights.names
    # Google's own files say MaskedLM and hold both heads of the pre-training.
    if kind == "ForMaskedLM" and "cls.seq_relationship.weight" in stored:
        kind = "ForPreTraining"
    found = {"masked_head": False, "num_tags": 0, "num_labels": 0}
    if kind in ("ForMaskedLM", "ForPreTraining"):
        need(hf, "tie_word_embeddings", True)
        found["masked_head"] = True
    if kind in ("ForPreTraining", "Model"):
        found["num_labels"] = 2
    if kind == "ForSequenceClassification":
        found["num_labels"] = labels(hf)
    if kind == "ForTokenClassification":
        found["num_tags"] = labels(hf)
    return found


def model_config(hf: Mapping[str, Any], weights: Any = None) -> EncoderConfig:
    """Our config of either's settings."""
    need(hf, "position_embedding_type", "absolute")
    need(hf, "is_decoder", False)
    need(hf, "add_cross_attention", False)
    offset = 0
    if hf["model_type"] == "roberta":
        offset = hf["pad_token_id"] + 1
    heads = _heads(hf, weights)
    if offset and heads["masked_head"] and activation(hf, "hidden_act") != "gelu":
        rule = "RoBERTa's masked head has 'gelu' whatever the layers have, ours has one"
        raise refused("hidden_act", hf["hidden_act"], rule, "import another checkpoint")
    trunk = TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        d_model=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        d_ff=hf["intermediate_size"],
        max_len=hf["max_position_embeddings"],
        positions="learned",
        norm="layer",
        norm_position="post",
        norm_eps=hf["layer_norm_eps"],
        ffn=activation(hf, "hidden_act"),
        init="normal",
        dropout=hf["hidden_dropout_prob"],
        attention_dropout=hf["attention_probs_dropout_prob"],
    )
    return EncoderConfig(
        trunk,
        vocab_size=hf["vocab_size"],
        num_types=hf["type_vocab_size"],
        position_offset=offset,
        **heads,
    )


def hf_config(config: EncoderConfig, name: str) -> dict[str, Any]:
    """The settings of a config that has no `obstacles`."""
    trunk = config.trunk
    count = config.num_tags or config.num_labels
    kind = "SequenceClassification"
    if config.num_tags:
        kind = "TokenClassification"
    if config.masked_head:
        kind = "PreTraining" if config.num_labels else "MaskedLM"
    found = {
        "architectures": [f"{name}For{kind}"],
        "vocab_size": config.vocab_size,
        "hidden_size": trunk.d_model,
        "num_hidden_layers": trunk.num_layers,
        "num_attention_heads": trunk.num_heads,
        "intermediate_size": trunk.d_ff,
        "hidden_act": THEIR_ACTIVATIONS[trunk.ffn],
        "hidden_dropout_prob": trunk.dropout,
        "attention_probs_dropout_prob": trunk.attention_dropout,
        "max_position_embeddings": trunk.max_len,
        "type_vocab_size": config.num_types,
        "layer_norm_eps": trunk.norm_eps,
        "tie_word_embeddings": True,
    }
    if not config.masked_head:
        found |= label_names(count)
    if name == "Roberta":
        found["pad_token_id"] = config.position_offset - 1
    return found


def obstacles(config: EncoderConfig, name: str) -> list[str]:
    """What transformers cannot express."""
    wanted = plain_heads(config) | {
        "trunk.positions": ("learned",),
        "trunk.norm": ("layer",),
        "trunk.norm_position": ("post",),
        "trunk.bias": ("all",),
        "trunk.ffn": UNGATED,
    }
    if config.num_tags:
        wanted["num_labels"] = (0,)
    if name == "Bert":
        wanted["position_offset"] = (0,)
        if config.masked_head:  # one of its labels is the next sentence
            wanted["num_labels"] = (0, 2)
    elif config.masked_head:
        wanted["num_labels"] = (0,)
        wanted["trunk.ffn"] = ("gelu",)
    found = unmet(config, wanted)
    if not config.num_types:
        found.append("model.num_types=0: expected at least 1")
    if name == "Roberta" and not config.position_offset:
        found.append("model.position_offset=0: expected the padding id and 1")
    return found


def rows(config: EncoderConfig, name: str) -> list[Row]:
    """The table."""
    theirs, layer = f"{name}.encoder.layer.{{i}}", "encoder/layer_{i}"
    attention = f"{layer}/self_attention"
    found = [
        *table("embedding", f"{name}.embeddings.word_embeddings"),
        *table("types", f"{name}.embeddings.token_type_embeddings"),
        *table("positions/table", f"{name}.embeddings.position_embeddings"),
        *norm("embedding_norm", f"{name}.embeddings.LayerNorm"),
        *linear(f"{attention}/query", f"{theirs}.attention.self.query"),
        *linear(f"{attention}/key", f"{theirs}.attention.self.key"),
        *linear(f"{attention}/value", f"{theirs}.attention.self.value"),
        *linear(f"{attention}/out", f"{theirs}.attention.output.dense", inputs=2),
        *norm(f"{attention}_norm", f"{theirs}.attention.output.LayerNorm"),
        *linear(f"{layer}/feed_forward/up", f"{theirs}.intermediate.dense"),
        *linear(f"{layer}/feed_forward/down", f"{theirs}.output.dense"),
        *norm(f"{layer}/feed_forward_norm", f"{theirs}.output.LayerNorm"),
    ]
    masked, pooler, label = {
        ("bert", True): (
            "cls.predictions",
            "bert.pooler.dense",
            "cls.seq_relationship",
        ),
        ("bert", False): ("", "bert.pooler.dense", "classifier"),
        ("roberta", True): ("lm_head", "", ""),
        ("roberta", False): ("", "classifier.dense", "classifier.out_proj"),
    }[name, config.masked_head]
    if config.masked_head:
        inner = f"{masked}.transform" if name == "bert" else masked
        last = "LayerNorm" if name == "bert" else "layer_norm"
        found += linear("masked_head/dense", f"{inner}.dense")
        found += norm("masked_head/norm", f"{inner}.{last}")
        found += same("masked_bias", f"{masked}.bias")
    if config.num_tags:
        found += linear("tag_head", "classifier")
    if config.num_labels:
        found += linear("pooler", pooler)
        found += linear("label_head", label)
    return found


def copies(config: EncoderConfig, name: str) -> dict[str, str]:
    """The masked head's matrix and bias, which old files repeat."""
    if not config.masked_head:
        return {}
    head = "cls.predictions" if name == "bert" else "lm_head"
    return {
        f"{head}.decoder.weight": f"{name}.embeddings.word_embeddings.weight",
        f"{head}.decoder.bias": f"{head}.bias",
    }


def _family(model_type: str, name: str, *extra: str, **fields: Any) -> Family:
    kinds = ("MaskedLM", "SequenceClassification", "TokenClassification", *extra)
    return Family(
        model_type=model_type,
        config_type=EncoderConfig,
        architectures=(*(f"{name}For{kind}" for kind in kinds), f"{name}Model"),
        prefix=f"{model_type}.",
        model_config=model_config,
        hf_config=functools.partial(hf_config, name=name),
        obstacles=functools.partial(obstacles, name=name),
        rows=functools.partial(rows, name=model_type),
        copies=functools.partial(copies, name=model_type),
        heads=("cls.", "lm_head.", "classifier."),
        ignored=r"embeddings\.(position_ids|token_type_ids)$",
        fresh=("label_head", "pooler"),
        **fields,
    )


BERT = _family(
    *("bert", "Bert", "PreTraining"),
    defaults=DEFAULTS | {"vocab_size": 30522},
    renamed=(
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ),
)
ROBERTA = _family(
    *("roberta", "Roberta"),
    defaults=DEFAULTS | {"vocab_size": 50265, "pad_token_id": 1},
    # The pooler of the body is the first half of the classifier.
    renamed=((r"^roberta\.pooler\.dense\.", "classifier.dense."),),
)
