"""A run that takes a second, with all that must be restored when it is resumed."""

import pathlib

import kill_harness

from triform.configs import schema


def config(folder: pathlib.Path, steps: int, every: int) -> schema.ExperimentConfig:
    """Dropout, accumulation and a moving average, on a corpus written to `folder`."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        kill_harness.write_corpus(corpus)
    trunk = schema.TransformerConfig(num_layers=1, d_model=16, num_heads=2, d_ff=32)
    trunk.max_len, trunk.dropout = 16, 0.1
    return schema.ExperimentConfig(
        model=schema.LanguageModelConfig(trunk, vocab_size=259),
        data=schema.CausalLMConfig(
            source=str(corpus),
            max_len=16,
            batch_size=8,
            tokenizer=schema.TokenizerConfig(kind="bytes"),
        ),
        optim=schema.OptimConfig("adamw", warmup_steps=2, accumulate=2, ema_decay=0.9),
        evaluation=schema.EvaluationConfig(every=3, examples=8, metrics=()),
        checkpoint=schema.CheckpointConfig(every=every, keep_newest=9),
        log_every=2,
        steps=steps,
    )
