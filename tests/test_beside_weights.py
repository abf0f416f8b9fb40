"""What comes with imported weights besides them: taken, or named in a line."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hf_models import BERT, CASES, build, save
from test_interop_workdir import SIZES, edit, words
from toy_decoder import NoCache

from triform import workdir as workdirs
from triform.answers.sampler import Sampler
from triform.configs.schema import to_json
from triform.data.codecs import files as codec_files
from triform.data.codecs.classes import Classes
from triform.data.datasets import ImagesConfig
from triform.data.datasets.base import labels
from triform.interop import generation, preprocessor
from triform.interop.__main__ import main
from triform.interop.staging import all_or_nothing
from triform.interop.workdir import export_model, exportable, import_model
from triform.models import EncoderDecoderConfig, LanguageModelConfig, decode
from triform.models.config import TransformerConfig
from triform.models.decode import DecodeConfig
from triform.runtime.errors import DataError, TriformError, UserError

LM = LanguageModelConfig(TransformerConfig(**SIZES), 300)
SEQ2SEQ = EncoderDecoderConfig(TransformerConfig(**SIZES), 300)


def content(folder, name: str) -> dict:
    return json.loads(pathlib.Path(folder, name).read_text())


# --- generation_config.json ---

GENERATION = [
    # (keys, model, settings of ours, what is named)
    ({}, LM, {}, []),
    ({"num_beams": 1, "do_sample": False, "length_penalty": 1.0}, SEQ2SEQ, {}, []),
    (
        {"num_beams": 4, "length_penalty": 0.8},
        SEQ2SEQ,
        {"method": "beam", "beam_size": 4, "length_penalty": 0.8},
        ["num_beams=4", "length_penalty=0.8"],
    ),
    (
        {"num_beams": 4, "no_repeat_ngram_size": 2},
        LM,
        {"method": "beam", "beam_size": 4, "length_penalty": 1.0, "no_repeat_ngram": 2},
        ["num_beams=4", "length_penalty=1.0"],
    ),
    (
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        LM,
        {"method": "sample", "temperature": 0.6, "top_p": 0.9, "top_k": 50},
        [],
    ),
    ({"do_sample": True, "top_k": 0}, LM, {"method": "sample"}, []),
    (
        {"bad_words_ids": [[7], [3]], "suppress_tokens": [9], "eos_token_id": [2, 3]},
        LM,
        {"banned": (7, 9)},
        [],
    ),
    ({"bad_words_ids": [[7], [4, 5]]}, LM, {"banned": (7,)}, ["bad_words_ids", "4, 5"]),
    ({"max_length": 64}, SEQ2SEQ, {"max_len": 63}, []),
    ({"max_new_tokens": 1000}, SEQ2SEQ, {"max_len": 600}, ["max_new_tokens=1000"]),
    ({"max_length": 64}, LM, {}, ["max_length=64", "--max_tokens"]),
    ({"temperature": -1.0}, LM, {}, ["temperature=-1.0"]),
    (
        {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
        LM,
        {"repetition_penalty": 1.8, "no_repeat_ngram": 2},
        [],
    ),
    (
        {"repetition_penalty": -1.0, "encoder_no_repeat_ngram_size": 2, "new": [1]},
        LM,
        {},
        ["repetition_penalty=-1.0", "encoder_no_repeat_ngram_size=2", "new=[1]"],
    ),
]


@pytest.mark.parametrize(("keys", "model", "ours", "named"), GENERATION)
def test_every_key_is_taken_or_named_with_its_value(keys, model, ours, named):
    found, lines = generation.taken(keys, model)
    assert found == DecodeConfig(**{"method": "greedy", **ours})
    assert all(any(part in line for line in lines) for part in named), lines
    assert bool(lines) == bool(named), lines
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(("keys", "model", "ours", "named"), GENERATION)
def test_settings_of_decoding_come_back(keys, model, ours, named):
    """Written again they mean the same; an unchanged file is left as it is."""
    decoding, _ = generation.taken(keys, model)
    assert generation.given_back(decoding, model, 64, keys) == {} or not keys
    back = generation.given_back(decoding, model, 64, {})
    again, _ = generation.taken(generation.merged(keys, back), model)
    again.max_len = decoding.max_len = 0  # left open, it is the data's
    for name in (
        () if decoding.method == "sample" else ("temperature", "top_k", "top_p")
    ):
        setattr(again, name, getattr(decoding, name))
    assert again == decoding


@pytest.mark.parametrize("method", decode.METHODS)
def test_a_banned_id_is_never_written(method):
    """Whatever the logits: the banned one is always the likeliest."""
    logits = jnp.array([0.0, 1.0, 9.0, 2.0, -9.0])

    def extend(tokens, positions, cache):
        return jnp.broadcast_to(logits, (*tokens.shape, 5)), cache

    for banned in ((), (2,)):
        config = DecodeConfig(method=method, banned=banned, beam_size=2)
        first = jnp.zeros(2, jnp.int32)
        options = {"eos": 4, "length": 6, "rng": jax.random.key(0)}
        tokens = decode.generate(config, extend, NoCache(), first, first, **options)[0]
        assert (2 in np.asarray(tokens)) == (not banned)


# --- Names of classes ---

OTHER_ORDER = [
    # (the model's, the data's, values, classes that are meant)
    (("positive", "negative"), ("negative", "positive"), [0, 1, 1], [1, 0, 0]),
    (("POSITIVE", "NEGATIVE"), ("negative", "positive"), [0, 1], [1, 0]),
    (("LABEL_0", "LABEL_1"), ("negative", "positive"), [0, 1], [0, 1]),
    (("positive", "negative"), (), [0, 1], [0, 1]),
    (("positive", "negative"), (), ["negative", "positive"], [1, 0]),
    (("positive", "negative"), (), ["1", "0"], [1, 0]),
    (("1", "0", "2"), (), [0, 1, 2], [1, 0, 2]),
    (("1", "0", "2"), (), ["0", "1", "2"], [1, 0, 2]),
    (("a", "b", "a"), ("a", "b", "a"), [0, 1, 2], [0, 1, 2]),
    (("B-X", "I-X", "O"), ("O", "B-X", "I-X"), [0, 1, 2], [2, 0, 1]),
]


class Labelled:
    """As much of a data set as `labels` reads."""

    def __init__(self, ours, theirs, field="label"):
        self.codecs, self.model_sizes = {field: Classes(ours)}, {}
        self.numbered, self.config = lambda field: theirs, self
        self.label = self.tags = "label"
        self.classes, self.features = lambda: {field: "num_labels"}, lambda: ()
        self.describe = "example {}".format


@pytest.mark.parametrize("field", ["label", "tags"])
@pytest.mark.parametrize(("ours", "theirs", "values", "meant"), OTHER_ORDER)
def test_classes_are_matched_by_name(field, ours, theirs, values, meant):
    found = labels(Labelled(ours, theirs, field), field, np.array(values))
    assert found.tolist() == meant


def test_names_that_do_not_match_are_refused_with_both_orders():
    data = Labelled(("subjective", "objective"), ("negative", "positive"))
    with pytest.raises(DataError, match="example 0") as error:
        labels(data, "label", np.array([1, 0]))
    for part in ("0 subjective, 1 objective", "0 negative, 1 positive"):
        assert part in str(error.value)


ID2LABEL = {"0": "good", "1": "bad", "2": "so so"}
NAMES = {"id2label": ID2LABEL, "label2id": {x: int(i) for i, x in ID2LABEL.items()}}


def classifier(folder, tags: bool = False, **changes) -> str:
    """A Hugging Face folder with named classes."""
    case = "bert-tags" if tags else "bert-label"
    CASES["named"] = (CASES[case][0], BERT | {"num_labels": 3})
    source = save(build("named"), folder)
    core = words("[MASK]", "[PAD]", "[CLS]", "[SEP]", "[UNK]")
    core.save(os.path.join(source, "tokenizer.json"))
    roles = {f"{x.lower()}_token": f"[{x}]" for x in ("PAD", "CLS", "SEP", "MASK")}
    pathlib.Path(source, "tokenizer_config.json").write_text(json.dumps(roles))
    edit(source, "config.json", lambda hf: hf.update(NAMES | changes))
    return source


@pytest.mark.parametrize("tags", [False, True])
def test_names_of_classes_survive_there_and_back(tags, tmp_path):
    source = classifier(tmp_path / "hf", tags)
    workdir, out = str(tmp_path / "run"), str(tmp_path / "out")
    import_model(source, workdir)
    field = "tags" if tags else "label"
    codecs = codec_files.load(workdir, workdirs.open_config(workdir).data)
    assert codecs[field].names == tuple(ID2LABEL.values())
    os.remove(os.path.join(workdir, "hf_config.json"))  # as if trained here
    export_model(workdir, out)
    loaded = transformers.AutoConfig.from_pretrained(out)
    assert loaded.id2label == {int(i): x for i, x in ID2LABEL.items()}
    assert loaded.label2id == NAMES["label2id"]


def test_a_new_run_keeps_the_order_of_the_model_it_starts_from(tmp_path):
    order = {"label": ["positive", "negative"]}
    (tmp_path / codec_files.CLASSES).write_text(json.dumps(order))
    saved = Classes(codec_files._saved_names(str(tmp_path))["label"])
    for names, known, expected in (
        (("negative", "positive"), -1, saved.names),
        (("0", "1"), 2, saved.names),
        (("negative", "positive"), 3, ("negative", "positive")),
        (("objective", "subjective"), 2, ("objective", "subjective")),
    ):
        found = codec_files._in_order(Classes(names), saved, known)
        assert found.names == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"problem_type": "regression"}, "single_label_classification"),
        ({"id2label": {"0": "a", "2": "b", "3": "c"}}, "classes 0 to 2"),
    ],
)
def test_classes_that_are_something_else_are_refused(changes, named, tmp_path, capsys):
    source = classifier(tmp_path / "hf", **changes)
    assert main(["import", source, str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == ["hf"]


def test_exporting_is_known_before_training():
    config = workdirs.schema.ExperimentConfig(model=LM, data=None)
    config.model.trunk.positions = "relative"
    with pytest.raises(UserError, match="positions='relative'"):
        exportable(config)


# --- preprocessor_config.json ---

PIXELS = [
    {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    {"image_mean": 0.1, "image_std": 0.7, "rescale_factor": 1 / 127.5, "resample": 3},
    {"do_rescale": False, "image_mean": [99.0] * 3, "image_std": [50.0] * 3},
    {"do_normalize": False, "image_mean": [0.4] * 3, "resample": 0},
    {"do_normalize": False, "do_rescale": False},
    {},
]


@pytest.mark.parametrize("given", PIXELS)
def test_pixels_are_numbers_as_the_preprocessor_makes_them(given):
    data = ImagesConfig(size=4, channels=3)
    assert preprocessor.taken({"size": 4, **given}, data) == []
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.float64)
    ours = (pixels / 255 - data.mean) / np.array(data.std)
    theirs = pixels * (
        given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1
    )
    if given.get("do_normalize", True):
        mean, std = (given.get(f"image_{x}", 0.5) for x in ("mean", "std"))
        theirs = (theirs - mean) / np.array(std)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
    # Back, with and without the file, they mean the same.
    for original in ({"size": 4, **given}, {}):
        again = ImagesConfig(size=4, channels=3)
        preprocessor.taken(preprocessor.given_back(data, original), again)
        for name in ("mean", "std"):
            values = [np.broadcast_to(getattr(x, name), 3) for x in (data, again)]
            np.testing.assert_allclose(*values, rtol=1e-12)
        assert again.resample == data.resample


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"size": {"height": 9, "width": 9}}, "size={'height': 9, 'width': 9}"),
        ({"do_center_crop": True, "crop_size": 4}, "do_center_crop=True"),
        ({"of_tomorrow": 1}, "of_tomorrow=1"),
        ({"image_mean": [0.5, 0.5]}, "image_mean=[0.5, 0.5]"),
        ({"resample": 77}, "resample=77"),
    ],
)
def test_what_is_not_taken_of_a_preprocessor_is_named(given, named):
    lines = preprocessor.taken(given, ImagesConfig(size=4))
    assert any(named in line for line in lines)


# --- Ids beyond a table ---


def with_added(folder, *tokens: str, **roles: str) -> str:
    """A LLaMA whose tokenizer knows more tokens than the model has rows."""
    source = save(build("llama"), folder)
    core = words("<unk>", "<s>", "</s>")
    core.add_tokens([f"w{i}" for i in range(37 - core.get_vocab_size())])
    core.add_special_tokens(list(tokens))
    core.save(os.path.join(source, "tokenizer.json"))
    named = {"eos_token": "</s>"} | {f"{k}_token": x for k, x in roles.items()}
    pathlib.Path(source, "tokenizer_config.json").write_text(json.dumps(named))
    return source


def test_an_id_beyond_the_table_never_reaches_the_model(tmp_path):
    """Padding that has no row does not matter; a text with such an id is refused."""
    answers = []
    for name, added in (("plain", ()), ("padded", ("[PAD]",))):
        roles = {"pad": "[PAD]"} if added else {}
        source = with_added(tmp_path / name, *added, **roles)
        report = import_model(source, str(tmp_path / f"{name}-run"))
        assert any("38 ids, the model 37" in line for line in report) == bool(added)
        sampler = Sampler(str(tmp_path / f"{name}-run"))
        outputs = sampler(["a b c", "a", "b [PAD] c"], max_tokens=4)
        answers.append([(x.text, x.score) for x in outputs[:2]])
    assert answers[0] == answers[1] and np.isfinite(answers[0][0][1])
    assert "has id 37, and the model 37 rows" in outputs[2].warnings[0]


def test_a_special_token_without_a_row_is_refused(tmp_path, capsys):
    source = with_added(tmp_path / "hf", "<begin>", bos="<begin>")
    edit(source, "config.json", lambda hf: hf.update(bos_token_id=37))
    assert main(["import", source, str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "bos token has id 37, the model 37 rows" in said and said.count("\n") == 1


# --- Staging ---


def test_a_foreign_folder_beside_the_target_stays(tmp_path):
    for name in ("new.part", "new.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    with all_or_nothing(str(tmp_path / "new")) as partial:
        pathlib.Path(partial, "config.json").write_text("{}")
    assert sorted(os.listdir(tmp_path)) == ["new", "new.part", "new.tmp"]
    assert (tmp_path / "new.part" / "mine").exists()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "new.tmp").stat().st_mode


@pytest.mark.parametrize("kind", ["empty", "link", "dangling link"])
def test_an_empty_folder_is_filled_and_stays_the_same(kind, tmp_path):
    real, target = tmp_path / "real", tmp_path / "target"
    if kind == "empty":
        target.mkdir()
    else:
        target.symlink_to(real)
    if kind == "link":
        real.mkdir()
    before = target.stat().st_ino if target.exists() else None
    with all_or_nothing(str(target)) as partial:
        pathlib.Path(partial, "inner").mkdir()
        for name in ("config.json", "inner/a"):
            pathlib.Path(partial, name).write_text("{}")
    assert sorted(os.listdir(target)) == ["config.json", "inner"]
    assert target.is_symlink() == (kind != "empty")
    assert before in (None, target.stat().st_ino)  # a mount point is another folder


@pytest.mark.parametrize("there", [False, True])
def test_of_what_fails_nothing_is_left(there, tmp_path, monkeypatch):
    target = tmp_path / "target"
    if there:
        target.mkdir()
    with pytest.raises(TriformError), all_or_nothing(str(target)) as partial:
        pathlib.Path(partial, "a").write_text("a")
        raise UserError("no")
    # Of two that fill the same folder the second is refused, and the first one stays.
    with pytest.raises(UserError, match="not empty"):
        with all_or_nothing(str(target)) as partial:
            pathlib.Path(partial, "a").write_text("second")
            target.mkdir(exist_ok=True)
            (target / "a").write_text("first")
    assert [(x.name, x.read_text()) for x in target.iterdir()] == [("a", "first")]
    assert os.listdir(tmp_path) == ["target"]


def test_marian_s_padding_is_banned_there_and_back(tmp_path):
    source = save(build("marian"), tmp_path / "hf")
    keys = {"bad_words_ids": [[36]], "num_beams": 6, "pad_token_id": 36}
    pathlib.Path(source, "generation_config.json").write_text(json.dumps(keys))
    workdir, out = str(tmp_path / "run"), str(tmp_path / "out")
    import_model(source, workdir)
    config = workdirs.open_config(workdir)
    assert (config.decode.banned, config.decode.beam_size) == ((36,), 6)
    export_model(workdir, out)
    assert content(out, "generation_config.json") == keys
    config.decode.beam_size = 2
    pathlib.Path(workdir, "config.json").write_text(to_json(config))
    export_model(workdir, str(tmp_path / "changed"))
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "changed")
    assert (found.num_beams, found.bad_words_ids) == (2, [[36]])
