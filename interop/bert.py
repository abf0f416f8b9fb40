"""BERT, RoBERTa and Longformer."""

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
    shortest_cycle,
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
NAMES = ("Bert", "Roberta", "Longformer")


def _heads(hf: Mapping[str, Any], weights: Any) -> dict[str, Any]:
    """Which heads an architecture has.

    The body alone comes with the head that it is mostly fine-tuned for, freshly made.
    """
    kind = hf["architectures"][0]
    for name in NAMES:
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


def _local(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Longformer's windows: w of theirs are w / 2 places on either side."""
    widths, count = hf["attention_window"], hf["num_hidden_layers"]
    widths = [widths] * count if isinstance(widths, int) else widths
    even = all(isinstance(w, int) and w > 0 and w % 2 == 0 for w in widths)
    if len(widths) != count or not even:
        rule = f"expected an even number, or {count} of them, one a layer"
        advice = "use the config.json of these weights"
        raise refused("attention_window", hf["attention_window"], rule, advice)
    windows = shortest_cycle(tuple(w // 2 + 1 for w in widths))
    return {"attention": "local", "windows": windows}


def model_config(hf: Mapping[str, Any], weights: Any = None) -> EncoderConfig:
    """Our config of any one's settings."""
    need(hf, "position_embedding_type", "absolute")
    need(hf, "is_decoder", False)
    need(hf, "add_cross_attention", False)
    kind = hf["model_type"]
    offset = 0 if kind == "bert" else hf["pad_token_id"] + 1
    heads = _heads(hf, weights)
    if offset and heads["masked_head"] and activation(hf, "hidden_act") != "gelu":
        rule = "their masked head has 'gelu' whatever the layers have, ours has one"
        raise refused("hidden_act", hf["hidden_act"], rule, "import another checkpoint")
    trunk = TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        d_model=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        d_ff=hf["intermediate_size"],
        max_len=hf["max_position_embeddings"],
        **(_local(hf) if kind == "longformer" else {}),
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
    if name != "Bert":
        found["pad_token_id"] = config.position_offset - 1
    if name == "Longformer":
        cycle = [2 * (w - 1) for w in trunk.windows]
        found["attention_window"] = [
            cycle[i % len(cycle)] for i in range(trunk.num_layers)
        ]
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
    if config.num_labels:
        wanted["pool"] = ("token",)
    if config.num_tags:
        wanted["num_labels"] = (0,)
    if name == "Bert":
        wanted["position_offset"] = (0,)
        if config.masked_head:  # one of its labels is the next sentence
            wanted["num_labels"] = (0, 2)
    elif config.masked_head:
        wanted["num_labels"] = (0,)
        wanted["trunk.ffn"] = ("gelu",)
    local = name == "Longformer"
    if local:
        wanted["trunk.attention"] = ("local",)
        del wanted["trunk.windows"]
    found = unmet(config, wanted) + (_local_obstacles(config.trunk) if local else [])
    if not config.num_types:
        found.append("model.num_types=0: expected at least 1")
    if name != "Bert" and not config.position_offset:
        found.append("model.position_offset=0: expected the padding id and 1")
    return found


def _local_obstacles(trunk: TransformerConfig) -> list[str]:
    found = []
    sides = [w - 1 for w in trunk.windows]
    # Rows are padded to the widest window, and each layer cuts them into its own; with
    # one place on either side transformers' cutting fails.
    if min(sides, default=0) < 2 or any(max(sides) % n for n in sides):
        found.append(
            f"model.trunk.windows={trunk.windows}: expected windows w from 3 on, each "
            "w - 1 a divisor of the largest"
        )
    if trunk.options().get("dilation", 1) != 1:
        found.append(
            f"model.trunk.attention_options={trunk.attention_options}: expected no "
            "dilation"
        )
    return found


def rows(config: EncoderConfig, name: str) -> list[Row]:
    """The table."""
    theirs, layer = f"{name}.encoder.layer.{{i}}", "encoder/layer_{i}"
    attention = f"{layer}/self_attention"
    found = [
        *table("embedding", f"{name}.embeddings.word_embeddings"),
        *table("token_type_embedding", f"{name}.embeddings.token_type_embeddings"),
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
    if name == "longformer":
        for part in ("query_global", "key_global", "value_global"):
            found += linear(f"{attention}/{part}", f"{theirs}.attention.self.{part}")
    bert = name == "bert"
    masked, pooler, label = {
        (True, True): ("cls.predictions", "bert.pooler.dense", "cls.seq_relationship"),
        (True, False): ("", "bert.pooler.dense", "classifier"),
        (False, True): ("lm_head", "", ""),
        (False, False): ("", "classifier.dense", "classifier.out_proj"),
    }[bert, config.masked_head]
    if config.masked_head:
        inner = f"{masked}.transform" if bert else masked
        last = "LayerNorm" if bert else "layer_norm"
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
LONGFORMER = _family(
    *("longformer", "Longformer"),
    defaults=DEFAULTS
    | {"vocab_size": 30522, "pad_token_id": 1, "attention_window": 512},
    renamed=((r"^longformer\.pooler\.dense\.", "classifier.dense."),),
    reads=("global_attention_mask",),
)
