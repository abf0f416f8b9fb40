"""BERT, RoBERTa and Longformer."""

import functools
from typing import Any

from triform.interop import settings
from triform.interop.mapping import Family, Row, linear, norm, same, table
from triform.models import EncoderConfig
from triform.models.config import TransformerConfig

# Vision transformers have these, too.
SIZES = (
    settings.equal("trunk.num_layers", "num_hidden_layers", 12),
    settings.equal("trunk.d_model", "hidden_size", 768),
    settings.equal("trunk.num_heads", "num_attention_heads", 12),
    settings.equal("trunk.d_ff", "intermediate_size", 3072),
    settings.choice("trunk.ffn", "hidden_act", "gelu", settings.ACTIVATIONS),
    settings.equal("trunk.norm_eps", "layer_norm_eps", 1e-12),
    settings.preset("trunk.init", "normal"),
)
NAMES = ("Bert", "Roberta", "Longformer", "Esm")


def _settings(name: str, vocab_size: int) -> tuple[settings.Setting, ...]:
    table = (
        *settings.TRUNK,
        *SIZES,
        *settings.blocks("layer", "post", "all", "learned"),
        *settings.UNGROUPED,
        settings.UNSCALED,
        settings.equal("vocab_size", "vocab_size", vocab_size),
        settings.equal("num_types", "type_vocab_size", 2),
        settings.equal("trunk.max_len", "max_position_embeddings", 512),
        settings.equal("trunk.dropout", "hidden_dropout_prob", 0.1),
        settings.equal("trunk.attention_dropout", "attention_probs_dropout_prob", 0.1),
        settings.only("position_embedding_type", "absolute"),
        settings.only("is_decoder", False),
        settings.only("add_cross_attention", False),
        settings.Setting("", "tie_word_embeddings", write=lambda config: True),
    )
    if name == "Longformer":
        local = settings.fixed("trunk.attention", "local")
        windows = settings.Setting(
            "trunk.windows", "attention_window", 512, _windows, _widths
        )
        table = (*table, local, windows)
    else:
        table = (*table, *settings.EXACT, settings.FULL)
    if name == "Bert":
        return (*table, settings.fixed("position_offset", 0))
    offset = settings.Setting(
        *("position_offset", "pad_token_id", 1),
        read=lambda hf: hf["pad_token_id"] + 1,
        write=lambda config: config.position_offset - 1,
    )
    return (*table, offset)


def _windows(hf: settings.Given) -> tuple[int, ...]:
    """Longformer's windows: w of theirs are w / 2 positions on either side."""
    widths, count = hf["attention_window"], hf["num_hidden_layers"]
    widths = [widths] * count if isinstance(widths, int) else widths
    even = all(isinstance(w, int) and w > 0 and w % 2 == 0 for w in widths)
    if len(widths) != count or not even:
        rule = f"expected an even number, or {count} of them, one a layer"
        advice = "use the config.json of these weights"
        raise settings.refused("attention_window", hf["attention_window"], rule, advice)
    return tuple(w // 2 + 1 for w in widths)


def _widths(config: EncoderConfig) -> list[int]:
    return [2 * (w - 1) for w in settings.windows_of(config)]


def heads(hf: settings.Given, weights: Any) -> dict[str, Any]:
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
    masked = kind in ("ForMaskedLM", "ForPreTraining")
    if masked:
        settings.only("tie_word_embeddings", True).read(
            {"tie_word_embeddings": True, **hf}
        )
    act = hf["hidden_act"]
    if masked and hf["model_type"] != "bert" and act != "gelu":
        rule = "their masked head has 'gelu' whatever the layers have, ours has one"
        raise settings.refused("hidden_act", act, rule, "import another checkpoint")
    classes = 2 if masked or kind == "Model" else settings.labels(hf)
    return {
        "masked_head": masked,
        "num_tags": classes if kind == "ForTokenClassification" else 0,
        "num_labels": 0
        if kind in ("ForMaskedLM", "ForTokenClassification")
        else classes,
    }


def architecture(config: EncoderConfig, name: str) -> dict[str, Any]:
    """The class with a config's heads, and its classes."""
    if config.masked_head:
        kind = "PreTraining" if config.num_labels else "MaskedLM"
        return {"architectures": [f"{name}For{kind}"]}
    kind = "TokenClassification" if config.num_tags else "SequenceClassification"
    names = settings.unnamed(config.num_tags or config.num_labels)
    return {"architectures": [f"{name}For{kind}"], **names}


def head_limits(config: EncoderConfig, name: str) -> list[str]:
    """What transformers' heads cannot express."""
    counts: tuple[int, ...] = ()
    if config.num_tags or (config.masked_head and name != "Bert"):
        counts = (0,)
    elif config.masked_head:  # one of its settings.labels is the next sentence
        counts = (0, 2)
    table = [settings.Setting("num_labels", accepted=counts)]
    if config.num_labels:
        table.append(settings.fixed("pool", "token"))
    if config.masked_head and name != "Bert":
        table.append(settings.fixed("trunk.ffn", "gelu"))
    return settings.obstacles(table, config)


def limits(config: EncoderConfig, name: str) -> list[str]:
    """What transformers' heads and embeddings cannot express."""
    found = head_limits(config, name)
    if name == "Longformer":
        found += _local_obstacles(config.trunk)
    if not config.num_types:
        found.append("model.num_types=0: expected at least 1")
    if name != "Bert" and not config.position_offset:
        found.append("model.position_offset=0: expected the padding id and 1")
    return found


def _local_obstacles(trunk: TransformerConfig) -> list[str]:
    sides = [w - 1 for w in trunk.windows]
    # Rows are padded to the widest window, and each layer divides them by its own;
    # with one position on either side transformers fails.
    if min(sides, default=0) >= 2 and not any(max(sides) % n for n in sides):
        return []
    return [
        f"model.trunk.windows={trunk.windows}: expected windows w from 3 on, each "
        "w - 1 a divisor of the largest"
    ]


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


def _family(name: str, *more: str, vocab_size: int, **fields: Any) -> Family:
    kinds = ("MaskedLM", "SequenceClassification", "TokenClassification", *more)
    return Family(
        model_type=name.lower(),
        config_type=EncoderConfig,
        architectures=(*(f"{name}For{kind}" for kind in kinds), f"{name}Model"),
        prefix=f"{name.lower()}.",
        settings=_settings(name, vocab_size),
        read=heads,
        write=functools.partial(architecture, name=name),
        limits=functools.partial(limits, name=name),
        rows=functools.partial(rows, name=name.lower()),
        copies=functools.partial(copies, name=name.lower()),
        heads=("cls.", "lm_head.", "classifier."),
        ignored=r"embeddings\.(position_ids|token_type_ids)$",
        fresh=("label_head", "pooler"),
        **fields,
    )


BERT = _family(
    *("Bert", "PreTraining"),
    vocab_size=30522,
    renamed=(
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ),
)
ROBERTA = _family(
    "Roberta",
    vocab_size=50265,
    # The pooler of the body is the first half of the classifier.
    renamed=((r"^roberta\.pooler\.dense\.", "classifier.dense."),),
)
LONGFORMER = _family(
    "Longformer",
    vocab_size=30522,
    renamed=((r"^longformer\.pooler\.dense\.", "classifier.dense."),),
    reads={"global_attention_mask": ("BL", "int32")},
)
