"""Tiny Shakespeare: 1.1 MB of plays, the classic of character-level language models.

Karpathy 2015, char-rnn; the split is nanoGPT's. Public domain.
"""

from collections.abc import Mapping

from triform.data.sources.local_builder import TEXT, Download, LocalBuilder, Paths

COMMIT = "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/"
    f"{COMMIT}/data/tinyshakespeare/input.txt"
)


class TinyShakespeare(LocalBuilder, skip_registration=True):
    """One example a split: the first 90 % of the characters, and the last 10 %."""

    name = "tinyshakespeare"
    folder = "tinyshakespeare"
    origin = URL
    features: Mapping = {"text": TEXT}
    files: Mapping[str, str] = {"input.txt": SHA256}
    downloads: Mapping[str, Download] = {"input.txt": (URL, 1_115_394, SHA256)}

    def examples(self, paths: Paths) -> Mapping[str, list[dict]]:
        """Two long texts."""
        text = self.read_text("input.txt", paths["input.txt"])
        end = int(len(text) * 0.9)
        return {"train": [{"text": text[:end]}], "validation": [{"text": text[end:]}]}
