"""The architecture of another run; what does not fit is said with its true cause."""

import copy

import numpy as np
import pytest
from test_workdir import encoder, flat, language_model, start, vision, workdir

from triform import config_flag
from triform.configs import architecture
from triform.configs.schema import (
    ClassificationConfig,
    InitRule,
    LoRAConfig,
    RegressionConfig,
    SequenceClassificationConfig,
    TokenClassificationConfig,
    TokenPredictionConfig,
    smoke,
)
from triform.runtime.errors import UserError
from triform.tasks import TokenRegressionConfig

__all__ = ["workdir"]  # a fixture


def test_the_architecture_of_a_run_with_the_head_of_this_one(workdir):
    """With init_from all but the new task's head is restored."""
    source, params = workdir(encoder())
    config = encoder(labels=5, masked=False)
    here = copy.deepcopy(config.model)
    here.trunk.d_model, here.vocab_size, here.trunk.num_layers = 24, 99, 1
    config.model = here
    config_flag.choose(config, "model", f"from:{source}")
    assert (config.model.trunk.d_model, config.model.vocab_size) == (8, 11)
    assert (config.model.num_labels, config.model.masked_head) == (5, False)
    state, report = start(config, source)
    assert report.new.keys() == {"label_head/kernel", "label_head/bias"}
    found, params = flat(state.params), flat(params)
    for name in report.restored:
        np.testing.assert_array_equal(found[name], params[name])


def test_adapters_are_put_around_the_architecture():
    there, here = encoder().model, LoRAConfig(encoder(5, masked=False).model, rank=3)
    here.model.trunk.d_model = 24
    found = architecture.taken(there, here)
    assert (found.rank, found.model.trunk.d_model, found.model.num_labels) == (3, 8, 5)
    # The classifier of images keeps what its positions depend on.
    found = architecture.taken(vision(16).model, vision(24, pool="mean").model)
    assert (found.image_size, found.pool) == (16, "token")


def test_a_missing_run_is_told():
    with pytest.raises(UserError, match="no such folder"):
        config_flag.choose(encoder(), "model", "from:/no/such")


@pytest.mark.parametrize(
    ("field", "value"), [("d_model", 12), ("d_ff", 20), ("num_layers", 1)]
)
def test_mismatches_name_both_values(field, value):
    there, here = language_model().model, language_model().model
    old = getattr(there.trunk, field)
    setattr(here.trunk, field, value)
    here.trunk.dropout, here.trunk.remat = 0.5, True  # no other parameters
    expected = f"trunk.{field} is {old} there, {value} here"
    assert architecture.mismatches(there, here) == [expected]
    assert architecture.mismatches(there, LoRAConfig(here)) == [expected]
    assert "EncoderConfig here" in architecture.mismatches(there, encoder().model)[0]


def test_the_cause_stands_in_the_refusal_and_in_the_report(workdir):
    source, _ = workdir(language_model())
    config = language_model()
    config.model.trunk.d_model = config.model.trunk.d_ff = 192
    with pytest.raises(UserError, match="d_model is 8 there, 192 here") as error:
        start(config, source)
    assert f"--config.model=from:{source}" in str(error.value)
    config.model.trunk.d_model = 8  # now all but the feed-forward layers fit
    _, report = start(config, source)
    assert "trunk.d_ff is 12 there, 192 here" in str(report)


def test_a_run_may_start_from_copies_alone(workdir, monkeypatch):
    """All arrays come from saved ones of other names: none is restored by its own."""
    source, params = workdir(language_model())
    config = language_model()
    monkeypatch.setattr(type(config.model), "origin", lambda self, name: f"base/{name}")
    state, report = start(config, (InitRule(source, (("^", "base/"),)),))
    assert not (report.restored or report.adapted or report.new)
    found, params = flat(state.params), flat(params)
    assert report.copied.keys() == params.keys()
    for name, x in params.items():
        np.testing.assert_array_equal(found[name], x)


KINDS = [
    (ClassificationConfig(), SequenceClassificationConfig, "number"),
    (RegressionConfig(), SequenceClassificationConfig, "class"),
    (TokenPredictionConfig(), TokenClassificationConfig, "number"),
    (TokenRegressionConfig(), TokenClassificationConfig, "class"),
]


@pytest.mark.parametrize(("task", "kind", "target"), KINDS)
def test_numbers_and_classes_are_told_apart(task, kind, target):
    """One output fits the size of both: what it means is the task's."""
    tags = kind is TokenClassificationConfig
    config = encoder(labels=1, masked=False)
    config.model.num_tags, config.model.num_labels = (1, 0) if tags else (0, 1)
    config.task, config.data = task, kind(max_len=8, target=target)
    with pytest.raises(ValueError, match="it predicts") as error:
        config.validate()
    right = {"number": "class", "class": "number"}[target]
    assert f"data.target={right!r}" in str(error.value)
    config.data.target = right
    config.validate()


@pytest.mark.parametrize(("layers", "windows", "found"), [(1, (), 1), (6, (), 2)])
def test_smoke_adds_no_layers(layers, windows, found):
    config = language_model()
    config.model.trunk.num_layers, config.model.trunk.windows = layers, windows
    smoke(config)
    assert config.model.trunk.num_layers == found


def test_rows_of_a_table_that_shrinks_are_the_first(workdir):
    """A vocabulary that was padded to 16 rows and is used with 11 again."""
    wide = language_model()
    wide.model.vocab_size, wide.model.tie_head = 16, False
    source, params = workdir(wide)
    config = language_model()
    config.model.tie_head = False
    state, report = start(config, source)
    assert report.adapted.keys() == {"embedding/embedding", "head/kernel"}
    old, new = flat(params), flat(state.params)
    np.testing.assert_array_equal(
        new["embedding/embedding"], old["embedding/embedding"][:11]
    )
    np.testing.assert_array_equal(new["head/kernel"], old["head/kernel"][:, :11])
    assert not report.new
