"""Scores of generated text: BLEU and chrF (sacreBLEU), exact match."""

import dataclasses
from collections.abc import Callable, Sequence

from sacrebleu.metrics import BLEU, CHRF

Scores = dict[str, float | str]


@dataclasses.dataclass
class EvaluationConfig:
    """When and how a run is evaluated."""

    every: int = 1000  # steps between evaluations; what is scored is saved, too
    # Names in scores.SCORES; none: losses only, nothing is generated.
    metrics: tuple[str, ...] = ("bleu", "chrf", "exact_match")
    lowercase: bool = False  # compare text case-insensitively
    language: str = "de"  # of the targets, for Moses tokenisation
    # While training, score at most so many examples of every split, or of each corpus
    # in it, spread evenly; 0: all. The test at the end and evaluate.py score all.
    examples: int = 0
    samples: int = 5  # shown and written with their references
    # Parameters of the last evaluation: the mean of so many newest checkpoints
    # (Vaswani et al. 2017, 6.1); 0: the best checkpoint by checkpoint.metric.
    average: int = 0

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        for name in self.metrics:
            if name not in SCORES:
                raise ValueError(
                    f"evaluation.metrics={self.metrics}: {name!r} is unknown, expected "
                    f"some of {', '.join(SCORES)}, written as \"('bleu','chrf')\""
                )
        for name in ("every", "samples", "examples", "average"):
            least = 1 if name == "every" else 0
            if getattr(self, name) < least:
                raise ValueError(
                    f"evaluation.{name}={getattr(self, name)}: must be at least {least}"
                )


def bleu(config: EvaluationConfig, ours: list[str], references: list[str]) -> Scores:
    """Corpus BLEU in percent (Papineni et al. 2002; Post 2018), tokenised 13a."""
    metric = BLEU(lowercase=config.lowercase)
    score = metric.corpus_score(ours, [references]).score
    return {"bleu": score, "bleu_signature": str(metric.get_signature())}


def bleu_moses(
    config: EvaluationConfig, ours: list[str], references: list[str]
) -> Scores:
    """BLEU of Moses-tokenised text, as multi-bleu.perl gives it."""
    # Not at the top: it costs 0.3 s, and few runs are scored with it.
    import sacremoses

    moses = sacremoses.MosesTokenizer(config.language)

    def tokenize(texts: list[str]) -> list[str]:
        return [moses.tokenize(t, return_str=True, escape=False) for t in texts]

    metric = BLEU(lowercase=config.lowercase, tokenize="none", force=True)
    score = metric.corpus_score(tokenize(ours), [tokenize(references)]).score
    signature = f"{metric.get_signature()}|pre:sacremoses-{sacremoses.__version__}"
    return {"bleu_moses": score, "bleu_moses_signature": signature}


def chrf(config: EvaluationConfig, ours: list[str], references: list[str]) -> Scores:
    """chrF2 in percent (Popovic 2015)."""
    metric = CHRF(lowercase=config.lowercase)
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
