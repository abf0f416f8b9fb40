"""The ids of training are those that transformers gives, going out and coming in."""

import dataclasses
import json
import os

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
import transformers
from hf_models import BERT, GPT2, LLAMA, LONGFORMER, MARIAN, T5
from tokenizers import models, normalizers, pre_tokenizers
from tokenizers.processors import (
    BertProcessing,
    ByteLevel,
    RobertaProcessing,
    Sequence,
    TemplateProcessing,
)

from triform.configs.schema import ExperimentConfig
from triform.data import datasets
from triform.data.batch import zeros
from triform.data.codecs import text as tokenizer
from triform.data.codecs.classes import Classes
from triform.data.codecs.text import KINDS, TokenizerConfig
from triform.data.datasets import (
    EVALUATION,
    CausalLMConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
)
from triform.interop import families, tokenizers
from triform.runtime.errors import UserError

TEXTS = ("The quick brown fox.", "it's 12 o'clock", "naïve Café", "x² ½ ﬁn", "dogs")
ITEMS = [{"x": a, "y": b, "label": 0} for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]
ONE = SequenceClassificationConfig(source="m", first="x", max_len=96)
TWO = dataclasses.replace(ONE, second="y")
STREAM = CausalLMConfig(source="m", text="x", max_len=400)
SOURCE = Seq2SeqConfig(source="m", inputs="x", targets="y", max_len=96)
OFFSET = {"pad_token_id": 1}
# name, beginning with their model_type: (architecture, settings, data)
FAMILIES = {
    "bert": ("BertForSequenceClassification", BERT, (ONE, TWO)),
    "bert, one type": (
        "BertForSequenceClassification",
        BERT | {"type_vocab_size": 1},
        (ONE, TWO),
    ),
    "roberta": (
        "RobertaForSequenceClassification",
        BERT | OFFSET | {"type_vocab_size": 1},
        (ONE, TWO),
    ),
    "roberta, two types": (
        "RobertaForSequenceClassification",
        BERT | OFFSET | {"type_vocab_size": 2},
        (ONE, TWO),
    ),
    "longformer": (
        "LongformerForSequenceClassification",
        LONGFORMER | OFFSET | {"attention_window": 4},
        (ONE, TWO),
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2, (STREAM,)),
    "llama": ("LlamaForCausalLM", LLAMA, (STREAM,)),
    "mistral": ("MistralForCausalLM", LLAMA, (STREAM,)),
    "t5": ("T5ForConditionalGeneration", T5, (SOURCE,)),
    "marian": (
        "MarianMTModel",
        MARIAN | {"pad_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2},
        (SOURCE,),
    ),
    "qwen2": ("Qwen2ForCausalLM", LLAMA, (STREAM,)),
}


def model_of(name, vocab_size):
    """(our config, its config.json) of a model that transformers has."""
    architecture, settings, _ = FAMILIES[name]
    hf = settings | {"model_type": name.split(",")[0], "vocab_size": vocab_size}
    hf["architectures"] = [architecture]
    return families.model_config(hf), hf


def rows_of(data, tok, model):
    """[(ids, types)] of training: of every item, or every document of a stream."""
    codecs = {"text": tok, "label": Classes(["0", "1"])}
    dataset = datasets.dataset(data, "train", codecs, model.sizes())
    found = []
    for item in range(len(dataset)):
        batch = zeros(data.spec(), {"B": 1, **data.shapes()[-1]})
        dataset.write(batch, 0, item, EVALUATION)
        key = "encoder_inputs" if "encoder_inputs" in batch else "inputs"
        real = batch[data.spec()[key].counts][0] > 0
        ids, types = (
            batch.get(k, np.zeros_like(batch[key]))[0][real]
            for k in (key, "token_type_ids")
        )
        if isinstance(data, CausalLMConfig):
            # FIRST document EOS document EOS ... document
            parts = np.split(ids, np.flatnonzero(ids == tok.eos))
            parts = [p[p != tok.eos] for p in parts]
            return [(p, 0 * p) for p in parts if len(p)]
        found.append((ids, types))
    return found


def theirs(folder, data):
    """The same by transformers, of what AutoTokenizer loads."""
    auto, found = transformers.AutoTokenizer.from_pretrained(folder), []
    for item in ITEMS:
        texts = [item["x"], item["y"]][: 1 + bool(getattr(data, "second", ""))]
        made = auto(*texts)
        types = made.get("token_type_ids", [0] * len(made["input_ids"]))
        found.append((made["input_ids"], types))
    return found, auto


def compare(ours, found):
    assert len(ours) == len(found)
    for (ids, types), (other, other_types) in zip(ours, found, strict=True):
        assert ids.tolist() == other
        assert types.tolist() == other_types


def exported(folder, tok, data, model, hf):
    """A folder as export_model writes it, without weights."""
    workdir, target = folder / "run", folder / "hf"
    for path in (workdir, target):
        path.mkdir(parents=True)
    tok.save(str(workdir))
    config = ExperimentConfig(model=model, data=data)
    family = families.family_of(hf)
    tokenizers.give(str(workdir), str(target), config, family)
    (target / "config.json").write_text(json.dumps(families.hf_config(model, family)))
    return target


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen2"])
def test_an_exported_tokenizer_gives_the_rows_of_training(
    kind, name, sources, tmp_path
):
    sources(m=ITEMS)
    for lowercase in (False, True):
        data = FAMILIES[name][2][-1]
        config = TokenizerConfig(kind, lowercase)
        texts = [*TEXTS, *map(str.lower, TEXTS)] * 3
        size = 400 if kind in ("bpe", "bytes") else 80
        tok = tokenizer.train(config, texts, size, data.SPECIALS)
        model, hf = model_of(name, tok.vocab_size)
        if kind == "bytes" and lowercase:
            with pytest.raises(UserError, match="lowercase=False"):
                exported(tmp_path / str(lowercase), tok, data, model, hf)
            continue
        folder = exported(tmp_path / str(lowercase), tok, data, model, hf)
        for data in FAMILIES[name][2]:
            found, auto = theirs(folder, data)
            compare(rows_of(data, tok, model), found)
        # What a model returns is text again.
        for text, ids in zip(TEXTS, tok.encode_batch(TEXTS), strict=True):
            if set(tok.names).isdisjoint(ids.tolist()):
                assert auto.decode(ids.tolist()) == tok.decode(ids), text
        assert auto.eos_token_id == tok.eos and auto.pad_token_id == tok.pad


def byte_level(pre_tokenizer, normalizer=None):
    """Byte-level BPE with a special token of chats."""
    core = library.Tokenizer(models.BPE())
    core.normalizer, core.pre_tokenizer = normalizer, pre_tokenizer
    core.decoder = library.decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    return core


def test_where_transformers_has_rules_of_its_own_only_these_are_exported(
    sources, tmp_path
):
    """It takes every tokenizer of a Qwen2 for one with Qwen2's pre-tokeniser."""
    sources(m=ITEMS)
    for kind in KINDS:
        tok = tokenizer.train(TokenizerConfig(kind), TEXTS, 300)
        model, hf = model_of("qwen2", tok.vocab_size)
        with pytest.raises(UserError, match=r"qwen2, .*data\.tokenizer\.path"):
            exported(tmp_path / kind, tok, STREAM, model, hf)
    from transformers.models.qwen2 import tokenization_qwen2 as qwen2

    split = library.Regex(qwen2.PRETOKENIZE_REGEX)
    steps = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    path = str(tmp_path / "tokenizer.json")
    byte_level(steps, normalizers.NFC()).save(path)
    tok = tokenizer.load(path)
    model, hf = model_of("qwen2", tok.vocab_size)
    folder = exported(tmp_path / "own", tok, STREAM, model, hf)
    compare(rows_of(STREAM, tok, model), theirs(folder, STREAM)[0])


# --- In ---


def wordpiece(*specials):
    words = sorted({w for t in TEXTS for w in t.split()} | set("".join(TEXTS)) - {" "})
    vocabulary = {p: i for i, p in enumerate([*specials, *words])}
    core = library.Tokenizer(models.WordPiece(vocabulary, unk_token=specials[-1]))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.add_special_tokens(list(specials))
    return core


BERTS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
ROBERTAS = ("<s>", "<pad>", "</s>", "<mask>", "<unk>")
NAMED = {
    "cls_token": "[CLS]",
    **{"sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
}
PLAIN = {
    **{"cls_token": "<s>", "sep_token": "</s>", "bos_token": "<s>"},
    **{"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
CHAT = FAST | {"eos_token": "<|endoftext|>", "bos_token": "<|bos|>"}
GPT = pre_tokenizers.ByteLevel(add_prefix_space=False)
BOS = TemplateProcessing(
    single="<|bos|> $A",
    pair="<|bos|> $A <|bos|>:1 $B:1",
    special_tokens=[("<|bos|>", 3)],
)
OFFSETS = ByteLevel(trim_offsets=False)
# name: (family, tokenizer, post-processor, tokenizer_config.json)
FOLDERS = {
    "BertProcessing": (
        "bert",
        wordpiece(*BERTS),
        BertProcessing(("[SEP]", 2), ("[CLS]", 1)),
        FAST | NAMED,
    ),
    "the class of BERT's": (
        "bert",
        wordpiece(*BERTS),
        None,
        NAMED | {"tokenizer_class": "BertTokenizer"},
    ),
    "another order": (
        "bert",
        wordpiece(*BERTS),
        TemplateProcessing(
            single="$A [SEP]:1 [CLS]:1",
            pair="$A [SEP] $B:0 [SEP]:1 [CLS]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        ),
        FAST | NAMED,
    ),
    "RobertaProcessing": (
        "roberta",
        wordpiece(*ROBERTAS),
        RobertaProcessing(("</s>", 2), ("<s>", 0)),
        FAST | PLAIN,
    ),
    "RobertaProcessing, two types": (
        "roberta, two types",
        wordpiece(*ROBERTAS),
        RobertaProcessing(("</s>", 2), ("<s>", 0)),
        FAST | PLAIN,
    ),
    "nothing": ("gpt2", byte_level(GPT), None, CHAT),
    "offsets only": ("gpt2", byte_level(GPT), OFFSETS, CHAT),
    "BOS": ("llama", byte_level(GPT), BOS, CHAT),
    "BOS and offsets": ("llama", byte_level(GPT), Sequence([OFFSETS, BOS]), CHAT),
    "BertProcessing with types": (
        "bert",
        wordpiece(*BERTS),
        BertProcessing(("[SEP]", 2), ("[CLS]", 1)),
        FAST | NAMED | {"model_input_names": ["input_ids", "token_type_ids"]},
    ),
    "a setting that is not read": (
        "llama",
        byte_level(GPT),
        BOS,
        CHAT | {"add_bos_token": False},
    ),
    "EOS": (
        "marian",
        wordpiece(*ROBERTAS),
        TemplateProcessing(
            single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 2)]
        ),
        FAST | PLAIN,
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_an_imported_tokenizer_frames_as_it_did(name, sources, tmp_path):
    """And so does the folder that is exported from a run that began with it."""
    sources(m=ITEMS)
    family, core, processor, settings = FOLDERS[name]
    core = library.Tokenizer.from_str(core.to_str())
    if processor is not None:
        core.post_processor = processor
    model, hf = model_of(family, core.get_vocab_size())
    if "bos_token" in settings:  # that config.json names it is no reason to write it
        hf |= {"bos_token_id": core.token_to_id(settings["bos_token"])}
    source, run = tmp_path / "source", tmp_path / "run"
    for path in (source, run):
        path.mkdir()
    core.save(str(source / "tokenizer.json"))
    (source / "spiece.model").write_bytes(b"an older form, which is not read")
    (source / "config.json").write_text(json.dumps(hf))
    # As an editor of Windows saves it.
    content = json.dumps(settings)
    (source / "tokenizer_config.json").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert tokenizers.bring(str(source), str(run), hf) == ""
    (source / "tokenizer_config.json").write_text(content)
    tok = tokenizer.load(tokenizer.find(str(run)))
    first = FAMILIES[family][2][0]
    again = exported(tmp_path / "again", tok, first, model, hf)
    kept = tmp_path / "kept"
    kept.mkdir()
    config = ExperimentConfig(model=model, data=first)
    tokenizers.give(str(run), str(kept), config, families.family_of(hf))
    assert {*os.listdir(source)} - {*os.listdir(kept)} <= {"config.json"}
    (kept / "config.json").write_text(json.dumps(hf))
    (kept / "tokenizer_config.json").write_text(content)
    for data in FAMILIES[family][2]:
        found, auto = theirs(source, data)
        assert theirs(again, data)[0] == theirs(kept, data)[0] == found
        if data is not STREAM:
            compare(rows_of(data, tok, model), found)
            continue
        rows = tok.prompts([item["x"] for item in ITEMS])
        assert [row.tolist() for row in rows] == [ids for ids, _ in found]
        prompt = "<|im_start|>the dogs<|im_end|>\n"
        assert tok.prompts([prompt])[0].tolist() == auto(prompt)["input_ids"]
        stream = rows_of(data, tok, model)[0][0].tolist()
        bare = auto(ITEMS[0]["x"], add_special_tokens=False)["input_ids"]
        lead = found[0][0][: found[0][0].index(bare[0])]
        assert stream == [*lead, *bare]


@pytest.mark.parametrize("name", ["llama", "llama, both", "llama, bare", "t5"])
def test_an_imported_model_file_frames_as_it_did(name, sources, tmp_path):
    """SentencePiece: settings, or the class, say what stands around a text."""
    sources(m=ITEMS)
    family, t5 = name.split(",")[0], name == "t5"
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if t5 else {}
    source, run = tmp_path / "source", tmp_path / "run"
    for path in (source, run):
        path.mkdir()
    file = "spiece.model" if t5 else "tokenizer.model"
    with open(source / file, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 3),
            model_writer=f,
            model_type="unigram" if t5 else "bpe",
            vocab_size=320 if not t5 else 50,
            hard_vocab_limit=False,
            byte_fallback=not t5,
            normalization_rule_name="nmt_nfkc" if t5 else "identity",
            remove_extra_whitespaces=t5,
            minloglevel=2,
            **ids,
        )
    settings = {"tokenizer_class": "T5Tokenizer" if t5 else "LlamaTokenizer"}
    settings |= {"eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"extra_ids": 4} if t5 else {"bos_token": "<s>"}
    if name in ("llama", "llama, both"):
        settings |= {"add_bos_token": True, "add_eos_token": "both" in name}
    model, hf = model_of(family, 330)
    (source / "config.json").write_text(json.dumps(hf))
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizers.bring(str(source), str(run), hf) == ""
    tok, data = tokenizer.load(tokenizer.find(str(run))), FAMILIES[family][2][0]
    rows = [tok.framing(data.USE).framed([x]) for x in tok.encode(TEXTS)]
    found = theirs(source, data)[0]
    compare([(ids, types) for ids, types, _ in rows], found)
    again = exported(tmp_path / "again", tok, data, model, hf)
    assert theirs(again, data)[0] == found


def test_a_post_processor_that_cannot_be_read_is_named(tmp_path):
    core = wordpiece(*BERTS)
    core.post_processor = TemplateProcessing(
        single="$A", pair="$B [SEP] $A", special_tokens=[("[SEP]", 2)]
    )
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json: .*'pair' is not A, B"):
        tokenizers.template(str(tmp_path), {})
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*'pair' is not A, B"):
        tokenizer.load(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_read_where_that_is_asked_for(kind):
    tok = tokenizer.train(TokenizerConfig(kind), TEXTS, 300, ("[CLS]", "[SEP]"))
    text = f"quick{tok.names[tok.sep]}dogs"
    quick, dogs = tok.encode(["quick", "dogs"])
    assert tok.encode([text], specials=True)[0].tolist() == [*quick, tok.sep, *dogs]
    assert tok.sep not in tok.encode([text])[0]
    names = "".join(tok.names.values())
    assert tok.encode([names, ""], specials=True)[0].tolist() == [*tok.names]


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_a_surrogate_pair_is_one_replacement_mark(kind):
    tok = tokenizer.train(TokenizerConfig(kind), [*TEXTS, "\ufffd"], 300)
    for bad, text in (("ok \ud83d end", "ok \ufffd end"), ("\udc80", "\ufffd")):
        for specials in (False, True):
            rows = tok.encode([bad, text], specials)
            assert rows[0].tolist() == rows[1].tolist()
    # Both halves are one character.
    whole = tok.encode(["\ud83d\ude42", "\U0001f642"])
    assert whole[0].tolist() == whole[1].tolist()


@pytest.mark.parametrize(
    ("config", "generation", "eos", "ends"),
    [
        (0, None, 0, (0,)),
        ([0, 2], None, 0, (0, 2)),
        ([1, 2], None, 2, (1, 2)),  # the tokenizer's own, where it is one of them
        (0, [0, 2], 0, (0, 2)),
        (0, 2, 2, (2,)),
        (None, [3, 2], 2, (3, 2)),
    ],
)
def test_every_id_that_ends_a_text_is_known(config, generation, eos, ends, tmp_path):
    """Those at which transformers stops."""
    source, run = tmp_path / "source", tmp_path / "run"
    for path in (source, run):
        path.mkdir()
    byte_level(GPT).save(str(source / "tokenizer.json"))
    settings = FAST | {"eos_token": "<|im_end|>" if eos == 2 else "<|endoftext|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if generation is not None:
        content = json.dumps({"eos_token_id": generation})
        (source / "generation_config.json").write_text(content)
    hf = {"model_type": "llama", "eos_token_id": config}
    assert tokenizers.bring(str(source), str(run), hf) == ""
    tok = tokenizer.load(tokenizer.find(str(run)))
    assert (tok.eos, tok.ends) == (eos, ends)
