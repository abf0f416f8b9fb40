"""LoRA adapters of PEFT: the same logits, in and out; merged equals applied."""

import json
import os
import pathlib

import jax
import numpy as np
import peft
import pytest
import torch
from flax.traverse_util import flatten_dict
from hf_models import CASES, CLOSE, both, build, error, save
from safetensors.torch import load_file, save_file

from triform import workdir as workdirs
from triform.configs.schema import to_json
from triform.experiment import Experiment
from triform.interop import families
from triform.interop.__main__ import main
from triform.interop.suggest import experiment_config
from triform.interop.transfer import tensors
from triform.interop.weights import write
from triform.models import LoRAConfig
from triform.runtime.checkpoint import Checkpointer

LLAMA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
BERT = {"r": 3, "lora_alpha": 7, "target_modules": ["query", "value"]}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name: (case, settings of LoRA, of import, dtype)
ADAPTERS = {
    "llama": ("llama", LLAMA, (), torch.float32),
    "llama, all kernels, rsLoRA, scanned": (
        "llama",
        LLAMA | {"target_modules": ALL, "use_rslora": True},
        ("--scan_layers",),
        torch.float32,
    ),
    "llama, mixed ranks, bfloat16": (
        "llama",
        LLAMA | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        (),
        torch.bfloat16,
    ),
    "llama, ranks by layer": (
        "llama",
        LLAMA | {"rank_pattern": {"layers.1.self_attn.q_proj": 6}},
        ("--scan_layers",),
        torch.float32,
    ),
    "llama, one layer": (
        "llama",
        LLAMA | {"layers_to_transform": [1]},
        (),
        torch.float32,
    ),
    "bert": ("bert", BERT, (), torch.float32),
    "bert, more kernels": (
        "bert-label",
        BERT | {"target_modules": ["key", "dense"], "use_rslora": True},
        (),
        torch.bfloat16,
    ),
    "gpt2": (
        "gpt2",
        BERT | {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        (),
        torch.float32,
    ),
    "t5": ("t5", BERT | {"target_modules": ["q", "v", "wo"]}, (), torch.float32),
}
# Those in which no layer differs, so that the matrices need not be changed.
PLAIN = ("llama", "llama, all kernels, rsLoRA, scanned", "bert", "gpt2", "t5")


def adapted(case: str, settings, dtype):
    """A PyTorch model with random adapters."""
    torch.manual_seed(1)
    model = peft.get_peft_model(build(case), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.copy_((0.3 * torch.randn_like(x)).to(dtype))
    return model.eval()


def folders(case: str, settings, tmp_path, dtype=torch.float32):
    """(model with adapters, folder of the base model, folder of the adapters)."""
    model = adapted(case, settings, dtype)
    base = save(build(case), tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: x.to(dtype) for k, x in load_file(path).items()}, path)
    return model, base, str(tmp_path / "adapter")


def opened(workdir: str):
    """(config of the model, parameters) of a workdir, with or without a tokenizer."""
    experiment = Experiment(workdirs.open_config(workdir))
    with Checkpointer(
        workdirs.checkpoint_dir(workdir), experiment.config.checkpoint
    ) as checkpointer:
        variables = workdirs.load_variables(experiment, checkpointer, "best")[0]
    return experiment.config.model, jax.device_get(variables["params"])


def logits_agree(model, workdir: str) -> None:
    for theirs, found in both(model, *opened(workdir)):
        assert error(theirs, found) < CLOSE


@pytest.mark.parametrize("name", ADAPTERS)
def test_in_and_out(name, tmp_path, capsys):
    case, settings, options, dtype = ADAPTERS[name]
    model, base, adapter = folders(case, settings, tmp_path, dtype)
    run, merged, again = (str(tmp_path / x) for x in ("run", "merged", "again"))
    assert main(["import", base, run, f"--adapter={adapter}", *options]) == 0
    assert "adapters of" in capsys.readouterr().out
    logits_agree(model, run)
    # The adapters alone.
    assert main(["export", run, again, "--adapter"]) == 0
    back = peft.PeftModel.from_pretrained(build(case), again).eval()
    theirs, found = (
        {k: x for k, x in m.state_dict().items() if "lora_" in k} for m in (model, back)
    )
    files = [load_file(f"{x}/adapter_model.safetensors") for x in (adapter, again)]
    if name in PLAIN:
        assert found.keys() == theirs.keys()
        for key, x in theirs.items():
            assert torch.equal(x, found[key]), key
        for key, x in files[0].items():
            assert torch.equal(x, files[1][key]), key
    assert {x.dtype for x in files[1].values()} == {dtype}
    if dtype == torch.float32 or name in PLAIN:
        logits_agree(back, run)
    # Merged.
    assert main(["export", run, merged]) == 0
    kind = type(model.base_model.model)
    whole = kind.from_pretrained(merged).eval()
    expected = model.merge_and_unload().state_dict()
    for key, x in whole.state_dict().items():
        np.testing.assert_allclose(x, expected[key], rtol=1e-5, atol=1e-6)


def lora_run(folder, model) -> str:
    """A workdir as a LoRA run leaves it: adapters saved by steps, the rest once."""
    config = experiment_config(model)
    config.validate()
    os.makedirs(workdirs.checkpoint_dir(folder))
    pathlib.Path(folder, "config.json").write_text(to_json(config))
    state = Experiment(config).make_state()
    assert all("lora_" in k[-1] for k in flatten_dict(state.params))
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    leaves = [
        0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
    ]
    state = state.replace(params=jax.tree.unflatten(tree, leaves))
    workdirs.save_frozen(folder, state)
    path = workdirs.checkpoint_dir(folder)
    with Checkpointer(path, config.checkpoint) as checkpointer:
        checkpointer.save(1000, state.replace(frozen={}), meta={}, wait=True)
    return str(folder)


@pytest.mark.parametrize("case", ["llama", "bert-label", "gpt2"])
def test_what_was_trained_here_goes_to_peft(case, tmp_path):
    architecture, given = CASES[case]
    hf = {"model_type": case.split("-")[0], "architectures": [architecture], **given}
    # Of GPT-2's fused kernel only two of three parts have adapters, of other ranks.
    model = LoRAConfig(
        families.model_config(hf),
        rank=3,
        alpha=5.0,
        targets=("attention/(query|value|out)/kernel$",),
        ranks=(("value", 2), ("out", 1)),
    )
    run = lora_run(tmp_path / "run", model)
    merged, adapter, base = (str(tmp_path / x) for x in ("merged", "adapter", "base"))
    assert main(["export", run, merged]) == 0
    assert main(["export", run, adapter, "--adapter"]) == 0
    whole = type(build(case)).from_pretrained(merged).eval()
    logits_agree(whole, run)
    # The base model is what is left without the adapters.
    params = flatten_dict(opened(run)[1], sep="/")
    bare = {k: np.asarray(x) for k, x in params.items() if "lora_" not in k}
    os.makedirs(base)
    family = families.family_for(model.model)
    list(write(base, tensors(family, model.model, bare)))
    pathlib.Path(base, "config.json").write_bytes(
        pathlib.Path(merged, "config.json").read_bytes()
    )
    start = type(whole).from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(start, adapter).eval()
    logits_agree(loaded, run)
    # And back.
    again = str(tmp_path / "again")
    assert main(["import", base, again, f"--adapter={adapter}"]) == 0
    logits_agree(loaded, again)


def test_an_adapter_is_not_all_if_more_was_trained(tmp_path, capsys):
    _, base, adapter = folders("bert-label", BERT, tmp_path)
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["import", base, run, f"--adapter={adapter}"]) == 0
    path = pathlib.Path(run, "config.json")
    config = json.loads(path.read_text())
    config["optim"]["train"] = [".*/lora_[ab]", "label_head/.*"]
    path.write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["export", run, out, "--adapter"]) == 1
    text = capsys.readouterr().err
    assert "label_head/" in text and "--adapter" in text and text.count("\n") == 1
    assert main(["import", base, str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "plain"), out, "--adapter"]) == 1
    assert "no adapters" in capsys.readouterr().err
    assert not os.path.exists(out)


