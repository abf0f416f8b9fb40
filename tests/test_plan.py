"""What is said before training, and what is kept: the plan, evaluations, starts."""

import dataclasses
import json
import os
import re
import sys
from collections import Counter

import numpy as np
import pytest

from triform import plan, train
from triform.configs import gpt_shakespeare_char, llama, sasrec, schema
from triform.data.codecs.text import ByteTokenizer
from triform.data.datasets import (
    CausalLMConfig,
    Corpus,
    MixtureConfig,
    Seq2SeqConfig,
)
from triform.evaluate import Evaluator
from triform.experiment import Experiment
from triform.input_pipeline import Split, TrainBatches, moved
from triform.runtime import history, metrics
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import DataError, UserError
from triform.workdir import checkpoint_dir

CODECS, SIZES = {"text": ByteTokenizer()}, {"vocab_size": 259}
TEXTS = [{"text": f"{i} " * (3 + i % 5), "other": str(i)} for i in range(60)]


def config(**data):
    """A language model that compiles in a second."""
    found = gpt_shakespeare_char.get_config("smoke")
    trunk = found.model.trunk
    trunk.num_layers, trunk.d_model, trunk.d_ff = 1, 8, 8
    found.data = dataclasses.replace(
        found.data,
        **{"source": "texts", "test_split": "test", "eval_split": "test", **data},
    )
    found.data.max_len, found.data.batch_size = 8, 4
    found.data.tokenizer.kind, found.model.vocab_size = "bytes", 259
    return found


@pytest.fixture
def texts(sources):
    sources(texts=TEXTS)


# --- Before training ---


def test_the_plan_names_sources_and_reads_an_example_of_every_split(sources):
    ours = config()
    sources(texts=TEXTS, more=TEXTS[:5])
    ours.evaluations = (schema.EvaluationSplit("other", "test", "more"),)
    short = plan.sources(ours)
    assert short.splitlines() == ["data: 'texts', in memory", "data: 'more', in memory"]
    text = plan.sources(ours, read=True)
    assert "data: 'texts', in memory: validation 60, test 60" in text
    assert "data: 'more', in memory: test 5" in text
    ours.data.text = "body"
    with pytest.raises(
        DataError, match="no feature 'body'; expected one of other, text"
    ):
        plan.sources(ours, read=True)
    sources(texts=[])
    with pytest.raises(DataError, match="has no examples"):
        plan.sources(config(), read=True)


def test_a_source_that_is_not_prepared_is_said(monkeypatch, tmp_path):
    ours = config(source="tinyshakespeare", data_dir=str(tmp_path))
    assert "'tinyshakespeare' is not prepared here" in plan.sources(ours, read=True)
    assert not list(tmp_path.iterdir())


def test_the_plan_says_as_what_a_run_can_be_exported():
    ours = config()
    ours.model.trunk.ffn, ours.model.trunk.bias = "gelu_tanh", "all"
    assert plan.export(ours) == "export: as GPT2LMHeadModel of transformers"
    ours.model.trunk.bias = "none"
    assert plan.export(ours).startswith("export: not possible: ")
    assert "model.trunk.bias" in plan.export(ours)


def test_the_plan_says_whether_the_tokenizer_can_be_exported():
    ours = llama.get_config("smoke").resolved()
    assert "LlamaForCausalLM" in plan.export(ours, codecs=CODECS)
    ours.model.trunk.bias = "qkv"  # qwen2, whose tokenizers transformers rebuilds
    assert plan.export(ours) == "export: as Qwen2ForCausalLM of transformers"
    said = plan.export(ours, codecs=CODECS)
    assert said.startswith("export: not possible: ")
    assert "data.tokenizer.path" in said


@pytest.mark.parametrize(("warmup", "said"), [(5, False), (6, True), (600, True)])
def test_a_warm_up_longer_than_the_run_is_said(warmup, said):
    ours = config().resolved()
    ours.optim.warmup_steps = warmup
    text = plan.describe(Experiment(ours))
    assert (f"optim.warmup_steps={warmup}: not below steps=6" in text) == said
    if said:
        reached = float(re.search(r"ends at (\S+) on", text)[1])
        assert reached == pytest.approx(1e-3 * 6 / warmup, rel=1e-3)


