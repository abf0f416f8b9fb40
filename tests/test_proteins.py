"""Proteins: the alphabet of residues, FASTA files, masked tokens left out."""

import gzip
import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
import transformers
from families import trunk
from laws import init

from triform import models
from triform.data.codecs import files as codec_files
from triform.data.codecs import text as tokenizer
from triform.data.datasets import (
    MaskedLMConfig,
    SequenceClassificationConfig,
    TokenClassificationConfig,
)
from triform.data.datasets.base import EVALUATION
from triform.data.sources import Column, Reading, source
from triform.data.sources.files import read_rows
from triform.input_pipeline import Split
from triform.models import ProteinConfig
from triform.runtime.errors import DataError

CODEC = tokenizer.TokenizerConfig(kind="residues")
ID = {piece: i for i, piece in enumerate(tokenizer.ALPHABET)}
SIZES = {"vocab_size": 33, "mask_id": 32}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))


def ids(text: str) -> list[int]:
    """Of residues; ( is <cls>, ) is <eos>, ? is <unk>, # is <mask>, _ is padding."""
    named = {"(": "<cls>", ")": "<eos>", "?": "<unk>", "#": "<mask>"}
    return [0 if c == "_" else ID[named.get(c, c)] for c in text]


def opened(config, split="train", sizes=SIZES):
    """A split, with codecs of a new run."""
    sizes = dict(sizes)
    codecs = codec_files.build(config, sizes | {"num_tags": -1})
    sizes |= codec_files.class_counts(config, codecs)
    return Split.open(config, codecs, split, sizes)


def batch_of(split, rows):
    """The first items of a split in one batch."""
    return split.batches.collate(0, np.arange(rows), EVALUATION)


# --- The alphabet ---


def capital(found: re.Match) -> str:
    """Of a letter; names of special tokens stay."""
    return found[0] if "<" in found[0] else found[0].upper()


def test_ids_are_those_of_the_original_tokenizer(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(tokenizer.ALPHABET))
    theirs, ours = transformers.EsmTokenizer(str(path)), tokenizer.residues()
    rng = np.random.default_rng(0)
    # Letters that are no residues, lower case, spaces, special tokens.
    parts = [*"LAGVSERTIDPKQNFYMHWCXBUZO.-", *"JJ*am ", "<mask>", "<cls>", "<null_1>"]
    texts = ["".join(rng.choice(parts, rng.integers(0, 30))) for _ in range(300)]
    framing = ours.framing("texts")
    for text, found in zip(texts, ours.encode(texts, specials=True), strict=True):
        # Lower-case residues are read as capitals, as in FASTA files; not there.
        text = re.sub("<[a-z_1]+>|[a-z]", capital, text)
        assert framing.framed([found]).ids.tolist() == theirs(text)["input_ids"], text
    pair = framing.framed(ours.encode(["MKV", "AX"])).ids.tolist()
    assert pair == theirs("MKV", "AX")["input_ids"] == ids("(MKV)AX)")
    again = tokenizer.load(ours.save(str(tmp_path)))
    assert (again.digest(), again.vocab_size) == (ours.digest(), 33)
    assert again.decode(ids("MKV)")) == "MKV"


def test_another_mask_token_than_the_model_s_is_refused(tmp_path):
    path = write(tmp_path / "a.fasta", ">a\nMKV\n>b\nAAA\n>c\nGG\n>d\nL\n")
    config = MaskedLMConfig(source=path, text="sequence", tokenizer=CODEC)
    with pytest.raises(DataError, match=r"model.mask_id=31.* is 32; set it"):
        opened(config, sizes=SIZES | {"mask_id": 31})


# --- FASTA ---


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


SEQUENCES = """\
>a1 first chain OS=Homo sapiens TARGET=0.5

MKV
aagx*
>b2
 M K
V
"""


