"""A GPT on your own text.

    python train.py --config=configs/my_text.py --workdir=DIR --config.data.source=TEXT
    python generate.py --workdir=DIR --input="The"

TEXT is a folder of .txt files, a file, a pattern such as 'notes/*.md', or a table
(.jsonl, .csv, .tsv, .parquet, also .gz, .xz, .zst) with --config.data.text=COLUMN. 5 %
are held out to choose the checkpoint and 5 % for the test, unless files with the names
of these splits exist.

To start from another workdir, for example imported weights (`:lora` then trains only
adapters): --config.model=from:WEIGHTS --config.init_from=WEIGHTS
"""

from triform.configs import schema

VARIANTS = {
    "": {},
    "lora": schema.adapters(),
    "smoke": lambda config: schema.smoke(config, split="all"),
}


def get_config(variant: str = "") -> schema.ExperimentConfig:
    """Variants: '' (minutes on 2 cores), 'lora' (trains adapters), 'smoke'."""
    trunk = schema.TransformerConfig(num_layers=4, d_model=192, num_heads=6, d_ff=768)
    trunk.max_len, trunk.positions, trunk.norm_position = 0, "learned", "pre"
    config = schema.ExperimentConfig(
        model=schema.LanguageModelConfig(trunk, vocab_size=4000),
        task=schema.TokenPredictionConfig(label_smoothing=0.0),
        data=schema.CausalLMConfig(
            source="./my_text", txt_example="passage", max_len=128, batch_size=16
        ),
        optim=schema.OptimConfig(
            "adamw", 2e-3, "cosine", warmup_steps=100, clip_norm=1.0
        ),
        decode=schema.DecodeConfig(method="sample"),
        evaluation=schema.EvaluationConfig(every=500, metrics=()),
        checkpoint=schema.CheckpointConfig(every=500),
        steps=2000,
    )
    return schema.vary(config, VARIANTS, variant)
