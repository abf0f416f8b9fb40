"""A translator of your own pairs of texts.

    python train.py --config=configs/my_pairs.py --workdir=DIR \
        --config.data.source=train.en,train.de
    python generate.py --workdir=DIR --input="How are you?"

Two files whose lines belong together; their suffixes name the columns that are read:
--config.data.inputs=en --config.data.targets=de. Or a table (.csv, .tsv, .jsonl,
.parquet) with such columns. 5 % are held out to choose the checkpoint, and 5 % to test
it, unless there are files of such names: train.en,train.de,test.en,test.de

To start from a workdir with other weights, imported ones say, and with `:lora` train
adapters only: --config.model=from:WEIGHTS --config.init_from=WEIGHTS
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