def test_the_cost_of_an_evaluation_is_that_of_its_positions(texts):
    ours = config().resolved()
    experiment = Experiment(ours)
    splits = plan.Splits.open(experiment, CODECS)
    rows = len(splits.test.dataset)
    ours.evaluation.every = 5
    share = rows / (5 * 3 * 4)  # a step: 4 rows, forward and twice that backward
    said = plan.evaluations(experiment, splits)
    assert f"every 5 steps, {rows} examples: about {share:.1%}" in said
    assert ("lower evaluation.examples" in said) == (share > 0.5)
    ours.evaluation.examples = 6
    share = 6 / (5 * 3 * 4)
    said = plan.evaluations(experiment, splits)
    assert f"6 examples: about {share:.1%}" in said


def test_a_head_that_reads_one_position_in_evaluation_costs_less_there():
    ours = sasrec.get_config("softmax")
    trunk, ours.model.num_items = ours.model.trunk, 500
    trunk.max_len = ours.data.max_len
    width, length = trunk.d_model, ours.data.max_len
    # A position's products: query, key and value, feed-forward, and both of attention.
    layers = trunk.num_layers * (3 * width + 2 * trunk.d_ff + 2 * length) * width
    expected = layers / (layers + 500 * width)  # of all items in training alone
    found = plan.position_cost(Experiment(ours))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("attention", ["dot", "flash"])
def test_what_an_evaluation_costs_where_one_layer_is_trained(attention):
    ours = config().resolved()
    ours.model.trunk.attention = attention
    ours.optim.train = ("decoder/layer_0/.*",)
    assert plan.position_cost(Experiment(ours)) == 1.0


# --- What resuming changes ---


def rates(before, after, step):
    found = []
    for steps, optim in (before, after):
        ours = config()
        ours.steps = steps
        for name, value in optim.items():
            setattr(ours.optim, name, value)
        found.append(ours)
    return plan.jump(*found, step)


COSINE = {"schedule": "cosine", "warmup_steps": 0, "learning_rate": 0.004, "floor": 0.0}


def test_a_jump_of_the_learning_rate_is_from_the_last_step_to_the_next():
    low, high = rates((20, COSINE), (40, COSINE), 20)
    assert low == pytest.approx(0.004 * 0.5 * (1 + np.cos(np.pi * 19 / 20)), rel=1e-4)
    assert high == pytest.approx(0.002, rel=1e-4)
    # A longer warm-up, or another peak, changes it, too.
    assert rates((40, COSINE), (40, {**COSINE, "warmup_steps": 30}), 10)
    assert rates((40, COSINE), (40, {**COSINE, "learning_rate": 0.001}), 10)


def test_what_goes_on_as_before_is_no_jump():
    constant = {"schedule": "constant", "warmup_steps": 3}
    assert rates((20, constant), (40, constant), 20) is None
    assert rates((20, COSINE), (20, COSINE), 7) is None
    assert rates((20, COSINE), (40, COSINE), 0) is None  # nothing was trained


def pairs(count):
    return [{"a": "x" * (1 + i % 9), "b": "y" * (1 + i % 7)} for i in range(count)]


def batches(**fields):
    ours = Seq2SeqConfig(source="pairs", inputs="a", targets="b", max_len=16, **fields)
    split = Split.open(ours, CODECS, "train", SIZES)
    return TrainBatches(split.batches, seed=3)


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        ({"batch_size": 8}, {"batch_size": 4}, 5),
        ({"batch_size": 4}, {"batch_size": 8}, 11),  # into a later epoch
        ({"batch_size": 8}, {"batch_size": 8, "buckets": (8,)}, 5),
    ],
)
def test_what_comes_twice_and_never_is_counted(sources, before, after, step):
    sources(pairs=pairs(50))
    old, new = batches(**before), batches(**after)
    text = moved(old, new, step)
    epoch, position = divmod(step, old.per_epoch)
    seen = [i for _, items in old.plan(epoch)[:position] for i in items]
    epoch, position = divmod(step, new.per_epoch)
    rest = [i for _, items in new.plan(epoch)[position:] for i in items]
    twice, never = set(seen) & set(rest), set(range(50)) - {*seen, *rest}
    assert twice
    assert f"of 50 items {len(twice)} come twice and {len(never)} never" in text


