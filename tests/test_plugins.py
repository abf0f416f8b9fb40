"""Plugins: tables merged by name, copies in the workdir, one version in a process."""

import dataclasses
import pathlib
import re
import subprocess

import numpy as np
import pytest

from triform.configs import plugins, schema
from triform.data import sources
from triform.experiment import Experiment
from triform.models.encoder import Encoder
from triform.models.feed_forward import FFNS
from triform.runtime.errors import UserError
from triform.tasks import TASKS
from triform.workdir import open_config, saved_config

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "plugins.md"
PAPER = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0]
RELU2 = 'FFNS = {"relu2": (lambda x: x * x, False)}\n'


@pytest.fixture
def write(tmp_path, no_plugins):
    """(path, text) -> the path of a file with this text."""

    def make(name, text=RELU2):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return make


def test_the_paper_of_the_docs_is_short():
    assert len(PAPER.splitlines()) <= 60


@pytest.mark.parametrize("table", [*plugins.TABLES])
def test_rows_join_every_table_and_a_taken_name_joins_none(table, write):
    taken = next(iter(plugins.TABLES[table]))
    by_type = isinstance(taken, type)
    name = taken.__name__ if by_type else taken
    row = "class {0}: pass\n{1} = {{{0}: 1}}\n" if by_type else "{1} = {{'{0}': 1}}\n"
    plugins.load(write("good.py", row.format("Novel", table)))
    rows = [getattr(row, "__name__", row) for row in plugins.TABLES[table]]
    assert rows.count("Novel") == 1
    before = {k: dict(x) for k, x in plugins.TABLES.items()}
    other = "INITS" if table != "INITS" else "FFNS"
    text = f"{other} = {{'unheard': 1}}\n" + row.format(name, table)
    with pytest.raises(UserError, match=rf"bad\.py: {table}\['{name}'\]: Triform"):
        plugins.load(write("bad.py", text))
    with pytest.raises(UserError, match=rf"worse\.py: {table}.*good\.py has a row"):
        plugins.load(write("worse.py", row.format("Novel", table)))
    assert before == {k: dict(x) for k, x in plugins.TABLES.items()}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x = 1\ny = (\n", (":2: SyntaxError",)),
        ("x = 1\n\ny = nope\n", (":3: NameError", "nope")),
        ("import beside\n", (":1: ModuleNotFoundError", "plugins.load('NAME.py'")),
        ("FFN = {'relu2': 1}\n", ("FFN: no such table", "did you mean FFNS?")),
    ],
)
def test_a_plugin_that_fails_is_one_line_with_file_and_line(text, parts, write):
    path = write("broken.py", text)
    with pytest.raises(UserError) as error:
        plugins.load(path)
    assert all(part in str(error.value) for part in (path, *parts))
    assert "\n" not in str(error.value)
    assert not plugins._loaded
    with pytest.raises(UserError, match="nowhere.py: No such file"):
        plugins.load(path.replace("broken", "nowhere"))
    with pytest.raises(UserError, match="must be a Python file"):
        plugins.load(write("not-a-name.py"))


def test_the_same_file_elsewhere_is_the_same_module_another_version_is_refused(write):
    first = plugins.load(write("a/parts.py"))
    assert plugins.load(write("b/parts.py")) is first
    with pytest.raises(UserError, match="a/parts.py, which this process uses"):
        plugins.load(write("c/parts.py", RELU2 + "# another\n"))


def test_a_table_that_a_plugin_imports_is_not_its_own(write):
    text = "from triform.models.feed_forward import FFNS\n"
    assert plugins.tables(plugins.load(write("reads.py", text))) == {}


def test_what_a_plugin_loads_goes_with_it(write, tmp_path, no_plugins):
    write("lib/parts.py")
    text = "from triform.configs import plugins\n"
    text += "parts = plugins.load('parts.py', __file__)\nACT = parts.FFNS['relu2']\n"
    config = schema.ExperimentConfig(plugins=(write("lib/outer.py", text),))
    plugins.load_all(config)
    assert [pathlib.Path(p).name for p in config.plugins] == ["outer.py", "parts.py"]
    plugins.save(config.plugins, str(tmp_path))
    no_plugins()
    found = plugins.saved(str(tmp_path), ("outer.py", "parts.py"))
    assert found[0] == str(tmp_path / "code" / "outer.py")
    assert "relu2" in FFNS


