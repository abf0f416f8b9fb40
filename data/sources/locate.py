"""Which files a source names: a file, a folder, a pattern, or several with commas."""

import dataclasses
import glob
import json
import os
import re
from collections.abc import Sequence

from triform.data.music import SUFFIXES as MIDI
from triform.data.sources.formats import File
from triform.data.sources.streams import plain_name
from triform.runtime import paths
from triform.runtime.errors import DataError

# Suffix of a table -> its format.
TABLES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "arrow",
    ".arrow": "arrow",
    **dict.fromkeys((".fasta", ".fa", ".faa"), "fasta"),
}
TEXTS = (".txt", ".text")
PICTURES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm"),
)
METADATA = "metadata"  # the table beside pictures, without its suffix
# What others write beside their tables.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json")
SAVED, STATE = "dataset_dict.json", "state.json"  # of datasets.save_to_disk
# Name of a file or folder -> the split that it is.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}
KINDS = ("table", "text", "picture", "midi", "other")  # what files are
KNOWN = (*TEXTS, *TABLES, *PICTURES, *MIDI)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The files of a source."""

    files: tuple[File, ...] = ()  # of rows
    pictures: tuple[File, ...] = ()  # one a picture, or the tables that name them
    midi: tuple[File, ...] = ()  # one a piece of music
    root: str = ""  # what names of splits and classes are relative to


def suffix(path: str) -> str:
    """'.jsonl' of 'a/b.JSONL.gz'."""
    return os.path.splitext(plain_name(path))[1].lower()


def is_path(source: str) -> bool:
    """Does a source that is no known name mean files?

    It does if it has a comma, a pattern's characters or a known suffix, begins with
    '/', '.' or '~', or is there.
    """
    return bool(
        re.search(r"[,*?\[]", source)
        or source.startswith(("/", ".", "~"))
        or suffix(source) in KNOWN
        or (source and os.path.exists(source))
    )


def absolute(source: str) -> str:
    """The same files from any folder."""
    return ",".join(paths.absolute(part) for part in _parts(source))


def _parts(source: str) -> list[str]:
    if os.path.exists(paths.absolute(source)):
        return [source]  # a name that has a comma
    return [part.strip() for part in source.split(",") if part.strip()]


def find(source: str, txt_example: str, columns: Sequence[str]) -> Found:
    """The files of a source, in order of their names; DataError if there are none.

    `txt_example` is the format of text files, `columns` what is read of a row.
    """
    parts = [paths.absolute(part) for part in _parts(source)]
    if len(parts) == 1 and (saved := _saved(parts[0])):
        return Found(files=tuple(saved), root=parts[0])
    listed = [path for part in parts for path in _listed(part)]
    if not listed:
        raise DataError(f"{source}: holds no file; put data there")
    root = parts[0]
    if len(parts) > 1 or not os.path.isdir(root):
        root = os.path.commonpath([os.path.dirname(path) for path in listed])
    named = len(listed) > 1 or os.path.isdir(parts[0])
    kinds: dict[str, list[str]] = {x: [] for x in KINDS}
    for path in listed:
        kinds[_kind(path)].append(path)
    files, tables, texts = [], kinds["table"], kinds["text"]
    if kinds["picture"]:
        return _pictures(source, kinds, root)
    if kinds["midi"]:
        return _pieces(source, kinds, root, named)
    if tables and texts:
        raise DataError(
            f"{source}: holds tables ({os.path.basename(tables[0])}) and texts "
            f"({os.path.basename(texts[0])}); name those that are meant by a pattern, "
            f"such as '{os.path.join(root, '*' + suffix(tables[0]))}'"
        )
    if tables:
        files = _tables(tables)
    elif texts:
        files = _aligned(texts, columns) or [
            File((path,), txt_example) for path in texts
        ]
    elif others := kinds["other"]:
        files = _aligned(others, ())
        if not files and os.path.isdir(parts[0]):
            raise DataError(
                f"{source}: no file in it has a suffix that is read "
                f"({', '.join(KNOWN)}, tables and texts also with .gz, .xz, .zst); "
                f"{others[0]} is read as text if data.source names it or a pattern does"
            )
        files = files or [File((path,), txt_example) for path in others]
    if named:
        files = [dataclasses.replace(f, split=_split(f, root)) for f in files]
    return Found(files=tuple(_trained(source, files)), root=root)


def _listed(part: str) -> list[str]:
    """The files of one part, hidden ones left out."""
    if os.path.isfile(part):
        return [part]
    if os.path.isdir(part):
        found = []
        for folder, folders, names in os.walk(part, followlinks=True):
            folders[:] = sorted(f for f in folders if not f.startswith((".", "__")))
            found += [os.path.join(folder, name) for name in names]
        return sorted(
            (x for x in found if not os.path.basename(x).startswith(".")),
            key=lambda path: path.split(os.sep),
        )
    found = sorted(glob.glob(part, recursive=True))
    if not found:
        raise DataError(f"{part}: no such file or folder; correct data.source")
    return [path for match in found for path in _listed(match)]


def _kind(path: str) -> str:
    if os.path.basename(path) in (*DESCRIPTIONS, SAVED):
        return "other"
    end = suffix(path)
    if end in TABLES:
        return "table"
    if end in TEXTS:
        return "text"
    if end in MIDI:
        return "midi"
    return "picture" if end in PICTURES else "other"


def _split(file: File, root: str) -> str:
    """The split that a folder below the root, or else the file's name, says."""
    *folders, name = os.path.relpath(file.paths[0], root).split(os.sep)
    for folder in folders:
        if folder.lower() in SPLITS:
            return SPLITS[folder.lower()]
    words = re.split(r"[-._ ]+", os.path.splitext(plain_name(name))[0].lower())
    for word in (words[0].rstrip("0123456789"), words[-1]):
        if word in SPLITS:
            return SPLITS[word]
    return ""


