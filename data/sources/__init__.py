"""Where examples come from: embedded generators, our TFDS builders, any public TFDS.

`load` gives a random-access sequence of example dicts whatever the origin; text is
always `str`. The builders written here are in `tfds_source.BUILDERS`.
"""

import types
from collections.abc import Sequence

from triform.data.sources import cldr, listops
from triform.data.sources.base import local_copy
from triform.runtime.errors import DataError

__all__ = [
    "EMBEDDED",
    "fingerprint",
    "label_names",
    "load",
    "local_copy",
]

# Need no download: name -> module with SPLITS, examples(split) and version().
EMBEDDED = {"cldr": cldr, "listops": listops}


def load(
    name: str, split: str, *, data_dir: str = "", manual_dir: str = ""
) -> Sequence[dict]:
    """Examples of one split: `len(s)`, `s[i]`; iterating reads in bulk, in order.

    Args:
      name: an embedded source (`cldr`), one of our builders (`multi30k_translate`), or
        any public TFDS name (`wmt14_translate/de-en`).
      split: a split of that data set; TFDS slices such as `train[:90%]` work for
        everything but embedded sources.
      data_dir: where TFDS keeps prepared data; '' is its default, and embedded sources
        have none.
      manual_dir: folder with files fetched by hand; '' lets the builder look for a
        local copy and then download.

    Raises:
      DataError: unknown name or split, an empty split, or data that cannot be prepared.
    """
    if name in EMBEDDED:
        return EMBEDDED[name].examples(_embedded_split(name, split))
    return _tfds_source().load(name, split, data_dir, manual_dir, tuple(EMBEDDED))


def fingerprint(
    name: str, split: str, *, data_dir: str = "", manual_dir: str = ""
) -> str:
    """A string, fit for a file name, which changes whenever the examples do.

    Embedded sources: versions of the generator and of its libraries. TFDS: full name
    with version, split, counts and bytes of every split, and the digest of files given
    by hand. Takes the same arguments, and raises the same errors, as `load`; prepares
    the data if need be.
    """
    if name in EMBEDDED:
        return f"{EMBEDDED[name].version()}-{_embedded_split(name, split)}"
    source = _tfds_source()
    return source.fingerprint(name, split, data_dir, manual_dir, tuple(EMBEDDED))


def label_names(
    name: str, feature: str, *, data_dir: str = "", manual_dir: str = ""
) -> tuple[str, ...]:
    """Names of the classes that a feature numbers, in order; () if it numbers none."""
    if name in EMBEDDED:
        return ()
    source = _tfds_source()
    return source.label_names(name, feature, data_dir, manual_dir, tuple(EMBEDDED))


def _embedded_split(name: str, split: str) -> str:
    splits = EMBEDDED[name].SPLITS
    if split not in splits:
        raise DataError(f"{name}: split {split!r}: expected one of {', '.join(splits)}")
    return split


def _tfds_source() -> types.ModuleType:
    # Not at the top: TFDS costs half a second, some 50 MB and a long list of
    # dependencies, which training on an embedded source need not pay.
    from triform.data.sources import tfds_source

    return tfds_source
