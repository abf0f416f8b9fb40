"""GPT with subwords on WikiText-2.

    python train.py --config=configs/gpt_wikitext2.py:cpu --workdir=DIR

Perplexity is per word: exp(nats of the validation text / its 217,646 words, including
one <eos> per line). So models with different tokens can be compared. The nats include
the end of every article. Each token is predicted once, with at least max_len -
eval_stride tokens before it, except at the beginning of the text. No other text was
used for training.

Measured on 2 cores of an AMD EPYC beside other jobs: `cpu` ran 1,500 steps in 16 min 9
s (about one pass over the training text), 19 min 13 s of CPU time. Its perplexity on
the validation split was 321.4 per word (44.1 per token, with 4,000 tokens), still
falling. The full recipe was not run.
"""

import functools

from triform.configs.schema import (
    CausalLMConfig,
    CheckpointConfig,
    DecodeConfig,
    EvaluationConfig,
    ExperimentConfig,
    LanguageModelConfig,
    OptimConfig,
    TokenPredictionConfig,
    TransformerConfig,
    smoke,
    vary,
)

VARIANTS = {
    "": {},
    "cpu": {
        "model.trunk": {
            "num_layers": 4,
            "d_model": 192,
            "num_heads": 6,
            "d_ff": 512,
            "dropout": 0.1,
        },
        "model.vocab_size": 4000,
        "data": {"max_len": 128, "batch_size": 16},
        "optim.learning_rate": 2e-3,
        "evaluation.every": 750,
        "checkpoint.every": 750,
        "steps": 1500,
    },
    "smoke": functools.partial(smoke, split="validation[:2]"),
}


def get_config(variant: str = "") -> ExperimentConfig:
    """Variants: '' (for an accelerator), 'cpu' (for 2 cores), 'smoke'."""
    trunk = TransformerConfig(
        num_layers=8,
        d_model=512,
        num_heads=8,
        d_ff=2048,
        max_len=0,
        positions="rotary",
        norm="rms",
        norm_position="pre",
        ffn="swiglu",
        bias="none",
        init="depth",
        dropout=0.3,
    )
    config = ExperimentConfig(
        model=LanguageModelConfig(trunk, vocab_size=8000),
        task=TokenPredictionConfig(label_smoothing=0.0),
        data=CausalLMConfig(
            source="wikitext2",
            test_split="validation",
            max_len=256,
            batch_size=32,
            eval_stride=64,
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=200,
            floor=0.1,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        decode=DecodeConfig(method="sample", top_p=0.9),
        evaluation=EvaluationConfig(every=1000, metrics=()),
        checkpoint=CheckpointConfig(
            every=500, keep_newest=2, metric="eval/word_perplexity"
        ),
        steps=10_000,
    )
    return vary(config, VARIANTS, variant)