def _trained(source: str, files: list[File]) -> list[File]:
    """Files without the name of a split are training data, if no others are."""
    plain = [file for file in files if not file.split]
    trained = [file for file in files if file.split == "train"]
    if plain and trained:
        raise DataError(
            f"{plain[0].name}: names no split, and {trained[0].name} is the training "
            f"data; rename or move it, or list in data.source what is meant"
        )
    return [f if f.split else dataclasses.replace(f, split="train") for f in files]


def _aligned(listed: Sequence[str], columns: Sequence[str]) -> list[File]:
    """Files whose lines belong together: same name, another last suffix.

    The suffixes name the columns; of .txt files ('train.en.txt') they must be among
    `columns`. [] if that is not how the files are named.
    """
    groups: dict[str, dict[str, str]] = {}
    for path in listed:
        name = plain_name(path)
        if os.path.splitext(name)[1].lower() in TEXTS:
            name = os.path.splitext(name)[0]
            if os.path.splitext(name)[1][1:] not in columns:
                return []
        stem, end = os.path.splitext(name)
        groups.setdefault(stem, {})[end[1:]] = path
    if not any(len(group) > 1 for group in groups.values()):
        return []
    names = max(groups.values(), key=len)
    for group in groups.values():
        if missing := [name for name in names if name not in group]:
            have = next(iter(group.values()))
            raise DataError(
                f"{have}: no file of the same name ends in .{missing[0]}; name both, "
                "such as train.en,train.de"
            )
    return [
        File(tuple(group.values()), "aligned", tuple(group))
        for group in groups.values()
    ]


def _tables(listed: Sequence[str]) -> list[File]:
    """Tables; to a FASTA file NAME.fasta belong NAME.COLUMN.fasta, NAME.csv, NAME.tsv.

    DataError for a table beside FASTA files that belongs to none.
    """
    stems = {
        os.path.splitext(plain_name(path))[0]: path
        for path in listed
        if TABLES[suffix(path)] == "fasta"
    }
    labels: dict[str, list[tuple[str, str]]] = {path: [] for path in stems.values()}
    for stem, path in stems.items():
        parent, column = os.path.splitext(stem)
        if column and parent in stems:
            labels[stems[parent]].append((path, column[1:]))
            del labels[path]
    for path in listed if stems else ():
        stem = os.path.splitext(plain_name(path))[0]
        if path in stems.values():
            continue
        if stem not in stems or TABLES[suffix(path)] not in ("csv", "tsv"):
            raise DataError(
                f"{path}: beside FASTA files only their labels are read, as .csv or "
                ".tsv of the same name; rename it or move it away"
            )
        labels[stems[stem]].append((path, ""))
    if not stems:
        return [File((path,), TABLES[suffix(path)]) for path in listed]
    return [
        File(
            (path, *(p for p, _ in more)), "fasta", ("sequence", *(c for _, c in more))
        )
        for path, more in labels.items()
    ]


def _saved(folder: str) -> list[File]:
    """The files of a folder that `datasets.save_to_disk` wrote; [] of another one."""
    if os.path.exists(os.path.join(folder, SAVED)):
        splits = _json(os.path.join(folder, SAVED)).get("splits", ())
    elif os.path.exists(os.path.join(folder, STATE)):
        splits = ("",)
    else:
        return []
    files = []
    for split in splits:
        inside = os.path.join(folder, split)
        for data in _json(os.path.join(inside, STATE)).get("_data_files", ()):
            path = os.path.join(inside, data["filename"])
            name = SPLITS.get(split, split or "train")
            files.append(File((path,), "arrow", split=name))
    return files


def _json(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); write the folder again with "
            "datasets.save_to_disk"
        ) from error


def _pictures(source: str, kinds: dict[str, list[str]], root: str) -> Found:
    pictures = [File((path,), "picture") for path in kinds["picture"]]
    tables = [x for x in kinds["table"] if _stem(x) == METADATA]
    if other := [x for x in kinds["table"] if x not in tables] + kinds["text"]:
        raise DataError(
            f"{source}: holds pictures and {os.path.basename(other[0])}; a table of "
            "pictures is called metadata.csv or metadata.jsonl; move the others away"
        )
    described = [File((path,), TABLES[suffix(path)]) for path in tables]
    files = _trained(
        source,
        [dataclasses.replace(f, split=_folder_split(f, root)) for f in pictures],
    )
    return Found(files=tuple(described), pictures=tuple(files), root=root)


def _pieces(source: str, kinds: dict[str, list[str]], root: str, named: bool) -> Found:
    """Music: tables and texts beside it tell of it, and are not read."""
    files = [File((path,), "midi") for path in kinds["midi"]]
    if named:
        files = [dataclasses.replace(f, split=_split(f, root)) for f in files]
    return Found(midi=tuple(_trained(source, files)), root=root)


def _folder_split(file: File, root: str) -> str:
    """Of pictures only the first folder names a split: the others name classes."""
    first, *rest = os.path.relpath(file.paths[0], root).split(os.sep)
    return SPLITS.get(first.lower(), "") if rest else ""


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(plain_name(path)))[0].lower()
