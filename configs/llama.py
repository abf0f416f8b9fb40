"""LLaMA-like models: Llama 3.2 1B and Llama 3 8B (Grattafiori et al. 2024).

    python train.py --config=configs/llama.py:8b --workdir=DIR --dry_run

Shapes are the published ones; the text is C4. Counted and dry-run only: 1,235,814,400
and 8,030,261,248 parameters.
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
    RopeConfig,
    TokenPredictionConfig,
    TransformerConfig,
    smoke,
    vary,
)

VARIANTS = {
    "1b": {
        "model.trunk": {"num_layers": 16, "d_model": 2048, "d_ff": 8192},
        "model.tie_head": True,
        # It reaches further than it was first trained for.
        "model.trunk.rope": {"scaling": "llama3", "factor": 32.0, "length": 8192},
    },
    "8b": {},
    "smoke": (
        {"data.source": "wikitext2"},
        functools.partial(smoke, split="validation[:2]"),
    ),
}


def get_config(variant: str = "1b") -> ExperimentConfig:
    """Variants: '1b', '8b', 'smoke'."""
    trunk = TransformerConfig(
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_heads=8,
        d_ff=14_336,
        max_len=0,
        positions="rotary",
        rope=RopeConfig(base=500_000.0),
        norm="rms",
        norm_position="pre",
        norm_eps=1e-5,
        ffn="swiglu",
        bias="none",
        init="depth",
        dropout=0.0,
        dtype="bfloat16",
        remat=True,
        scan_layers=True,
        logit_chunks=8,
    )
    config = ExperimentConfig(
        model=LanguageModelConfig(trunk, vocab_size=128_256, tie_head=False),
        task=TokenPredictionConfig(label_smoothing=0.0, z_loss=1e-4),
        data=CausalLMConfig(
            source="c4/en",
            test_split="validation",
            max_len=8192,
            batch_size=512,
            documents="separate",
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=3e-4,
            schedule="cosine",
            warmup_steps=2000,
            floor=0.1,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        decode=DecodeConfig(method="sample", top_p=0.9),
        evaluation=EvaluationConfig(every=5000, metrics=()),
        checkpoint=CheckpointConfig(every=1000),
        steps=100_000,
    )
    return vary(config, VARIANTS, variant)
