"""Laws of the data sources: which examples they give, and what they refuse."""

import concurrent.futures
import functools
import gzip
import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds

from triform.data import sources
from triform.data.sources import cldr, cldr_phrases, multi30k, tfds_source
from triform.runtime.errors import DataError

SENTENCES = {
    "train": 7,
    "val": 3,
    "test_2016_flickr": 2,
}


# CLDR -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phrases() -> dict[str, list[dict[str, str]]]:
    return {
        split: list(sources.source("cldr").examples(split)) for split in cldr.SPLITS
    }


def _content(phrases: dict) -> str:
    return hashlib.sha256(repr(sorted(phrases.items())).encode()).hexdigest()


def test_cldr_sizes(phrases):
    assert 55_000 <= len(phrases["train"]) <= 70_000
    assert 900 <= len(phrases["validation"]) <= 1_250
    assert 900 <= len(phrases["test"]) <= 1_250
    longest = max(len(t) for part in phrases.values() for e in part for t in e.values())
    assert longest <= cldr.MAX_CHARS


def test_cldr_is_the_same_in_every_process(phrases):
    program = (
        "import hashlib\n"
        "from triform.data import sources\n"
        "from triform.data.sources.cldr import SPLITS\n"
        'p = {s: list(sources.source("cldr").examples(s)) for s in SPLITS}\n'
        "print(hashlib.sha256(repr(sorted(p.items())).encode()).hexdigest())\n"
    )
    found = set()
    for seed, zone, language in (("1", "UTC", "C"), ("77", "Asia/Tokyo", "de_DE")):
        env = dict(os.environ, PYTHONHASHSEED=seed, TZ=zone, LC_ALL=language)
        run = subprocess.run(
            [sys.executable, "-X", "utf8", "-c", program],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(run.stdout.strip())
    assert found == {_content(phrases)}


def test_cldr_english_determines_german_and_occurs_once(phrases):
    english = Counter(e["en"] for part in phrases.values() for e in part)
    assert [text for text, count in english.items() if count > 1] == []


def test_cldr_conflicting_translations_are_dropped():
    pairs = [("Nauru", "Nauru"), ("Chad", "Tschad"), ("Nauru", "Nauruisch")]
    assert cldr._unambiguous(iter(pairs)) == [("Chad", "Tschad")]


@pytest.mark.parametrize("language", ["en", "de"])
def test_cldr_held_out_words_were_seen_in_training(phrases, language):
    seen = {t for e in phrases["train"] for t in cldr.masked(e[language])}
    unseen = [
        e
        for split in ("validation", "test")
        for e in phrases[split]
        # A German number in words is one new compound; its English words are checked.
        if not (language == "de" and cldr_phrases.is_compound(e["de"]))
        and not seen.issuperset(cldr.masked(e[language]))
    ]
    assert unseen == []


def test_cldr_names_are_seen_by_the_dozen(phrases):
    words = Counter(
        item
        for example in phrases["train"]
        for item in re.split(r",? (?:and|or) |, ", example["en"])
    )
    names = cldr_phrases._territories() + cldr_phrases._languages()
    assert min(words[english] for english, _ in names) >= 48


def test_cldr_kinds_are_balanced():
    drawn = Counter()
    for kind, (quota, phrase) in cldr.KINDS.items():
        draw = cldr_phrases.Draw(kind)
        drawn[kind] = len({phrase(draw) for _ in range(200)})
        assert 1_000 <= quota <= 7_000
    assert min(drawn.values()) > 100


@pytest.mark.parametrize(
    ("text", "compound"),
    [
        ("dreihundertvierundzwanzig", True),
        ("neunhundertsechzehntausendsiebzig", True),
        ("eins", True),
        ("Tausend", False),
        ("3 Stunden", False),
    ],
)
def test_cldr_compound_numbers_are_told_from_words(text, compound):
    assert cldr_phrases.is_compound(text) is compound


def test_cldr_every_number_in_words_is_one_compound():
    draw = cldr_phrases.Draw("compounds")
    for _ in range(500):
        assert cldr_phrases.is_compound(cldr_phrases.words(draw)[1])


def test_cldr_has_plain_spaces_only(phrases):
    text = "".join(t for part in phrases.values() for e in part for t in e.values())
    assert [c for c in set(text) if c.isspace()] == [" "]


def test_cldr_examples_cannot_be_spoilt_by_a_caller():
    first = sources.source("cldr").examples("test")[0]
    first["en"] = "spoilt"
    assert sources.source("cldr").examples("test")[0]["en"] != "spoilt"


def test_embedded_data_do_not_import_tfds():
    program = (
        "import sys\n"
        "from triform.data import sources\n"
        'sources.source("cldr").fingerprint("train")\n'
        'assert "tensorflow_datasets" not in sys.modules\n'
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Multi30k ---------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No local copy in reach, and a data_dir of our own."""
    monkeypatch.setenv("TRIFORM_DATA", str(tmp_path / "none"))
    return str(tmp_path / "prepared")


def _write(folder, tag: str = "", **lines: int) -> str:
    folder.mkdir()
    for name in multi30k.CHECKSUMS:
        stem, language, _ = name.split(".")
        count = lines.get(f"{stem}_{language}", SENTENCES[stem])
        text = "".join(f"{tag}{language} {stem} {i} ä\u2028ö\n" for i in range(count))
        (folder / name).write_bytes(gzip.compress(text.encode()))
    return str(folder)


_multi30k = functools.partial(sources.source, "multi30k_translate")


def _serve(folder: str) -> http.server.ThreadingHTTPServer:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_multi30k_is_the_published_corpus_in_file_order(tmp_path, shared_data):
    folder = shared_data("multi30k_ende")
    source = _multi30k(str(tmp_path))
    sizes = {split: len(source.examples(split)) for split in source.splits()}
    assert sizes == {"train": 29_000, "validation": 1_014, "test": 1_000}
    test = source.examples("test")
    for language in multi30k.LANGUAGES:
        path = os.path.join(folder, f"test_2016_flickr.{language}.gz")
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            assert [e[language] for e in test] == [line.strip() for line in file]
    # The published files share the folder a download would use.
    assert os.path.isdir(tmp_path / "multi30k_translate")


def test_access_by_index_in_bulk_and_by_iteration_agree(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(tfds_source, "BULK", 3)
    manual = _write(tmp_path / "files")
    found = _multi30k(alone, manual).examples("train")
    expected = [
        {x: f"{x} train {i} ä\u2028ö" for x in multi30k.LANGUAGES} for i in range(7)
    ]
    assert list(found) == [found[i] for i in range(7)] == expected
    assert found.__getitems__([5, 1]) == [expected[5], expected[1]]
    assert found[-1] == expected[-1]
    with pytest.raises(IndexError, match="the split has 7 examples"):
        found[7]


def test_other_files_are_never_answered_with_earlier_data(tmp_path, alone):
    prints = set()
    for tag in ("first ", "second "):
        manual = _write(tmp_path / tag.strip(), tag)
        source = _multi30k(alone, manual)
        assert source.examples("test")[0]["en"].startswith(tag)
        prints.add(source.fingerprint("test"))
        assert _multi30k(alone, manual).fingerprint("test") in prints
    assert len(prints) == 2


def test_fingerprints_tell_splits_apart(tmp_path, alone):
    manual = _write(tmp_path / "files")
    splits = ("train", "train[:2]", "test")
    prints = {_multi30k(alone, manual).fingerprint(split) for split in splits}
    prints |= {sources.source("cldr").fingerprint(split) for split in cldr.SPLITS}
    assert len(prints) == 6
    assert not any(set(text) & set("/[]: ") for text in prints)


def _published(folder: str, monkeypatch) -> http.server.ThreadingHTTPServer:
    server = _serve(folder)
    sums = {}
    for name in multi30k.CHECKSUMS:
        with open(os.path.join(folder, name), "rb") as file:
            content = file.read()
        sums[name] = (len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(multi30k, "CHECKSUMS", sums)
    monkeypatch.setattr(multi30k, "URL", f"http://127.0.0.1:{server.server_port}/")
    return server


def test_multi30k_downloads_and_verifies(tmp_path, alone, monkeypatch):
    folder = _write(tmp_path / "remote")
    server = _published(folder, monkeypatch)
    try:
        found = _multi30k(alone).examples("validation")
        assert [e["de"] for e in found] == [f"de val {i} ä\u2028ö" for i in range(3)]
        # Prepared once: the files are not asked for again.
        server.shutdown()
        assert len(_multi30k(alone).examples("test")) == 2
    finally:
        server.server_close()


def test_multi30k_refuses_a_download_that_differs(tmp_path, alone, monkeypatch):
    folder = _write(tmp_path / "remote")
    server = _published(folder, monkeypatch)
    changed = gzip.compress(b"something else\n" * 3)
    (tmp_path / "remote" / "val.de.gz").write_bytes(changed)
    try:
        with pytest.raises(DataError, match=r"val\.de\.gz.*wrong checksum"):
            _multi30k(alone).examples("train")
    finally:
        server.shutdown()
        server.server_close()


def test_multi30k_line_counts_must_agree(tmp_path, alone):
    manual = _write(tmp_path / "files", train_de=6)
    with pytest.raises(
        DataError, match=r"train\.en\.gz has 7 lines but train\.de\.gz has 6"
    ):
        _multi30k(alone, manual).examples("test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b""), r"val\.en\.gz is empty"),
        (b"", r"val\.en\.gz is empty"),
        (b"plain text", r"val\.en\.gz is not gzip-compressed UTF-8"),
        (gzip.compress(b"abc\n")[:-9], r"val\.en\.gz is not gzip-compressed UTF-8"),
        (gzip.compress(b"\xff\xfe\n"), r"val\.en\.gz is not gzip-compressed UTF-8"),
    ],
    # Not by content: gzip writes the time into it, and test ids must not change.
    ids=["compressed nothing", "nothing", "plain", "torn", "not UTF-8"],
)
def test_multi30k_damaged_files_are_named(tmp_path, alone, content, message):
    manual = _write(tmp_path / "files")
    (tmp_path / "files" / "val.en.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        _multi30k(alone, manual).examples("test")


def test_multi30k_missing_files_are_named(tmp_path, alone):
    manual = _write(tmp_path / "files")
    (tmp_path / "files" / "val.de.gz").unlink()
    with pytest.raises(DataError, match=r"files lacks val\.de\.gz"):
        _multi30k(alone, manual).examples("test")


@pytest.mark.parametrize(
    "method", ["is_prepared", "download_and_prepare", "_split_generators"]
)
def test_the_loser_of_a_race_uses_what_the_winner_prepared(
    tmp_path, alone, monkeypatch, method
):
    manual = _write(tmp_path / "files")
    original = getattr(multi30k.Multi30kTranslate, method)
    races = []

    def overtaken(self, *args, **options):
        if not races:
            races.append(self)
            _multi30k(alone, manual).examples("test")
        return original(self, *args, **options)

    monkeypatch.setattr(multi30k.Multi30kTranslate, method, overtaken)
    found = _multi30k(alone, manual).examples("train")
    assert races
    assert len(found) == 7


def test_processes_may_prepare_at_the_same_time(tmp_path, alone):
    manual = _write(tmp_path / "files")
    program = (
        "import sys\n"
        "from triform.data import sources\n"
        's = sources.source("multi30k_translate", sys.argv[1], sys.argv[2])\n'
        'print(len(list(s.examples("train"))))\n'
    )
    command = [sys.executable, "-c", program, alone, manual]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = list(
            pool.map(
                lambda _: subprocess.run(command, capture_output=True, text=True),
                range(3),
            )
        )
    for run in runs:
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == "7"  # After what TFDS prints.


# Any TFDS name, and what is refused -------------------------------------------------


class Nested(tfds.core.GeneratorBasedBuilder):
    """Text at the top, in sequences and in sequences of dicts; and bytes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "title": text,
                    "tags": tfds.features.Sequence(text),
                    "turns": tfds.features.Sequence({"who": text, "when": np.int64}),
                    "label": tfds.features.ClassLabel(names=["no", "yes"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            turns = [{"who": f"ä{j}", "when": j} for j in range(i)]
            yield i, {"title": "ß", "tags": ["a", "b"], "turns": turns, "label": 1}


def test_text_is_str_at_every_depth(tmp_path):
    # The class registers itself with TFDS, so this goes the way of a public name.
    found = sources.source("nested", data_dir=str(tmp_path)).examples("train")
    for example in found:
        assert example["title"] == "ß"
        assert list(example["tags"]) == ["a", "b"]
        who = example["turns"]["who"]
        assert list(who) == [f"ä{i}" for i in range(len(who))]
        assert example["label"] == 1


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("cldr", "dev", "cldr: split 'dev': expected one of train, validation, test"),
        (
            "nosuch",
            "train",
            "'nosuch': no such data set, file or folder: expected a path, one of ",
        ),
        ("nested", "dev", "nested: split 'dev': expected one of train"),
        ("nested", "train[:0]", r"split 'train\[:0\]' has no examples: .*train 3"),
    ],
)
def test_wrong_names_are_answered_with_the_choices(tmp_path, name, split, message):
    for method in ("examples", "fingerprint"):
        source = sources.source(name, data_dir=str(tmp_path))  # reads nothing yet
        with pytest.raises(DataError, match=message):
            getattr(source, method)(split)


def test_sources_name_their_splits_and_classes(tmp_path):
    assert sources.source("listops").splits() == ("train", "validation", "test")
    nested = sources.source("nested", data_dir=str(tmp_path))
    assert nested.splits() == ("train",)
    assert nested.classes("label") == ("no", "yes")
    for feature in ("title", "turns", "nosuch"):
        assert nested.classes(feature) == ()


def test_a_manual_dir_must_exist(alone):
    with pytest.raises(DataError, match="manual_dir='/nowhere' is not a fold"):
        _multi30k(alone, "/nowhere").examples("test")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module", name="tensorflow"),
            r"^nested: .* the package tensorflow.*'triform\[tensorflow\]'.*data_dir",
        ),
        (ModuleNotFoundError("No", name="mido.x"), "package mido.*install 'mido'"),
        (ConnectionError("no route"), r"^nested: could not be downloaded .*data_dir"),
        (AssertionError("Manual files\nneeded"), "Manual files needed.*set manual_dir"),
        (RuntimeError("odd"), r"^nested: could not be prepared \(RuntimeError: odd\)"),
    ],
)
def test_failures_of_builders_are_one_line(tmp_path, monkeypatch, error, message):
    def fails(self, dl_manager):
        raise error

    monkeypatch.setattr(Nested, "_split_generators", fails)
    with pytest.raises(DataError, match=message) as caught:
        sources.source("nested", data_dir=str(tmp_path)).examples("train")
    assert "\n" not in str(caught.value)


def test_local_copy_follows_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIFORM_DATA", str(tmp_path))
    assert sources.local_copy("corpus") == ""
    (tmp_path / "corpus").mkdir()
    assert sources.local_copy("corpus") == str(tmp_path / "corpus")
