"""The polarity of whole film reviews, read byte by byte, up to 4,096 of them.

    python train.py --config=configs/movie_reviews_bytes.py --workdir=DIR \
        --config.model.trunk.attention=flash

The task of the Long Range Arena's "Text" (Tay et al. 2021) on a corpus that is small
and free: 1,600 reviews to train on, where theirs, of IMDb, are 25,000. The shape is
theirs (google-research/long-range-arena, text_classification/configs/
base_tc_config.py, with the paper's length): 4 layers of width 256, 4 heads; so are
batches and optimiser, for as many epochs, 26, with as large a share of warm-up. What
differs: positions are learned, attention weights are not dropped, so that every
algorithm of attention trains alike, and the head is BERT's pooler. They report 64.27 %
on IMDb. This recipe was not run.

Longformer: attention=local with --config.model.trunk.windows="(256,)" and
--config.data.global_tokens=first. Performer: attention=performer.

On 2 cores bytes have to become words first, on rows that are short:

    python train.py --config=configs/movie_reviews_bytes.py:pretrain --workdir=A
    python train.py --config=configs/movie_reviews_bytes.py:sentences --workdir=B \
        --config.init_from=A
    python train.py --config=configs/movie_reviews_bytes.py:cpu --workdir=C \
        --config.init_from=B --config.model.trunk.attention=local \
        --config.model.trunk.windows="(256,)" --config.data.global_tokens=first

Measured on 2 cores of an AMD EPYC, one seed: 1.071 nats a masked byte of the test
reviews after 54 minutes on one of the cores; 66.6 % of mr_sentiment's test sentences
right after 15 minutes. Then one epoch of reviews, by the checkpoint that is best on
validation; a step is 4 reviews, memory the process's peak:

                 validation    test    a step    memory    minutes
    local            79.0 %    71.0 %    0.95 s    2.5 GB      8
    flash            72.5      66.0      1.6       1.9        16
    performer        56.5      57.0      0.8       2.2         7
    dot              65.5        -       2.9       6.9         -

dot was stopped after its first evaluation, at step 100: accuracy and losses are flash's
to four digits. Of 200 reviews each, a standard error is 3 points. Nothing before this
step saw bytes more than 270 apart; local goes on so. Performer is not clearly above
chance: it starts from weights of exact softmax, its loss over the first 100 steps is
1.03 where local's is 0.66, and 300 steps of `sentences` with it stayed at chance too.
From scratch, and without `sentences`, reviews cut to 1,024 bytes were at chance after
two epochs of dot that read the first token, and of flash in windows of 64 that read the
mean (from `pretrain`). Naive Bayes on the words of these bytes, with one added
to all counts, has 78.5 % of validation and 83.5 % of test; of whole reviews 79.0 % and
87.5 %.
"""

from triform.configs.schema import ExperimentConfig
from triform.data.codecs.text import TokenizerConfig
from triform.data.datasets import MaskedLMConfig, SequenceClassificationConfig
from triform.models import EncoderConfig
from triform.models.config import TransformerConfig
from triform.runtime.checkpoint import CheckpointConfig
from triform.runtime.optim import OptimConfig
from triform.scores.text import EvaluationConfig
from triform.tasks import ClassificationConfig, TokenPredictionConfig

STAGES = ("pretrain", "sentences", "cpu")


def get_config(variant: str = "") -> ExperimentConfig:
    """Variants: '' (for an accelerator), 'pretrain', 'sentences' and 'cpu' (one after
    another, for 2 cores), 'smoke'.
    """
    trunk = TransformerConfig(
        num_layers=4,
        d_model=256,
        num_heads=4,
        d_ff=1024,
        max_len=4096,
        positions="learned",
        norm_position="pre",
        ffn="gelu_tanh",
        dropout=0.1,
    )
    config = ExperimentConfig(
        # 256 bytes, and pad, end, unknown, [CLS] and [SEP].
        model=EncoderConfig(
            trunk, vocab_size=261, num_types=0, masked_head=False, num_labels=2
        ),
        task=ClassificationConfig(),
        data=SequenceClassificationConfig(
            source="movie_reviews",
            first="text",
            label="label",
            cut=True,
            max_len=4096,
            batch_size=32,
            tokenizer=TokenizerConfig(kind="bytes"),
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=0.05 / 8000**0.5,
            schedule="rsqrt",
            warmup_steps=520,
            weight_decay=0.1,
        ),
        evaluation=EvaluationConfig(every=100, metrics=()),
        checkpoint=CheckpointConfig(every=100, metric="eval/accuracy", mode="max"),
        steps=1300,
    )
    if variant in STAGES:
        _stage(config, variant)
    elif variant == "smoke":
        trunk.num_layers, trunk.d_model, trunk.num_heads, trunk.d_ff = 2, 16, 2, 32
        trunk.max_len = config.data.max_len = 32
        # Of a fold, 100 negative reviews come before the positive ones.
        config.data.train_split = config.data.eval_split = "validation[50:150]"
        config.data.test_split = "validation[50:150]"
        config.steps, config.log_every = 4, 2
        config.evaluation.every = config.checkpoint.every = 2
    elif variant:
        raise ValueError(
            f"variant {variant!r}: expected '', {', '.join(map(repr, STAGES))} or "
            "'smoke'"
        )
    return config


def _stage(config: ExperimentConfig, variant: str) -> None:
    """Makes it one of the three steps for 2 cores, of one small model."""
    trunk = config.model.trunk
    trunk.num_layers, trunk.d_model, trunk.d_ff = 2, 128, 512
    trunk.num_heads, trunk.head_dim = 1, 64
    trunk.positions, trunk.dropout = "rotary", 0.0
    config.model.vocab_size, config.model.pool = 262, "mean"  # and [MASK]
    config.optim.schedule, config.optim.learning_rate = "linear", 2e-4
    config.optim.warmup_steps, config.optim.weight_decay = 20, 0.01
    config.optim.b2, config.optim.clip_norm = 0.98, 1.0
    config.data.batch_size, config.steps = 4, 400
    if variant == "pretrain":
        config.model.masked_head, config.model.num_labels = True, 0
        config.task = TokenPredictionConfig(label_smoothing=0.0)
        trunk.max_len = 256
        config.data = MaskedLMConfig(
            source="movie_reviews",
            next_sentence=False,
            short_rate=0.0,
            max_len=256,
            batch_size=32,
            tokenizer=TokenizerConfig(kind="bytes"),
        )
        config.optim.learning_rate, config.optim.warmup_steps = 3e-3, 200
        config.optim.weight_decay = 0.1
        config.evaluation.every = config.checkpoint.every = 500
        config.checkpoint.metric, config.checkpoint.mode = "eval/loss", "min"
        config.steps = 6000
    elif variant == "sentences":
        config.data.source = "mr_sentiment"
        trunk.max_len = config.data.max_len = 288  # none is longer
        config.data.buckets, config.data.batch_size = (96, 160), 32
        trunk.dropout = 0.1
        config.optim.learning_rate, config.optim.warmup_steps = 5e-4, 100
        config.evaluation.every = config.checkpoint.every = 250
        config.steps = 2500
