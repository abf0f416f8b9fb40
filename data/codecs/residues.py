"""The alphabet of protein language models, one id a residue (Lin et al. 2023)."""

import re
from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

# By id. After the 20 amino acids: X any, B Asx, U selenocysteine, Z Glx, O pyrrolysine.
ALPHABET = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
    *("<null_1>", "<mask>"),
)
SPECIALS = ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")


def library(pieces: Sequence[str] = ALPHABET) -> tokenizers.Tokenizer:
    """The alphabet as a tokenizer: each residue by itself, spaces are passed over.

    A run of characters that are no residues (J, *, lower-case letters) is one <unk>, as
    transformers' EsmTokenizer has it.
    """
    core = tokenizers.Tokenizer(
        models.WordLevel({p: i for i, p in enumerate(pieces)}, "<unk>")
    )
    known = sorted((p for p in pieces if p not in SPECIALS), key=len, reverse=True)
    pattern = tokenizers.Regex("|".join(map(re.escape, known)))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pattern, "isolated")]
    )
    core.decoder = decoders.Fuse()
    core.add_special_tokens([p for p in pieces if p in SPECIALS])
    return core
