"""--config, --config.KEY=VALUE, --keys, and the commands that programs print."""

import dataclasses
import importlib
import inspect
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
from absl import flags

from triform import config_flag, console, train
from triform.configs import keys, plugins, schema
from triform.configs.schema import ExperimentConfig
from triform.data.datasets import DATASETS
from triform.models import MODELS
from triform.models.algorithms import ALGORITHMS
from triform.models.feed_forward import FFNS
from triform.models.positions import POSITIONS
from triform.runtime import commands
from triform.runtime.errors import UserError
from triform.runtime.optim import OPTIMIZERS, SCHEDULES
from triform.runtime.partition import PLACEMENTS
from triform.tasks import TASKS

ROOT = pathlib.Path(__file__).resolve().parent.parent


def refusal(call, *args):
    """The line that a call is refused with."""
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Which config ---


def test_a_config_by_name_by_path_and_from_a_workdir(tmp_path, monkeypatch):
    by_name = config_flag.load("llama:8b")
    assert by_name == config_flag.load(str(ROOT / "configs" / "llama.py") + ":8b")
    assert by_name.model.trunk.d_model == 4096
    assert config_flag.load("llama") == config_flag.load("llama:1b")
    (tmp_path / "config.json").write_text(schema.to_json(by_name))
    assert config_flag.load(str(tmp_path)) == by_name
    monkeypatch.chdir(tmp_path.parent)
    assert config_flag.load(f"{tmp_path.name}/config.json") == by_name


def test_a_wrong_config_lists_the_nearest(tmp_path, no_plugins):
    assert "did you mean llama?" in refusal(config_flag.load, "lama")
    assert "mean --config=gpt2?" in refusal(config_flag.load, "configs/gpt2s.py")
    assert "one of autoencoder_mnist, " in refusal(config_flag.load, "qqq")
    assert "'1b', '8b', 'smoke'" in refusal(config_flag.load, "llama:9b")
    assert "holds no config.json" in refusal(config_flag.load, str(tmp_path))
    for text, part in (
        ("x = 1\n", "defines no get_config"),
        ("def get_config(variant=''):\n    return 3\n", "returned int"),
        ("def get_config(variant=''):\n    return 1 / 0\n", "wrong.py:2: ZeroDiv"),
        ("def get_config(\n", "wrong.py:1: SyntaxError"),
    ):
        path = tmp_path / "wrong.py"
        path.write_text(text)
        assert part in refusal(config_flag.load, str(path))
        no_plugins()


# --- Keys ---


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("trian.steps", "did you mean steps?"),
        ("modle.trunk.d_model", "did you mean model?"),
        ("model.trnk.d_model", "did you mean model.trunk?"),
        ("model.trunk.nun_layers", "did you mean model.trunk.num_layers?"),
        ("d_model", "did you mean model.trunk.d_model?"),
        ("optim.qq", "it has name, learning_rate, "),
        ("steps.x", "steps is a value, 100000"),
        ("model.trunk", "is a section"),
    ],
)
def test_a_wrong_key_is_answered_with_the_nearest(key, hint):
    assert hint in refusal(
        config_flag.check_key, config_flag.load("llama:8b"), key, "1"
    )


def test_every_key_of_every_config_may_be_set():
    for name in config_flag.names():
        config = config_flag.load(name)
        for key in config_flag.all_keys(config):
            owner = config
            for part in key.split("."):
                owner = getattr(owner, part)
            if not dataclasses.is_dataclass(owner):
                config_flag.check_key(config, key, "")


def parsed(*argv):
    """(config, what is left) of a command line, with flags of its own."""
    before = {*flags.FLAGS}
    try:
        train.define()
        rest = config_flag.define(["train.py", *argv])
        flags.FLAGS(rest)
        return config_flag.value(), rest
    finally:
        for name in {*flags.FLAGS} - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


