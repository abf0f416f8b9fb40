"""configs/my_chat.py from a file to answers, and the public harness on its model."""

import csv
import itertools
import json
import sys

import jax
import numpy as np
import pytest
import transformers

from triform import evaluate, train
from triform import lm_eval as harnessed
from triform import workdir as workdirs
from triform.answers.chat import Conversation, talk
from triform.answers.inputs import Asked, of_lines
from triform.answers.sampler import Sampler
from triform.configs import my_chat
from triform.configs.schema import smoke
from triform.data.lines import one_line
from triform.input_pipeline import Split
from triform.interop.workdir import export_model
from triform.runtime.errors import UserError

NUMBERS = ("one", "two", "three", "four")
SUMS = list(itertools.product(NUMBERS, NUMBERS))
ASKED = "What is {} plus {}?"


def talks() -> list[list[dict[str, str]]]:
    """Every sum, some after another one or a system turn."""
    found = []
    for i, (a, b) in enumerate(SUMS):
        messages = [{"role": "system", "content": "Add."}] if i % 4 == 0 else []
        for x, y in ((b, a), (a, b))[i % 2 :]:
            total = NUMBERS.index(x) + NUMBERS.index(y) + 2
            messages.append({"role": "user", "content": ASKED.format(x, y)})
            messages.append({"role": "assistant", "content": str(total)})
        found.append(messages)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """chats.jsonl, and a cache of the module's."""
    path = tmp_path_factory.mktemp("chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIFORM_CACHE", str(path / "cache"))
        rows = [json.dumps({"messages": messages}) for messages in talks()]
        (path / "chats.jsonl").write_text("\n".join(rows))
        yield path


@pytest.fixture(scope="module")
def trained(folder):
    """The workdir of the smoke variant."""
    config = my_chat.get_config("smoke")
    config.data.source = str(folder / "chats.jsonl")
    scores = train.run(config, str(folder / "run"))
    assert np.isfinite(scores["test/loss"])
    return str(folder / "run")


def test_the_config_is_short():
    with open(my_chat.__file__) as f:
        assert len(f.readlines()) < 45


def test_every_conversation_is_scored_on_its_answers(trained, folder):
    """As many targets as the file's answers have ids, whatever shares a row."""
    result = evaluate.run(trained, "all", predictions=True)
    codecs = workdirs.open_run(trained).codecs
    tok, chat = codecs["text"], codecs["chat"]
    answers = [m["content"] for t in talks() for m in t if m["role"] == "assistant"]
    assert result.scalars["all/cut"] == 0
    assert len(result.predictions) <= len(talks())
    counted = sum(int(chat.encode(t)[0][1].sum()) for t in talks())
    assert counted == sum(len(x) + 1 for x in tok.encode(answers))


def test_files_of_other_formats_give_the_same_batches(trained, folder):
    """Two columns of a CSV, and messages as JSON in a cell."""
    pairs = [(ASKED.format(a, b), f"{a} {b}") for a, b in SUMS]
    with open(folder / "pairs.csv", "w", newline="") as f:
        csv.writer(f).writerows([("question", "answer"), *pairs])
    turns = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in pairs
    ]
    with open(folder / "turns.csv", "w", newline="") as f:
        rows = [("messages",), *((json.dumps(t),) for t in turns)]
        csv.writer(f).writerows(rows)
    lines = [json.dumps({"messages": t, "tools": None}) for t in turns]
    (folder / "turns.jsonl").write_text("\n".join(lines))
    config = my_chat.get_config("smoke")
    codecs = workdirs.open_run(trained).codecs
    found = []
    for name in ("pairs.csv", "turns.csv", "turns.jsonl"):
        config.data.source = str(folder / name)
        config.data.prompt, config.data.response = "", ""
        if name == "pairs.csv":
            config.data.prompt, config.data.response = "question", "answer"
        split = Split.open(config.data, codecs, "all", {"vocab_size": 1000})
        found.append([split.dataset.store[t] for t in range(len(split.dataset.store))])
    for one in found[1:]:
        for (ids, marks), (others, theirs) in zip(found[0], one, strict=True):
            assert ids.tolist() == others.tolist()
            assert marks.tolist() == theirs.tolist()


def test_chat_asks_with_all_that_was_said(trained, capsys):
    """What `generate.py --chat` prints are the sampler's answers to the messages."""
    sampler = Sampler(trained, method="greedy")
    end = sampler.codecs["text"].pieces.index("<|im_end|>")
    assert end in sampler.codecs["text"].ends
    lines = [b"What is one plus two?\n", b"\n", b"And?\r\n", b"/reset\n", b"And?"]
    talk(sampler, of_lines(lines, "lines"), {"max_tokens": 6})
    first, empty, second, third, rest = capsys.readouterr().out.split("\n")
    assert (empty, rest) == ("", "")
    said = [{"role": "user", "content": "What is one plus two?"}]
    (answer,) = sampler([said], max_tokens=6)
    assert one_line(answer.text) == first
    said.append({"role": "assistant", "content": answer.text.strip()})
    said.append({"role": "user", "content": "And?"})
    again, alone, text = sampler([said, said[-1:], "And?"], max_tokens=6)
    assert one_line(again.text) == second
    assert one_line(alone.text) == third
    assert text.text == alone.text  # of a chat, a text is what a user says
    lines = [b"/reset\n", b"And?"]
    talk(sampler, of_lines(lines, "lines"), {"max_tokens": 6}, system="Add.")
    (begun,) = sampler(
        [[{"role": "system", "content": "Add."}, said[-1]]], max_tokens=6
    )
    assert capsys.readouterr().out == one_line(begun.text) + "\n"
    with pytest.raises(UserError, match="--chat: a.jsonl, line 1 is no line of text"):
        talk(sampler, [Asked({"messages": said}, "a.jsonl, line 1")], {})


