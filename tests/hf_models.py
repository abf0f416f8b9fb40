"""Small PyTorch models with random weights, and ours with the same."""

import functools
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import torch
import transformers
from flax.traverse_util import unflatten_dict

from triform import models
from triform.interop.transfer import Import
from triform.interop.weights import Weights
from triform.models import (
    EncoderConfig,
    EncoderDecoderConfig,
    LoRAConfig,
    ProteinConfig,
    VisionConfig,
)

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 37
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
# Rows of 64 tokens at most.
LONGFORMER = BERT | {"max_position_embeddings": 66}
LLAMA = BERT | {"max_position_embeddings": 128, "num_key_value_heads": 2}
LLAMA |= {"bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4}
GPT2 |= {"n_positions": 128, "bos_token_id": 1, "eos_token_id": 1}
T5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2}
T5 |= {"num_heads": 4, "decoder_start_token_id": 0}
VIT = {k: v for k, v in BERT.items() if k[0] not in "vm"} | {"image_size": 12}
VIT |= {"patch_size": 4, "num_labels": 5}
ESM = BERT | {"max_position_embeddings": 128, "position_embedding_type": "rotary"}
ESM |= {"token_dropout": True, "mask_token_id": 32, "pad_token_id": 1}
MARIAN = {"vocab_size": VOCAB, "d_model": 16, "max_position_embeddings": 128}
MARIAN |= {"pad_token_id": VOCAB - 1, "decoder_start_token_id": VOCAB - 1}
MARIAN |= {
    f"{s}_{k}": v
    for s in ("encoder", "decoder")
    for k, v in {"layers": 2, "ffn_dim": 24, "attention_heads": 4}.items()
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 32, "beta_fast": 8.0}
LINEAR = {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.5}

LENGTHS = np.array([20, 13, 5])
# Of a difference to the standard deviation of the logits, float32.
CLOSE = 1e-4

# name: (architecture, settings)
CASES = {
    "bert": ("BertForPreTraining", BERT),
    "bert-masked": (
        "BertForMaskedLM",
        BERT | {"hidden_act": "gelu_new", "num_hidden_layers": 3},
    ),
    "bert-label": (
        "BertForSequenceClassification",
        BERT | {"num_labels": 3, "hidden_act": "relu"},
    ),
    "bert-tags": (
        "BertForTokenClassification",
        BERT | {"num_labels": 5, "type_vocab_size": 1},
    ),
    "roberta": ("RobertaForMaskedLM", BERT | {"type_vocab_size": 1}),
    "roberta-label": (
        "RobertaForSequenceClassification",
        BERT | {"num_labels": 1, "layer_norm_eps": 1e-5},
    ),
    "longformer": (
        "LongformerForMaskedLM",
        LONGFORMER | {"num_hidden_layers": 4, "attention_window": [4, 8, 4, 8]},
    ),
    "longformer-label": (
        "LongformerForSequenceClassification",
        LONGFORMER
        | {"attention_window": 6, "num_labels": 3, "hidden_act": "gelu_new"}
        | {"type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "longformer-tags": (
        "LongformerForTokenClassification",
        LONGFORMER
        | {"num_hidden_layers": 3, "attention_window": [12, 4, 6], "num_labels": 5},
    ),
    "esm": ("EsmForMaskedLM", ESM),
    "esm-label": (
        "EsmForSequenceClassification",
        ESM | {"num_labels": 1, "layer_norm_eps": 1e-5, "rope_theta": 100.0},
    ),
    "esm-tags": (
        "EsmForTokenClassification",
        ESM | {"num_labels": 5, "token_dropout": False, "num_hidden_layers": 3},
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        GPT2
        | {
            "n_inner": 20,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
            "n_layer": 1,
        },
    ),
    "gpt2-unscaled": (
        "GPT2LMHeadModel",
        GPT2 | {"scale_attn_weights": False, "activation_function": "relu"},
    ),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-bias": (
        "LlamaForCausalLM",
        LLAMA
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 6,
            "num_key_value_heads": 4,
        },
    ),
    "llama-tied": (
        "LlamaForCausalLM",
        LLAMA
        | {
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
            "rope_parameters": LLAMA3,
        },
    ),
    "llama-linear": (
        "LlamaForCausalLM",
        LLAMA | {"rope_parameters": LINEAR, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "llama-yarn": (
        "LlamaForCausalLM",
        LLAMA | {"rope_parameters": YARN, "num_hidden_layers": 1, "hidden_size": 32},
    ),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 5}),
    "mistral-full": (
        "MistralForCausalLM",
        LLAMA | {"sliding_window": None, "head_dim": 8},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        LLAMA
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen2-windows": (
        "Qwen2ForCausalLM",
        LLAMA
        | {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-gated": (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "vit": ("ViTForImageClassification", VIT),
    "vit-gray": (
        "ViTForImageClassification",
        VIT | {"num_channels": 1, "patch_size": 6, "hidden_act": "gelu_new"},
    ),
    "marian": (
        "MarianMTModel",
        MARIAN | {"scale_embedding": True, "activation_function": "swish"},
    ),
    "marian-apart": (
        "MarianMTModel",
        MARIAN | {"share_encoder_decoder_embeddings": False},
    ),
    "marian-untied": (
        "MarianMTModel",
        MARIAN
        | {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False},
    ),
}


def build(name: str, noise: float = 0.2, **settings):
    """The PyTorch model of a case; nothing of it is trivial."""
    seed = 0
    architecture, given = CASES[name]
    kind = getattr(transformers, architecture)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**given | settings)).eval()
    rng = np.random.default_rng(seed)
    if name == "t5-gated":  # what loading T5 v1.1 makes of it
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        for x in dict.fromkeys(model.parameters()):
            x += torch.tensor(
                noise * rng.standard_normal(tuple(x.shape)), dtype=x.dtype
            )
        if "marian" in name:
            bias = model.final_logits_bias
            bias += torch.tensor(rng.standard_normal(tuple(bias.shape)))
            for stack in (model.model.encoder, model.model.decoder):
                table = stack.embed_positions
                table.weight.copy_(table.create_weight())
    return model