def test_the_config_may_stand_anywhere_and_types_of_sections_are_chosen():
    config, rest = parsed("--config.steps=3", "--config=llama:8b", "--config.seed=4")
    assert (config.steps, config.seed, config.model.trunk.d_model) == (3, 4, 4096)
    assert rest == ["train.py", "--config.steps=3", "--config.seed=4"]
    config, _ = parsed(
        "--config=llama:8b",
        "--config.task=ClassificationConfig",
        "--config.data=SequenceClassificationConfig",
        "--config.data.label=mood",
    )
    assert type(config.task) is schema.ClassificationConfig
    assert config.task.z_loss == 1e-4  # both have it
    assert (config.data.label, config.data.batch_size) == ("mood", 512)
    wrong = ("--config=llama:8b", "--config.task=Qq")
    assert "expected one of TokenPredictionConfig, " in refusal(parsed, *wrong)


@pytest.mark.parametrize(
    ("given", "windows"), [("", ()), ("()", ()), ("8", (8,)), ("8,0", (8, 0))]
)
def test_a_tuple_without_a_value_is_empty(given, windows):
    words = "--config=protein", f"--config.model.trunk.windows={given}"
    assert parsed(*words)[0].model.trunk.windows == windows
    assert parsed("--config=protein", "--config.data.mask=")[0].data.mask == ""


def test_plugins_of_the_command_line_and_of_an_architecture(
    no_plugins, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = "from triform.configs.schema import TokenPredictionConfig as Base\n"
    text += "class NovelConfig(Base): pass\nTASKS = {NovelConfig: 1}\n"
    pathlib.Path("novel.py").write_text(text + "FFNS = {'novel': (abs, False)}\n")
    flags = ("--config=llama:8b", "--config.plugins=novel.py")
    config, _ = parsed(
        *flags, "--config.task=NovelConfig", "--config.model.trunk.ffn=novel"
    )
    assert config.plugins == (str(tmp_path / "novel.py"),)
    assert type(config.task).__name__ == "NovelConfig"
    workdir = tmp_path / "run"
    workdir.mkdir()
    plugins.save(config.plugins, str(workdir))
    (workdir / "config.json").write_text(schema.to_json(config))
    config, _ = parsed("--config=llama:1b", f"--config.model=from:{workdir}")
    assert config.model.trunk.ffn == "novel"
    assert [pathlib.Path(p).name for p in config.plugins] == ["novel.py"]


def test_a_run_starts_from_the_same_others_in_any_folder(tmp_path, monkeypatch):
    config = ExperimentConfig(init=(schema.InitRule("runs/b:best"),))
    config.init_from = "runs/a:7"
    monkeypatch.chdir(tmp_path)
    config = config.resolved()
    monkeypatch.chdir("/")
    again = config.resolved()
    assert again.init_from == config.init_from == str(tmp_path / "runs" / "a:7")
    assert again.init[0].source == str(tmp_path / "runs" / "b:best")
    assert ExperimentConfig().resolved().init_from == ""


def test_a_workdir_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(
        schema.to_json(config_flag.load("listops:smoke"))
    )
    config, _ = parsed(f"--workdir={tmp_path}", "--config.steps=400")
    expected = config_flag.load("listops:smoke")
    expected.steps = 400
    assert config == expected
    text = refusal(parsed, f"--workdir={tmp_path / 'new'}")
    assert "no --config, and no --workdir of a run to go on with" in text


# --- What --keys lists ---


def of_all_types():
    for name, table in (("model", MODELS), ("task", TASKS), ("data", DATASETS)):
        for kind in table:
            yield ExperimentConfig(**{name: kind()})


def test_every_key_has_a_meaning():
    for config in of_all_types():
        for name, value, meaning in keys._walk(config):
            assert meaning, f"{name}: no comment beside the field"
            if not dataclasses.is_dataclass(value):
                assert meaning not in ("Sizes", "Parts"), name


def test_a_key_that_is_not_there_is_answered_with_the_nearest():
    config = config_flag.load("llama:8b")
    assert "mean model.trunk?" in refusal(keys.listing, config, "model.trnk")
    assert "first ones are model, " in refusal(keys.listing, config, "qq")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--confg.data.source=x", "did you mean --config.data.source?"),
        ("--data.source=x", "unknown flag --data.source: did you mean --config.data"),
        ("-model.trunk.ffn=x", "did you mean --config.model.trunk.ffn?"),
        ("--dta.source=x", "no field 'dta'"),
    ],
)
def test_a_misspelt_section_is_one_line_with_the_nearest(word, hint):
    assert hint in refusal(parsed, "--config=llama:8b", word)