def test_an_epoch_that_goes_on_as_before_is_not_mentioned(sources):
    sources(pairs=pairs(50))
    assert moved(batches(batch_size=8), batches(batch_size=8), 5) == ""
    assert moved(batches(batch_size=8), batches(batch_size=4), 0) == ""
    # All rows fit into the longest bucket that remains.
    assert moved(batches(batch_size=8), batches(batch_size=8, prefetch=3), 5) == ""


def test_rows_of_another_length_are_compared_by_share(sources):
    sources(texts=TEXTS)
    old, new = (
        TrainBatches(
            Split.open(
                CausalLMConfig(source="texts", max_len=n, batch_size=2),
                CODECS,
                "train",
                SIZES,
            ).batches,
            seed=3,
        )
        for n in (8, 16)
    )
    text = moved(old, new, old.per_epoch // 2)
    assert re.search(r"epoch 1 was \d+% done.*: about \d+% of it come twice", text)


@pytest.mark.parametrize("buckets", [(), (8,)])
def test_a_limited_evaluation_is_spread_over_every_corpus(sources, buckets):
    sources(many=pairs(60), few=pairs(3))
    parts = tuple(Corpus(name, "a", "b") for name in ("many", "few"))
    ours = MixtureConfig(corpora=parts, max_len=16, batch_size=8, buckets=buckets)
    split = Split.open(ours, CODECS, "train", SIZES)

    def scored(limit):
        return sorted(i for x, _ in split.batches.evaluation(limit) for i in x.tolist())

    assert scored(0) == scored(60) == [*range(63)]
    found = scored(6)
    groups = Counter(split.dataset.group(item)[0] for item in found)
    assert sorted(groups.values()) == [3, 6]
    numbers = [split.dataset.group(item)[1] for item in found]
    # Files are often sorted: the first ones would be of one kind.
    assert numbers[:6] == [0, 10, 20, 30, 40, 50]


# --- A run ---


@pytest.fixture
def run(texts, tmp_path, monkeypatch):
    """(config, stop) -> scores and the splits that were scored, by prefix."""
    scored, call = [], Evaluator.__call__

    def spied(self, variables, step, split, prefix, *args, **kwargs):
        scored.append((step, prefix))
        return call(self, variables, step, split, prefix, *args, **kwargs)

    monkeypatch.setattr(Evaluator, "__call__", spied)

    def do(ours, stop=lambda: ""):
        scored.clear()
        return train.run(ours, str(tmp_path), stop=stop), list(scored)

    return do


def kept(workdir):
    with Checkpointer(checkpoint_dir(str(workdir)), config().checkpoint) as found:
        return found.steps()


def test_evaluations_starts_and_resuming(run, tmp_path, capsys):
    """One run, stopped after 4 of 10 steps: what it keeps, and what it says."""
    ours = config()
    ours.steps, ours.log_every, ours.evaluation.every = 10, 2, 3
    ours.checkpoint.every, ours.checkpoint.keep_newest = 4, 1
    ours.optim.schedule, ours.optim.learning_rate = "constant", 0.01
    ours.optim.warmup_steps = 0
    ours.checkpoint.mode = "max"  # the best step is the first that was scored

    def stop():
        lines = metrics.read_lines(str(tmp_path))
        return "enough" if any(x["step"] == 4 for x in lines) else ""

    scores, scored = run(ours, stop)
    assert (scores, scored) == ({}, [(3, "eval")])
    first = kept(tmp_path)[-1]
    assert first == 4
    ours.data.batch_size, ours.optim.learning_rate = 2, 0.005
    scores, scored = run(ours)
    out = capsys.readouterr().out
    assert re.search(r"learning rate: \S+ -> \S+ between steps", out)
    assert f"data.batch_size changed after step {first}: epoch 1 was" in out
    for what in ("opening texts", "compiling the step", "first step", "initialising"):
        assert re.search(rf"{what}.*: \d+\.\d s", out), what
    # What was scored is saved if it is the best, whatever checkpoint.every is.
    assert kept(tmp_path) == [3, 8, 10]
    # It was scored by another start: the test scores it again.
    assert scored[-1] == (3, "test")
    lines = metrics.read_lines(str(tmp_path))
    assert [x["step"] for x in lines if "eval/loss" in x] == [3, 6, 9, 10]
    assert [x["step"] for x in lines if "train/loss" in x] == [2, 4, 6, 8, 10]
    assert sorted(x["time"] for x in lines) == [x["time"] for x in lines]
    # Rows of 8 tokens: 4 a batch before, 2 afterwards.
    seen = {x["step"]: x["tokens"] for x in lines if "train/loss" in x}
    assert seen[10] == 8 * (4 * first + 2 * (10 - first))
    starts = history.read(str(tmp_path))
    assert [x["outcome"] for x in starts] == ["interrupted by enough", "finished"]
    assert train.run(ours, str(tmp_path)) == scores  # finished already
    assert len(history.read(str(tmp_path))) == 3


def test_the_test_split_is_scored_once_where_it_is_the_evaluation_split(run, tmp_path):
    ours = config()
    ours.steps = ours.evaluation.every = 2
    scores, scored = run(ours)
    assert scored == [(2, "eval")]
    lines = metrics.read_lines(str(tmp_path))
    evaluated = next(x for x in lines if "eval/loss" in x)
    assert scores["test/loss"] == evaluated["eval/loss"]
    assert scores["test/checkpoint"] == "step 2"
    assert {k[5:] for k in evaluated if k.startswith("eval/")} == {
        k[5:] for k in scores if k != "test/checkpoint"
    }


def test_a_limited_evaluation_is_no_test(run, tmp_path):
    ours = config()
    ours.steps = ours.evaluation.every = 2
    ours.evaluation.examples = 6
    scores, scored = run(ours)
    assert [prefix for _, prefix in scored] == ["eval", "test"]
    evaluated = next(x for x in metrics.read_lines(str(tmp_path)) if "eval/loss" in x)
    assert evaluated["eval/examples"] == 6
    assert scores["test/examples"] > 6
    # What needs counts of the whole split is an estimate for it.
    whole, part = scores["test/bits_per_byte"], evaluated["eval/bits_per_byte"]
    assert part == pytest.approx(whole, rel=0.2)


# --- Starts ---


def test_every_start_is_a_line_that_says_how_it_ended(tmp_path):
    workdir = str(tmp_path)
    history.Start(workdir).__enter__()  # and killed
    assert history.read(workdir)[-1]["outcome"] is None
    with pytest.raises(UserError), history.Start(workdir):
        raise UserError("steps=0: must be at least 1")
    with pytest.raises(ZeroDivisionError), history.Start(workdir):
        _ = 1 / 0
    with pytest.raises(KeyboardInterrupt), history.Start(workdir):
        raise KeyboardInterrupt
    with history.Start(workdir):
        pass
    lines = history.read(workdir)
    assert [line["outcome"] for line in lines] == [
        "killed",
        "error: steps=0: must be at least 1",
        "error: ZeroDivisionError: division by zero",
        "interrupted by KeyboardInterrupt",
        "finished",
    ]
    assert [line["ended"] is None for line in lines] == [True] + 4 * [False]
    last = lines[-1]
    assert last["started"] <= last["ended"]
    assert last["versions"].keys() >= {"python", "jax", "numpy"}
    assert last["devices"] == "8 x cpu"
    assert os.path.basename(sys.executable) in last["command"]
    assert last["folder"] == os.getcwd()
    code, clean = history.commit()
    assert (last["commit"], last["clean"]) == (code, clean)


def test_a_torn_line_of_starts_is_passed_over(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"outcome": "finished"}) + '\n{"outc')
    with history.Start(str(tmp_path)):
        pass
    assert [x["outcome"] for x in history.read(str(tmp_path))] == 2 * ["finished"]
