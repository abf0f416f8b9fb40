"""Conversations as rows: what is trained, who sees whom, which rows there are."""

import dataclasses

import jax
import numpy as np
import pytest

from triform.configs.schema import (
    ConversationsConfig,
    LanguageModelConfig,
    TokenizerConfig,
    TokenPredictionConfig,
    TransformerConfig,
)
from triform.data import encoding
from triform.data.codecs import files as codec_files
from triform.data.datasets.base import EVALUATION
from triform.data.datasets.conversations import packed
from triform.input_pipeline import Batches, Split, TrainBatches, report
from triform.models import build
from triform.runtime.errors import DataError
from triform.tasks import Context
from triform.tasks import build as build_task

WORDS = ("what", "is", "the", "sum", "of", "one", "two", "red", "green", "blue", "tell")


def talk(seed: int) -> dict:
    """A conversation of one to three rounds, maybe with a system turn."""
    rng = np.random.default_rng(seed)
    system = {"role": "system", "content": "Be brief."}
    messages = [system] if seed % 3 == 0 else []
    for _ in range(1 + seed % 3):
        asked = " ".join(rng.choice(WORDS, rng.integers(1, 6)))
        said = " ".join(rng.choice(WORDS, rng.integers(1, 4)))
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": said})
    return {"messages": messages}


def config_of(**options) -> ConversationsConfig:
    """A byte tokenizer, rows of 256."""
    sizes = {"source": "chats", "max_len": 256, "batch_size": 2}
    bytes_ = TokenizerConfig(kind="bytes")
    config = ConversationsConfig(**{**sizes, "tokenizer": bytes_, **options})
    config.validate()
    return config


def opened(config, split="train"):
    """(split, codecs) of a config."""
    codecs = codec_files.build(config, {"vocab_size": 300})
    return Split.open(config, codecs, split, {"vocab_size": 300}), codecs


@pytest.fixture
def chats(sources):
    """40 conversations to train on, 7 others."""
    splits = {"train": range(40), "validation": range(100, 107), "test": range(9)}
    sources(chats={name: [talk(i) for i in part] for name, part in splits.items()})


def trained_text(batch, tok) -> list[str]:
    """What is trained in every row, answer by answer."""
    rows = []
    for targets, weights in zip(batch["targets"], batch["weights"], strict=True):
        cuts = np.flatnonzero(np.diff(weights)) + 1
        parts = zip(np.split(targets, cuts), np.split(weights, cuts), strict=True)
        rows.append([tok.show(ids) for ids, w in parts if w[0]])
    return rows


def test_all_answers_with_their_ends_and_nothing_else_are_trained(chats):
    split, codecs = opened(config_of(), "validation")
    found = [
        text
        for _, batch in split.batches.evaluation()
        for text in trained_text(batch, codecs["text"])
    ]
    wanted = [
        [m["content"] + " <|im_end|>" for m in talk(i)["messages"][1::2]]
        if i % 3
        else [m["content"] + " <|im_end|>" for m in talk(i)["messages"][2::2]]
        for i in range(100, 107)
    ]
    assert [x for x in found if x] == wanted  # one row each, in order; then padding
    assert split.dataset.describe(3) == "chats validation, example 3"
    assert split.dataset.example(3) == talk(103)
    assert split.dataset.input_text(3).endswith("assistant\n")


def test_an_epoch_of_packed_rows_holds_every_conversation_once(chats):
    split, codecs = opened(config_of())
    train = TrainBatches(split.batches, seed=3)
    assert len(split.dataset) < 20
    assert train.fill() > 0.8
    seen = []
    for step in range(train.per_epoch):
        batch = train[step]
        for row in trained_text(batch, codecs["text"]):
            seen += row
        again = TrainBatches(split.batches, seed=3)[step]
        assert all((batch[k] == again[k]).all() for k in batch)
        # Positions start anew in every segment, and inputs are what was predicted.
        for row in range(len(batch["inputs"])):
            segments = batch["segments"][row]
            same = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
            inputs, targets = batch["inputs"][row], batch["targets"][row]
            assert (inputs[1:] == targets[:-1])[same].all()
            step = np.diff(batch["positions"][row])
            assert (step[same] == 1).all()
            assert (batch["positions"][row][1:][~same] == 0).all()
            assert not batch["weights"][row][segments == 0].any()
    wanted = [
        m["content"] + " <|im_end|>"
        for i in range(40)
        for m in talk(i)["messages"]
        if m["role"] == "assistant"
    ]
    assert sorted(seen) == sorted(wanted)
    other = TrainBatches(split.batches, seed=4)
    assert any((other[t]["inputs"] != train[t]["inputs"]).any() for t in range(3))
    assert ", example" in split.dataset.describe(0)


