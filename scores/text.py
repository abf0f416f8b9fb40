"""Scores of generated text: BLEU and chrF (sacreBLEU), exact match."""

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

Scores = dict[str, float | str]
# Language of the targets -> sacreBLEU's tokenizer of it; of languages that put no
# spaces between words and have none, characters; of all others 13a.
TOKENIZERS = {
    **dict.fromkeys(("zh", "zho", "chi", "cmn", "yue", "wuu"), "zh"),
    **dict.fromkeys(("ja", "jpn"), "ja-mecab"),
    **dict.fromkeys(("ko", "kor"), "ko-mecab"),
    **dict.fromkeys(("th", "tha", "lo", "lao", "km", "khm", "my", "mya"), "char"),
    **dict.fromkeys(("bo", "bod", "dz", "dzo"), "char"),
}
# What these import -> the extra of ours that installs it.
EXTRAS = {"ja-mecab": ("MeCab", "japanese"), "ko-mecab": ("mecab_ko", "korean")}
# Scripts without spaces: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
    "\U00020000-\U0003ffff]"
)


@dataclasses.dataclass
class EvaluationConfig:
    """When and how a run is evaluated."""

    every: int = 1000  # steps between evaluations; each also saves a checkpoint
    # Names in scores.SCORES; (): losses only, no text is generated.
    metrics: tuple[str, ...] = ("bleu", "chrf", "exact_match")
    lowercase: bool = False  # lower-case text before it is compared
    language: str = "de"  # language of the targets: selects the tokenizer of BLEU
    bleu_tokenizer: str = ""  # a sacreBLEU tokenizer ("char"); '': by language
    # Largest number of examples scored per split (or corpus) during training, spread
    # evenly; 0: all. The final test and evaluate.py score all.
    examples: int = 0
    samples: int = 5  # generated examples printed and saved with references
    # Parameters of the final test: the mean of this many newest checkpoints (Vaswani
    # et al. 2017, 6.1); 0: the best checkpoint by checkpoint.metric.
    average: int = 0

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        for name in self.metrics:
            if name not in SCORES:
                raise ValueError(
                    f"evaluation.metrics={self.metrics}: {name!r} is unknown, expected "
                    f"some of {', '.join(SCORES)}, written as \"('bleu','chrf')\""
                )
        self.require_words(self.metrics)
        for name in ("every", "samples", "examples", "average"):
            least = 1 if name == "every" else 0
            if getattr(self, name) < least:
                raise ValueError(
                    f"evaluation.{name}={getattr(self, name)}: must be at least {least}"
                )

    def tokenizer(self) -> str:
        """sacreBLEU's name of what divides outputs and references into words."""
        language = re.split("[-_]", self.language.lower())[0]
        return self.bleu_tokenizer or TOKENIZERS.get(language, "13a")

    def require_words(self, names: Sequence[str]) -> None:
        """ValueError if one of these scores cannot tell the words of the language."""
        kind = self.tokenizer()
        ours = ("13a", *TOKENIZERS.values())
        if kind not in ours and kind not in (known := _sacrebleu().BLEU.TOKENIZERS):
            raise ValueError(
                f"evaluation.bleu_tokenizer={kind!r}: expected one of "
                f"{', '.join(known)}, or '' to go by evaluation.language"
            )
        module, extra = EXTRAS.get(kind, ("", ""))
        if "bleu" in names and module and importlib.util.find_spec(module) is None:
            raise ValueError(
                f"evaluation.language={self.language!r}: its BLEU needs sacreBLEU's "
                f"{kind}; run `pip install 'triform[{extra}]'`, or set "
                "evaluation.bleu_tokenizer=char to count characters"
            )
        if "bleu_moses" in names and kind in ("zh", "ja-mecab", "char"):
            raise ValueError(
                f"evaluation.language={self.language!r}: Moses does not divide it into "
                "words; replace 'bleu_moses' in evaluation.metrics by 'bleu'"
            )


def _sacrebleu() -> Any:
    # Not at the top: 40 ms with what it imports, and a start scores nothing.
    import sacrebleu.metrics

    return sacrebleu.metrics


def bleu(config: EvaluationConfig, ours: list[str], references: list[str]) -> Scores:
    """Corpus BLEU in percent (Papineni et al. 2002; Post 2018).

    Its signature names the tokenizer; `bleu_warning` is there if that cannot find the
    words of the references.
    """
    kind = config.tokenizer()
    metric = _sacrebleu().BLEU(lowercase=config.lowercase, tokenize=kind)
    score = metric.corpus_score(ours, [references]).score
    found: Scores = {"bleu": score, "bleu_signature": str(metric.get_signature())}
    text = "".join(references)
    if kind == "13a" and 5 * len(UNSPACED.findall(text)) > len(text):
        found["bleu_warning"] = (
            f"tokeniser 13a does not divide these references into words; set "
            f"evaluation.language, which is {config.language!r}"
        )
    return found


def bleu_moses(
    config: EvaluationConfig, ours: list[str], references: list[str]
) -> Scores:
    """BLEU of Moses-tokenised text, as multi-bleu.perl gives it."""
    # Not at the top: it costs 0.3 s, and few runs are scored with it.
    import sacremoses

    moses = sacremoses.MosesTokenizer(config.language)

    def tokenize(texts: list[str]) -> list[str]:
        return [moses.tokenize(t, return_str=True, escape=False) for t in texts]

    metric = _sacrebleu().BLEU(lowercase=config.lowercase, tokenize="none", force=True)
    score = metric.corpus_score(tokenize(ours), [tokenize(references)]).score
    signature = f"{metric.get_signature()}|pre:sacremoses-{sacremoses.__version__}"
    return {"bleu_moses": score, "bleu_moses_signature": signature}


def chrf(config: EvaluationConfig, ours: list[str], references: list[str]) -> Scores:
    """chrF2 in percent (Popovic 2015)."""
    metric = _sacrebleu().CHRF(lowercase=config.lowercase)
    score = metric.corpus_score(ours, [references]).score
    return {"chrf": score, "chrf_signature": str(metric.get_signature())}


def exact_match(
    config: EvaluationConfig, ours: list[str], references: list[str]
) -> Scores:
    """Share of outputs that equal their reference."""

    def norm(text: str) -> str:
        return text.lower() if config.lowercase else text

    hits = [norm(a) == norm(b) for a, b in zip(ours, references, strict=True)]
    return {"exact_match": sum(hits) / len(hits)}


SCORES: dict[str, Callable[..., Scores]] = {
    "bleu": bleu,
    "bleu_moses": bleu_moses,
    "chrf": chrf,
    "exact_match": exact_match,
}


def score(
    config: EvaluationConfig, ours: Sequence[str], references: Sequence[str]
) -> Scores:
    """Every metric of the config; each BLEU and chrF with its signature beside it."""
    result: Scores = {}
    for name in config.metrics:
        result |= SCORES[name](config, list(ours), list(references))
    return result
