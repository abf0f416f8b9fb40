"""A classifier of your own texts.

    python train.py --config=configs/my_labels.py --workdir=DIR \
        --config.data.source=TABLE
    python generate.py --workdir=DIR --input="What is this?"

TABLE is a .csv, .tsv, .jsonl or .parquet with the columns text and label (names or
numbers), a folder of such files, or several separated by commas. For other column
names: --config.data.first=COLUMN --config.data.label=COLUMN; for two texts:
--config.data.second. 5 % are held out to choose the checkpoint and 5 % for the test,
unless files with the names of these splits exist.

To start from another workdir, for example imported weights (`:lora` then trains only
adapters): --config.model=from:WEIGHTS --config.init_from=WEIGHTS
"""

from triform.configs import schema

VARIANTS = {
    "": {},
    "lora": schema.adapters(".*label_head/.*", ".*pooler/.*"),
    "smoke": lambda config: schema.smoke(config, split="all"),
}


def get_config(variant: str = "") -> schema.ExperimentConfig:
    """Variants: '' (minutes on 2 cores), 'lora' (trains adapters), 'smoke'."""
    trunk = schema.TransformerConfig(num_layers=2, d_model=128, num_heads=4, d_ff=512)
    trunk.max_len, trunk.positions, trunk.ffn = 0, "learned", "gelu"
    config = schema.ExperimentConfig(
        model=schema.EncoderConfig(trunk, 4000, num_labels=-1, masked_head=False),
        task=schema.ClassificationConfig(),
        data=schema.SequenceClassificationConfig(
            source="my_labels.csv", max_len=64, batch_size=32, truncate=True
        ),
        optim=schema.OptimConfig(
            "adamw", 1e-3, "linear", warmup_steps=50, clip_norm=1.0
        ),
        evaluation=schema.EvaluationConfig(every=300, metrics=()),
        checkpoint=schema.CheckpointConfig(300, metric="eval/accuracy", mode="max"),
        steps=900,
    )
    return schema.vary(config, VARIANTS, variant)
