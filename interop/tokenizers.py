"""Tokenizers: which files go along, special tokens, and what stands around texts."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import sentencepiece

from triform.configs.schema import ExperimentConfig
from triform.data.codecs import text as tokenizer
from triform.data.codecs.framing import Framing, around, from_processor, twice
from triform.data.codecs.tokenizer import Tokenizer
from triform.interop.fast import fast
from triform.interop.mapping import Family
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
CONFIG, JSON = KEPT[0], "tokenizer.json"
# T5's SentencePiece model has a name of its own; ours is that of the others.
PIECES, MODEL = "spiece.model", "tokenizer.model"
# Files of other forms of a tokenizer, and settings of these.
FORMS = tuple(x for x in KEPT if x.endswith(("vocab.json", ".txt", ".spm", ".model")))


def read_json(folder: str, name: str) -> dict[str, Any]:
    """A file's object, {} without the file; UserError if it is not one.

    UTF-8, with or without a byte order mark.
    """
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8-sig") as f:
            found = json.load(f)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy the file again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; copy the file again")
    return found


def write_json(folder: str, name: str, content: Mapping[str, Any]) -> None:
    """Writes an object, indented."""
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)
        f.write("\n")


def bring(source: str, workdir: str, hf: Mapping[str, Any]) -> str:
    """Copies the tokenizer of a Hugging Face folder; '' or what is missing, a line."""
    there = _copy(source, workdir, (JSON, *KEPT))
    known = ids(source, hf)
    if hf["model_type"] == "t5" and PIECES in there and JSON not in there:
        model = os.path.join(workdir, MODEL)
        shutil.copyfile(os.path.join(source, PIECES), model)
        known["sentinels"] = _sentinels(model, read_json(source, CONFIG))
    alphabet = CLASSES.get(hf["model_type"]) in ALPHABETS
    if alphabet and ALPHABET in there and JSON not in there:
        tokenizer.library(_lines(source)).save(os.path.join(workdir, JSON))
    known |= _template(source, hf)
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
    found = _named(source)
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


def _named(source: str) -> dict[str, int]:
    """{role: id} of the special tokens that a folder's tokenizer names."""
    vocabulary, found = _vocabulary(source), {}
    for name in ("special_tokens_map.json", CONFIG):
        content = read_json(source, name)
        for role in ROLES:
            token = content.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token in vocabulary:
                found[role] = vocabulary[token]
    return found


# model_type -> the class of its tokenizers where tokenizer_config.json names none.
CLASSES = {
    "bert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "longformer": "RobertaTokenizer",
    "t5": "T5Tokenizer",
    "marian": "MarianTokenizer",
    "esm": "EsmTokenizer",
}
# Those that read an alphabet, one token a line, and have no tokenizer.json.
ALPHABETS = ("EsmTokenizer",)
ALPHABET = "vocab.txt"


def template(folder: str, hf: Mapping[str, Any]) -> Framing | None:
    """What transformers puts around texts with a folder's tokenizer; None: nothing.

    The post-processor of tokenizer.json, else what the tokenizer's class does; without
    that file the settings add_bos_token and add_eos_token. Types are 0 where it gives
    the model none. UserError for a post-processor that cannot be read.
    """
    settings, found = read_json(folder, CONFIG), None
    name = settings.get("tokenizer_class") or hf.get("tokenizer_class") or ""
    name = name.removesuffix("Fast") or CLASSES.get(hf.get("model_type", ""), "")
    given = read_json(folder, JSON)
    if processor := given.get("post_processor"):
        try:
            found = from_processor(processor)
        except ValueError as error:
            path = os.path.join(folder, JSON)
            raise UserError(f"{path}: {error}; replace it") from error
    elif not given and {"add_bos_token", "add_eos_token"} & {*settings}:
        found = _added(folder, settings)
    else:
        found = _of_class(folder, hf, name)
    if found is None or not found.adds():
        return None
    types = ["token_type_ids"] * (name == "BertTokenizer")
    typed = "token_type_ids" in settings.get("model_input_names", types)
    return found if typed else found.bounded(1)


def _added(folder: str, settings: Mapping[str, Any]) -> Framing:
    named = _named(folder)
    lead, end = (
        [named[role]] if settings.get(f"add_{role}_token") and role in named else []
        for role in ("bos", "eos")
    )
    return twice(lead, end)


def _of_class(folder: str, hf: Mapping[str, Any], name: str) -> Framing:
    """What a class of tokenizers puts around texts by itself."""
    vocabulary, known = _vocabulary(folder), ids(folder, hf)

    def token(role: str, usual: str) -> list[int]:
        i = known.get(role, vocabulary.get(usual))
        return [] if i is None else [i]

    eos = token("eos", "</s>")
    if name == "EsmTokenizer":
        cls, eos = token("cls", "<cls>"), token("eos", "<eos>")
        return around(cls, eos, eos)
    if name == "BertTokenizer":
        cls, sep = token("cls", "[CLS]"), token("sep", "[SEP]")
        return around(cls, sep, sep, second=1)
    if name == "RobertaTokenizer":
        cls, sep = token("cls", "<s>"), token("sep", "</s>")
        return around(cls, sep * 2, sep)
    if name == "T5Tokenizer":
        return around((), eos, eos)
    return around((), (), eos) if name == "MarianTokenizer" else Framing()


