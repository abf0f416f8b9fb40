"""Requests to a trained workdir, and what it answers."""
