"""Numbers of parameters: those of the published models, exactly."""

import importlib
import math

import jax
import pytest

from triform.experiment import Experiment
from triform.interop.families import family_of, model_config
from triform.interop.mapping import parameters

BERT = {"model_type": "bert", "architectures": ["BertForPreTraining"]}
BERT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
GPT2 = {"model_type": "gpt2"}
T5 = {"model_type": "t5"}
VIT = {"model_type": "vit", "num_labels": 1000}
LLAMA = {"model_type": "llama", "vocab_size": 32000}
# A masked token's and the row's head are no part of what is published as BERT's size.
HEADS = ("masked_head", "masked_bias", "label_head")

# name: (settings of its config.json that are not its class's, parameters)
PUBLISHED = {
    "bert-base": (BERT, 109_482_240),
    "bert-large": (BERT | BERT_LARGE, 335_141_888),
    "roberta-base": (
        {
            "model_type": "roberta",
            "architectures": ["RobertaModel"],
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
        },
        124_645_632,
    ),
    # With the pooler, as transformers' LongformerModel of the published config.json.
    "longformer-base-4096": (
        {
            "model_type": "longformer",
            "architectures": ["LongformerModel"],
            "vocab_size": 50265,
            "max_position_embeddings": 4098,
            "type_vocab_size": 1,
            "attention_window": [512] * 12,
        },
        148_659_456,
    ),
    "gpt2": (GPT2, 124_439_808),
    "gpt2-medium": (
        GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
        354_823_168,
    ),
    "gpt2-large": (GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20}, 774_030_080),
    "gpt2-xl": (GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    "t5-small": (T5, 60_506_624),
    "t5-base": (
        T5 | {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        222_903_552,
    ),
    "t5-large": (
        T5 | {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
        737_668_096,
    ),
    "t5-v1_1-small": (
        T5
        | {
            "d_ff": 1024,
            "num_layers": 8,
            "num_decoder_layers": 8,
            "num_heads": 6,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        76_961_152,
    ),
    "vit-base-patch16-224": (VIT, 86_567_656),
    "vit-large-patch16-224": (VIT | BERT_LARGE, 304_326_632),
    "llama-2-7b": (LLAMA, 6_738_415_616),
    "llama-3-8b": (
        LLAMA
        | {
            "vocab_size": 128_256,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "rope_theta": 500_000.0,
        },
        8_030_261_248,
    ),
    "mistral-7b": ({"model_type": "mistral"}, 7_241_732_096),
    "qwen2-0.5b": (
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_theta": 1_000_000.0,
        },
        494_032_768,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    hf, count = PUBLISHED[name]
    config = model_config(hf)
    config.trunk.scan_layers = True  # the same parameters, faster to trace
    shapes = parameters(config, family_of(hf).reads)
    if hf["model_type"] in ("bert", "roberta", "longformer"):
        shapes = {k: x for k, x in shapes.items() if k.split("/")[0] not in HEADS}
    assert sum(math.prod(x.shape) for x in shapes.values()) == count


# (config file, variant): parameters, as its header has them.
COUNTS = {
    ("esm2", "8m"): 7_512_353,
    ("esm2", "35m"): 33_501_153,
    ("esm2", "150m"): 148_139_553,
    ("esm2", "650m"): 651_042_593,
    ("esm2", "3b"): 2_839_004_193,
    ("esm2", "15b"): 15_129_098_273,
    ("gpt2", "small"): 124_439_808,
    ("gpt2", "medium"): 354_823_168,
    ("gpt2", "large"): 774_030_080,
    ("gpt2", "xl"): 1_557_611_200,
    ("llama", "1b"): 1_235_814_400,
    ("llama", "8b"): 8_030_261_248,
    ("t5", "small"): 60_506_624,
    ("t5", "base"): 222_903_552,
    ("t5", "large"): 737_668_096,
    ("t5", "v1_1_small"): 76_961_152,
    ("transformer_wmt14", "base"): 63_082_496,
    ("transformer_wmt14", "big"): 214_245_376,
    ("vit", "b16"): 86_567_656,
    ("vit", "l16"): 304_326_632,
    ("vit", "h14"): 632_045_800,
}


@pytest.mark.parametrize(("name", "variant"), COUNTS)
def test_configs_have_the_counts_of_their_headers(name, variant):
    module = importlib.import_module(f"triform.configs.{name}")
    config = module.get_config(variant).resolved()
    config.model.trunk.scan_layers = True  # the same parameters, faster to trace
    params = jax.eval_shape(Experiment(config).init_variables)["params"]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    assert count == COUNTS[name, variant]
    assert f"{count:,}" in " ".join(module.__doc__.split())
