"""Metrics that need whole outputs."""
