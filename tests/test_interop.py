"""Weights of Hugging Face models: the same outputs, the same bytes, none left over."""

import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from hf_models import (
    CASES,
    CLOSE,
    both,
    build,
    draw,
    error,
    load,
    ours,
    rows,
    run,
    save,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import LlamaConfig
from transformers.models.marian.modeling_marian import (
    MarianSinusoidalPositionalEmbedding,
)
from transformers.models.t5.modeling_t5 import T5Attention

from triform import models
from triform.interop import families
from triform.interop.mapping import canonical, entries, parameters
from triform.interop.settings import rope
from triform.interop.transfer import tensors
from triform.interop.weights import write
from triform.models import EncoderConfig, EncoderDecoderConfig
from triform.models.config import TransformerConfig
from triform.models.decode import DecodeConfig, generate
from triform.models.positions import (
    relative_bucket,
    rotary_frequencies,
    sinusoidal_table,
)
from triform.models.stacking import stacked_layers
from triform.runtime.errors import UserError


@pytest.mark.parametrize(("i", "name"), list(enumerate(CASES)), ids=list(CASES))
def test_logits_are_those_of_the_original(i, name, tmp_path):
    model = build(name)
    config, params = load(save(model, tmp_path), scan_layers=i % 2 == 1)
    for theirs, found in both(model, config, params):
        assert error(theirs, found) < CLOSE


PACKED = ("bert-masked", "gpt2", "llama-tied", "mistral", "t5", "marian")


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_give_what_the_original_gives_one_by_one(name, tmp_path):
    model = build(name)
    config, params = load(save(model, tmp_path))
    sizes = (7, 12, 4)
    texts = [draw((n,), seed=n) for n in sizes]

    def packed(texts) -> dict[str, np.ndarray]:
        parts = {
            "inputs": texts,
            "segments": [np.full(len(x), i + 1) for i, x in enumerate(texts)],
            "positions": [np.arange(len(x)) for x in texts],
        }
        return {k: np.concatenate(x)[None].astype(np.int32) for k, x in parts.items()}

    batch = packed(texts)
    alone = [{"input_ids": x[None].astype(np.int64)} for x in texts]
    if isinstance(config, EncoderDecoderConfig):
        answers = [draw((n,), seed=90 + n) for n in (3, 8, 5)]
        sources = {f"encoder_{k}": x for k, x in batch.items()}
        batch = packed(answers) | sources
        for one, answer in zip(alone, answers, strict=True):
            one["decoder_input_ids"] = answer[None].astype(np.int64)
    theirs = [run(model, **one).logits[0].numpy() for one in alone]
    found = ours(config, params, batch)["targets"][0]
    assert error(np.concatenate(theirs), found) < CLOSE


def contents(folder, family) -> dict[str, tuple]:
    """{tensor: (dtype, shape, bytes)} of all files, by the names in the table.

    Without buffers and what ours has no counterpart of. (transformers writes norms of
    ESM under old names.)
    """
    found = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="numpy") as f:
            for known, name in canonical(family, f.keys()).items():
                x = f.get_tensor(name)
                found[known] = str(x.dtype), x.shape, x.tobytes()
    left = r"inv_freq$|" + family.left_out
    return {name: x for name, x in found.items() if not re.search(left, name)}


@pytest.mark.parametrize(
    ("scan", "dtype"), [(False, "F32"), (True, "BF16"), (True, "F16")]
)
@pytest.mark.parametrize("name", CASES)
def test_in_and_out_again_gives_the_same_bytes(name, scan, dtype, tmp_path):
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    folder = save(build(name).to(kinds[dtype]), tmp_path / "in")
    config, params = load(folder, scan_layers=scan)
    with open(os.path.join(folder, "config.json")) as f:
        family = families.family_of(json.load(f))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    out = tmp_path / "out"
    out.mkdir()
    found = tensors(family, config, flatten_dict(params, sep="/"), dtype)
    sizes = list(write(str(out), found))
    original = contents(folder, family)
    assert contents(out, family) == original
    extra = sum(x.nbytes for x in family.constants(config).values())
    assert sum(sizes) - extra == sum(len(x[2]) for x in original.values())


def test_scanned_parameters_are_the_looped_ones(tmp_path):
    folder = save(build("qwen2-windows"), tmp_path)
    config, looped = load(folder)
    stacked = stacked_layers(looped, len(config.trunk.windows), np)
    _, scanned = load(folder, scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, scanned, stacked)


# --- Text ---