def save(model, folder) -> str:
    """Writes it as transformers does."""
    model.save_pretrained(folder)
    return str(folder)


def load(folder: str, **options):
    """(our config, our parameters) of a folder."""
    with open(os.path.join(folder, "config.json")) as f:
        hf = json.load(f)
    with Weights(folder) as weights:
        found = Import(weights, hf, **options)
        params = found.read()
    return found.config, unflatten_dict(params, sep="/")


def draw(shape, seed: int = 0) -> np.ndarray:
    """Tokens that no model takes for padding."""
    return np.random.default_rng(seed).integers(3, VOCAB - 1, shape).astype(np.int32)


def rows(model) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, 1 where they are real), of LENGTHS, padded on the right."""
    real = np.arange(LENGTHS.max()) < LENGTHS[:, None]
    pad = model.config.pad_token_id or 0
    return np.where(real, draw(real.shape), pad).astype(np.int32), real.astype(np.int32)


def run(model, **inputs):
    """The PyTorch model's output."""
    with torch.no_grad():
        return model(**{k: torch.tensor(x) for k, x in inputs.items()})


@functools.cache
def applied(config):
    """fn(variables, batch) of our model, compiled once a shape."""
    return jax.jit(models.build(config).apply)


def ours(config, params, batch) -> dict[str, np.ndarray]:
    """Our model's logits."""
    found = applied(config)({"params": params}, batch)
    return {k: np.asarray(x) for k, x in found.items()}


def both(model, config, params) -> list[tuple[np.ndarray, np.ndarray]]:
    """Logits of both for the same padded batch, only those of real positions."""
    inner = config.model if isinstance(config, LoRAConfig) else config
    if isinstance(inner, VisionConfig):
        shape = (3, inner.image_size, inner.image_size, inner.channels)
        image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        theirs = run(model, pixel_values=image.transpose(0, 3, 1, 2)).logits
        return [(theirs.numpy(), ours(config, params, {"image": image})["label"])]
    tokens, real = rows(model)
    given = {"input_ids": tokens.astype(np.int64), "attention_mask": real}
    if isinstance(inner, EncoderDecoderConfig):
        targets = draw((3, 9), seed=1)
        theirs = run(model, **given, decoder_input_ids=targets.astype(np.int64)).logits
        batch = {"encoder_inputs": tokens, "encoder_segments": real, "inputs": targets}
        return [(theirs.numpy(), ours(config, params, batch)["targets"])]
    batch = {"inputs": tokens, "segments": real}
    if isinstance(inner, ProteinConfig):
        tokens[0, ::3] = inner.mask_id
        given["input_ids"] = tokens.astype(np.int64)
    elif isinstance(inner, EncoderConfig):
        kinds = np.random.default_rng(1).integers(0, inner.num_types, tokens.shape)
        given["token_type_ids"], batch["token_type_ids"] = kinds, kinds.astype(np.int32)
        if inner.trunk.attention == "local":  # its classifier does so unasked
            first = np.zeros_like(tokens)
            first[:, 0] = 1
            given["global_attention_mask"] = batch["global_attention_mask"] = first
    theirs, found = run(model, **given), ours(config, params, batch)
    pairs = []
    if "targets" in found:
        logits = getattr(theirs, "prediction_logits", None)
        logits = (theirs.logits if logits is None else logits).numpy()
        pairs.append((logits[real > 0], found["targets"][real > 0]))
    if "label" in found:
        logits = getattr(theirs, "seq_relationship_logits", None)
        logits = (theirs.logits if logits is None else logits).numpy()
        pairs.append((logits, found["label"]))
    return pairs


def error(theirs: np.ndarray, found: np.ndarray) -> float:
    """The largest difference, relative to the spread."""
    assert theirs.shape == found.shape
    return float(np.abs(theirs - found).max() / theirs.std())
