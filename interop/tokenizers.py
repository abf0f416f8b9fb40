"""Tokenizers: which files go along, and the ids of special tokens."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import sentencepiece

from triform.data.codecs import text as tokenizer
from triform.runtime.errors import UserError

GENERATION = "generation_config.json"
# Files that go into a workdir and back as they are.
KEPT = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION,
    "preprocessor_config.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "source.spm",
    "target.spm",
    "spiece.model",
    "tokenizer.model",
)
ROLES = ("pad", "eos", "unk", "bos", "cls", "sep", "mask")
# T5's SentencePiece model has a name of its own; ours is that of the others.
JSON, PIECES, MODEL = "tokenizer.json", "spiece.model", "tokenizer.model"


def read_json(folder: str, name: str) -> dict[str, Any]:
    """A file's object, {} without the file; UserError if it is not one."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    try:
        with open(path) as f:
            found = json.load(f)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy the file again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; copy the file again")
    return found


def write_json(folder: str, name: str, content: Mapping[str, Any]) -> None:
    """Writes an object, indented."""
    with open(os.path.join(folder, name), "w") as f:
        json.dump(content, f, indent=2)
        f.write("\n")


def bring(source: str, workdir: str, hf: Mapping[str, Any]) -> str:
    """Copies the tokenizer of a Hugging Face folder; '' or what is missing, a line."""
    there = _copy(source, workdir, (JSON, *KEPT))
    known = ids(source, hf)
    if hf["model_type"] == "t5" and PIECES in there and JSON not in there:
        model = os.path.join(workdir, MODEL)
        shutil.copyfile(os.path.join(source, PIECES), model)
        known["sentinels"] = _sentinels(model, read_json(source, KEPT[0]))
    write_json(workdir, tokenizer.SIDECAR, known)
    path = tokenizer.find(workdir)
    if path is None:
        return "" if hf["model_type"] == "vit" else "holds no tokenizer.json"
    try:
        tokenizer.load(path)
    except ValueError as error:
        raise UserError(f"{source}: {error}; mend or remove the file") from error
    return ""


def _sentinels(model: str, settings: Mapping[str, Any]) -> list[int]:
    """T5 puts <extra_id_0> last, after the pieces of its model file."""
    count = settings.get("extra_ids", 100)
    pieces = sentencepiece.SentencePieceProcessor(model_file=model).vocab_size()
    return [pieces + count - 1 - i for i in range(count)]


def ids(source: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """{role: id} of the special tokens that a folder names, and the decoder's start."""
    vocabulary = _vocabulary(source)
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json(source, name)
        for role in ROLES:
            token = content.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token in vocabulary:
                found[role] = vocabulary[token]
    for role in ROLES:
        if isinstance(value := hf.get(f"{role}_token_id"), int):
            found[role] = value
    if ends := _ends(source, hf):
        if found.get("eos") not in ends:
            found["eos"] = ends[0]
        if len(ends) > 1:
            found["ends"] = ends
    start = hf.get("decoder_start_token_id", found.get("pad"))
    if isinstance(start, int):
        found["start"] = start
    return found


def _ends(source: str, hf: Mapping[str, Any]) -> list[int]:
    """Every id that ends a text that transformers generates with a folder."""
    given = read_json(source, GENERATION) or hf
    ends = given.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return [i for i in ends if isinstance(i, int)]


def _vocabulary(source: str) -> dict[str, int]:
    """{token: id} of whatever vocabulary a folder has."""
    found = {}
    if os.path.exists(path := os.path.join(source, "vocab.txt")):
        with open(path, encoding="utf-8") as f:
            found |= {token.rstrip("\n"): i for i, token in enumerate(f)}
    found |= read_json(source, "vocab.json")
    content = read_json(source, JSON)
    pieces = content.get("model", {}).get("vocab", {})
    if isinstance(pieces, list):  # of a Unigram: with scores
        pieces = {piece: i for i, (piece, _) in enumerate(pieces)}
    found |= pieces
    found |= {x["content"]: x["id"] for x in content.get("added_tokens", ())}
    return found


def give(workdir: str, target: str, length: int) -> dict[str, Any]:
    """Copies a workdir's tokenizer into a Hugging Face folder, described for it.

    Returns the ids of its special tokens as config.json calls them; {} without one.
    """
    there = _copy(workdir, target, (JSON, *KEPT))
    path = tokenizer.find(workdir)
    if path is None:
        return {}
    try:
        tok = tokenizer.load(path)
    except ValueError as error:
        raise UserError(f"{error}; mend or remove the file") from error
    found = tok.specials
    settings = {"model_max_length": length}
    for role in ROLES:
        i = getattr(found, role)
        if i is not None and i < len(tok.pieces):
            settings[f"{role}_token"] = tok.pieces[i]
    if isinstance(tok, tokenizer.HuggingFaceTokenizer):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    elif isinstance(tok, tokenizer.SentencePieceTokenizer):
        if PIECES in there or KEPT[0] not in there:
            os.replace(os.path.join(target, MODEL), os.path.join(target, PIECES))
        extra = tok.vocab_size - len(tok.pieces)
        settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": extra}
    else:  # the ids are ByT5's
        settings |= {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}
    if KEPT[0] not in there:
        write_json(target, KEPT[0], settings)
    return {
        "pad_token_id": found.pad,
        "eos_token_id": found.eos,
        "bos_token_id": found.bos,
        "decoder_start_token_id": found.start,
    }


def _copy(source: str, target: str, names: Iterable[str]) -> set[str]:
    """Copies the files that are there; returns their names."""
    there = {name for name in names if os.path.exists(os.path.join(source, name))}
    for name in there:
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    return there
