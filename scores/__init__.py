"""Metrics that need whole outputs."""

from triform.scores.text import SCORES, EvaluationConfig, Scores, score

__all__ = ["SCORES", "EvaluationConfig", "Scores", "score"]
