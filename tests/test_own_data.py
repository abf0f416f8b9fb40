"""The templates for one's own data, and own files beside the sources built in."""

import csv
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from triform import evaluate, train, workdir
from triform.configs import bert_finetune, my_images, my_labels, my_pairs, my_text
from triform.data import store
from triform.data.codecs import files as codec_files
from triform.data.sources.tfds_source import TfdsSource
from triform.input_pipeline import Split, TrainBatches

TEMPLATES = (my_text, my_labels, my_pairs, my_images)
RNG = np.random.default_rng(0)


def texts(folder):
    for name in ("a", "b"):
        lines = [f"{name} {i}: the cat sat on the mat\n" for i in range(900)]
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


def table(folder):
    rows = "".join(f"the cat {i},{['no', 'yes'][i % 2]}\n" for i in range(80))
    (folder / "a.csv").write_text("text,label\n" + rows)
    return folder / "a.csv"


def pairs(folder):
    for side in ("en", "de"):
        lines = [f"{side} {i}\n" for i in range(80)]
        (folder / f"train.{side}").write_text("".join(lines))
    return f"{folder}/train.en,{folder}/train.de"


def pictures(folder):
    for i in range(40):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    return folder


DATA = {my_text: texts, my_labels: table, my_pairs: pairs, my_images: pictures}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda x: x.__name__)
def test_templates_are_short_and_name_what_is_missing(template):
    assert len(pathlib.Path(template.__file__).read_text().splitlines()) < 45
    for variant in template.VARIANTS:
        template.get_config(variant).data.validate()
    config = template.get_config()
    with pytest.raises(ValueError, match="no such file or folder; correct data.source"):
        store.origin(config.data, config.data.source)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda x: x.__name__)
def test_a_template_trains_and_goes_on_where_the_data_went(
    template, tmp_path, monkeypatch
):
    """Relative paths mean the folder of the first start; moved data are the same."""
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    own, run = tmp_path / "own", tmp_path / "run"
    own.mkdir()
    source = str(DATA[template](own))
    monkeypatch.chdir(own)
    config = template.get_config("smoke")
    config.data.source = source.replace(str(own), ".")
    scores = train.run(config, str(run))
    assert np.isfinite(scores["test/loss"])
    monkeypatch.chdir(tmp_path)
    kept = workdir.open_config(str(run))
    parts = kept.data.source.split(",")
    assert all(os.path.isabs(x) and os.path.exists(x) for x in parts)
    own.rename(tmp_path / "moved")
    config.data.source = source.replace(str(own), str(tmp_path / "moved"))
    config.steps = 8
    scores, before = train.run(config, str(run)), scores
    assert scores["test/loss"] != before["test/loss"]
    # What is predicted stands beside what is true.
    split = config.data.test_split
    found = evaluate.run(str(run), split, predictions=True).predictions
    if "test/accuracy" in scores and "true_label" in found[0]:
        right = np.mean([x["label"] == x["true_label"] for x in found])
        assert right == pytest.approx(scores["test/accuracy"])
    else:
        assert template in (my_text, my_pairs)
    references = [x.get("reference") for x in found]
    expected = [f"de {x['input'].split()[1]}" for x in found if template is my_pairs]
    assert references == (expected or [None] * len(found))


def test_a_template_trains_adapters_of_another_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own").mkdir()
    config = my_text.get_config("smoke")
    config.data.source = str(texts(tmp_path / "own"))
    train.run(config, str(tmp_path / "first"))
    adapters = my_text.get_config("lora")
    made = my_text.get_config("smoke")
    made.model, made.optim = adapters.model, adapters.optim
    made.model.model = config.model
    made.data.source, made.init_from = config.data.source, str(tmp_path / "first")
    assert np.isfinite(train.run(made, str(tmp_path / "second"))["test/loss"])


BUILT_IN = {"mr_sentiment": ("text", "label"), "clinc150": ("text", "intent")}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_table_gives_the_batches_of_the_source_built_in(
    name, tmp_path, monkeypatch, shared_data
):
    """Equal rows and equal classes: so every score is equal to the digit."""
    shared_data(name)
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    built_in = TfdsSource(name, str(tmp_path / "tfds"), "")
    folder = tmp_path / "own"
    folder.mkdir()
    text, label = BUILT_IN[name]
    names = built_in.classes(label)
    for split in built_in.splits():
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f)
            writer.writerow([text, label])
            for row in built_in.examples(split):
                writer.writerow([row[text], names[row[label]]])
    found = []
    for source in (name, str(folder)):
        config = bert_finetune.get_config(name)
        data, sizes = config.data, config.model.sizes()
        data.source, data.data_dir = source, str(tmp_path / "tfds")
        data.tokenizer.kind, data.buckets = "bytes", ()
        codecs = codec_files.build(data, sizes)
        opened = {x: Split.open(data, codecs, x, sizes) for x in built_in.splits()}
        train_batches = TrainBatches(opened["train"].batches, seed=0)
        batches = [train_batches[step] for step in range(20)]
        for split in opened.values():
            batches += [batch for _, batch in split.batches.evaluation()]
        found.append((codecs["label"].names, batches))
    (names_a, a), (names_b, b) = found
    assert names_a == names_b
    assert len(a) == len(b) > 100
    for one, other in zip(a, b, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], key)
