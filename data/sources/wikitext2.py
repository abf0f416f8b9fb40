"""WikiText-2: 660 articles of Wikipedia, words separated, rare ones `<unk>`.

Merity et al. 2016, "Pointer Sentinel Mixture Models". CC BY-SA 3.0. The site that
published the archive is gone, hence no download.
"""

import itertools
import re
from collections.abc import Iterator, Mapping

import tensorflow_datasets as tfds

from triform.data.sources.local_builder import TEXT, LocalBuilder, Paths

TITLE = re.compile(r" = (?!= ).*(?<! =) = ")
NAMES = {"train": "train.txt.gz", "validation": "valid.txt.gz"}


class WikiText2(LocalBuilder, skip_registration=True):
    """One example an article, 600 for training and 60 for validation, in file order.

    A text holds the lines of the file as they are, each with its newline, so that
    whitespace words plus newlines are the official tokens: 2,088,628 and 217,646.
    """

    name = "wikitext2"
    # 1.0.0 divided articles at `Played , W =` and the like.
    VERSION = tfds.core.Version("2.0.0")
    folder = "wikitext2"
    origin = (
        "wikitext-2-v1.zip of github.com/longluv1605/drive and valid.txt of "
        "github.com/pytorch/examples"
    )
    features: Mapping = {"text": TEXT}
    files: Mapping[str, str] = {
        "train.txt.gz": (
            "441f36e917e68bb727e4c0343b274193140d3f364fed5dde924dcd08ed40012e"
        ),
        "valid.txt.gz": (
            "3cdd8cb5bb349a05840c7c3bef9578d90d64df77e27e0c25c033ba9342757ee3"
        ),
    }

    def examples(self, paths: Paths) -> Mapping[str, Iterator[dict]]:
        """Articles."""
        return {
            split: articles(self.read_text(name, paths[name]))
            for split, name in NAMES.items()
        }


def articles(text: str) -> Iterator[dict]:
    """Splits before every title but the first: ` = Title = ` between two blank lines.

    Legends of tables, such as ` = Played , W = `, have text above or below.
    """
    # Only '\n' ends a line: splitlines() would also split at U+2028 and its like.
    lines = [f"{line}\n" for line in text.removesuffix("\n").split("\n")]
    around = zip(["\n", *lines], lines, [*lines[1:], "\n"], strict=False)
    titles = [
        i
        for i, (above, line, below) in enumerate(around)
        if TITLE.fullmatch(line.rstrip("\n")) and not (above + below).strip()
    ]
    bounds = [0, *titles[1:], len(lines)]
    for start, end in itertools.pairwise(bounds):
        yield {"text": "".join(lines[start:end])}
