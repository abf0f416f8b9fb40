"""The Python of docs/python.md and of the README runs as it is written."""

import pathlib
import re
import signal

import numpy as np
import pytest

from triform.configs import my_labels

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "python.md"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    """What all blocks together define, run in an empty folder."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("docs")
        patch.chdir(folder)
        patch.setenv("TRIFORM_CACHE", str(folder / "cache"))
        before = [signal.getsignal(number) for number in SIGNALS]
        for block in BLOCKS:
            exec(block, names)
        names["signals"] = before, [signal.getsignal(number) for number in SIGNALS]
        yield names


def test_ten_lines_train_generate_and_classify(namespace):
    assert len(BLOCKS[0].strip().splitlines()) <= 10
    answer = namespace["answer"]
    assert answer.label in answer.probabilities
    assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_every_request_has_its_samples(namespace):
    outputs = namespace["texts"]
    assert [len(x.samples) for x in outputs] == [2, 2, 2]
    assert all(len(x.token_scores) <= 8 for x in outputs)
    assert outputs[0].warnings == outputs[1].warnings == ()
    assert outputs[2].warnings[0].startswith("cut: ")


def test_a_changed_config_is_trained(namespace):
    assert np.isfinite(namespace["scores"]["test/loss"])


def test_evaluation_gives_scalars_and_predictions(namespace):
    result = namespace["result"]
    assert len(result.predictions) == result.scalars["test/examples"]


def test_hidden_states_and_logits_have_the_documented_axes(namespace):
    config, batch = namespace["triform"].load("runs/cldr").config, namespace["batch"]
    rows, source = batch["encoder_inputs"].shape
    assert namespace["hidden"].shape == (rows, source, config.model.trunk.d_model)
    logits = (rows, batch["inputs"].shape[1], config.model.vocab_size)
    assert namespace["logits"].shape == logits


def test_a_loop_around_a_model_learns(namespace):
    first, *_, last = namespace["losses"]
    assert last < first


def test_no_handler_of_signals_is_left(namespace):
    before, after = namespace["signals"]
    assert before == after


def test_the_own_loop_makes_the_steps_it_says(namespace):
    assert int(namespace["state"].step) == 3
    assert np.isfinite(namespace["measured"]["loss"].value())


def test_the_python_of_the_readme_answers(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(block.strip().splitlines()) <= 10
    rows = [f"{word} {i},{word}" for i in range(40) for word in ("good", "bad")]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    tiny = my_labels.get_config("smoke")
    monkeypatch.setattr(my_labels, "get_config", lambda: tiny)
    names = {}
    exec(block, names)
    assert set(names["answer"].probabilities) == {"good", "bad"}
