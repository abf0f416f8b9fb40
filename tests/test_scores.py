"""Scores of text: by the words of its language, against what a model can write."""

import dataclasses
import importlib.util
import types

import pytest

from triform import scores
from triform.data.codecs import text as tokenizer
from triform.data.codecs.text import TokenizerConfig
from triform.evaluate import Evaluator
from triform.scores import EvaluationConfig, text

GERMAN = ["ein Glas", "zwei Meter hoch"]
CHINESE = ["我是一个学生。", "他住在北京。"]


def evaluator_of(tok, metrics):
    """What scores texts, without a model."""
    evaluation = EvaluationConfig(metrics=metrics, samples=9)
    found = Evaluator.__new__(Evaluator)
    config = types.SimpleNamespace(evaluation=evaluation)
    found.experiment = types.SimpleNamespace(config=config)
    found.codecs, found.log, found.warned = {"text": tok}, None, [""]
    return found


def dataset_of(references):
    return types.SimpleNamespace(
        text=lambda i: ("source", references[i]), group=lambda i: ("", i)
    )


def scored(language, ours, references, *names, **fields):
    config = EvaluationConfig(metrics=names, language=language, **fields)
    return scores.score(config, ours, references)


@pytest.mark.parametrize(
    ("language", "kind"),
    [
        *(
            ("de", "13a"),
            ("en-GB", "13a"),
            ("ru", "13a"),
            ("zh", "zh"),
            ("zh_TW", "zh"),
        ),
        *(("cmn-Hans", "zh"), ("th", "char"), ("ja", "ja-mecab"), ("ko", "ko-mecab")),
    ],
)
def test_bleu_divides_words_as_the_language_does_and_says_so(language, kind):
    config = EvaluationConfig(metrics=("bleu",), language=language)
    assert config.tokenizer() == kind
    module, extra = text.EXTRAS.get(kind, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        with pytest.raises(ValueError, match=rf"language='{language}'.*\[{extra}\]"):
            config.validate()
        config = dataclasses.replace(config, bleu_tokenizer="char")
        kind = "char"
    config.validate()
    texts = [x * 5 for x in (GERMAN if kind == "13a" else CHINESE)]
    found = scores.score(config, texts, texts)
    assert f"|tok:{kind}" in found["bleu_signature"]
    assert found["bleu"] == pytest.approx(100)


def test_a_script_without_spaces_under_another_language_is_warned_of():
    near = [x.replace("。", "!") for x in CHINESE]
    found = scored("de", near, CHINESE, "bleu")
    assert found["bleu"] < 1 and "evaluation.language" in found["bleu_warning"]
    found = scored("zh", near, CHINESE, "bleu")
    assert found["bleu"] > 50 and "bleu_warning" not in found
    assert "bleu_warning" not in scored("de", GERMAN, GERMAN, "bleu")


def test_the_warning_is_said_once(capsys):
    evaluator = evaluator_of(tokenizer.ByteTokenizer(), ("bleu",))
    for _ in range(2):
        evaluator._score(dataset_of(CHINESE), dict(enumerate(CHINESE)), ("bleu",))
    assert capsys.readouterr().out.count("13a does not divide") == 1


@pytest.mark.parametrize("language", ["zh", "th"])
def test_moses_is_refused_where_it_finds_no_words(language):
    config = EvaluationConfig(metrics=("bleu_moses",), language=language)
    with pytest.raises(ValueError, match="bleu_moses"):
        config.validate()
    with pytest.raises(ValueError, match=r"bleu_tokenizer='13b': expected one of"):
        EvaluationConfig(bleu_tokenizer="13b").validate()


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes", "chars"])
@pytest.mark.parametrize("lowercase", [False, True])
def test_what_a_tokenizer_normalises_caps_no_score(kind, lowercase):
    """A model that writes every reference as it can has 1.0; the report says it."""
    references = [
        "½ Tasse",
        "x² Meter",
        "ﬁnden",
        "\uff11\uff12 Uhr",
        "e\u0301té",
        "plain text",
    ]
    config = TokenizerConfig(kind, lowercase)
    tok = tokenizer.train(config, references * 20, 320)
    metrics = ("exact_match", "bleu")
    dataset = dataset_of(references)
    found = {}
    for perfect in (True, False):
        evaluator = evaluator_of(tok, metrics)
        rows = tok.encode(references)
        written = {i: tok.decode(ids) for i, ids in enumerate(rows)}
        if not perfect:
            written[5] = "plain texts"
        found, samples = evaluator._score(dataset, written, metrics)
        right = len(references) - (not perfect)
        assert found["exact_match"] == pytest.approx(right / len(references))
    assert written[0] in samples and tok.normalize(references[0]) in samples
    changed = sum(tok.normalize(x) != x for x in references)
    assert found.get("references", "0 of")[:4] == f"{changed} of"
