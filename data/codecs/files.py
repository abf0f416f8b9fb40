"""The codecs of a run: built from its data, saved in its workdir, loaded from there."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from triform.data import store
from triform.data.codecs import Codec, chat, text
from triform.data.codecs.chat import ChatTemplate
from triform.data.codecs.classes import Classes
from triform.data.codecs.text import Tokenizer
from triform.runtime.errors import DataError

CLASSES = "classes.json"  # {field: [names]}


def build(config: Any, sizes: Mapping[str, int], earlier: str = "") -> dict[str, Codec]:
    """The codecs of a new run, by field of the data ("text" is the tokenizer).

    A tokenizer is the one that the config names, else that of the workdir
    `earlier`, else trained on the training split. Classes keep the order that they have
    in `earlier`, so that its head fits. DataError if the model has fewer ids or classes
    than the data.
    """
    codecs: dict[str, Codec] = {}
    if hasattr(config, "tokenizer"):
        if earlier and not config.tokenizer.path:
            codecs["text"] = _load_tokenizer(earlier)
        else:
            codecs["text"] = _build_tokenizer(config, sizes["vocab_size"])
        path = config.tokenizer.path or earlier or config.tokenizer.kind
        _require_rows(codecs["text"], sizes["vocab_size"], path)
        _require_mask(codecs["text"], sizes)
    if hasattr(config, "template"):
        path = config.tokenizer.path
        folder = os.path.dirname(path) if path else earlier
        codecs["chat"] = chat.choose(
            config.template, codecs["text"], folder, config.day
        )
    before = _saved_names(earlier) if earlier else {}
    for field, size in config.classes().items():
        known = sizes.get(size, -1)
        names = _class_names(config, field, codecs, known)
        if 0 <= known < len(names):
            raise DataError(
                f"model.{size}={known}: {config.source!r} has {len(names)} classes in "
                f"data.{field}={getattr(config, field)!r}; raise it to at least that"
            )
        found = Classes(list(map(str, names)))
        codecs[field] = _in_order(found, Classes(before.get(field, ())), known)
    return codecs


def _in_order(found: Classes, earlier: Classes, known: int) -> Classes:
    """The classes `found` in the data, as those of `earlier` if they are the same."""
    count = found.size if known < 0 else known
    same = not found.named or earlier.holds(found.names)
    fits = earlier.named and same and found.size <= earlier.size == count
    return earlier if fits else found


def _require_rows(tok: Tokenizer, rows: int, path: str) -> None:
    """DataError if the model's table has fewer rows than the tokenizer ids."""
    padding = tok.pad == tok.vocab_size - 1  # which no model reads
    if tok.vocab_size - padding > rows:
        raise DataError(
            f"model.vocab_size={rows}: the tokenizer {path} has {tok.vocab_size} "
            "ids; raise it to at least that"
        )


def _require_mask(tok: Tokenizer, sizes: Mapping[str, int]) -> None:
    """DataError if a model that knows its mask token knows another one."""
    known = sizes.get("mask_id", tok.mask)
    if known != tok.mask:
        fix = "set it to that" if tok.mask is not None else "take another tokenizer"
        raise DataError(
            f"model.mask_id={known}: the tokenizer's mask token is {tok.mask}; {fix}"
        )


def is_complete(codecs: Mapping[str, Codec], config: Any) -> bool:
    """Do all classes of the data have names, and all codes a model?

    Those of an imported model may have placeholders, which the data replace.
    """
    found = [codecs.get(field) for field in config.classes()]
    named = all(isinstance(x, Classes) and not x.placeholders for x in found)
    return named and all(field in codecs for field in config.coded())


def class_counts(config: Any, codecs: Mapping[str, Codec]) -> dict[str, int]:
    """{name of a size of the model: number of classes or codes}."""
    sizes = config.classes() | config.coded()
    return {size: codecs[field].size for field, size in sizes.items()}


