"""The alphabet of protein language models, one id a residue (Lin et al. 2023)."""

import re
import string
from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

# By id. After the 20 amino acids: X any, B Asx, U selenocysteine, Z Glx, O pyrrolysine.
ALPHABET = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
    *("<null_1>", "<mask>"),
)
SPECIALS = ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")


def library(pieces: Sequence[str] = ALPHABET) -> tokenizers.Tokenizer:
    """The alphabet as a tokenizer: each residue by itself, spaces are passed over.

    Lower-case letters, which mark masked regions, are read as capitals; transformers'
    EsmTokenizer takes a run of them for one <unk>. A run of other characters that are
    no residues (J, *) is one <unk>, as it has it.
    """
    core = tokenizers.Tokenizer(
        models.WordLevel({p: i for i, p in enumerate(pieces)}, "<unk>")
    )
    known = sorted((p for p in pieces if p not in SPECIALS), key=len, reverse=True)
    pattern = tokenizers.Regex("|".join(map(re.escape, known)))
    capitals = [(c, c.upper()) for c in string.ascii_lowercase]
    capitals += [(p.upper(), p) for p in known if len(p) > 1]  # <null_1> stays
    core.normalizer = normalizers.Sequence(
        [normalizers.Replace(a, b) for a, b in capitals]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pattern, "isolated")]
    )
    core.decoder = decoders.Fuse()
    core.add_special_tokens([p for p in pieces if p in SPECIALS])
    return core