def test_packed_equals_separate(chats):
    """No token sees another conversation; the loss is that of separate rows."""
    config = config_of()
    split, codecs = opened(config)
    trunk = TransformerConfig(
        num_layers=2, d_model=16, num_heads=2, d_ff=32, max_len=256, dropout=0.0
    )
    trunk.positions = "rotary"
    model = build(LanguageModelConfig(trunk, 300))
    task = build_task(TokenPredictionConfig(label_smoothing=0.0), model)
    train = TrainBatches(split.batches, seed=0)
    alone = dataclasses.replace(config, train_split="other")
    rows = Split.open(alone, codecs, "train", {"vocab_size": 300}).batches
    variables = task.init(jax.random.key(0), train[0])

    @jax.jit
    def measure(batch):
        ctx = Context(0, {}, False, lambda x: x)
        outputs, _ = task.outputs(variables, batch, ctx)
        return task.terms(outputs, batch, ctx)["token"], task.weights(batch)["token"]

    def total(batches):
        return np.sum([measure(batch) for batch in batches], axis=0)

    packed_total = total(train[t] for t in range(train.per_epoch))
    separate = total(batch for _, batch in rows.evaluation())
    assert packed_total[1] == separate[1]
    np.testing.assert_allclose(packed_total[0], separate[0], rtol=1e-5)


def test_cut_before_the_first_answer_is_counted_and_no_answer_is_an_error(sources):
    long = {"role": "user", "content": "x" * 300}
    answer = {"role": "assistant", "content": "y" * 300}
    asked = {"role": "user", "content": "why"}
    sources(
        chats=[
            {"messages": [asked, answer]},  # cut in the answer
            {"messages": [long, answer]},  # cut before it
            talk(1),
        ],
        silent=[talk(1), {"messages": [asked]}, talk(2)],
    )
    split, _ = opened(config_of())
    told = report(TrainBatches(split.batches, 0))
    assert "1 of 2 are longer than L=256, shortened" in told
    assert "1 begin their first answer behind max_len=256, not trained on" in told
    assert len(split.dataset.rows) == 2
    evaluated, _ = opened(config_of(), "test")
    assert [
        x.sum() > 0 for _, b in evaluated.batches.evaluation() for x in b["weights"]
    ] == [
        True,
        False,
        True,
        False,
    ]
    with pytest.raises(DataError, match="silent train, example 1: no turn of the role"):
        opened(config_of(source="silent"))
    split, _ = opened(config_of(source="silent", drop_empty=True))
    assert sorted(split.dataset.store.example[np.concatenate(split.dataset.rows)]) == [
        0,
        2,
    ]


def test_a_template_that_changes_earlier_turns_divides_conversations(sources, tmp_path):
    """Every answer is trained once, after what was read before it."""
    path = tmp_path / "last.jinja"
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}:"
        "{{ m.content if loop.last or m.role == 'user' else '' }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    sources(chats=[talk(2), talk(1)])
    split, codecs = opened(config_of(template=str(path)))
    assert "2 conversations are 5 texts" in report(TrainBatches(split.batches, 0))
    tok = codecs["text"]
    batches = Batches(split.dataset)
    batch = batches.collate(0, np.arange(len(split.dataset)), EVALUATION)
    found = sorted(x for row in trained_text(batch, tok) for x in row)
    answers = [m["content"] for t in (talk(2), talk(1)) for m in t["messages"][1::2]]
    assert found == sorted(f"{x} <|im_end|>" for x in answers)