def save(codecs: Mapping[str, Codec], workdir: str) -> None:
    """Writes all codecs into a workdir, the names of classes into one file."""
    names = {k: list(c.names) for k, c in codecs.items() if isinstance(c, Classes)}
    for codec in codecs.values():
        if not isinstance(codec, Classes):
            codec.save(workdir)
    if names:
        path = os.path.join(workdir, CLASSES)
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            json.dump(names, f, indent=1, ensure_ascii=False)
        os.replace(path + ".tmp", path)


def load(workdir: str, config: Any) -> dict[str, Codec]:
    """The codecs that a run saved; DataError if its tokenizer is gone.

    Classes without saved names are left out: data that need them cannot be opened.
    """
    codecs: dict[str, Codec] = {}
    if hasattr(config, "tokenizer"):
        codecs["text"] = _load_tokenizer(workdir)
        if hasattr(config, "template"):
            codecs["chat"] = chat.choose(
                config.template, codecs["text"], workdir, config.day
            )
        elif template := chat.own(workdir):
            codecs["chat"] = ChatTemplate(codecs["text"], template)
    return codecs | load_classes(workdir, config)


def load_classes(workdir: str, config: Any) -> dict[str, Classes]:
    """The classes that a run saved, by field of the data."""
    names = _saved_names(workdir)
    return {f: Classes(names[f]) for f in config.classes() if f in names}


def _saved_names(workdir: str) -> dict[str, list[str]]:
    path = os.path.join(workdir, CLASSES)
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def _class_names(
    config: Any, field: str, codecs: Mapping[str, Codec], known: int
) -> Sequence[str | int]:
    """Names of the classes of a field, or their numbers where they have no names.

    Without names in the source, the classes are the distinct texts of the training
    split, sorted, or the numbers up to its largest; of images, the model's number.
    """
    feature = getattr(config, field)
    names = store.origin(config, config.source).classes(feature)
    if len(names) == 1:
        raise DataError(
            f"data.{field}={feature!r}: {config.source} has one class, {names[0]!r}: "
            "nothing can be learned from one class; add the others"
        )
    if names:
        return names
    if not config.features():
        if known < 0:
            raise DataError(
                f"data.{field}={feature!r}: {config.source!r} does not say how many "
                "classes there are; set model.num_labels"
            )
        return range(known)
    features = config.features()
    train = store.open_store(config, config.train_split, codecs["text"], features)
    seen = train.values[field]
    if len(seen) and (seen == seen[0]).all():
        raise DataError(
            f"data.{field}={feature!r}: all {len(seen):,} labels of {config.source} "
            f"{config.train_split} are {seen[0].item()!r}: nothing can be learned from "
            "one class; name another column or add the other classes"
        )
    if seen.dtype.kind == "U":
        return np.unique(seen).tolist()
    # What is no number of a class is refused when the split is opened.
    largest = seen[np.isfinite(seen)].astype(np.int64).max(initial=-1)
    return range(largest + 1)


def _load_tokenizer(workdir: str) -> Tokenizer:
    """The tokenizer that a run saved in its workdir."""
    path = text.find(workdir)
    if path is None:
        raise DataError(f"{workdir}: its tokenizer is gone; restore the file")
    try:
        return text.load(path)
    except ValueError as error:
        raise DataError(str(error)) from error


def _build_tokenizer(config: Any, vocab_size: int) -> Tokenizer:
    """The tokenizer that a TextConfig names, or a new one trained on what it reads."""
    path = config.tokenizer.path
    if path and not os.path.exists(path):
        raise DataError(
            f"data.tokenizer.path={path!r}: no such file; leave it empty to train a "
            "tokenizer on the corpus"
        )
    try:
        if path:
            result = text.load(path)
        else:
            texts = _training_texts(config)
            result = text.train(config.tokenizer, texts, vocab_size, config.SPECIALS)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from error
    return result


def _training_texts(config: Any) -> Iterator[str]:
    features = [feature for feature in config.features() if feature.is_text]
    for corpus in config.tokenizer.corpora:
        source, _, name = corpus.rpartition(":")
        features.append(store.Feature("tokenizer.corpora", source, name))
    for _, group in itertools.groupby(features, lambda feature: feature.source):
        what = "training a tokenizer"
        for example in store.read(config, config.train_split, list(group), what):
            for texts in example:
                yield from texts