def test_records_are_rows(tmp_path):
    rows = [row for _, row in read_rows(write(tmp_path / "a.fa", SEQUENCES))]
    assert rows == [
        {
            "id": "a1",
            "description": "first chain OS=Homo sapiens TARGET=0.5",
            "sequence": "MKVAAGX",
            "OS": "Homo sapiens",
            "TARGET": "0.5",
        },
        {"id": "b2", "description": "", "sequence": "MKV"},
    ]
    path = tmp_path / "a.fasta.gz"
    path.write_bytes(gzip.compress(SEQUENCES.replace("\n", "\r\n").encode()))
    assert [row for _, row in read_rows(str(path))] == rows


def test_records_can_be_read_in_any_order(tmp_path):
    chains = {f"c{i}": "MKVLAG"[: 1 + i % 6] * (1 + i % 5) for i in range(600)}
    path = write(tmp_path / "a.fasta", fasta(chains))
    labels = write(tmp_path / "a.y.fasta", fasta(chains))
    columns = (Column("text", "sequence"), Column("tags", "y", "label", divided=True))
    reading = Reading(columns, held_out=0.0)
    rows = source(f"{path},{labels}", reading=reading).examples("train")
    for i in (599, 0, 300, 257, 599, 1):
        assert rows[i]["id"] == f"c{i}" and rows[i]["sequence"] == chains[f"c{i}"]
        assert rows[i]["y"] == list(chains[f"c{i}"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MKV\n>a\nMKV\n", "line 1: 'MKV' is no header"),
        (">a\nMKV\n>\nMKV\n", "line 3: '>' is no header"),
        (">a\nMKV\n>b\n\n>c\nMKV\n", "line 3: 'b' has no sequence"),
        (">a\nMKV\n>c\n", "line 3: 'c' has no sequence"),
        (">a\nMKV\n>b\nMKV\n>a x\nL\n", "line 5: the id 'a' comes twice, first in"),
        (">a\nMKV\n>b\nMK1V\n", "line 3: 'b' holds '1'"),
        (">a\nM*KV\n", "line 1: 'a' holds '*'"),
    ],
)
def test_what_is_no_record_is_named_by_file_and_line(tmp_path, text, said):
    path = write(tmp_path / "a.fasta", text)
    with pytest.raises(DataError) as raised:
        list(read_rows(path))
    message = str(raised.value)
    assert message.startswith(f"{path}, ") and said in message and "\n" not in message


CHAINS = {f"c{i}": "MKVLAGGSTE"[i % 3 : 4 + i % 7] for i in range(40)}


def fasta(values: dict[str, str]) -> str:
    return "".join(
        f">{name} x\n{text[:3]}\n{text[3:]}\n" for name, text in values.items()
    )


def structures(seed=0) -> dict[str, dict[str, str]]:
    """(eight states, which residues are resolved) of all chains."""
    rng = np.random.default_rng(seed)
    draw = {"ss8": list("HBEGITSC"), "mask": list("0111")}
    return {
        key: {k: "".join(rng.choice(letters, len(x))) for k, x in CHAINS.items()}
        for key, letters in draw.items()
    }


def tagged(source: str) -> TokenClassificationConfig:
    return TokenClassificationConfig(
        source,
        tokens="sequence",
        tags="ss8",
        mask="mask",
        max_len=16,
        batch_size=len(CHAINS),
        tokenizer=CODEC,
    )


def test_labels_of_residues_come_from_files_of_the_same_name(tmp_path):
    labels = structures()
    folder = tmp_path / "own"
    folder.mkdir()
    write(folder / "own.fasta", fasta(CHAINS))
    backwards = {key: dict(reversed(x.items())) for key, x in labels.items()}
    for key, values in backwards.items():
        write(folder / f"own.{key}.fasta", fasta(values))
    table = "sequence\tss8\tmask\n" + "".join(
        f"{CHAINS[k]}\t{labels['ss8'][k]}\t{labels['mask'][k]}\n" for k in CHAINS
    )
    found = opened(tagged(str(folder)))
    same = opened(tagged(write(tmp_path / "own.tsv", table)))
    assert found.dataset.codecs["tags"].names == tuple("BCEGHIST")
    count = len(found.dataset)
    one, other = batch_of(found, count), batch_of(same, count)
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], key)
    # By hand: the state of every residue, and weight 1 where it is resolved.
    rows = found.dataset.example
    for i in range(count):
        name = rows(i)["id"]
        size = len(CHAINS[name])
        assert one["inputs"][i, : size + 2].tolist() == ids(f"({CHAINS[name]})")
        states = [tuple("BCEGHIST")[x] for x in one["targets"][i, 1 : size + 1]]
        real = [*map(int, labels["mask"][name])]
        assert one["weights"][i].tolist() == [0, *real, *[0] * (15 - size)]
        assert "".join(states) == labels["ss8"][name]