def test_columns_of_an_instruction_file_take_the_same_path(sources):
    pairs = [{"q": f"number {i}", "a": f"is {i}"} for i in range(5)]
    turns = [
        {
            "messages": [
                {"from": "human", "value": x["q"]},
                {"from": "gpt", "value": x["a"]},
            ]
        }
        for x in pairs
    ]
    sources(pairs=pairs, turns=turns)
    one, _ = opened(config_of(source="pairs", prompt="q", response="a"))
    two, _ = opened(config_of(source="turns"))
    a, b = (TrainBatches(x.batches, 0)[0] for x in (one, two))
    assert all((a[k] == b[k]).all() for k in a)
    with pytest.raises(DataError, match="no such feature; expected one of a, q"):
        opened(config_of(source="pairs"))


def test_several_processes_give_what_one_gives(sources, monkeypatch, tmp_path):
    """Of every kind of tokenizer: its special tokens are the same there."""
    sources(chats=[talk(i) for i in range(40)])
    bpe = TokenizerConfig(kind="bpe")
    configs = [config_of(), config_of(tokenizer=bpe, template="plain")]
    opened_ones = [opened(config, "all") for config in configs]
    monkeypatch.setattr(encoding, "PART", 500)
    monkeypatch.setattr(encoding, "WORKERS", 2)
    for config, (split, codecs) in zip(configs, opened_ones, strict=True):
        config.cache_dir = str(tmp_path / config.tokenizer.kind)
        one = split.dataset.store
        other = Split.open(config, codecs, "all", {"vocab_size": 300}).dataset.store
        assert one.digest == other.digest
        for name in ("ids", "trained", "offsets", "example", "answer"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    bad = [talk(i) for i in range(40)]
    bad[30] = {"messages": [{"role": "user"}]}
    sources(chats=bad)
    with pytest.raises(DataError, match=r"chats all, example 30: .*cannot write"):
        Split.open(configs[0], opened_ones[0][1], "all", {"vocab_size": 300})


def test_errors_name_the_example(sources):
    sources(chats=[talk(0), {"messages": [{"role": "user"}]}])
    with pytest.raises(DataError, match=r"chats train, example 1: .*cannot write"):
        opened(config_of())
    with pytest.raises(ValueError, match="together with data.prompt"):
        config_of(response="a")
    with pytest.raises(ValueError, match="data.day='soon'"):
        config_of(day="soon")


def test_packing_is_best_fit_and_repeatable():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 100, 500)
    rows = packed(sizes, 100)
    assert sorted(np.concatenate(rows)) == list(range(500))
    assert max(sizes[row].sum() for row in rows) <= 100
    # Half of the sizes are above half of the room: 11/9 of the best there is at most.
    assert len(rows) <= 11 / 9 * -(-sizes.sum() // 100) + 1
    small = sizes % 20 + 1
    assert small.sum() / (100 * len(packed(small, 100))) > 0.98
    assert all((a == b).all() for a, b in zip(rows, packed(sizes, 100), strict=True))
    assert packed(np.array([100, 0, 3]), 100)[0].tolist() == [0, 1]


def test_codecs_of_a_run_are_kept(chats, tmp_path):
    """The template is saved, and its end ends what is decoded."""
    config = config_of(template="plain")
    codecs = codec_files.build(config, {"vocab_size": 300})
    codec_files.save(codecs, str(tmp_path))
    again = codec_files.load(str(tmp_path), dataclasses.replace(config, template=""))
    assert again["chat"].digest() == codecs["chat"].digest()
    codecs = codec_files.build(config_of(), {"vocab_size": 300})
    end = codecs["text"].pieces.index("<|im_end|>")
    assert codecs["text"].decode([100, end, 101]) == "_"
    assert codecs["text"].ends == (1, end)
    codec_files.save(codecs, str(tmp_path / ".."))
    again = codec_files.load(str(tmp_path / ".."), config_of())
    assert again["text"].ends == (1, end)
    assert again["text"].digest() == codecs["text"].digest()
