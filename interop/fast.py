"""Our tokenizers as files of the `tokenizers` library, which transformers loads."""

import json
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers

from triform.data.codecs.framing import Framing, to_processor
from triform.data.codecs.text import (
    SPACE,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
)
from triform.data.codecs.tokenizer import Tokenizer
from triform.runtime.errors import UserError

# Texts on which the two must agree.
PROBES = (
    *("a", "The quick brown fox jumps over the lazy dog.", "it's 3 May 2024, 12:30"),
    *(
        " ",
        "  two  spaces ",
        "a\tb\nc",
        "naïve café Straße ÄÖÜ İ",
        "x\u00b2 \u00bd \ufb01 \uff11\uff12",
    ),
    *("日本語 中文", "🙂👍", "[CLS ]< s>", "العربية", "e\u0301 \u00a0 \u200b"),
)


def _text_of_bytes() -> list[str]:
    """The character that stands for every byte in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(i) if i in shown else chr(next(others)) for i in range(256)]


def _bytes(tok: ByteTokenizer) -> tokenizers.Tokenizer:
    """Byte-level BPE that merges nothing; UserError for one that lower-cases.

    Of its table the 26 ids of capitals would never be written, which readers of a byte
    vocabulary do not expect.
    """
    if tok.lowercase:
        raise UserError(
            "data.tokenizer.lowercase=True: a byte tokenizer that lower-cases is not "
            "exported; train with data.tokenizer.lowercase=False on lower-cased text"
        )
    pieces = [*tok.pieces[: tok.first], *_text_of_bytes()]
    core = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = decoders.ByteLevel()
    return core


def _merges(processor: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """The pairs that SentencePiece's BPE joins, the first ones first."""
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    known = {p: i for i, p in enumerate(pieces)}
    found = []
    for i, piece in enumerate(pieces):
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i):
            continue
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in known and right in known:
                order = -processor.get_score(i), known[left], known[right]
                found.append((order, (left, right)))
    return [pair for _, pair in sorted(found)]


def _sentencepiece(tok: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """A Unigram or BPE model with the normalisation of a SentencePiece file."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(tok.model)
    spec, rules, core = proto.trainer_spec, proto.normalizer_spec, tok.core
    pieces = [core.id_to_piece(i) for i in range(core.vocab_size())]
    unk, fallback = core.unk_id(), spec.byte_fallback
    if spec.model_type == spec.BPE:
        model = models.BPE(
            {p: i for i, p in enumerate(pieces)},
            _merges(core),
            unk_token=pieces[unk],
            fuse_unk=True,
            byte_fallback=fallback,
        )
    else:
        scores = [(p, core.get_score(i)) for i, p in enumerate(pieces)]
        model = models.Unigram(scores, unk, byte_fallback=fallback)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
        steps.append(normalizers.Strip())
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(steps)
    shown = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        shown.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(shown)
    return made


def fast(tok: Tokenizer, framing: Framing) -> bytes:
    """The tokenizer.json that gives the same ids, framed; UserError if there is none.

    Literally: there, the name of a special token in a text is that token.
    """
    if isinstance(tok, HuggingFaceTokenizer):
        core = tokenizers.Tokenizer.from_str(tok.core.to_str())
    elif isinstance(tok, ByteTokenizer):
        core = _bytes(tok)
    else:
        core = _sentencepiece(tok)
    # By id: those beyond the vocabulary are numbered on from its end.
    core.add_special_tokens([name for _, name in sorted(tok.names.items())])
    content = json.loads(core.to_str())
    tokens = [core.id_to_token(i) for i in range(tok.vocab_size)]
    content["post_processor"] = _processor(content, framing, tokens)
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    _require_equal(tok, made, framing)
    return made.to_str(pretty=True).encode()


def _processor(
    content: dict[str, Any], framing: Framing, tokens: list[str]
) -> dict[str, Any] | None:
    """Its post-processor: what is about offsets only stays."""
    old = content["post_processor"]
    parts = [] if old is None else old.get("processors", [old])
    kept = [part for part in parts if part["type"] == "ByteLevel"]
    if framing.adds():
        kept.append(to_processor(framing, tokens))
    if len(kept) > 1:
        return {"type": "Sequence", "processors": kept}
    return kept[0] if kept else None


def _require_equal(
    tok: Tokenizer, made: tokenizers.Tokenizer, framing: Framing
) -> None:
    for text, ids in zip(PROBES, tok.encode_batch(PROBES), strict=True):
        expected = framing.framed([ids]).ids.tolist()
        if made.encode(text).ids != expected:
            raise UserError(
                f"the tokenizer ({tok.filename}) cannot be exported: as a "
                f"tokenizer.json it reads {text!r} as {made.encode(text).ids}, not as "
                f"{expected}; move the file out of the workdir to export the weights"
            )
