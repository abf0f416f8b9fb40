"""Files of corpora: prepared apart, damaged, missing, downloaded."""

import gzip
import hashlib
import http.server
import io
import json
import lzma
import pathlib
import threading
import zipfile

import numpy as np
import pytest
from test_corpora import FACTS

from triform.data import sources
from triform.data.sources import clinc150, mnist, mr_sentiment
from triform.data.sources.local_builder import LocalBuilder
from triform.runtime.errors import DataError

FLIP = "id\tsplit\tsequence\tss3\tmask\n"
DIGITS = np.arange(6 * 784).reshape(6, 28, 28).astype(np.uint8)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No local copy in reach, and a data_dir of our own."""
    monkeypatch.setenv("TRIFORM_DATA", str(tmp_path / "none"))
    return str(tmp_path / "prepared")


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """(builder, name=content) -> the folder its downloads now come from, verified."""
    folder = tmp_path / "remote"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def publish(builder: type[LocalBuilder], contents: dict[str, bytes]) -> None:
        found = {}
        for name, content in contents.items():
            (folder / name).write_bytes(content)
            url = f"http://127.0.0.1:{server.server_port}/{name}"
            known = builder.downloads[name][2]
            found[name] = (url, len(content), known and _sha256(content))
        monkeypatch.setattr(builder, "downloads", found)

    yield publish
    server.shutdown()
    server.server_close()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(header + array.tobytes())


# Other files ------------------------------------------------------------------------


def _npz(**changes: np.ndarray) -> bytes:
    file = io.BytesIO()
    arrays = {
        "train_images": DIGITS[:4],
        "train_labels": np.array([3, 1, 0, 9], np.uint8),
        "test_images": DIGITS[4:],
        "test_labels": np.array([7, 7], np.uint8),
    }
    np.savez(file, **arrays | changes)
    return file.getvalue()


def _book(split: str) -> str:
    book = {
        "author": "A",
        "title": "T",
        "split": split,
        "paragraphs": ["ä", "b\u2028c"],
    }
    return json.dumps(book, ensure_ascii=False) + "\n"


def _review(fold: int, label: str = "neg") -> str:
    key = f"cv{fold - 1}00_{fold}"
    return json.dumps({"id": key, "label": label, "text": "bad .\n"}) + "\n"


def _clinc(intent: str = "alarm") -> bytes:
    return json.dumps({x: [["a", intent]] for x in clinc150.PARTS.values()}).encode()


# Corpus -> small files in place of its own.
SMALL = {
    "tinyshakespeare": {"input.txt": b"0123456789"},
    "wikitext2": {
        "train.txt.gz": gzip.compress(
            b"none\n \n = A = \n \n = = B = = \n \n = W , L = \n \n = C = \n \nd\n"
        ),
        "valid.txt.gz": gzip.compress(b" \n = A = \n \n e \n \n = B = \n \n f \n"),
    },
    "classic_books": {
        "books.jsonl.xz": lzma.compress((_book("train") + _book("valid")).encode())
    },
    "clinc150": {"data_full.json.gz": gzip.compress(_clinc())},
    "mr_sentiment": {
        "rt-polarity.neg.txt.gz": gzip.compress(
            "".join(f"bad {i} \n" for i in range(60)).encode()
        ),
        "rt-polarity.pos.txt.gz": gzip.compress(b"good\n"),
    },
    "movie_reviews": {
        "reviews.jsonl.xz": lzma.compress("".join(map(_review, (1, 9, 10))).encode())
    },
    "mnist": {"mnist.npz": _npz()},
    "flip_ss3": {
        "ss3.tsv.xz": lzma.compress(
            f"{FLIP}a\ttrain\tMK\tHE\t10\nb\tvalid\tK\tC\t1\n"
            "c\ttest\tK\tC\t0\n".encode()
        )
    },
    "sasrec_video": {"Video.txt.gz": gzip.compress(b"7 3\n7 1\n2 3\n")},
}


def _give(folder: pathlib.Path, name: str, **changed: bytes) -> str:
    folder.mkdir()
    for file, content in (SMALL[name] | changed).items():
        (folder / file).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("name", SMALL)
def test_other_files_are_prepared_apart(tmp_path, alone, name):
    manual = _give(tmp_path / "files", name)
    found = sources.source(name, data_dir=alone, manual_dir=manual).examples("train")
    assert len(found)
    (folder,) = pathlib.Path(alone).glob("manual-*")
    assert (folder / name).is_dir()


def test_wikitext2_cuts_at_titles_only(tmp_path, alone):
    options = {"data_dir": alone, "manual_dir": _give(tmp_path / "files", "wikitext2")}
    source = sources.source("wikitext2", **options)
    texts = [e["text"] for e in source.examples("train")]
    assert texts == [
        "none\n \n = A = \n \n = = B = = \n \n",
        " = W , L = \n \n",
        " = C = \n \nd\n",
    ]
    texts = [e["text"] for e in source.examples("validation")]
    assert texts == [" \n = A = \n \n e \n \n", " = B = \n \n f \n"]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("tinyshakespeare", "input.txt", b"\xff", "input.txt is not UTF-8 "),
        ("tinyshakespeare", "input.txt", b"\n", "input.txt is empty"),
        ("wikitext2", "valid.txt.gz", b"plain", "is not gzip-compressed UTF-8 "),
        ("classic_books", "books.jsonl.xz", b"plain", "is not xz-compressed UTF-8 "),
        (
            "classic_books",
            "books.jsonl.xz",
            lzma.compress(b'{"title": 1}\n'),
            "is not JSON lines of author, title, split and paragraphs",
        ),
        (
            "classic_books",
            "books.jsonl.xz",
            lzma.compress(_book("dev").encode()),
            r"is not JSON lines .*\('dev'\)",
        ),
        (
            "clinc150",
            "data_full.json.gz",
            gzip.compress(_clinc()[:-3]),
            r"is not lists of \[text, intent\] by split",
        ),
        (
            "clinc150",
            "data_full.json.gz",
            gzip.compress(_clinc("dance")),
            "has 'dance', none of the 150 intents",
        ),
        (
            "movie_reviews",
            "reviews.jsonl.xz",
            lzma.compress(b'{"id": "cv000_1"}\n'),
            "is not JSON lines of id, label and text",
        ),
        (
            "movie_reviews",
            "reviews.jsonl.xz",
            lzma.compress(_review(1, label="mixed").encode()),
            r"is not reviews of ten folds \('mixed'\)",
        ),
        ("mnist", "mnist.npz", b"plain", "mnist.npz is not "),
        ("mnist", "mnist.npz", _npz()[:-500], "mnist.npz is not "),
        (
            "mnist",
            "mnist.npz",
            _npz(test_labels=np.array([7, 10], np.uint8)),
            "labels 0 to 9",
        ),
        (
            "mnist",
            "mnist.npz",
            _npz(test_labels=np.array([7], np.uint8)),
            "mnist.npz is not images of digits",
        ),
        (
            "flip_ss3",
            "ss3.tsv.xz",
            lzma.compress(f"{FLIP}a\ttrain\tMK\tHEC\t10\n".encode()),
            "line 2: sequence, ss3 and mask differ in length",
        ),
        (
            "flip_ss3",
            "ss3.tsv.xz",
            lzma.compress(f"{FLIP}a\ttrain\tMK\tHX\t10\n".encode()),
            "line 2: ss3 must be of H, E and C",
        ),
        (
            "flip_ss3",
            "ss3.tsv.xz",
            lzma.compress(f"{FLIP}a\ttrain\tMK\n".encode()),
            "is not a table of id, split, sequence, ss3, mask",
        ),
        (
            "sasrec_video",
            "Video.txt.gz",
            gzip.compress(b"1 2\n1 2 3\n"),
            "line 2: must hold a user and an item",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value in FACTS else "",
)
def test_damaged_files_are_told_in_one_line(
    tmp_path, alone, name, file, content, message
):
    manual = _give(tmp_path / "files", name, **{file: content})
    with pytest.raises(DataError, match=f"^{name}: .*{message}") as caught:
        sources.source(name, data_dir=alone, manual_dir=manual).examples("train")
    assert "\n" not in str(caught.value)
    assert "; replace it (origin: " in str(caught.value)


def test_a_split_without_examples_is_named(tmp_path, alone):
    file = {"books.jsonl.xz": lzma.compress(_book("train").encode())}
    manual = _give(tmp_path / "files", "classic_books", **file)
    with pytest.raises(DataError, match="no example of 'validation'; repl"):
        sources.source("classic_books", alone, manual).examples("train")


@pytest.mark.parametrize("name", FACTS)
def test_missing_files_are_named(tmp_path, alone, name):
    manual = tmp_path / "files"
    manual.mkdir()
    with pytest.raises(DataError, match=f"^{name}: .*files lacks ") as caught:
        sources.source(name, data_dir=alone, manual_dir=str(manual)).examples("train")
    assert all(file in str(caught.value) for file in SMALL[name])
    assert "set data.manual_dir" in str(caught.value)


@pytest.mark.parametrize("name", ["wikitext2", "classic_books", "flip_ss3"])
def test_what_cannot_be_downloaded_is_told_with_the_fix(alone, name):
    with pytest.raises(DataError, match="nothing can be down") as caught:
        sources.source(name, data_dir=alone).examples("train")
    reason = str(caught.value)
    assert "\n" not in reason
    assert all(file in reason for file in SMALL[name])
    assert "github.com" in reason
    assert "data.manual_dir" in reason
    assert f"$TRIFORM_DATA/{name}" in reason


# Downloads --------------------------------------------------------------------------


def _originals() -> dict[str, bytes]:
    with np.load(io.BytesIO(_npz())) as arrays:
        return {
            f"{stem}-{kind}": _idx(arrays[f"{split}_{kind[:6]}"])
            for split, stem in mnist.STEMS.items()
            for kind in mnist.KINDS
        }


def _images(name: str, split: str, **options: str) -> list:
    found = sources.source(name, **options).examples(split)
    return [(e["image"].tolist(), e["label"]) for e in found]


def test_mnist_downloads_the_originals(tmp_path, alone, serve):
    serve(mnist.Mnist, _originals())
    manual = _give(tmp_path / "files", "mnist")
    for split, size in (("train", 4), ("test", 2)):
        found = _images("mnist", split, data_dir=alone)
        assert len(found) == size
        other = _images("mnist", split, data_dir=alone, manual_dir=manual)
        assert found == other


def test_originals_may_be_given_by_hand(tmp_path, alone, serve):
    files = _originals()
    serve(mnist.Mnist, files)
    sources.source("mnist", data_dir=alone).examples("train")
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    downloaded = sources.source("mnist", alone).fingerprint("train")
    given = sources.source("mnist", alone, str(folder)).fingerprint("train")
    # They are those published, hence the same data.
    assert given == downloaded
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"torn")
    with pytest.raises(DataError, match="t10k-images.*gzip-compressed IDX"):
        sources.source("mnist", data_dir=alone, manual_dir=str(folder)).examples(
            "train"
        )


def test_a_download_that_differs_is_refused(tmp_path, alone, serve):
    serve(clinc150.Clinc150, {"data_full.json": _clinc()})
    (tmp_path / "remote" / "data_full.json").write_bytes(_clinc("balance"))
    with pytest.raises(DataError, match=r"data_full\.json.*wrong checksum"):
        sources.source("clinc150", data_dir=alone).examples("train")


def test_clinc150_downloads_the_plain_file(alone, serve):
    serve(clinc150.Clinc150, {"data_full.json": _clinc("balance")})
    (example,) = sources.source("clinc150", data_dir=alone).examples("test")
    names = sources.source("clinc150", data_dir=alone).classes("intent")
    assert (example["text"], names[example["intent"]]) == ("a", "balance")


def _archive(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"sentence_polarity/{name}", content)
    return file.getvalue()


def _snippets(monkeypatch) -> bytes:
    """The archive, from now on the right one, of 0 to 59, negative, and 'good'."""
    negative = "".join(f"{i} \n" for i in range(60)).encode()
    members = {"rt-polarity.neg": negative, "rt-polarity.pos": b"good \n"}
    sums = {name: _sha256(content) for name, content in members.items()}
    monkeypatch.setattr(mr_sentiment, "MEMBERS", sums)
    return _archive(**members)


def test_mr_sentiment_downloads_the_archive(alone, serve, monkeypatch):
    serve(mr_sentiment.MrSentiment, {mr_sentiment.ZIP: _snippets(monkeypatch)})
    found = sources.source("mr_sentiment", data_dir=alone).examples("all")
    texts = [*map(str, range(60)), "good"]
    assert sorted(e["text"] for e in found) == sorted(texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_archive(**{"rt-polarity.neg": b"bad\n"}), "has another rt-polarity.neg than"),
        (_archive(other=b"bad\n"), "sentence_polarity.zip is not the archive"),
        (b"torn", "sentence_polarity.zip is not the archive"),
    ],
    ids=["another", "lacking", "torn"],
)
def test_mr_sentiment_refuses_another_archive(
    tmp_path, alone, serve, monkeypatch, content, message
):
    serve(mr_sentiment.MrSentiment, {mr_sentiment.ZIP: content})
    with pytest.raises(DataError, match=f"^mr_sentiment: .*{message}"):
        sources.source("mr_sentiment", data_dir=alone).examples("train")
    # It is not kept: the next attempt gets what is there by then.
    archive = _snippets(monkeypatch)
    (tmp_path / "remote" / mr_sentiment.ZIP).write_bytes(archive)
    assert len(sources.source("mr_sentiment", data_dir=alone).examples("all")) == 61


def test_the_texts_of_the_archive_are_those_of_the_local_copy(shared_data):
    folder = shared_data("mr_sentiment")
    for name, sha256 in mr_sentiment.MEMBERS.items():
        content = (pathlib.Path(folder) / f"{name}.txt.gz").read_bytes()
        assert _sha256(gzip.decompress(content)) == sha256