def test_a_config_names_the_plugins_that_it_uses(write):
    path = write("parts.py")
    plugins.load(path)
    config = schema.ExperimentConfig()
    config.model.trunk.ffn = "relu2"
    with pytest.raises(UserError, match=r"model\.trunk\.ffn=relu2: it is in .*parts"):
        plugins.load_all(config)
    config.plugins = (path,)
    plugins.load_all(config)
    config.validate()


@pytest.fixture
def saved(write, tmp_path):
    """(original, workdir) of a run of the paper that has just been claimed."""
    path = write("paper.py", PAPER)
    config = plugins.load(path).get_config()
    config.plugins = (path,)
    Experiment(config.resolved())
    workdir = tmp_path / "run"
    workdir.mkdir()
    plugins.save(config.plugins, str(workdir))
    (workdir / "config.json").write_text(schema.to_json(config))
    return pathlib.Path(path), workdir


def test_a_workdir_needs_no_original(saved, no_plugins, tmp_path):
    path, workdir = saved
    path.unlink()
    no_plugins()
    moved = workdir.rename(tmp_path / "moved")
    config = open_config(str(moved))
    assert config.plugins == (str(moved / "code" / "paper.py"),)
    assert type(config.task).__name__ == "CalmConfig"
    assert type(config.task) in TASKS
    again = saved_config(str(moved))
    assert schema.differences(config, again) == {}
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=moved / "code")
    assert done.returncode == 0


@pytest.mark.parametrize("which", ["original", "copy"])
def test_a_changed_plugin_is_refused_until_the_printed_command_accepts_it(
    which, saved, no_plugins
):
    original, workdir = saved
    changed = original if which == "original" else workdir / "code" / "paper.py"
    changed.write_text(PAPER.replace("penalty: float = 0.1", "penalty: float = 0.3"))
    no_plugins()
    if which == "original":
        plugins.load(str(original))
    with pytest.raises(UserError, match="another version|was edited") as error:
        open_config(str(workdir))
    command = str(error.value).rpartition(": ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    assert type(open_config(str(workdir)).task)().penalty == 0.3
    no_plugins()
    (workdir / "code" / "paper.py").unlink()
    with pytest.raises(UserError, match="is gone; restore it"):
        open_config(str(workdir))


def test_cached_arrays_and_identity_follow_the_file(write, no_plugins):
    seen = set()
    for text in (PAPER, PAPER + "# another version\n", PAPER):
        plugins.load(write("paper.py", text))
        source = sources.source("doubles")
        assert source.splits() == ("train", "validation", "test")
        seen.add(source.fingerprint("train"))
        no_plugins()
    assert len(seen) == 2


HEAD = '''
import dataclasses
import jax.numpy as jnp
from flax import linen as nn
from triform.models.encoder import Encoder, EncoderConfig
from triform.models.positions import Scheme

class LengthHead(nn.Module):
    """{'label': [B, 1]}: the sum of a dense layer over the row."""

    config: object

    @nn.nowrap
    def outputs(self):
        return {"label": "num_labels"}

    @nn.compact
    def __call__(self, x, mask, batch, frontend):
        return {"label": nn.Dense(1, name="label_head")(x).sum(1)}

@dataclasses.dataclass(unsafe_hash=True)
class LengthConfig(EncoderConfig):
    num_labels: int = 1

    def heads(self):
        return (LengthHead(self.trunk),)

def ramp(config, positions, dtype):
    first = jnp.arange(config.d_model) == 0
    return (positions[..., None] * first).astype(dtype)

MODELS = {LengthConfig: Encoder}
POSITIONS = {"ramp": Scheme(embed=ramp)}
'''


def test_a_head_and_a_position_scheme(write):
    module = plugins.load(write("length.py", HEAD))
    trunk = schema.TransformerConfig(2, 8, 2, max_len=6, d_ff=8, positions="ramp")
    model = module.LengthConfig(trunk, vocab_size=9, masked_head=False)
    config = schema.ExperimentConfig(
        model,
        schema.RegressionConfig(),
        schema.SequenceClassificationConfig(max_len=6, target="number"),
        plugins=(module.__file__,),
        evaluation=schema.EvaluationConfig(metrics=()),
    )
    experiment = Experiment(config)
    batch = experiment.empty_batch(config.data.shapes()[0], rows=1)
    variables = experiment.init_variables()
    out = experiment.model.apply(variables, batch)["label"]
    assert out.shape == (1, 1)
    model.trunk = dataclasses.replace(trunk, positions="none")
    without = Encoder(model).apply(variables, batch)["label"]
    assert np.isfinite(out).all()
    assert not np.allclose(out, without)
