"""A translator of your own pairs of texts.

    python train.py --config=configs/my_pairs.py --workdir=DIR \
        --config.data.source=train.en,train.de
    python generate.py --workdir=DIR --input="How are you?"

The source is two line-aligned files; their suffixes name the columns:
--config.data.inputs=en --config.data.targets=de. Or it is a table (.csv, .tsv, .jsonl,
.parquet) with these columns. 5 % are held out to choose the checkpoint and 5 % for the
test, unless files with the names of these splits exist:
train.en,train.de,test.en,test.de

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
    trunk = schema.TransformerConfig(num_layers=3, d_model=128, num_heads=4, d_ff=512)
    trunk.max_len, trunk.norm_position = 0, "pre"
    config = schema.ExperimentConfig(
        model=schema.EncoderDecoderConfig(trunk, vocab_size=4000),
        data=schema.Seq2SeqConfig(
            source="train.en,train.de", max_len=64, batch_size=32, buckets=(24,)
        ),
        optim=schema.OptimConfig(learning_rate=2e-3, warmup_steps=400),
        decode=schema.DecodeConfig(method="greedy"),
        evaluation=schema.EvaluationConfig(every=1000, examples=200),
        checkpoint=schema.CheckpointConfig(1000, metric="eval/bleu", mode="max"),
        steps=4000,
    )
    return schema.vary(config, VARIANTS, variant)
