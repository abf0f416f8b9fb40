"""The Transformer of Vaswani et al. 2017 on WMT 2014 English-German, base and big.

    python train.py --config=configs/transformer_wmt14.py:base --workdir=DIR
    python train.py --config=configs/transformer_wmt14.py:big --workdir=DIR --dry_run

The corpus is TFDS wmt14_translate/de-en; preparing it needs a network and
pip install 'triform[tensorflow]'. Not trained by us. The paper (tables 2 and 3): base
65 M parameters, BLEU 27.3 on newstest2014 (tokenised, case-sensitive, compound
splitting, which scores a little higher than sacreBLEU); big 213 M, 28.4; 8 P100.
Ours count 63,082,496 and 214,245,376 parameters: the paper does not say how it counts.
"""

from triform.configs.schema import ExperimentConfig
from triform.data.datasets import Seq2SeqConfig
from triform.models import EncoderDecoderConfig
from triform.models.config import TransformerConfig
from triform.models.decode import DecodeConfig
from triform.runtime.checkpoint import CheckpointConfig
from triform.runtime.optim import OptimConfig
from triform.scores.text import EvaluationConfig
from triform.tasks import TokenPredictionConfig


def get_config(variant: str = "base") -> ExperimentConfig:
    """Variants: 'base', 'big', 'smoke' (base cut to seconds, on CLDR phrases)."""
    trunk = TransformerConfig(
        num_layers=6, d_model=512, num_heads=8, d_ff=2048, max_len=256, dropout=0.1
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
        # 5.3; eq. 3 at its peak is (d_model * warmup_steps) ** -0.5.
        optim=OptimConfig(learning_rate=6.988e-4, warmup_steps=4000),
        decode=DecodeConfig(beam_size=4, length_penalty=0.6),  # 6.1
        evaluation=EvaluationConfig(
            every=5000,
            metrics=("bleu", "bleu_moses", "chrf"),
            language="de",
            average=5,  # 6.1; big: 20
        ),
        # The paper saves every 10 minutes, about 1,500 steps of base on its machine.
        checkpoint=CheckpointConfig(every=1000, metric="eval/bleu", mode="max"),
        steps=100_000,
    )
    if variant == "big":
        trunk.d_model, trunk.num_heads, trunk.d_ff = 1024, 16, 4096
        trunk.dropout = 0.3
        config.optim.learning_rate = 4.941e-4
        config.evaluation.average = config.checkpoint.keep_newest = 20
        config.steps = 300_000
    elif variant == "smoke":
        trunk.num_layers, trunk.d_model, trunk.num_heads, trunk.d_ff = 2, 16, 2, 32
        trunk.max_len = config.data.max_len = 64
        config.model.vocab_size = 400
        config.data.source, config.data.train_split = "cldr", "validation"
        config.data.batch_size, config.data.buckets = 8, ()
        config.steps, config.log_every = 4, 2
        config.evaluation.every = config.checkpoint.every = 2
        config.evaluation.examples, config.evaluation.average = 8, 2
    elif variant != "base":
        raise ValueError(f"variant {variant!r}: expected 'base', 'big' or 'smoke'")
    return config
