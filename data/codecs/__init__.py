"""Codecs: values of a field <-> ids."""
