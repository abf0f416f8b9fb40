"""BERT pre-trained on public-domain books: masked tokens and next sentence.

    python train.py --config=configs/bert_books.py:cpu --workdir=DIR
    python train.py --config=configs/bert_finetune.py:clinc150 --config.init_from=DIR \
        --workdir=DIR2

The `cpu` variant was measured on 2 cores of an AMD EPYC beside other jobs: 3,000 steps
of 64 rows took 52 minutes (51 minutes of CPU time). On the three held-out books, 28.4 %
of the masked tokens and 70.3 % of the next-sentence predictions were correct, with 4.35
nats per masked token. A second run gave the same digits. With --config.steps=16000 on
an H200 (checkpoints and evaluations every 4,000 steps): 35.6 % and 79.5 %, 3.69 nats.
`base`, `large` and `roberta` were dry-run only.
"""

import functools

from triform.configs.schema import (
    CheckpointConfig,
    EncoderConfig,
    EvaluationConfig,
    ExperimentConfig,
    MaskedLMConfig,
    OptimConfig,
    PretrainingConfig,
    TokenizerConfig,
    TokenPredictionConfig,
    TransformerConfig,
    smoke,
    vary,
)

VARIANTS = {
    "base": {},
    "large": {
        "model.trunk": {
            "num_layers": 24,
            "d_model": 1024,
            "num_heads": 16,
            "d_ff": 4096,
            "remat": True,
            "scan_layers": True,
        },
    },
    "roberta": {
        "model": {"num_types": 0, "num_labels": 0},
        "task": TokenPredictionConfig(label_smoothing=0.0),
        "data": {"next_sentence": False, "whole_word": True},
        "optim": {"b2": 0.98, "learning_rate": 6e-4},
    },
    "cpu": {
        "model.trunk": {
            "num_layers": 4,
            "d_model": 192,
            "num_heads": 6,
            "d_ff": 768,
            "norm_position": "pre",
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "model.vocab_size": 8000,
        "data": {"max_len": 64, "batch_size": 64},
        "optim": {"learning_rate": 1.5e-3, "warmup_steps": 300, "b2": 0.98},
        "evaluation.every": 1000,
        "checkpoint.every": 250,
        "steps": 3000,
    },
    "smoke": functools.partial(smoke, split="validation[:2]"),
}


def get_config(variant: str = "base") -> ExperimentConfig:
    """Variants: 'base', 'large', 'roberta' (masks all tokens of a word, has no second
    sentence), 'cpu' (an hour on 2 cores), 'smoke'.
    """
    trunk = TransformerConfig(
        num_layers=12,
        d_model=768,
        num_heads=12,
        d_ff=3072,
        max_len=0,
        positions="learned",
        norm_position="post",
        norm_eps=1e-12,
        ffn="gelu",
        init="normal",
        dropout=0.1,
        attention_dropout=0.1,
    )
    config = ExperimentConfig(
        model=EncoderConfig(trunk, vocab_size=30_522),
        task=PretrainingConfig(),
        data=MaskedLMConfig(
            source="classic_books",
            test_split="validation",
            max_len=512,
            batch_size=256,
            tokenizer=TokenizerConfig(kind="wordpiece", lowercase=True),
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=1e-4,
            schedule="linear",
            warmup_steps=10_000,
            b2=0.999,
            eps=1e-6,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        evaluation=EvaluationConfig(every=5000, metrics=()),
        checkpoint=CheckpointConfig(every=1000),
        steps=100_000,
    )
    return vary(config, VARIANTS, variant)