def _template(source: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """{"template": ...} for the sidecar; {} where no file says anything."""
    found = template(source, hf)
    if found is not None:
        return {"template": dataclasses.asdict(found)}
    return {"template": None} if read_json(source, JSON).get("post_processor") else {}


def _ends(source: str, hf: Mapping[str, Any]) -> list[int]:
    """Every id that ends a text that transformers generates with a folder."""
    given = read_json(source, GENERATION) or hf
    ends = given.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return [i for i in ends if isinstance(i, int)]


def _vocabulary(source: str) -> dict[str, int]:
    """{token: id} of whatever vocabulary a folder has."""
    found = {token: i for i, token in enumerate(_lines(source))}
    found |= read_json(source, "vocab.json")
    content = read_json(source, JSON)
    pieces = content.get("model", {}).get("vocab", {})
    if isinstance(pieces, list):  # of a Unigram: with scores
        pieces = {piece: i for i, (piece, _) in enumerate(pieces)}
    found |= pieces
    found |= {x["content"]: x["id"] for x in content.get("added_tokens", ())}
    return found if content else found | _model_pieces(source)


def _lines(folder: str) -> list[str]:
    """The tokens of a vocab.txt; [] without one."""
    path = os.path.join(folder, ALPHABET)
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8-sig") as f:
        return [token.rstrip("\n") for token in f]


def _model_pieces(source: str) -> dict[str, int]:
    """{token: id} of a SentencePiece file; {} without one that can be read."""
    paths = [os.path.join(source, name) for name in (PIECES, MODEL)]
    path = next((p for p in paths if os.path.exists(p)), "")
    if not path:
        return {}
    try:
        core = sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError):  # reported where the file is loaded
        return {}
    return {core.id_to_piece(i): i for i in range(core.vocab_size())}


# Their model_type -> (types of normaliser and pre-tokeniser that transformers puts into
# every tokenizer of it, whatever the file says).
REBUILT = {"qwen2": ("NFC", ["Split", "ByteLevel"])}


def give(
    workdir: str, target: str, config: ExperimentConfig, family: Family
) -> dict[str, Any]:
    """Copies a workdir's tokenizer into a Hugging Face folder, described for it.

    transformers frames texts with it as training did. Returns the ids of its special
    tokens as config.json calls them; {} without one. UserError if transformers has no
    such tokenizer.
    """
    there = _copy(workdir, target, (JSON, *KEPT))
    path = tokenizer.find(workdir)
    if path is None:
        return {}
    try:
        tok = tokenizer.load(path)
    except ValueError as error:
        raise UserError(f"{error}; mend or remove the file") from error
    types = config.model.sizes().get("num_types", 0)
    framing = tok.framing(config.data.USE).bounded(types)
    if {PIECES, MODEL} <= there:  # one file; this is the workdir's name of it
        _remove(target, [MODEL])
    kept = CONFIG in there and {JSON, PIECES, MODEL} & there
    theirs = template(target, {"model_type": family.model_type}) or Framing()
    if not kept or theirs.bounded(types) != framing:
        _remove(target, FORMS)
        content = fast(tok, framing)
        _require_kept(content, family)
        with open(os.path.join(target, JSON), "wb") as f:
            f.write(content)
        _describe(target, tok, config, types)
        _as_alphabet(target, tok, family)
    found = tok.specials
    return {
        "pad_token_id": found.pad,
        "eos_token_id": found.eos if len(tok.ends) == 1 else list(tok.ends),
        "bos_token_id": found.bos,
        "decoder_start_token_id": found.start,
    }


def _require_kept(content: bytes, family: Family) -> None:
    """UserError if transformers would read the tokenizer by other rules."""
    if family.model_type not in REBUILT:
        return
    found = json.loads(content)
    steps = found["pre_tokenizer"] or {}
    kinds = [x["type"] for x in steps.get("pretokenizers", [steps]) if x]
    normalizer = (found["normalizer"] or {}).get("type")
    if (normalizer, kinds) != REBUILT[family.model_type]:
        raise UserError(
            f"model: it is exported as {family.model_type}, whose tokenizers "
            "transformers reads by rules of their own, so that it would read texts "
            "otherwise than in training; train with the tokenizer.json of a "
            f"{family.model_type} model (data.tokenizer.path), or move the tokenizer "
            "out of the workdir to export the weights alone"
        )


def _describe(
    target: str, tok: Tokenizer, config: ExperimentConfig, types: int
) -> None:
    """Writes tokenizer_config.json; what an imported one says of other things stays."""
    settings = read_json(target, CONFIG)
    for key in ("add_bos_token", "add_eos_token", "extra_ids", "vocab_file"):
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.setdefault("model_max_length", config.model.longest().get("L", 0))
    settings["clean_up_tokenization_spaces"] = False
    settings["model_input_names"] = [
        *("input_ids", *(["token_type_ids"] if types else [])),
        "attention_mask",
    ]
    for role in ROLES:
        i = getattr(tok.specials, role)
        if i is not None and i < len(tok.pieces):
            settings[f"{role}_token"] = tok.pieces[i]
    write_json(target, CONFIG, settings)


def _as_alphabet(target: str, tok: Tokenizer, family: Family) -> None:
    """Writes what a class of ALPHABETS reads, if the family has such and it fits."""
    name = CLASSES.get(family.model_type, "")
    if name not in ALPHABETS:
        return
    ours = read_json(target, JSON)
    theirs = json.loads(tokenizer.library(tok.pieces).to_str())
    if any(ours[k] != theirs[k] for k in ("normalizer", "pre_tokenizer", "model")):
        return
    with open(os.path.join(target, ALPHABET), "w", encoding="utf-8") as f:
        f.write("\n".join(tok.pieces))
    write_json(target, CONFIG, read_json(target, CONFIG) | {"tokenizer_class": name})


def _remove(folder: str, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


def _copy(source: str, target: str, names: Iterable[str]) -> set[str]:
    """Copies the files that are there; returns their names."""
    there = {name for name in names if os.path.exists(os.path.join(source, name))}
    for name in there:
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    return there
