"""Amazon's reviews of video games: 287,107 choices of 31,013 users among 23,715 items.

Kang & McAuley 2018, "Self-Attentive Sequential Recommendation", data of McAuley et al.
2015; users and items with fewer than five reviews were left out. Ids are theirs.
"""

from collections.abc import Mapping

import tensorflow_datasets as tfds

from triform.data.sources.local_builder import TEXT, Download, LocalBuilder, Paths

NAME, ORIGINAL = "Video.txt.gz", "Video.txt"
COMMIT = "e3738967fddab206d6eeb4fda433e7a7034dd8b1"
URL = f"https://raw.githubusercontent.com/kang205/SASRec/{COMMIT}/data/{ORIGINAL}"


class SasrecVideo(LocalBuilder, skip_registration=True):
    """A user an example: the ids of the items that they reviewed, in order of time."""

    name = "sasrec_video"
    folder = "sasrec_video"
    origin = "https://github.com/kang205/SASRec (data/Video.txt)"
    features: Mapping = {"user": TEXT, "item": tfds.features.Sequence(TEXT)}
    files: Mapping[str, str] = {
        NAME: "d1d700c3a1d5cf3f5c3b0a108c61179c5f24114f15d665e49b8ed6a53e463712"
    }
    downloads: Mapping[str, Download] = {
        ORIGINAL: (
            URL,
            3_187_124,
            "b7376fe24430743f411dc7f567285657b2adb3f74361cc7ba0aee94f3024b651",
        )
    }

    def examples(self, paths: Paths) -> Mapping[str, list[dict]]:
        """Users in file order; 'train' is all there is."""
        name = next(iter(paths))
        users: dict[str, list[str]] = {}
        lines = self.read_text(name, paths[name]).removesuffix("\n").split("\n")
        for number, line in enumerate(lines, 1):
            words = line.split()
            if len(words) != 2:
                raise self.wrong(name, f"line {number}: must hold a user and an item")
            users.setdefault(words[0], []).append(words[1])
        return {"train": [{"user": u, "item": x} for u, x in users.items()]}
