"""A published encoder, the user's table, and the folder that goes back."""

import csv
import json
import random

import numpy as np
import tokenizers
import transformers

from triform import evaluate, train
from triform import workdir as workdirs
from triform.configs.schema import (
    CheckpointConfig,
    ClassificationConfig,
    EncoderConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimConfig,
    SequenceClassificationConfig,
    from_json,
    to_json,
)
from triform.interop.workdir import export_model, import_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 40}
GOOD, BAD = ("fine", "great", "lovely"), ("dull", "poor", "sad")


def published(folder) -> str:
    """A BERT with random weights, as transformers writes it."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*specials, "a", "film", "the", "was", *GOOD, *BAD, "##s", ","]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(
            {piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"
        )
    )
    core.normalizer = tokenizers.normalizers.BertNormalizer()
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    core.add_special_tokens(specials)
    transformers.BertTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=len(vocabulary), **SIZES)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


def table(path) -> str:
    """Film reviews and what is thought of them, quoted cells with commas."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8", newline="") as f:
        out = csv.writer(f)
        out.writerow(["review", "opinion"])
        for _ in range(160):
            words, opinion = rng.choice(((GOOD, "liked it"), (BAD, "left early")))
            said = f"The film was {rng.choice(words)}, {rng.choice(words)}"
            out.writerow([f"{said}, a {rng.choice(words)} film", opinion])
    return str(path)


def test_predictions_of_a_bert_on_a_table_equal_the_pipeline_s(tmp_path):
    """Import, a CSV, ten predictions to a file, export, the same ten by transformers:
    names of the classes and their probabilities.
    """
    imported, run, out = (str(tmp_path / x) for x in ("imported", "run", "out"))
    import_model(published(tmp_path / "hf"), imported)
    here = EncoderConfig(masked_head=False, num_labels=-1)
    config = ExperimentConfig(
        model=workdirs.architecture(imported, here),
        task=ClassificationConfig(),
        data=SequenceClassificationConfig(
            source=table(tmp_path / "reviews.csv"),
            first="review",
            label="opinion",
            max_len=20,
            batch_size=16,
            cache_dir=str(tmp_path / "cache"),
        ),
        optim=OptimConfig(learning_rate=0.01, schedule="constant", warmup_steps=1),
        evaluation=EvaluationConfig(every=60, metrics=()),
        checkpoint=CheckpointConfig(every=60),
        init_from=imported,
        steps=60,
        log_every=10,
    )
    config = from_json(to_json(config))
    scores = train.run(config, run)
    assert scores["test/accuracy"] == 1
    path = str(tmp_path / "predictions.jsonl")
    found = evaluate.run(run, "train", predictions=True).predictions[:10]
    evaluate.write_predictions(path, found)
    export_model(run, out)
    ask = transformers.pipeline("text-classification", model=out, top_k=None)
    with open(path, encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    answers = ask([line["input"] for line in lines])
    assert {line["label"] for line in lines} == {"liked it", "left early"}
    for line, answer in zip(lines, answers, strict=True):
        assert line["label"] == answer[0]["label"]
        shares = {x["label"]: x["score"] for x in answer}
        assert shares.keys() == line["probabilities"].keys()
        for name, share in shares.items():
            np.testing.assert_allclose(line["probabilities"][name], share, atol=1e-5)