# (changes of adapter_config.json, what the one line says)
REFUSED = [
    ({"use_dora": True}, "use_dora=True"),
    ({"modules_to_save": ["classifier"]}, "modules_to_save=['classifier']"),
    ({"bias": "all"}, "bias='all'"),
    ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"lora_bias": True}, "lora_bias=True"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"of_another_version": 1}, "of_another_version=1"),
    ({"r": None}, "r is missing"),
]


def test_what_we_do_not_do_is_refused(tmp_path, capsys):
    _, base, adapter = folders("llama", LLAMA, tmp_path)
    run, path = str(tmp_path / "run"), pathlib.Path(adapter, "adapter_config.json")
    given = path.read_text()

    def refused(*parts):
        capsys.readouterr()
        assert main(["import", base, run, f"--adapter={adapter}"]) == 1
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1
        assert all(part in text for part in parts), text
        assert not os.path.exists(run)

    for changes, part in REFUSED:
        path.write_text(json.dumps(json.loads(given) | changes))
        refused(part)
    path.write_text(given)
    file = os.path.join(adapter, "adapter_model.safetensors")
    stored = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    for change, part in (
        ({f"{name}.lora_magnitude_vector": torch.ones(2)}, "lora_magnitude_vector"),
        ({f"{name[:-6]}x.lora_A.weight": torch.ones(2, 16)}, "x.lora_B.weight"),
        (
            {f"{name[:-6]}x.lora_{k}.weight": torch.ones(2, 2) for k in "AB"},
            "self_attn.x.weight",
        ),
        ({f"{name}.lora_A.weight": torch.ones(4, 5)}, "5 inputs"),
    ):
        save_file(stored | change, file)
        refused(part)
    os.remove(path)
    refused("adapter_config.json")
