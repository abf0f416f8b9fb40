"""Starting from another run's parameters: what is restored, adapted, skipped, new."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triform import workdir as workdirs
from triform.configs import schema
from triform.configs.schema import ExperimentConfig
from triform.data.codecs import files as codec_files
from triform.data.codecs import text
from triform.data.datasets import (
    CausalLMConfig,
    ImagesConfig,
    MaskedLMConfig,
    SequenceClassificationConfig,
)
from triform.experiment import Experiment
from triform.models import EncoderConfig, LanguageModelConfig, VisionConfig
from triform.models.config import TransformerConfig
from triform.models.stacking import looped_layers
from triform.runtime import optim
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import UserError
from triform.runtime.paths import path_name
from triform.scores.text import EvaluationConfig
from triform.tasks import (
    ClassificationConfig,
    PretrainingConfig,
    TokenPredictionConfig,
)

CODECS = {"text": text.ByteTokenizer()}
SIZES = {"num_layers": 2, "d_model": 8, "num_heads": 2, "d_ff": 12, "dropout": 0.0}


def experiment_config(model, task, data, **fields):
    evaluation = EvaluationConfig(metrics=())
    return ExperimentConfig(model, task, data, evaluation=evaluation, **fields)


def language_model(**trunk):
    trunk = TransformerConfig(**SIZES, max_len=16, **trunk)
    return experiment_config(
        LanguageModelConfig(trunk, 11),
        TokenPredictionConfig(label_smoothing=0.0),
        CausalLMConfig(max_len=8),
    )


def encoder(labels=2, masked=True):
    trunk = TransformerConfig(**SIZES, max_len=16, positions="learned")
    if masked:
        model = EncoderConfig(trunk, 11, num_labels=labels)
        return experiment_config(model, PretrainingConfig(), MaskedLMConfig(max_len=8))
    model = EncoderConfig(trunk, 11, masked_head=False, num_labels=labels)
    data = SequenceClassificationConfig(max_len=8)
    return experiment_config(model, ClassificationConfig(), data)


def vision(size, pool="token"):
    length = (size // 4) ** 2 + (pool == "token")
    trunk = TransformerConfig(**SIZES, max_len=length, positions="learned")
    model = VisionConfig(trunk, size, 4, 1, pool, num_labels=3)
    data = ImagesConfig(size=size, channels=1)
    return experiment_config(model, ClassificationConfig(), data)


@pytest.fixture
def workdir(tmp_path):
    """config -> (workdir of a run whose parameters are noise, those parameters)."""

    def make(config):
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(Experiment(config).make_state).params
        params = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes
        )
        (tmp_path / "config.json").write_text(schema.to_json(config))
        with Checkpointer(
            workdirs.checkpoint_dir(str(tmp_path)), config.checkpoint
        ) as out:
            out.save(7, {"params": params}, meta={})
        codec_files.save(CODECS, str(tmp_path))
        return str(tmp_path), params

    return make


def start(config, source):
    experiment = Experiment(config)
    rules = (schema.InitRule(source),) if isinstance(source, str) else source
    state, report = workdirs.start(experiment, rules)
    return experiment.placement.unload(state), report


def flat(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): np.asarray(x) for path, x in found}


@pytest.mark.parametrize("placement", ["mesh", "pmap"])
def test_all_of_the_same_model_is_restored(workdir, placement):
    source, params = workdir(language_model())
    config = language_model()
    config.placement, config.optim.ema_decay = placement, 0.9
    state, report = start(config, f"{source}:latest")
    params = flat(params)
    for tree in (state.params, optim.evaluation_params(None, state.opt_state)):
        for name, x in flat(tree).items():
            np.testing.assert_array_equal(x, params[name])
    assert report.restored == {name: x.shape for name, x in params.items()}
    assert not (report.adapted or report.skipped or report.new)
    assert state.step == 0


@pytest.mark.parametrize("scanned", [False, True])
def test_looped_and_scanned_trunks_are_one(workdir, scanned):
    source, params = workdir(language_model(scan_layers=not scanned))
    state, report = start(language_model(scan_layers=scanned), source)
    expected = flat(looped_layers(jax.device_get(params)))
    found = flat(looped_layers(jax.device_get(state.params)))
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name])
    assert not (report.skipped or report.new)


def test_another_head_is_new_and_said_so(workdir):
    source, params = workdir(encoder())
    config = encoder(labels=5, masked=False)
    # Compiled as a run's are: the last bit depends on it.
    fresh = flat(jax.jit(Experiment(config).init_variables)()["params"])
    state, report = start(config, f"{source}:7")
    found, params = flat(state.params), flat(params)
    assert report.new == {"label_head/kernel": (8, 5), "label_head/bias": (5,)}
    assert set(report.skipped) == {
        *("label_head/kernel", "label_head/bias", "masked_bias"),
        *(f"masked_head/dense/{x}" for x in ("kernel", "bias")),
        *(f"masked_head/norm/{x}" for x in ("scale", "bias")),
    }
    for name, x in found.items():
        origin = fresh if name in report.new else params
        np.testing.assert_array_equal(x, origin[name])
    text = str(report)
    for part in ("restored: ", "skipped: 7 saved", "newly initialised: 2 arrays"):
        assert part in text
    assert "label_head/kernel (8, 5)" in text


def test_positions_of_images_are_resized(workdir):
    source, params = workdir(vision(16))
    state, report = start(vision(24), source)
    assert report.adapted.keys() == {"positions/table/embedding"}
    old, new = (flat(p)["positions/table/embedding"] for p in (params, state.params))
    np.testing.assert_array_equal(new[0], old[0])  # the class token's
    # Corners keep their values: bilinear, with the edges held.
    corners = [old[1:].reshape(4, 4, 8), new[1:].reshape(6, 6, 8)]
    np.testing.assert_allclose(corners[1][0, 0], corners[0][0, 0], atol=1e-6)
    assert "(17, 8) -> (37, 8)" in str(report)


def test_longer_rows_repeat_the_positions_that_were_learned(workdir):
    source, params = workdir(encoder())
    name, config = "positions/table/embedding", encoder()
    config.model.trunk.max_len, config.model.position_offset = 37, 2
    state, report = start(config, source)
    assert report.adapted.keys() == {name}
    assert "(16, 8) -> (37, 8)" in report.adapted[name]
    old, new = flat(params)[name], flat(state.params)[name]
    np.testing.assert_array_equal(new[:16], old)
    np.testing.assert_array_equal(new[16:30], old[2:])  # the first two are no places
    np.testing.assert_array_equal(new[30:], old[2:9])


@pytest.mark.parametrize("scanned", [False, True])
def test_global_projections_start_as_the_others(workdir, scanned):
    source, params = workdir(encoder())
    config = encoder(masked=False)
    trunk = config.model.trunk
    trunk.attention, trunk.windows, trunk.scan_layers = "local", (3,), scanned
    config.data.global_tokens = "first"
    state, report = start(config, source)
    assert len(report.copied) == (6 if scanned else 12) and not report.new
    found = flat(looped_layers(jax.device_get(state.params)))
    for name, x in flat(params).items():
        part, _, kind = name.rpartition("/")
        if part.endswith(("/query", "/key", "/value")):
            np.testing.assert_array_equal(found[f"{part}_global/{kind}"], x)
    assert "query_global/kernel from encoder/" in str(report)


def test_nothing_in_common_is_refused(workdir):
    source, _ = workdir(vision(16))
    config = language_model(positions="learned")
    config.model.trunk.d_model = 12
    with pytest.raises(UserError, match="none of its .* arrays has a name and shape"):
        start(config, source)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("/a/b", ("/a/b", "best")),
        ("/a/b:latest", ("/a/b", "latest")),
        ("/a/b:average:3", ("/a/b", "average:3")),
        ("/a/b:120", ("/a/b", "120")),
        ("/a/b:c", ("/a/b:c", "best")),
    ],
)
def test_which_checkpoint_is_named_after_a_colon(text, parsed, monkeypatch):
    monkeypatch.setattr("os.path.isdir", lambda path: True)
    assert workdirs.parse(text) == parsed


def test_a_missing_workdir_is_told():
    with pytest.raises(UserError, match=r"init_from='/no/such': no such folder"):
        start(copy.deepcopy(language_model()), "/no/such")


def test_a_shorter_context_keeps_the_first_positions(workdir):
    source, params = workdir(language_model(positions="learned"))
    config = language_model(positions="learned")
    config.model.trunk.max_len = 10
    state, report = start(config, source)
    name = "positions/table/embedding"
    assert report.adapted.keys() == {name}
    np.testing.assert_array_equal(flat(state.params)[name], flat(params)[name][:10])
    assert not report.new


@pytest.mark.parametrize("size", [9, 14])
def test_another_vocabulary_keeps_the_shared_rows(workdir, size):
    source, params = workdir(language_model())
    config = language_model()
    config.model.vocab_size = size
    fresh = flat(jax.jit(Experiment(config).init_variables)()["params"])
    state, report = start(config, source)
    name = "embedding/embedding"
    old, new = flat(params)[name], flat(state.params)[name]
    both = min(11, size)
    np.testing.assert_array_equal(new[:both], old[:both])
    np.testing.assert_array_equal(new[both:], fresh[name][both:])
    assert report.adapted.keys() == {name}
    assert f"(11, 8) -> ({size}, 8)" in str(report)


def test_rules_rename_choose_and_join_sources(workdir):
    """The second layer of another run becomes the first; the rest stays fresh."""
    source, params = workdir(language_model())
    config = language_model()
    config.model.trunk.num_layers = 1
    rename = (("layer_0/", "left_out/"), ("layer_1/", "layer_0/"))
    rules = (
        schema.InitRule(source, rename, only="layer_0/"),
        schema.InitRule(source, only="^embedding/"),
    )
    state, report = start(config, rules)
    found, params = flat(state.params), flat(params)
    for name in report.restored:
        origin = name.replace("layer_0/", "layer_1/")
        np.testing.assert_array_equal(found[name], params[origin])
    assert "embedding/embedding" in report.restored
    assert any("layer_0/" in name for name in report.restored)
    assert all("layer_0" not in name and "embedding" not in name for name in report.new)


def test_what_is_frozen_is_saved_once_and_stays(tmp_path):
    """Law 11, and that optimiser and checkpoints hold what is trained alone."""
    config = language_model()
    config.optim.train = (r"decoder/layer_1/.*",)
    experiment = Experiment(config)
    state = experiment.placement.init(experiment.make_state)
    frozen = flat(state.frozen)
    assert frozen and not set(frozen) & set(flat(state.params))
    held = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert held < 3 * sum(x.size for x in jax.tree.leaves(state.params))
    path = str(tmp_path)
    workdirs.save_frozen(path, state)
    with Checkpointer(workdirs.checkpoint_dir(path), config.checkpoint) as out:
        out.save(1, state.replace(frozen={}), meta={}, wait=True)
        saved = {k for k in out._read_meta(1)["arrays"] if "layer_0" in k}
        assert not saved
        restored, _ = workdirs.restore(experiment, out)
    for name, x in flat(restored.frozen).items():
        assert x.tobytes() == frozen[name].tobytes()
