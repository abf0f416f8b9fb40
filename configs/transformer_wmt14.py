"""The Transformer of Vaswani et al. 2017 on WMT 2014 English-German, base and big.

    python train.py --config=configs/transformer_wmt14.py:base --workdir=DIR
    python train.py --config=configs/transformer_wmt14.py:big --workdir=DIR --dry_run

The corpus is TFDS wmt14_translate/de-en; preparing it needs a network and pip install
'triform[tensorflow]'. We did not train on it. The paper (tables 2 and 3) reports for
base 65 M parameters and BLEU 27.3 on newstest2014 (tokenised, case-sensitive, compound
splitting, which scores a little higher than sacreBLEU); for big 213 M and 28.4; 8 P100.
Our models have 63,082,496 and 214,245,376 parameters; the paper does not say how it
counts.
"""

from triform.configs.schema import (
    CheckpointConfig,
    DecodeConfig,
    EncoderDecoderConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimConfig,
    Seq2SeqConfig,
    TokenPredictionConfig,
    TransformerConfig,
    smoke,
    vary,
)

WARMUP = 4000
VARIANTS = {
    "base": {},
    "big": {
        "model.trunk": {"d_model": 1024, "num_heads": 16, "d_ff": 4096, "dropout": 0.3},
        "optim.learning_rate": (1024 * WARMUP) ** -0.5,
        "evaluation.average": 20,  # 6.1
        "checkpoint.keep_newest": 20,
        "steps": 300_000,
    },
    "smoke": ({"data.source": "cldr"}, smoke),
}


def get_config(variant: str = "base") -> ExperimentConfig:
    """Variants: 'base', 'big', 'smoke' (base made tiny, on CLDR phrases)."""
    trunk = TransformerConfig(
        num_layers=6, d_model=512, num_heads=8, d_ff=2048, max_len=0, dropout=0.1
    )
    config = ExperimentConfig(
        model=EncoderDecoderConfig(trunk, vocab_size=37_000),  # 5.1
        task=TokenPredictionConfig(label_smoothing=0.1),  # 5.4
        data=Seq2SeqConfig(
            source="wmt14_translate/de-en",
            max_len=256,
            batch_size=100,  # about 25,000 source and 25,000 target tokens (5.1)
            buckets=(16, 32, 48, 64, 96, 128),
            drop_empty=True,
        ),
        # 5.3, the peak of eq. 3.
        optim=OptimConfig(learning_rate=(512 * WARMUP) ** -0.5, warmup_steps=WARMUP),
        decode=DecodeConfig(beam_size=4, length_penalty=0.6),  # 6.1
        evaluation=EvaluationConfig(
            every=5000,
            metrics=("bleu", "bleu_moses", "chrf"),
            language="de",
            average=5,  # 6.1
        ),
        # The paper saves every 10 minutes, about 1,500 steps of base on its machine.
        checkpoint=CheckpointConfig(every=1000, metric="eval/bleu", mode="max"),
        steps=100_000,
    )
    return vary(config, VARIANTS, variant)