def test_choices_are_those_of_the_tables():
    found = {key.name: key for key in keys.listing(config_flag.load("llama:8b"))}
    for name, table in {
        "model.trunk.ffn": FFNS,
        "model.trunk.positions": POSITIONS,
        "model.trunk.attention": ALGORITHMS,
        "optim.name": OPTIMIZERS,
        "optim.schedule": SCHEDULES,
        "placement": PLACEMENTS,
        "model.trunk.norm": ("layer", "rms"),
        "data.documents": ("joined", "separate"),
        "model.tie_head": ("True", "False"),
        "task": [kind.__name__ for kind in TASKS],
        "data.source": (),
        "steps": (),
    }.items():
        assert found[name].choices == tuple(table), name
    assert found["model.trunk.d_model"].value == 4096
    few = keys.listing(config_flag.load("llama"), "model.trunk.rope")
    assert {key.name.rpartition(".")[0] for key in few[1:]} == {"model.trunk.rope"}
    assert "no such key" in refusal(keys.listing, config_flag.load("llama"), "model.q")


# --- The console command ---


def test_every_program_has_a_door():
    for name, (module, about) in console.PROGRAMS.items():
        found = importlib.import_module(module)
        assert [*inspect.signature(found.cli).parameters] == ["argv", "program"]
        assert f"  {name:10}{about}" in console.usage()


def test_a_wrong_program_and_help(capsys):
    assert console.main(["triform", "trian"]) == 1
    assert "did you mean train?" in capsys.readouterr().err
    assert console.main(["triform", "--help"]) == console.main(["triform"]) == 0
    assert capsys.readouterr().out == 2 * f"{console.usage()}\n"


def test_the_door_imports_nothing_heavy():
    code = (
        "import sys, triform, triform.console; assert dir(triform)\n"
        "heavy = {'jax', 'numpy', 'absl', 'triform.train'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert triform.load.__name__ == 'load'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        (ROOT / "train.py", ["{python}", "{root}/evaluate.py"]),
        (ROOT / "__main__.py", ["{python}", "-m", "triform", "evaluate"]),
    ],
)
def test_commands_go_on_as_the_user_began(started, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(started)])
    monkeypatch.chdir(tmp_path)
    workdir = tmp_path / "my runs" / "a"
    words = shlex.split(commands.line("evaluate", workdir=workdir, split=""))
    python = commands._program(sys.executable)
    assert words == [
        *(word.format(python=python, root=commands.ROOT) for word in expected),
        f"--workdir={os.path.join('my runs', 'a')}",
    ]
    monkeypatch.chdir(ROOT / "docs")  # outside: whole paths
    words = shlex.split(commands.line("evaluate", workdir=workdir))
    assert words[-1] == f"--workdir={workdir}"


def test_the_console_command_is_shown_by_its_name(monkeypatch, tmp_path):
    script = tmp_path / "bin" / "triform"
    script.parent.mkdir()
    script.write_text("")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.chdir(tmp_path)
    assert commands.start("sweep") == ["bin/triform", "sweep"]
    monkeypatch.setenv("PATH", str(script.parent))
    assert commands.start("sweep") == ["triform", "sweep"]
