"""ESM-2 in and out: frequencies in half precision, the tokenizer, the contact head."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers
from families import with_trunk
from hf_models import CASES, CLOSE, ESM, both, build, error, load, rows, run, save
from safetensors.torch import load_file, save_file

from triform.configs import esm2
from triform.configs.schema import ExperimentConfig, to_json
from triform.data.codecs import text as tokenizer
from triform.data.datasets import TokenClassificationConfig
from triform.interop import families
from triform.interop.esm import FREQUENCIES
from triform.interop.mapping import parameters
from triform.interop.suggest import experiment_config
from triform.interop.workdir import export_model, import_model
from triform.models import ProteinConfig
from triform.models.config import TransformerConfig
from triform.runtime.errors import UserError
from triform.workdir import open_config

PROTEINS = ["MKVLAAGX", "MJJ<mask>K", "GGSTEB" * 4]
# As many rows as the alphabet has letters.
ALPHABET = {"vocab_size": 33, "mask_token_id": 32}


def published(folder, name: str = "esm", **settings) -> str:
    """A model with random weights and its tokenizer, as transformers writes both."""
    model = build(name, **ALPHABET, **settings)
    save(model, folder)
    path = pathlib.Path(folder, "alphabet.txt")
    path.write_text("\n".join(tokenizer.ALPHABET))
    transformers.EsmTokenizer(str(path)).save_pretrained(folder)
    path.unlink()
    return str(folder)


def changed(folder: str, change) -> str:
    """The folder with `change` done to {tensor: value}."""
    path = os.path.join(folder, "model.safetensors")
    stored = load_file(path)
    change(stored)
    save_file(stored, path, metadata={"format": "pt"})
    return folder


def logits(folder: str, kind) -> np.ndarray:
    """Of PROTEINS, by transformers alone."""
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    model = kind.from_pretrained(folder).eval()
    given = tok(PROTEINS, return_tensors="np", padding=True)
    return run(model, **{k: given[k] for k in ("input_ids", "attention_mask")}).logits


def test_there_and_back_with_tokenizer(tmp_path):
    source = published(tmp_path / "hf")
    assert not os.path.exists(os.path.join(source, "tokenizer.json"))
    workdir, target = str(tmp_path / "run"), str(tmp_path / "out")
    said = import_model(source, workdir)
    assert any("ignored: esm.contact_head" in line for line in said)
    assert not any("holds no tokenizer" in line for line in said)
    assert open_config(workdir).data.tokenizer.kind == "residues"
    kind = transformers.EsmForMaskedLM
    expected = logits(source, kind)
    for out, original in ((target, True), (f"{target}-ours", False)):
        if not original:  # as if it had been trained here
            for name in ("hf_config.json", "tokenizer_config.json", "vocab.txt"):
                os.remove(os.path.join(workdir, name))
        export_model(workdir, out)
        assert torch.equal(logits(out, kind), expected)
        tok = transformers.AutoTokenizer.from_pretrained(out)
        assert type(tok) is transformers.EsmTokenizer
        assert (tok.cls_token_id, tok.eos_token_id, tok.mask_token_id) == (0, 2, 32)
        _, info = kind.from_pretrained(out, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert all("contact_head" in name for name in info["missing_keys"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frequencies_keep_the_precision_that_they_were_trained_in(dtype, tmp_path):
    model = build("esm", rope_theta=7.0)
    rotary = model.esm.rotary_embeddings
    rotary.inv_freq.copy_(rotary.inv_freq.to(dtype).float())
    config, params = load(save(model, tmp_path / "hf"))
    assert config.trunk.positions == f"rotary_{str(dtype)[6:]}"
    for theirs, found in both(model, config, params):
        assert error(theirs, found) < CLOSE
    # It matters: exact ones give other logits.
    exact = with_trunk(config, positions="rotary")
    assert all(error(*pair) > CLOSE for pair in both(model, exact, params))
    folder = save(model, tmp_path / "others")
    name = next(x for x in load_file(f"{folder}/model.safetensors") if "inv_freq" in x)
    changed(folder, lambda stored: stored.update({name: 2 * stored[name]}))
    with pytest.raises(UserError, match="rope_theta=7.0: the weights"):
        load(folder)


def test_older_files_repeat_frequencies_and_hold_unused_tables(tmp_path):
    folder = save(build("esm"), tmp_path)
    _, params = load(folder)

    def change(stored):
        name = next(x for x in stored if x.endswith("inv_freq"))
        rates = stored.pop(name)
        for i in range(2):
            layer = f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"
            stored[layer] = rates.clone()
        stored["esm.embeddings.position_ids"] = torch.arange(128)[None]
        stored["esm.embeddings.position_embeddings.weight"] = torch.ones(128, 16)
        stored["lm_head.decoder.weight"] = stored[
            "esm.embeddings.word_embeddings.weight"
        ].clone()

    changed(folder, change)
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], params)


def test_the_body_gets_fresh_heads(tmp_path):
    model = transformers.EsmModel(transformers.EsmConfig(**ESM)).eval()
    config, params = load(save(model, tmp_path))
    assert not config.masked_head and config.num_labels == 2
    pooled = run(model, input_ids=rows(model)[0].astype(np.int64)).pooler_output
    assert params["pooler"]["kernel"].shape == (16, pooled.shape[-1])


@pytest.mark.parametrize("name", ["8m", "35m"])
def test_counts_are_those_of_transformers_without_the_contact_head(name):
    config = esm2.get_config(name).resolved().model
    hf = families.hf_config(config)
    with torch.device("meta"):
        kind = transformers.EsmForMaskedLM
        model = kind(kind.config_class(**hf))
    head = sum(x.numel() for x in model.esm.contact_head.parameters())
    count = sum(x.size for x in parameters(config).values())
    assert count == model.num_parameters() - head


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"masked_share": 0.3}, "masked_share=0.3"),
        ({"pool": "mean", "masked_head": False, "num_labels": 3}, "pool='mean'"),
        ({"masked_head": True, "num_labels": 2}, "num_labels=2"),
        ({"windows": (4,)}, "windows=(4,)"),
        ({"positions": "relative"}, "positions='relative'"),
    ],
)
def test_what_transformers_cannot_express_is_said(fields, said):
    trunk = {"positions": "rotary", "norm_position": "pre", "ffn": "gelu"}
    for name in ("windows", "positions"):
        if name in fields:
            trunk[name] = fields.pop(name)
    shape = TransformerConfig(2, 16, 2, d_ff=32, **trunk)
    config = ProteinConfig(shape, **{"num_labels": 0, **fields})
    with pytest.raises(UserError) as raised:
        families.family_for(config)
    assert f"model.{said}" in str(raised.value) or f"trunk.{said}" in str(raised.value)


def test_every_head_has_its_experiment():
    kinds = {"esm": "MaskedLMConfig", "esm-label": "SequenceClassificationConfig"}
    kinds["esm-tags"] = TokenClassificationConfig.__name__
    for name, kind in kinds.items():
        architecture, given = CASES[name]
        hf = {"model_type": "esm", "architectures": [architecture], **given}
        config: ExperimentConfig = experiment_config(families.model_config(hf))
        config.resolved().validate()
        assert type(config.data).__name__ == kind
        assert json.loads(to_json(config))["data"]["tokenizer"]["kind"] == "residues"
        assert FREQUENCIES in families.family_for(config.model).constants(config.model)
