"""Tokens in parts: any number of processes gives the same, and none is lost."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from triform.data import encoding, store
from triform.data.codecs import text
from triform.data.codecs.pieces import pieces
from triform.data.codecs.text import TokenizerConfig
from triform.data.datasets import CausalLMConfig, SequenceClassificationConfig
from triform.runtime.errors import DataError

TEXTS = [f"text {i} of many: {'words and ' * (i % 5)}end" for i in range(60)]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    rows = [{"text": x, "label": i % 3} for i, x in enumerate(TEXTS)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    return str(tmp_path / "a.jsonl")


def opened(config, tok):
    return store.open_store(config, "train", tok, config.features())


@pytest.mark.parametrize("value", ["", "abc", "a b\nc d e f g h", "é" * 25, "x " * 99])
@pytest.mark.parametrize("longest", [1, 3, 10, 1000])
def test_pieces_are_the_text(value, longest):
    found = pieces(value, longest)
    assert "".join(found) == value
    assert max(map(len, found)) <= longest or not value


def test_pieces_end_between_words():
    found = pieces("word " * 100, 50)
    assert len(found) == 11
    assert all(piece.startswith(" ") for piece in found[1:])


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_parts_and_processes_change_nothing(corpus, tmp_path, monkeypatch, kind):
    tok = text.train(TokenizerConfig(kind=kind), TEXTS, 300)
    config = SequenceClassificationConfig(source=corpus, held_out=0.0)
    whole = opened(config, tok)
    monkeypatch.setattr(encoding, "PART", 200)
    monkeypatch.setattr(encoding, "WORKERS", 2)
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "other"))
    parts = opened(config, tok)
    for name in ("ids", "offsets", "first"):
        one, other = (getattr(x.tokens["first"], name) for x in (whole, parts))
        np.testing.assert_array_equal(one, other, name)
    np.testing.assert_array_equal(whole.values["label"], parts.values["label"])
    assert whole.tokens["first"].words == parts.tokens["first"].words
    assert whole.digest == parts.digest
    # Nothing is left beside the entry.
    assert os.listdir(tmp_path / "other" / "tokens") == [parts.digest]


def test_a_text_that_is_too_long_for_a_tokenizer_is_divided(corpus, monkeypatch):
    config = CausalLMConfig(source=corpus, held_out=0.0)
    tok = text.train(TokenizerConfig(kind="bytes"), TEXTS, 300)
    whole = opened(config, tok).tokens["text"].ids
    monkeypatch.setattr(encoding, "LONGEST", 10)
    monkeypatch.setattr(store, "LAYOUT", "another")
    np.testing.assert_array_equal(opened(config, tok).tokens["text"].ids, whole)


def test_what_fails_in_a_process_is_told(corpus, monkeypatch):
    """Half a character, which files do not let through."""
    tok = text.train(TokenizerConfig(kind="bpe"), TEXTS, 300)
    columns = [encoding.Column("text", True, False)]
    monkeypatch.setattr(encoding, "PART", 5)
    bad = [[["good text"]], [["bad \ud83d"]], [["more text"]]] * 3
    folder = os.path.dirname(corpus)
    with pytest.raises(DataError, match="Unicode|surrogate|TypeError"):
        encoding.write_parts(encoding.Texts(tok, columns), bad, folder)


PROGRAM = """
import sys, time
from triform.data import encoding, store
from triform.data.codecs import text
from triform.data.datasets import CausalLMConfig

if __name__ != "__main__":
    sys.exit("no process may run this program again")
encoding.PART, encoding.WORKERS = 300, 2
config = CausalLMConfig(source=sys.argv[1], held_out=0.0)
tok = text.ByteTokenizer()
if sys.argv[2] == "stuck":
    read = store.read

    def stuck(*args):
        for i, example in enumerate(read(*args)):
            if i > 40:
                time.sleep(600)
            yield example

    store.read = stuck
opened = store.open_store(config, "train", tok, config.features())
print(len(opened.tokens["text"].ids), opened.digest)
"""


def test_a_killed_run_keeps_its_parts(corpus, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), corpus]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([*command, "stuck"], env=environment)
    folder = pathlib.Path(os.environ["TRIFORM_CACHE"]) / "tokens"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        kept = sorted(folder.glob("*parts-*/*.npz"))
        if len(kept) >= 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sorted(folder.glob("*parts-*/*.npz"))
    assert 3 <= len(kept) < 12, kept
    # Another content would come out if the parts were made again.
    first = dict(np.load(kept[0]))
    first["text/ids"] = first["text/ids"][::-1]
    encoding.save(str(kept[0]), first)
    done = subprocess.run(
        [*command, "goes on"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    count, digest = done.stdout.split()
    ids = np.fromfile(folder / digest / "text.tokens", first["text/ids"].dtype)
    assert len(ids) == int(count) == sum(len(x.encode()) + 1 for x in TEXTS)
    np.testing.assert_array_equal(ids[: len(first["text/ids"])], first["text/ids"])
    assert not list(folder.glob("*parts-*"))
