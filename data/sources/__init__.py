"""Where examples come from: embedded generators, our TFDS builders, any public TFDS.

A new source is a class with the methods of `base.Source`, made from (name, data_dir,
manual_dir), and a row of SOURCES.
"""

import functools
from collections.abc import Callable

from triform.data.sources import cldr, listops
from triform.data.sources.base import Embedded, Source, local_copy

__all__ = ["SOURCES", "Embedded", "Source", "local_copy", "source"]

# Name -> (name, data_dir, manual_dir) -> source. Every other name is one of TFDS's,
# which include the builders of `tfds_source.BUILDERS`.
SOURCES: dict[str, Callable[[str, str, str], Source]] = {
    "cldr": functools.partial(Embedded, cldr),
    "listops": functools.partial(Embedded, listops),
}


def source(name: str, data_dir: str = "", manual_dir: str = "") -> Source:
    """The source of that name; nothing is read before its methods are called.

    Args:
      name: a key of SOURCES (`cldr`), one of our builders (`multi30k_translate`), or
        any public TFDS name (`wmt14_translate/de-en`), whose splits may be slices such
        as `train[:90%]`.
      data_dir: where TFDS keeps prepared data; '' is its default.
      manual_dir: folder with files fetched by hand; '' lets the builder look for a
        local copy and then download.
    """
    return SOURCES.get(name, _tfds)(name, data_dir, manual_dir)


def _tfds(name: str, data_dir: str, manual_dir: str) -> Source:
    # Not at the top: TFDS costs half a second, some 50 MB and a long list of
    # dependencies, which training on an embedded source need not pay.
    from triform.data.sources.tfds_source import TfdsSource

    return TfdsSource(name, data_dir, manual_dir, others=tuple(SOURCES))
