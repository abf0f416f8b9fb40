"""Hugging Face weights in and out: one mapping table a family, read both ways."""