GENERATED = 64
# Case: noise by which its text is not one token again and again.
TEXTS = {"gpt2": 1.0, "llama-tied": 1.0, "t5-gated": 0.5, "marian": 0.2}


def talkative(name: str):
    """The model of a case, of weak biases: strong ones favour one token."""
    model = build(name, TEXTS[name])
    with torch.no_grad():
        for path, x in model.named_parameters():
            if path.endswith("bias") and ("norm" in path or "ln_" in path):
                x *= 0.1
        if name == "marian":
            model.final_logits_bias *= 0.1
            model.model.shared.weight *= 0.3
    return model


@pytest.mark.parametrize("name", TEXTS)
def test_greedy_text_is_the_original_s(name, tmp_path):
    model = talkative(name)
    config, params = load(save(model, tmp_path))
    ours = models.build(config)
    sides = isinstance(config, EncoderDecoderConfig)
    tokens, real = rows(model)
    if not sides:  # whoever continues must have the prompts' ends side by side
        tokens, real = tokens[:, ::-1], real[:, ::-1]
    tokens, real = tokens.copy(), real.copy()
    options = {"eos_token_id": None, "forced_eos_token_id": None, "do_sample": False}
    theirs = model.generate(
        torch.tensor(tokens.astype(np.int64)),
        attention_mask=torch.tensor(real),
        max_new_tokens=GENERATED,
        pad_token_id=model.config.pad_token_id or 0,
        **options,
    )[:, -GENERATED:].numpy()
    if sides:
        start = np.full((3, 1), model.config.decoder_start_token_id, np.int32)
        batch = {"encoder_inputs": tokens, "encoder_segments": real, "inputs": start}
    else:
        batch = {"inputs": tokens, "segments": real}

    @jax.jit
    def run(params, batch):
        variables = {"params": params}

        def extend(*args):
            return ours.apply(variables, *args, method="extend")

        state = ours.apply(variables, batch, GENERATED, method="start")
        how = {"eos": -1, "length": GENERATED, "rng": jax.random.key(0)}
        return generate(DecodeConfig(method="greedy"), extend, *state, **how)[0]

    found = np.asarray(run(params, batch))
    assert min(len(np.unique(row)) for row in theirs) > 3
    np.testing.assert_array_equal(found, theirs)


# --- Positions ---


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_are_t5_s(bidirectional):
    distance = np.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(distance), bidirectional, num_buckets=32, max_distance=128
    )
    found = relative_bucket(distance, bidirectional)
    np.testing.assert_array_equal(found, theirs.numpy())


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LENGTH = {"original_max_position_embeddings": 4096}
ROPES = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    {"rope_type": "llama3", "factor": 32.0, "rope_theta": 500_000.0, **LLAMA3},
    {"rope_type": "yarn", "factor": 16.0, **LENGTH},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20, "beta_slow": 2, **LENGTH},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8, **LENGTH},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        **LENGTH,
    },
    {"rope_type": "yarn", "factor": 0.5, **LENGTH},
]


@pytest.mark.parametrize("given", ROPES, ids=lambda given: given["rope_type"])
@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_scaling"])
def test_rotary_frequencies_are_those_of_transformers(given, old):
    given = {"rope_theta": 10_000.0, **given}
    sizes = {"hidden_size": 256, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 32768}
    theirs = LlamaConfig(**sizes, rope_parameters=dict(given))
    rates, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](theirs, "cpu")
    hf = sizes | {"rope_parameters": given}
    if old:
        kind = {"type": given["rope_type"]}
        rest = {k: v for k, v in given.items() if k not in ("rope_type", "rope_theta")}
        hf = sizes | {"rope_theta": given["rope_theta"], "rope_scaling": kind | rest}
    found = rope(hf)
    trunk = TransformerConfig(d_model=256, num_heads=4, positions="rotary", rope=found)
    trunk.validate()
    ours, scale = rotary_frequencies(trunk)
    np.testing.assert_allclose(ours, rates.numpy(), rtol=1e-6)
    assert scale == pytest.approx(factor, rel=1e-9)


def test_sinusoids_are_marian_s():
    theirs = MarianSinusoidalPositionalEmbedding(512, 64).create_weight()
    np.testing.assert_allclose(sinusoidal_table(512, 64), theirs.numpy(), atol=1e-7)


# --- What does not fit ---


def changed(folder: str, change) -> str:
    """The folder with `change` done to {tensor: value}."""
    path = os.path.join(folder, "model.safetensors")
    stored = load_file(path)
    change(stored)
    save_file(stored, path, metadata={"format": "pt"})
    return folder


