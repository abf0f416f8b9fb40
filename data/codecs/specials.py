"""Special tokens: which ids stand for no text."""

import dataclasses
import itertools
from collections.abc import Sequence

from triform.data.codecs.framing import Framing, around

# The first ids of every tokenizer trained here, as in T5. Other ones have their own.
PAD, EOS, UNK = 0, 1, 2
SPECIALS = ("<pad>", "</s>", "<unk>")
SIDECAR = "special_tokens.json"

# How published tokenizers call their special tokens; the first that is there counts.
NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[SEP]"),
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}


@dataclasses.dataclass(frozen=True)
class Specials:
    """Ids that stand for no text; None: the tokenizer has no such."""

    pad: int
    eos: int  # written after a text in training
    start: int  # starts a decoder
    unk: int | None = None
    bos: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    sentinels: tuple[int, ...] = ()  # '<extra_id_0>' and so on, as in T5
    ends: tuple[int, ...] = ()  # all that end a generated text; (): eos alone
    template: Framing | None = None  # what the tokenizer itself puts around texts

    def framing(self, use: str) -> Framing:
        """What stands around texts: as the tokenizer says, else by their use.

        For a use of framing.USES: "texts" are [CLS] A [SEP] and [CLS] A [SEP] B [SEP],
        or end with EOS where there are no such; a "source" ends with EOS; a "prompt" is
        bare.
        """
        if self.template is not None:
            return self.template
        if use == "prompt":
            return Framing()
        if use == "source":
            return around((), [self.eos], [self.eos])
        end = [self.eos if self.sep is None else self.sep]
        return around(() if self.cls is None else [self.cls], end, end, second=1)


def recognise(pieces: Sequence[str], **known) -> Specials:
    """The special ids by the usual names; `known` ones are given.

    ValueError if nothing ends a text. Without a pad token the end pads, as is usual
    with GPT-2's.
    """
    ids = {p: i for i, p in enumerate(pieces)}
    found = {
        role: next((ids[n] for n in names if n in ids), None)
        for role, names in NAMES.items()
    }
    if "<mask>" in ids:  # RoBERTa and BART, ESM: the ends of a text are these
        found |= {
            "cls": ids.get("<s>", found["cls"]),
            "sep": ids.get("</s>", ids.get("<eos>")),
        }
    sentinels = itertools.takewhile(
        ids.__contains__, map("<extra_id_{}>".format, range(len(ids)))
    )
    found |= {"sentinels": tuple(ids[s] for s in sentinels), **known}
    found |= {k: tuple(found[k]) for k in ("sentinels", "ends") if k in found}
    if isinstance(found.get("template"), dict):
        found["template"] = Framing.of(found["template"])
    if found["eos"] is None:
        raise ValueError(
            f"no token ends a text (expected one of {', '.join(NAMES['eos'])}); write "
            f'{{"eos": ID}} into {SIDECAR} beside it'
        )
    if found["pad"] is None:
        found["pad"] = found["eos"]
    found.setdefault("start", found["pad"])
    return Specials(**found)
