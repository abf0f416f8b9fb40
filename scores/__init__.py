"""Metrics that need whole outputs."""

from triform.scores.text import METRICS, EvaluationConfig, Scores, score

__all__ = ["METRICS", "EvaluationConfig", "Scores", "score"]