def mend(folder: str, **settings) -> str:
    """The folder with other settings in its config.json; None: without it."""
    path = os.path.join(folder, "config.json")
    with open(path) as f:
        hf = json.load(f) | settings
    with open(path, "w") as f:
        json.dump({k: v for k, v in hf.items() if v is not None}, f)
    return folder


def message(call, *args, **kwargs) -> str:
    """The one line of the UserError that a call must raise."""
    with pytest.raises(UserError) as raised:
        call(*args, **kwargs)
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_all_tensors_that_do_not_fit_are_listed(tmp_path):
    def change(stored):
        stored |= {"extra.weight": torch.ones(2), "other": torch.ones(2)}
        del stored["transformer.ln_f.bias"], stored["transformer.h.1.ln_1.weight"]

    folder = changed(save(build("gpt2"), tmp_path), change)
    text = message(load, folder)
    for name in ("extra.weight", "other", "transformer.ln_f.bias"):
        assert name in text
    assert "transformer.h.1.ln_1.weight" in text and "--ignore=" in text
    assert "extra" not in message(load, folder, ignore=["extra*", "oth?r"])


def test_tensors_can_be_left_out_on_purpose(tmp_path):
    folder = save(build("gpt2"), tmp_path)
    _, params = load(folder)
    changed(folder, lambda stored: stored.update({"extra.weight": torch.ones(2)}))
    _, again = load(folder, ignore=["extra.*"])
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_parameters_without_a_tensor_are_listed():
    trunk = TransformerConfig(1, 8, 2, positions="learned", norm_position="pre")
    config = EncoderConfig(trunk, 11)
    family = families.FAMILIES["bert"]
    assert "embedding_norm" in message(entries, family, config, parameters(config))
    trunk.norm_position, trunk.ffn = "post", "geglu"
    assert "feed_forward/gate" in message(entries, family, config, parameters(config))


def test_a_tensor_of_another_shape_is_named(tmp_path):
    folder = mend(save(build("vit"), tmp_path), image_size=16)
    assert "vit.embeddings.position_embeddings" in message(load, folder)


def test_weights_of_other_kinds_are_refused(tmp_path):
    folder = save(build("gpt2").double(), tmp_path)
    assert "F64" in message(load, folder)
    assert "quantization_config" in message(
        load, mend(folder, quantization_config={"bits": 4})
    )


def test_buffers_are_no_parameters(tmp_path):
    def change(stored):
        stored["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        stored["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)

    load(changed(save(build("gpt2"), tmp_path), change))


