"""The command line: a workdir of a Hugging Face folder, and a folder of a workdir."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from flax.traverse_util import unflatten_dict
from hf_models import CASES, build, load, save
from safetensors import safe_open

from triform.configs.schema import ExperimentConfig, to_json
from triform.data.codecs import text as tokenizer
from triform.interop import families, transfer
from triform.interop.__main__ import main
from triform.interop.mapping import parameters
from triform.interop.suggest import experiment_config
from triform.interop.weights import write
from triform.interop.workdir import export_model
from triform.models import (
    EncoderConfig,
    EncoderDecoderConfig,
    LanguageModelConfig,
    VisionConfig,
)
from triform.models.config import TransformerConfig
from triform.runtime.checkpoint import CheckpointConfig, Checkpointer
from triform.workdir import checkpoint_dir, open_config

# Every family and kind of head.
SOME = [
    *("bert", "bert-masked", "bert-tags", "roberta", "roberta-label"),
    *("longformer", "longformer-label", "longformer-tags"),
    *("gpt2", "gpt2-untied", "llama-bias", "llama-yarn", "mistral", "qwen2-windows"),
    *("t5", "t5-gated", "vit", "marian", "marian-untied"),
]


def bytes_of(folder) -> dict[str, tuple]:
    found = {}
    for path in pathlib.Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="numpy") as f:
            for name in f.keys():  # noqa: SIM118
                x = f.get_tensor(name)
                found[name] = str(x.dtype), x.shape, x.tobytes()
    return found


def edit(folder, name: str, change) -> None:
    """Changes a JSON file in place."""
    path = pathlib.Path(folder, name)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reloaded(folder: str, model):
    """The exported model as transformers loads it, with nothing missing or left."""
    back, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return back.eval()


def same_weights(model, other) -> None:
    theirs, found = model.state_dict(), other.state_dict()
    assert theirs.keys() == found.keys()
    for name, x in theirs.items():
        assert torch.equal(x, found[name]), name


@pytest.mark.parametrize(("i", "name"), list(enumerate(SOME)), ids=SOME)
def test_there_and_back_by_command(i, name, tmp_path, capsys):
    model = build(name)
    source = save(model, tmp_path / "hf")
    workdir, target = str(tmp_path / "run"), str(tmp_path / "out")
    scan = ["--scan_layers"] * (i % 2)
    assert main(["import", source, workdir, *scan]) == 0
    said = capsys.readouterr().out
    assert f"imported {CASES[name][0]}" in said and "init_from=" in said
    config = open_config(workdir)
    config.validate()
    assert config.model.trunk.scan_layers == bool(scan)
    assert main(["export", workdir, target]) == 0
    assert CASES[name][0] in capsys.readouterr().out
    assert bytes_of(target) == bytes_of(source)
    same_weights(model, reloaded(target, model))
    # As if it had been trained here: the settings are written from ours alone.
    os.remove(os.path.join(workdir, "hf_config.json"))
    again = str(tmp_path / "again")
    export_model(workdir, again)
    assert bytes_of(again) == bytes_of(source)
    back = reloaded(again, model)
    same_weights(model, back)
    assert type(back) is type(model)
    # The settings that count are the same: so is the function.
    with open(os.path.join(again, "config.json")) as f:
        hf = json.load(f)
    tied = config.model.tie_head if "t5" in name else None
    ours = families.model_config(hf)
    ours.trunk.scan_layers = config.model.trunk.scan_layers
    ours.trunk.init = config.model.trunk.init
    assert ours == config.model
    assert tied is None or ours.tie_head == tied


def test_original_settings_are_kept_as_far_as_they_hold(tmp_path):
    source = save(build("llama-tied"), tmp_path / "hf")
    edit(source, "config.json", lambda hf: hf.update({"our_own": [1, 2]}))
    workdir = str(tmp_path / "run")
    assert main(["import", source, workdir]) == 0
    export_model(workdir, str(tmp_path / "out"))
    original, found = (
        json.loads((tmp_path / x / "config.json").read_text()) for x in ("hf", "out")
    )
    assert found == original

    def change(config):
        config["model"]["trunk"]["rope"]["base"] = 7.0

    edit(workdir, "config.json", change)
    export_model(workdir, str(tmp_path / "changed"))
    found = json.loads((tmp_path / "changed" / "config.json").read_text())
    assert found["rope_parameters"] == original["rope_parameters"] | {"rope_theta": 7.0}
    assert found["our_own"] == [1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_come_back_tensor_by_tensor(dtype, tmp_path):
    model = build("gpt2").to(dtype)
    model.transformer.ln_f.float()
    source = save(model, tmp_path / "hf")
    workdir, target = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["import", source, workdir]) == 0
    export_model(workdir, target)
    assert bytes_of(target) == bytes_of(source)
    kinds = {x[0] for x in bytes_of(target).values()}
    assert kinds == {"float32", str(dtype).removeprefix("torch.")}


def test_files_are_cut_and_read_cut(tmp_path):
    model = build("bert")
    whole = save(model, tmp_path / "hf")
    model.save_pretrained(tmp_path / "cut", max_shard_size="4KB")
    cut = str(tmp_path / "cut")
    assert len(list(pathlib.Path(cut).glob("*.safetensors"))) > 2
    for x, y in zip(*(jax.tree.leaves(load(f)[1]) for f in (whole, cut)), strict=True):
        np.testing.assert_array_equal(x, y)
    workdir, target = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["import", cut, workdir]) == 0
    export_model(workdir, target, shard=5000)
    names = sorted(p.name for p in pathlib.Path(target).glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors" and len(names) > 2
    same_weights(model, reloaded(target, model))
    os.remove(os.path.join(cut, sorted(os.listdir(cut))[-2]))
    assert main(["import", cut, str(tmp_path / "no")]) == 1


# --- Tokenizers ---


def words(*specials: str) -> tokenizers.Tokenizer:
    vocabulary = [*specials, "a", "b", "c"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "a")
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.add_special_tokens(list(specials))
    return core


def test_special_tokens_are_found(tmp_path):
    source = save(build("bert"), tmp_path / "hf")
    core = words("[MASK]", "[PAD]", "[CLS]", "[SEP]", "[UNK]")
    core.save(os.path.join(source, "tokenizer.json"))
    named = {"mask_token": {"content": "[MASK]"}, "cls_token": "[CLS]"}
    pathlib.Path(source, "tokenizer_config.json").write_text(json.dumps(named))
    edit(source, "config.json", lambda hf: hf.update(pad_token_id=1, eos_token_id=[3]))
    workdir, target = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["import", source, workdir]) == 0
    found = json.loads(pathlib.Path(workdir, "special_tokens.json").read_text())
    # As their class of tokenizers frames, where the file says nothing.
    assert found.pop("template")["single"] == [[2, 0], ["A", 0], [3, 0]]
    assert found == {"mask": 0, "cls": 2, "pad": 1, "eos": 3, "start": 1}
    tok = tokenizer.load(tokenizer.find(workdir))
    assert (tok.mask, tok.pad, tok.cls, tok.sep, tok.eos) == (0, 1, 2, 3, 3)
    assert tok.encode_batch(["b c"])[0].tolist() == [6, 7]
    assert main(["export", workdir, target]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        there, here = (pathlib.Path(x, name).read_bytes() for x in (source, target))
        assert there == here


def pieces(path, **options) -> None:
    texts = ["the cat sat on the mat", "a dog ate the log"] * 20
    with open(path, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=f,
            vocab_size=30,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )


def test_t5_s_pieces_and_sentinels(tmp_path):
    source = save(build("t5"), tmp_path / "hf")
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    pieces(os.path.join(source, "spiece.model"), **ids)
    extra = {"extra_ids": 4}
    pathlib.Path(source, "tokenizer_config.json").write_text(json.dumps(extra))
    workdir, target = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["import", source, workdir]) == 0
    tok = tokenizer.load(tokenizer.find(workdir))
    count = len(tok.pieces)
    assert tok.specials.sentinels == tuple(range(count + 3, count - 1, -1))
    assert (tok.pad, tok.eos, tok.start) == (0, 1, 0)
    assert main(["export", workdir, target]) == 0
    assert "spiece.model" in os.listdir(target)
    assert "tokenizer.model" not in os.listdir(target)


def test_a_tokenizer_that_is_missing_is_asked_for(tmp_path, capsys):
    source = save(build("marian"), tmp_path / "hf")
    pieces(os.path.join(source, "source.spm"))
    vocabulary = {"</s>": 0, "<unk>": 1, "a": 2, "<pad>": 36}
    pathlib.Path(source, "vocab.json").write_text(json.dumps(vocabulary))
    workdir, target = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["import", source, workdir]) == 0
    assert "holds no tokenizer.json" in capsys.readouterr().out
    found = json.loads(pathlib.Path(workdir, "special_tokens.json").read_text())
    assert (found["pad"], found["eos"], found["start"]) == (36, 0, 36)
    assert main(["export", workdir, target]) == 0
    assert {"vocab.json", "source.spm"} <= set(os.listdir(target))


def trained_workdir(folder, model) -> str:
    """A workdir as training leaves it, its model fresh, with a byte tokenizer."""
    config = experiment_config(model)
    config.validate()
    os.makedirs(checkpoint_dir(folder))
    pathlib.Path(folder, "config.json").write_text(to_json(config))
    tokenizer.ByteTokenizer().save(folder)
    rng = np.random.default_rng(0)
    flat = {
        path: jax.numpy.asarray(rng.standard_normal(x.shape, np.float32))
        for path, x in parameters(model).items()
    }
    params = unflatten_dict(flat, sep="/")
    with Checkpointer(checkpoint_dir(folder), CheckpointConfig()) as checkpointer:
        for step in (1000, 2000):
            checkpointer.save(step, {"params": params}, meta={}, wait=True)
        checkpointer.record(1000, {"eval/loss": 1.0})
        checkpointer.record(2000, {"eval/loss": 2.0})
    return str(folder)


SIZES = {"num_layers": 1, "d_model": 8, "num_heads": 2, "d_ff": 12, "max_len": 600}
MARIAN = {"norm_eps": 1e-5, "positions": "sinusoidal"}


def test_what_was_trained_here_is_exported(tmp_path):
    model = EncoderDecoderConfig(TransformerConfig(**SIZES, **MARIAN), 300)
    workdir = trained_workdir(tmp_path / "run", model)
    for which, found in (
        ("best", "step 1000 "),
        ("latest", "step 2000 "),
        ("1000", "step 1000 "),
        ("average:2", "mean of steps [1000, 2000]"),
    ):
        target = str(tmp_path / which)
        assert found in export_model(workdir, target, which)[0]
    found = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "best")
    config = found.config
    assert (config.pad_token_id, config.eos_token_id) == (0, 1)
    assert (config.decoder_start_token_id, config.forced_eos_token_id) == (0, 1)
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "best")
    ours = tokenizer.ByteTokenizer().encode_batch(["größer"])[0].tolist()
    assert text("größer")["input_ids"] == [*ours, 1]
    out = found.generate(**text(["a"], return_tensors="pt"), max_new_tokens=3)
    assert out[0, 0] == 0


WHY_NOT = [
    (
        EncoderDecoderConfig(TransformerConfig(**SIZES), 300),
        ("norm_eps=1e-06", "marian"),
    ),
    (
        LanguageModelConfig(TransformerConfig(**SIZES, positions="relative"), 300),
        ("positions='relative'", "gpt2"),
    ),
    (
        LanguageModelConfig(
            TransformerConfig(
                **SIZES, positions="rotary", norm="rms", norm_position="pre",
                bias="none", ffn="swiglu", attention_options=("scale", 1.0),
            ),
            300,
        ),
        ("('scale', 1.0)", "llama"),
    ),
    (
        EncoderConfig(
            TransformerConfig(**SIZES, positions="learned"), 300, num_types=0
        ),
        ("num_types=0", "bert"),
    ),
    (
        EncoderConfig(
            TransformerConfig(**SIZES, positions="learned"), 300, pool="mean"
        ),
        ("pool='mean': expected 'token'", "bert"),
    ),
    (
        VisionConfig(
            TransformerConfig(
                **SIZES | {"max_len": 9}, positions="learned", norm_position="pre"
            ),
            12, 4, pool="mean",
        ),
        ("pool='mean'", "vit"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "said"), WHY_NOT, ids=[w[1][1] for w in WHY_NOT])
def test_what_transformers_cannot_express_is_named(model, said, tmp_path, capsys):
    folder = tmp_path / "run"
    os.makedirs(folder)
    (folder / "config.json").write_text(to_json(ExperimentConfig(model=model)))
    assert main(["export", str(folder), str(tmp_path / "out")]) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    assert all(part in text for part in said)
    assert not (tmp_path / "out").exists()


# --- Mistakes and interruptions ---


def test_mistakes_are_answered_in_one_line(tmp_path, capsys):
    source = save(build("gpt2"), tmp_path / "hf")
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "x").write_text("kept")
    file.write_text("kept")
    empty.mkdir()
    new = str(tmp_path / "new")
    for argv, said in (
        (["import", source, str(full)], "not empty"),
        (["import", source, str(file)], "not empty"),
        (["import", str(tmp_path / "none"), new], "no such folder"),
        (["import", str(empty), new], "config.json"),
        (["export", str(empty), new], "config.json"),
        (["import", source], "WORKDIR"),
        (["import", source, new, "--scan"], "--scan"),
        ([], "command"),
    ):
        assert main(argv) == 1, argv
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1
        assert said in text
    assert (full / "x").read_text() == file.read_text() == "kept"
    assert main(["import", source, str(empty)]) == 0  # an empty one is as good as none
    assert main(["export", str(empty), new, "--checkpoint=7"]) == 1
    assert "7" in capsys.readouterr().err
    weights = pathlib.Path(source, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    assert main(["import", source, new]) == 1
    assert "model.safetensors" in capsys.readouterr().err
    os.remove(weights)
    assert main(["import", source, new]) == 1
    assert "save_pretrained" in capsys.readouterr().err
    pathlib.Path(source, "config.json").write_text("{")
    assert main(["import", source, new]) == 1
    assert "not JSON" in capsys.readouterr().err
    left = {"hf", "full", "file", "empty"}
    assert set(os.listdir(tmp_path)) == left


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError(28, "No space left")])
def test_an_interruption_leaves_nothing(kind, tmp_path, capsys, monkeypatch):
    source = save(build("gpt2"), tmp_path / "hf")
    target = tmp_path / "run"

    def fail(*args):
        assert [x.name for x in tmp_path.glob(".*/*/config.json")] == ["config.json"]
        raise kind

    monkeypatch.setattr(transfer.Import, "read", fail)
    code = main(["import", source, str(target)])
    assert code == (130 if kind is KeyboardInterrupt else 1)
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert os.listdir(tmp_path) == ["hf"]


# --- Memory ---

# Not getrusage: its peak begins as that of the process that started this one.
MEASURE = """
import re
import jax
from triform.interop import __main__ as command
from triform.runtime import host

jax.config.update("jax_platforms", "cpu")
jax.numpy.zeros(8).block_until_ready()
host.return_freed_memory()

def peak():
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024

before = peak()
command.main(["import", "hf", "run"])
print("peak", peak() - before)
command.main(["export", "run", "out"])
print("peak", peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, sets glibc's malloc")
def test_memory_is_little_more_than_the_parameters(tmp_path):
    sizes = {"n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 30_000}
    hf = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **sizes}
    config = families.model_config(hf)
    shapes = parameters(config)
    zeros = {path: np.zeros(x.shape, np.float32) for path, x in shapes.items()}
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(hf))
    found = transfer.tensors(families.FAMILIES["gpt2"], config, zeros)
    size = sum(write(str(source), found)) / 2**20
    assert size > 150
    # One device: on several the parameters are replicated.
    env = {k: x for k, x in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    peaks = [float(x) for x in re.findall(r"peak ([\d.]+)", done.stdout)]
    assert len(peaks) == 2, done.stderr
    # Compiled programs and libraries take the same whatever the model's size.
    assert max(peaks) < 1.2 * size + 80, (peaks, size)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > size * 2**20