def test_numbers_of_sequences_come_from_a_table(tmp_path):
    write(tmp_path / "own.fasta", fasta(CHAINS))
    rows = "".join(f"{k},{len(x) / 4}\n" for k, x in reversed(CHAINS.items()))
    write(tmp_path / "own.csv", f"id,fitness\n{rows}")
    config = SequenceClassificationConfig(
        *(f"{tmp_path}/own.*",), first="sequence", label="fitness", target="number"
    )
    config.tokenizer = CODEC
    split = opened(config)
    for i in range(len(split.dataset)):
        example = split.dataset.example(i)
        assert example["fitness"] == len(example["sequence"]) / 4


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("own.csv", "id,y\nc1,1\n", "own.fasta, line 1: 'c0' is not in "),
        ("own.csv", "name,y\nc0,1\n", "own.csv, line 2: has no column 'id'"),
        ("own.tsv", "id\ty\nc0\t1\nc0\t2\n", "own.tsv, line 3: has 'c0' twice"),
        ("own.ss8.fasta", ">c0\nHH\n>c0\nHH\n", "line 3: the id 'c0' comes twice"),
        ("others.csv", "id,y\nc0,1\n", "others.csv: beside FASTA files only their"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path, name, text, said):
    write(tmp_path / "own.fasta", fasta(CHAINS))
    write(tmp_path / name, text)
    config = MaskedLMConfig(str(tmp_path), text="sequence", tokenizer=CODEC)
    with pytest.raises(DataError) as raised:
        opened(config)
    assert said in str(raised.value) and "\n" not in str(raised.value)


# --- Masked tokens ---


def test_masked_residues_are_left_out_and_the_others_scaled():
    config = ProteinConfig(trunk(positions="rotary", norm_position="pre"), num_labels=0)
    inputs = np.array(
        [ids("(MK#V)__"), ids("(AG#)(L)"), ids("(####)__"), ids("(MKVA)__")]
    )
    segments = np.array(
        [[1] * 6 + [0] * 2, [1] * 5 + [2] * 3, [1] * 6 + [0] * 2, [1] * 6 + [0] * 2]
    )
    batch = {"inputs": inputs.astype(np.int32), "segments": segments.astype(np.int32)}
    model, params = models.build(config), init(config, batch)

    @jax.jit
    def run(batch):
        alone = {"inputs": batch["inputs"][:1, :6]}  # without segments: one sequence
        return [
            model.apply({"params": params}, x, method=lambda m, x: m.frontend(x)[0])
            for x in (batch, alone)
        ]

    found, alone = run(batch)
    table = params["embedding"]["embedding"]
    # Lin et al. 2023: (1 - 0.15 * 0.8) / (1 - share of <mask>), in each sequence.
    lengths = np.array([[6] * 8, [5] * 5 + [3] * 3, [6] * 8, [6] * 8])
    masks = np.array([[1] * 8, [1] * 5 + [0] * 3, [4] * 8, [0] * 8])
    scale = 0.88 / (1 - masks / lengths)
    expected = np.where(inputs == 32, 0, scale)[..., None] * table[inputs]
    real = segments > 0
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-6)
    np.testing.assert_allclose(alone[0], expected[0, :6], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mask_id": 40}, "mask_id=40"),
        ({"masked_share": 1.0}, "masked_share=1.0"),
        ({"num_types": 1}, "masked_share=0.12: tokens are scaled before"),
    ],
)
def test_what_a_protein_model_cannot_be(fields, said):
    shape = trunk(positions="rotary", norm_position="pre")
    ProteinConfig(shape).validate()
    with pytest.raises(ValueError, match=f"model.{said}"):
        ProteinConfig(shape, **fields).validate()
