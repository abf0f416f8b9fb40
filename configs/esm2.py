"""ESM-2 in its published sizes (Lin et al. 2023), on FASTA files of your own.

    python train.py --config=configs/esm2.py:8m --workdir=DIR \
        --config.data.source=uniref50.fasta
    python train.py --config=configs/esm2.py:650m --workdir=DIR --dry_run

Shapes are the published ones. Batches have 2 million tokens, sequences are truncated to
1,024, and the learning rates roughly follow the paper. Counted and dry-run only:
7,512,353 parameters (8m), 33,501,153 (35m), 148,139,553 (150m), 651,042,593 (650m),
2,839,004,193 (3b) and 15,129,098,273 (15b). These counts equal those of transformers'
EsmForMaskedLM without its contact head, which this model does not have.

`python -m triform.interop` imports and exports published weights.
"""

from typing import Any

from triform.configs.schema import (
    CheckpointConfig,
    EvaluationConfig,
    ExperimentConfig,
    MaskedLMConfig,
    OptimConfig,
    TokenizerConfig,
    TokenPredictionConfig,
    TransformerConfig,
    smoke,
    vary,
)
from triform.models import ProteinConfig


def size(layers: int, width: int, heads: int) -> dict[str, Any]:
    """A variant; those of more than 12 layers are scanned and recomputed."""
    deep = layers > 12
    shape = {"num_layers": layers, "d_model": width, "num_heads": heads}
    return {
        "model.trunk": {
            **shape,
            "d_ff": 4 * width,
            "remat": deep,
            "scan_layers": deep,
        }
    }


VARIANTS = {
    "8m": size(6, 320, 20),
    "35m": size(12, 480, 20),
    "150m": size(30, 640, 20),
    "650m": size(33, 1280, 20),
    "3b": size(36, 2560, 40),
    "15b": (
        size(48, 5120, 40),
        {"optim.weight_decay": 0.1, "data.batch_size": 3072, "steps": 270_000},
    ),
    "smoke": smoke,
}


def get_config(variant: str = "8m") -> ExperimentConfig:
    """Variants: '8m', '35m', '150m', '650m', '3b', '15b', 'smoke'."""
    trunk = TransformerConfig(
        max_len=0,
        positions="rotary",
        norm_position="pre",
        norm_eps=1e-5,
        ffn="gelu",
        init="normal",
        dropout=0.0,
        attention="flash",
        dtype="bfloat16",
    )
    config = ExperimentConfig(
        model=ProteinConfig(trunk, num_labels=0),
        task=TokenPredictionConfig(label_smoothing=0.0),
        data=MaskedLMConfig(
            source="flip_ss3",
            text="sequence",
            next_sentence=False,
            short_rate=0.0,
            max_len=1024,
            batch_size=2048,
            buckets=(128, 256, 512),
            tokenizer=TokenizerConfig(kind="residues"),
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=4e-4,
            schedule="linear",
            warmup_steps=2000,
            floor=0.1,
            b2=0.98,
            eps=1e-8,
            weight_decay=0.01,
        ),
        evaluation=EvaluationConfig(every=5000, metrics=()),
        checkpoint=CheckpointConfig(every=1000),
        steps=500_000,
    )
    return vary(config, VARIANTS, variant)
