"""Where examples come from: files, embedded generators, our TFDS builders, any TFDS.

A new source is a class with the methods of `base.Source`, made from (name, data_dir,
manual_dir, reading), and a row of SOURCES.
"""

import functools
from collections.abc import Callable

from triform.data.sources import cldr, digits, listops, locate
from triform.data.sources.base import (
    LABEL,
    PICTURE,
    TEXT,
    Column,
    Embedded,
    KeptEmbedded,
    Reading,
    Source,
    local_copy,
)
from triform.data.sources.files import FileSource
from triform.data.sources.midi_files import MidiSource
from triform.data.sources.picture_tables import TablePictures
from triform.data.sources.pictures import FolderPictures

__all__ = [
    "LABEL",
    "PICTURE",
    "SOURCES",
    "TEXT",
    "Column",
    "Embedded",
    "Reading",
    "Source",
    "absolute",
    "is_path",
    "local_copy",
    "source",
]

# Name -> (name, data_dir, manual_dir, reading) -> source. Every other name is a path or
# one of TFDS's, which include the builders of `tfds_source.BUILDERS`.
SOURCES: dict[str, Callable[[str, str, str, Reading], Source]] = {
    "cldr": functools.partial(KeptEmbedded, cldr),
    "listops": functools.partial(Embedded, listops),
    "digits": functools.partial(Embedded, digits),
}
# Ours among TFDS's: a folder of such a name in the present one does not hide them.
BUILDERS = (
    *("multi30k_translate", "tinyshakespeare", "wikitext2", "classic_books"),
    *("clinc150", "mr_sentiment", "movie_reviews", "flip_ss3", "mnist"),
    *("captioned_mnist", "noto_emoji", "jsb_chorales", "jsb_chorales_quarter"),
    "sasrec_video",
)


def is_path(name: str) -> bool:
    """Does a source of that name consist of files?"""
    return name not in (*SOURCES, *BUILDERS) and locate.is_path(name)


def absolute(name: str) -> str:
    """The same source from any folder: paths become absolute."""
    return locate.absolute(name) if is_path(name) else name


def source(
    name: str, data_dir: str = "", manual_dir: str = "", reading: Reading | None = None
) -> Source:
    """The source of that name; no data are read before its methods are called.

    Args:
      name: a key of SOURCES (`cldr`), one of our builders (`multi30k_translate`), a
        file, folder or pattern, several of them with commas between (`locate.find`), or
        any public TFDS name (`wmt14_translate/de-en`), whose splits may be slices such
        as `train[:90%]`.
      data_dir: where TFDS keeps prepared data; '' is its default.
      manual_dir: folder with files fetched by hand; '' lets the builder look for a
        local copy and then download.
      reading: how files are read.
    """
    reading = reading or Reading()
    if name in SOURCES:
        return SOURCES[name](name, data_dir, manual_dir, reading)
    if is_path(name):
        texts = [c.name for c in reading.columns if c.kind == TEXT]
        found = locate.find(name, reading.txt_example, texts)
        if found.midi:
            return MidiSource(name, found, reading)
        if found.pictures:
            return FolderPictures(name, found, reading)
        inside = any(c.kind == PICTURE for c in reading.columns)
        return (TablePictures if inside else FileSource)(name, found, reading)
    # Not at the top: TFDS costs half a second, some 50 MB and a long list of
    # dependencies, which training on an embedded source need not pay.
    from triform.data.sources.tfds_source import TfdsSource

    return TfdsSource(name, data_dir, manual_dir, others=tuple(SOURCES))