def test_a_long_conversation_forgets_its_oldest_turns(trained):
    conversation = Conversation(Sampler(trained, method="greedy"))
    warnings = []
    conversation.messages = [{"role": "system", "content": "Add."}]
    for asked in of_lines([b"one plus one and " * 4] * 5, "lines"):
        *_, output = conversation.answer(asked, max_tokens=8)
        warnings += output.warnings
    assert any("forgotten: the oldest 2 turns" in x for x in warnings)
    assert conversation.messages[0]["role"] == "system"
    assert not any("cut" in x for x in warnings)


def test_lora_trains_adapters_beside_the_weights(trained, folder):
    config = my_chat.get_config("lora")
    smoke(config, split="all")
    config.data.source, config.data.max_len = str(folder / "chats.jsonl"), 128
    config.init_from, config.steps = trained, 2
    train.run(config, str(folder / "lora"))
    before, after = (workdirs.load(x).params for x in (trained, str(folder / "lora")))
    new = dict(jax.tree_util.tree_leaves_with_path(after))
    for path, x in jax.tree_util.tree_leaves_with_path(before):
        assert np.asarray(x).tobytes() == np.asarray(new.pop(path)).tobytes()
    assert new
    assert all("lora_" in jax.tree_util.keystr(path) for path in new)
    codecs = [
        workdirs.open_run(x).codecs["chat"] for x in (trained, str(folder / "lora"))
    ]
    assert codecs[0].digest() == codecs[1].digest()


# --- The harness ---

CHOICE = """
task: sums_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """
task: sums_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} "
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n", "e"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: sums_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} {{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
TASKS = {"sums_choice": CHOICE, "sums_write": WRITE, "sums_rolling": ROLLING}


@pytest.fixture
def harness(monkeypatch, tmp_path):
    """The package lm_eval."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    try:
        return harnessed.harness()
    except UserError as error:
        pytest.skip(str(error))


def test_the_harness_gives_the_scores_of_the_exported_model(trained, harness, tmp_path):
    rows = [
        {
            "question": ASKED.format(a, b) * (1 + 6 * (i == 3)),  # beyond the context
            "choices": [f"{a} {b}", f" {b}", "4"],
            "label": i % 3,
        }
        for i, (a, b) in enumerate(SUMS[:9])
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(path=data))
    names = list(TASKS)
    options = {"batch_size": 4, "bootstrap_iters": 0}
    export_model(trained, str(tmp_path / "exported"))
    ours = harnessed.run(trained, names, include_path=str(tmp_path), **options)
    theirs = harness.evaluator.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'exported'},dtype=float32",
        device="cpu",
        tasks=names,
        task_manager=harness.tasks.TaskManager(
            include_path=str(tmp_path), include_defaults=False
        ),
        **options,
    )
    for name in names:
        for key, value in ours["results"][name].items():
            if "," in key and "stderr" not in key:
                assert value == pytest.approx(theirs["results"][name][key], rel=1e-5)
        samples = [
            sorted(x["samples"][name], key=lambda s: s["doc_id"])
            for x in (ours, theirs)
        ]
        for one, two in zip(*samples, strict=True):
            if name == "sums_write":
                assert one["resps"] == two["resps"]
                continue
            for a, b in zip(one["resps"], two["resps"], strict=True):
                np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-5)
    _same_chat(harnessed.model(trained), str(tmp_path / "exported"))


def _same_chat(model, exported: str) -> None:
    """--apply_chat_template writes and reads what transformers does."""
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    messages = [*talks()[0], {"role": "user", "content": "And <b>?\n"}]
    for k in (1, 2, len(messages)):
        prompt = messages[k - 1]["role"] != "assistant"
        options = {
            "add_generation_prompt": prompt,
            "continue_final_message": not prompt,
        }
        text = theirs.apply_chat_template(messages[:k], tokenize=False, **options)
        assert model.apply_chat_template(messages[:k], prompt) == text
        assert model.tok_encode(text) == theirs.encode(text)


def test_what_the_harness_cannot_ask_is_one_line(trained, harness):
    model = harnessed.model(trained)
    with pytest.raises(UserError, match="asks for sampling"):
        model._limits({"do_sample": True})
    with pytest.raises(UserError, match="asks for 500 new tokens"):
        model._limits({"max_gen_toks": 500})
    del model.sampler.codecs["chat"]
    with pytest.raises(UserError, match="leave out --apply_chat_template"):
        model.chat_template(True)
    with pytest.raises(UserError, match="no chat template"):
        Conversation(model.sampler)