COPIES = {
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "bert": ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    "longformer": ("lm_head.decoder.bias", "lm_head.bias"),
    "llama-tied": ("lm_head.weight", "model.embed_tokens.weight"),
    "t5": ("encoder.embed_tokens.weight", "shared.weight"),
    "marian": ("model.decoder.embed_tokens.weight", "model.shared.weight"),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_tensor_may_be_stored_twice_if_it_is_the_same(name, tmp_path):
    copy, original = COPIES[name]
    folder = save(build(name), tmp_path)
    _, params = load(folder)

    def same(x, y):
        jax.tree.map(np.testing.assert_array_equal, x, y)

    changed(folder, lambda x: x.update({copy: x[original].clone()}))
    same(load(folder)[1], params)
    changed(folder, lambda x: x.pop(original))  # the copy alone serves too
    same(load(folder)[1], params)
    changed(folder, lambda x: x.update({original: x[copy] + 1}))
    text = message(load, folder)
    assert copy in text and original in text


def test_a_head_that_is_not_the_table_needs_a_setting(tmp_path):
    folder = save(build("t5-gated"), tmp_path)
    assert not load(folder)[0].tie_head
    text = message(load, mend(folder, scale_decoder_outputs=None))
    assert "tie_word_embeddings=True" in text
    mend(folder, tie_word_embeddings=False)  # as T5 v1.1 was published
    config, _ = load(folder)
    assert config.embedding_scale == "none" and not config.tie_head


def test_files_of_the_base_model_lack_its_prefix(tmp_path):
    model = build("gpt2")
    _, params = load(save(model, tmp_path / "whole"))
    config, bare = load(save(model.transformer, tmp_path / "base"))
    jax.tree.map(np.testing.assert_array_equal, params, bare)
    assert config.tie_head


def test_the_body_of_bert_gets_fresh_heads(tmp_path):
    model = build("bert").bert
    config, params = load(save(model, tmp_path))
    assert not config.masked_head and config.num_labels == 2
    assert 0 < np.abs(params["label_head"]["kernel"]).mean() < 0.05
    pooled = run(model, input_ids=rows(model)[0].astype(np.int64)).pooler_output
    head, pooler = params["label_head"], params["pooler"]
    assert pooler["kernel"].shape == head["kernel"].shape[:1] * 2
    found = ours(config, params, {"inputs": rows(model)[0]})["label"]
    expected = pooled.numpy() @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    changed(str(tmp_path), lambda x: x.pop("embeddings.LayerNorm.bias"))
    assert "bert.embeddings.LayerNorm.bias" in message(load, str(tmp_path))


def test_google_s_bert_has_both_heads_and_old_names(tmp_path):
    folder = save(build("bert"), tmp_path)
    _, params = load(folder)

    def change(stored):
        for name in list(stored):
            for new, old in (("weight", "gamma"), ("bias", "beta")):
                if name.endswith(f"LayerNorm.{new}"):
                    stored[name.replace(f"LayerNorm.{new}", f"LayerNorm.{old}")] = (
                        stored.pop(name)
                    )
        stored["bert.embeddings.position_ids"] = torch.arange(40)[None]

    mend(changed(folder, change), architectures=["BertForMaskedLM"])
    config, again = load(folder)
    assert config.masked_head and config.num_labels == 2
    jax.tree.map(np.testing.assert_array_equal, params, again)


YARN = {"rope_type": "yarn", "factor": 2.0}
# (case, settings, what the one line says)
REFUSED = [
    ("bert", {"position_embedding_type": "relative_key"}, "'relative_key'"),
    ("bert", {"is_decoder": True}, "is_decoder=True"),
    ("bert", {"hidden_act": "mish"}, "hidden_act='mish'"),
    ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ("bert", {"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice"),
    ("bert", {"num_attention_heads": 3}, "num_heads=3"),
    ("roberta", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("longformer", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("longformer", {"attention_window": 7}, "attention_window=7"),
    ("longformer", {"attention_window": [4, 8]}, "attention_window=[4, 8]"),
    ("longformer", {"attention_window": [4, 0] * 2}, "attention_window=[4, 0, 4, 0]"),
    ("longformer", {"attention_window": "all"}, "attention_window='all'"),
    ("esm", {"position_embedding_type": "absolute"}, "'absolute'"),
    ("esm", {"emb_layer_norm_before": True}, "emb_layer_norm_before=True"),
    ("esm", {"is_folding_model": True}, "is_folding_model=True"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    ("gpt2", {"activation_function": "quick_gelu"}, "'quick_gelu'"),
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "'dynamic'",
    ),
    ("llama", {"rope_scaling": {"type": "longrope"}}, "'longrope'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ("llama", {"rope_parameters": YARN | {"truncate": False}}, "truncate=False"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (
        "qwen2-windows",
        {"layer_types": ["full_attention", "chunked_attention"] * 2},
        "layer_types",
    ),
    ("t5", {"relative_attention_num_buckets": 16}, "num_buckets=16"),
    ("t5", {"relative_attention_max_distance": 64}, "max_distance=64"),
    ("t5", {"num_decoder_layers": 3}, "num_decoder_layers=3"),
    ("t5", {"feed_forward_proj": "gated-relu"}, "'gated-relu'"),
    ("vit", {"qkv_bias": False}, "qkv_bias=False"),
    ("vit", {"image_size": [12, 16]}, "image_size=[12, 16]"),
    ("vit", {"patch_size": 5}, "patch_size=5"),
    ("marian", {"decoder_layers": 3}, "decoder_layers=3"),
    ("marian", {"decoder_ffn_dim": 20}, "decoder_ffn_dim=20"),
    ("marian", {"decoder_vocab_size": 50}, "decoder_vocab_size=50"),
    ("marian", {"normalize_before": True}, "normalize_before=True"),
    ("marian", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ("marian", {"model_type": "bart"}, "model_type='bart'"),
]


@pytest.mark.parametrize(("name", "settings", "said"), REFUSED)
def test_what_our_model_does_not_do_is_refused(name, settings, said):
    architecture, given = CASES[name]
    hf = {"model_type": name.split("-")[0], "architectures": [architecture]}
    hf = {"pad_token_id": 1, **hf, **given}
    families.model_config(hf)
    text = message(families.model_config, hf | settings)
    assert text.startswith("config.json: ") and said in text
