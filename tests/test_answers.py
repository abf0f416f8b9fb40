"""Answers: one per request, in order, whatever is beside it and however it is asked."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triform import workdir as workdirs
from triform.answers.output import JsonLines, Output
from triform.answers.sampler import Sampler
from triform.answers.writing import FUSION, compiler_options, plan
from triform.configs import schema
from triform.configs.schema import ExperimentConfig
from triform.data import datasets
from triform.data.codecs import files as codec_files
from triform.data.codecs.classes import Classes
from triform.data.codecs.text import ByteTokenizer
from triform.data.datasets import (
    CausalLMConfig,
    ImagesConfig,
    MaskedLMConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
    TokenClassificationConfig,
)
from triform.experiment import Experiment
from triform.models import (
    EncoderConfig,
    EncoderDecoderConfig,
    LanguageModelConfig,
    VisionConfig,
    decode,
)
from triform.models.config import TransformerConfig
from triform.models.decode import DecodeConfig
from triform.runtime import host
from triform.runtime.checkpoint import Checkpointer
from triform.runtime.errors import UserError
from triform.scores.text import EvaluationConfig
from triform.tasks import (
    ClassificationConfig,
    PretrainingConfig,
    RegressionConfig,
    TokenPredictionConfig,
)

TOK = ByteTokenizer(specials=("[CLS]", "[SEP]", "[MASK]"))
V, CONTEXT = TOK.vocab_size, 24
NAMES = Classes(["no", "yes", "maybe"])


def trunk(**fields):
    sizes = {"num_layers": 1, "d_model": 16, "num_heads": 2, "d_ff": 16, "dropout": 0.0}
    return TransformerConfig(**sizes | {"max_len": CONTEXT, **fields})


def encoder(**fields):
    plain = {"masked_head": False, "num_labels": 0}
    return EncoderConfig(trunk(), V, **plain | fields)


def experiments():
    rows = {"max_len": CONTEXT}
    pair = SequenceClassificationConfig(first="a", second="b", **rows)
    number = SequenceClassificationConfig(first="a", target="number", **rows)
    image = VisionConfig(trunk(max_len=5), 8, 4, 1, num_labels=3)
    return {
        "prompts": (
            LanguageModelConfig(trunk(positions="rotary"), V),
            TokenPredictionConfig(),
            CausalLMConfig(**rows),
        ),
        "sources": (
            EncoderDecoderConfig(trunk(), V),
            TokenPredictionConfig(),
            Seq2SeqConfig(**rows),
        ),
        "labels": (encoder(num_labels=3), ClassificationConfig(), pair),
        "numbers": (encoder(num_labels=1), RegressionConfig(), number),
        "tags": (
            encoder(num_tags=3),
            TokenPredictionConfig(),
            TokenClassificationConfig(**rows),
        ),
        "blanks": (
            encoder(masked_head=True, num_labels=2),
            PretrainingConfig(),
            MaskedLMConfig(**rows),
        ),
        "images": (image, ClassificationConfig(), ImagesConfig(size=8, channels=1)),
    }


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """(name of an experiment) -> a workdir of it whose parameters are noise."""
    made = {}

    def make(name):
        if name not in made:
            model, task, data = experiments()[name]
            decoding = DecodeConfig(method="greedy", max_len=12)
            config = ExperimentConfig(
                model,
                task,
                data,
                decode=decoding,
                evaluation=EvaluationConfig(metrics=()),
            )
            folder, rng = tmp_path_factory.mktemp(name), np.random.default_rng(3)
            shapes = jax.eval_shape(Experiment(config).make_state).params
            params = jax.tree.map(
                lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype),
                shapes,
            )
            (folder / "config.json").write_text(schema.to_json(config))
            where = workdirs.checkpoint_dir(str(folder))
            with Checkpointer(where, config.checkpoint) as out:
                out.save(7, {"params": params}, meta={})
            codecs = dict.fromkeys(data.classes(), NAMES)
            if hasattr(data, "tokenizer"):
                codecs["text"] = TOK
            codec_files.save(codecs, str(folder))
            made[name] = str(folder)
        return made[name]

    return make


@pytest.fixture(scope="module")
def sampler(workdir):
    """(name, settings) -> its sampler; compiled once."""
    made = {}

    def open_one(name, **settings):
        key = name, *settings.items()
        if key not in made:
            made[key] = Sampler(workdir(name), **settings)
        return made[key]

    return open_one


PROMPTS = ["a", "a longer prompt than the context of the model holds", "", "ab cd " * 3]


# --- Continuations ---


def test_a_pass_reads_what_fits_and_leaves_room_for_what_is_left():
    for context in (1, 2, 5, 8, 24):
        for given in range(1, 3 * context):
            for left in range(1, 3 * context):
                read, new = plan(given, left, context)
                assert 1 <= read <= given
                assert 1 <= new <= left
                # The token that is written last is never read.
                assert read + new - 1 <= context
                if given + left - 1 <= context:
                    assert (read, new) == (given, left)
                elif left <= context // 2:  # it is written in one pass
                    assert (read, new) == (context + 1 - left, left)
                elif given > context:
                    assert read == max(1, context // 2)


def test_greedy_text_is_that_of_full_passes(sampler):
    """Prompts that fit are read whole; every token's log-probability is the model's."""
    ours, limit = sampler("prompts"), 8
    prompts = ["ab", "ab cd ef gh ij k", "x" * (CONTEXT + 1 - limit)]
    model, variables = ours.experiment.model, ours.run.variables
    apply = jax.jit(lambda x: jax.nn.log_softmax(model.apply(variables, x)["targets"]))
    outputs = ours(prompts, max_tokens=limit, scores=True)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert not output.warnings
        ids = TOK.prompts([prompt])[0].tolist()
        given, logp = len(ids), []
        while len(logp) < limit:
            row = np.zeros((1, CONTEXT), np.int32)
            row[0, : len(ids)] = ids
            after = np.asarray(apply({"inputs": row})[0, len(ids) - 1])
            ids.append(int(after.argmax()))
            logp.append(after.max())
            if ids[-1] in TOK.ends:
                break
        np.testing.assert_allclose(output.token_scores, logp, atol=1e-4)
        assert output.score == pytest.approx(sum(logp), abs=1e-3)
        assert output.tokens == [TOK.show([i]) for i in ids[given:]]
        shown = TOK.continuation(ids[:given], ids[given:])
        assert output.text == shown.removesuffix("\ufffd")


def test_a_text_does_not_depend_on_what_is_beside_it(sampler):
    """Nor on the size of the batch; also where it outgrows the context."""
    ours = sampler("prompts", method="sample", top_k=20)
    how = {"max_tokens": 30, "seed": 5}
    together = ours(PROMPTS, **how)
    assert any(x.warnings for x in together)
    for a, b in zip(together, ours(PROMPTS, batch_size=1, **how), strict=True):
        assert (a.text, a.finish, a.warnings) == (b.text, b.finish, b.warnings)
        assert a.score == pytest.approx(b.score, abs=1e-3)
    assert ours(PROMPTS, max_tokens=30, seed=6)[0].text != together[0].text
    # Its number decides, not its position in a call.
    assert ours(["x", *PROMPTS[:3]], **how)[1].text != together[0].text


def test_samples_of_a_prompt_are_its_own(sampler):
    ours = sampler("prompts", method="sample", top_k=20)
    how = {"max_tokens": 30, "seed": 2}
    outputs = ours(PROMPTS, num_samples=2, batch_size=4, **how)
    texts = [sample.text for output in outputs for sample in output.samples]
    assert len({*texts}) == len(texts) == 2 * len(PROMPTS)
    # The first sample is what is written if one is asked for.
    assert [x.text for x in ours(PROMPTS, **how)] == [x.text for x in outputs]


@pytest.mark.parametrize("stop", [(), ("e",)])
def test_live_text_is_the_text(sampler, stop):
    ours = sampler("prompts", method="sample", top_k=20)
    how = {"max_tokens": 30, "seed": 5, "stop": stop}
    whole = ours(PROMPTS, **how)
    for number, expected in enumerate(whole):
        *parts, last = ours.live(PROMPTS[number], number=number, **how)
        shown = ours.kind.read(PROMPTS[number]).shown + expected.text
        assert "".join(parts).replace(" ", "") == "".join(
            c if c in "\n\t" or c.isprintable() or c == "\ufffd" else "" for c in shown
        ).replace(" ", "")
        assert last.text == expected.text
        assert last.warnings == expected.warnings


def test_a_text_ends_before_a_stop(sampler):
    ours = sampler("prompts", method="sample", top_k=20)
    free = ours(["ab"] * 4, max_tokens=30, scores=True)
    plain = [[c for c in x.text if c.isascii()] for x in free]
    stop = (plain[0][2], plain[1][1])
    stopped = ours(["ab"] * 4, max_tokens=30, stop=stop, scores=True)
    assert stopped[0].finish == stopped[1].finish == "stop"
    for a, b in zip(free, stopped, strict=True):
        assert not any(s in b.text for s in stop)
        assert a.text.startswith(b.text)
        assert b.finish == ("stop" if any(s in a.text for s in stop) else a.finish)
        np.testing.assert_allclose(
            b.token_scores, a.token_scores[: len(b.token_scores)], atol=1e-4
        )
    with pytest.raises(UserError, match="stop="):
        ours(["ab"], stop=[""])


def test_prompts_have_beams(sampler):
    """Each its own, of at most half the context; a stop ends them, too."""
    ours, half = sampler("prompts", beam_size=3), CONTEXT // 2
    together = ours(PROMPTS, scores=True)
    long = together[1]
    assert long.finish == "length" and len(long.token_scores) == half
    assert [x.split(":")[0] for x in long.warnings] == ["cut", "shortened"]
    *_, alone = ours.live(PROMPTS[0])
    assert (alone.text, alone.finish) == (together[0].text, together[0].finish)
    for output in together:
        n = len(output.token_scores)
        assert output.tokens and n <= half
        expected = sum(output.token_scores) / decode.length_norm(n, 0.6)
        assert output.score == pytest.approx(expected, rel=1e-4)
    # Some text is likelier than what greedy search finds.
    greedy = sampler("prompts")(PROMPTS, max_tokens=half, scores=True)
    assert any(
        sum(a.token_scores) > sum(b.token_scores) + 0.1
        for a, b in zip(together, greedy, strict=True)
    )
    stop = next(c for c in long.text[1:] if c.isascii())
    stopped = ours(PROMPTS, stop=[stop])[1]
    assert stopped.text == long.text[: long.text.find(stop)]


def test_a_prompt_that_is_cut_says_by_how_much(sampler):
    ours = sampler("prompts")
    read = CONTEXT + 1 - 8
    cut, whole = ours(["x" * 50, "x" * read], max_tokens=8)
    assert cut.warnings == (f"cut: {50 - read} of 50 tokens left out",)
    assert (cut.text, whole.warnings) == (whole.text, ())
    with pytest.raises(UserError, match=r"input 2 .'xxxx.*50 tokens.*context of 24"):
        ours(["a", "x" * 50], max_tokens=8, strict=True)


# --- Every kind ---

GOOD = {
    "prompts": ["ab", "cd"],
    "sources": ["ab", "cd ef"],
    "labels": ["ab\tcd", {"a": "ef", "b": "gh"}],
    "numbers": ["ab", {"a": "ef"}],
    "tags": ["ab cd", {"tokens": ["ef", "gh"]}],
    "blanks": ["a[MASK]b", {"text": "[MASK] [MASK] c"}],
    "images": [np.full((8, 8), 9, np.uint8), {"image": np.zeros((4, 4), np.uint8)}],
}
LONG = dict.fromkeys(GOOD, "x" * 99) | {"labels": "x" * 99 + "\ty"}


@pytest.mark.parametrize("name", GOOD)
def test_every_request_has_its_answer(sampler, name):
    """Whatever lies between them, the good ones are answered as they are alone."""
    ours, (first, second) = sampler(name), GOOD[name]
    how = {"max_tokens": 8, "scores": True}
    alone = ours([first, second], batch_size=1, **how)
    bad = {"nothing": 1}
    outputs = ours([first, "", LONG[name], bad, second], **how)
    assert len(outputs) == 5
    for a, b in zip(alone, (outputs[0], outputs[-1]), strict=True):
        a, b = a.row(ours.gives), b.row(ours.gives)
        numbers = {"score", "token_scores", "probabilities", "filled", "label"}
        assert {k: x for k, x in a.items() if k not in numbers} == {
            k: x for k, x in b.items() if k not in numbers
        }
        flat = [jax.tree.leaves({k: x.get(k) for k in numbers}) for x in (a, b)]
        for x, y in zip(*flat, strict=True):
            assert x == y if isinstance(x, str) else x == pytest.approx(y, abs=1e-4)
    notes = [x.warnings for x in outputs]
    assert notes[0] == notes[4] == ()
    if name != "prompts":  # of which an empty one is a beginning
        assert notes[1] == ("empty: there is nothing to answer",)
        assert outputs[1] == Output(warnings=notes[1])
    assert notes[2][-1].startswith("failed:" if name == "images" else "cut: ")
    assert notes[3][0].startswith("failed: ")
    for wrong in (LONG[name], bad):
        with pytest.raises(UserError, match="input 2"):
            ours([first, wrong], strict=True)
    assert len(ours([""], strict=True)) == 1


def probabilities(ours, requests, output):
    """What the model itself says of requests."""
    batch = datasets.request_batch(
        ours.config.data, requests, len(requests), ours.codecs, ours.experiment.sizes
    )
    outputs = ours.experiment.model.apply(ours.run.variables, batch)
    return np.asarray(jax.nn.softmax(outputs[output])), batch


@pytest.mark.parametrize("name", ["labels", "images"])
def test_a_label_is_the_likeliest(sampler, name):
    ours = sampler(name)
    expected, _ = probabilities(ours, GOOD[name], "label")
    for shares, output in zip(expected, ours(GOOD[name]), strict=True):
        assert [*output.probabilities] == [*NAMES.names]
        np.testing.assert_allclose([*output.probabilities.values()], shares, atol=1e-5)
        assert output.label == output.line() == NAMES.names[shares.argmax()]
        assert output.score == pytest.approx(shares.max(), abs=1e-5)


def test_words_are_tagged(sampler):
    ours = sampler("tags")
    expected, batch = probabilities(ours, GOOD["tags"], "targets")
    for row, output in enumerate(ours(GOOD["tags"])):
        at = np.flatnonzero(batch["weights"][row])
        names = [NAMES.names[i] for i in expected[row, at].argmax(-1)]
        assert [tag for _, tag in output.tags] == names
        words = [["ab", "cd"], ["ef", "gh"]][row]
        assert output.line() == " ".join(map("/".join, zip(words, names, strict=True)))


def test_blanks_are_filled(sampler):
    ours = sampler("blanks")
    expected, batch = probabilities(ours, GOOD["blanks"][1:], "targets")
    ((first, second),) = (x.filled for x in ours(GOOD["blanks"][1:]))
    assert (batch["masked_positions"][0, :2] > 0).all()
    for shares, found in zip(expected[0], (first, second), strict=False):
        best = np.sort(shares)[::-1][:5]
        np.testing.assert_allclose([*found.values()], best, atol=1e-5)


def test_targets_follow_their_settings(sampler):
    ours = sampler("sources", method="sample", top_k=20)
    sources = ["ab", "cd", "ab cd ef"]
    outputs = ours(sources, num_samples=2, batch_size=2, scores=True, seed=4)
    texts = [s.text for o in outputs for s in o.samples]
    assert len({*texts}) == len(texts)
    assert [x.text for x in ours(sources, batch_size=2, seed=4)] == texts[::2]
    for output in outputs:
        assert output.score == pytest.approx(sum(output.token_scores), abs=1e-4)
        assert len(output.tokens) == len(output.token_scores) <= 12
    few = ours(sources, batch_size=2, max_tokens=3, scores=True)
    assert all(len(x.tokens) <= 3 for x in few)
    cut = ours(sources, batch_size=2, seed=4, stop=[texts[0][1:3]])[0]
    assert (cut.text, cut.finish) == (texts[0][: texts[0].find(texts[0][1:3])], "stop")


def test_settings_that_make_no_sense_are_refused(sampler, workdir):
    with pytest.raises(UserError, match="num_samples=2.*method='sample'"):
        sampler("prompts")(["a"], num_samples=2)
    with pytest.raises(UserError, match="num_samples=2.*writes no text"):
        sampler("labels")(["a\tb"], num_samples=2)
    with pytest.raises(UserError, match="max_tokens=0"):
        sampler("prompts")(["a"], max_tokens=0)
    with pytest.raises(UserError, match="beam_size=2: method='sample' does not read"):
        Sampler(workdir("prompts"), beam_size=2, top_k=3)
    with pytest.raises(UserError, match="top_p=0.5: .* set method='sample'"):
        Sampler(workdir("prompts"), method="greedy", top_p=0.5)
    with pytest.raises(UserError, match="warmth=2: no setting"):
        Sampler(workdir("prompts"), warmth=2)


def test_rows_of_a_file_are_strict_json(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    file = JsonLines(str(path))
    assert not path.exists()
    file.open()
    nan = Output(text="a\u2028\ud800b", score=float("nan"), warnings=("cut: 1",))
    file.write({"input": {"x": np.int32(3)}, **nan.row(("text", "score"))})
    (line,) = path.read_text("utf-8").split("\n")[:-1]  # before it is closed
    file.close()

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(line, parse_constant=refuse) == {
        "input": {"x": 3},
        "text": "a\u2028\ufffdb",
        "score": "nan",
        "warnings": ["cut: 1"],
    }
    with pytest.raises(UserError, match="there already.*--overwrite"):
        JsonLines(str(path))
    JsonLines(str(path), overwrite=True).open()
    assert path.read_text() == ""
    full = JsonLines("/dev/full")
    full.open()
    with pytest.raises(OSError, match="/dev/full") as caught:
        full.write({})
    assert caught.value.filename == "/dev/full"


def test_a_users_compiler_flag_is_that_of_writing_too(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    host.set_compiler_flags()
    ours = compiler_options()
    assert list(ours) == [FUSION]
    double = jax.jit(lambda x: 2 * x, compiler_options=ours)
    assert double(jnp.ones(())) == 2  # this jaxlib takes them
    monkeypatch.setenv("XLA_FLAGS", f"--{FUSION}=LIBRARY_FUSION_TYPE_ELTWISE")
    host.set_compiler_flags()
    assert compiler_options() == {}
