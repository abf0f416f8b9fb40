"""A pre-trained encoder on sentences: 150 intents, or the polarity of film reviews.

    python train.py --config=configs/bert_finetune.py:clinc150 --workdir=DIR \
        --config.init_from=PRETRAINED

PRETRAINED is a workdir of configs/bert_books.py:cpu. Without init_from the same model
starts from scratch; --config.data.tokenizer.path=PRETRAINED/tokenizer.json gives it the
same tokens.

Measured on 2 cores of an AMD EPYC beside other jobs, 5 seeds each, test accuracy, mean
and standard deviation; pre-trained are 3,000 steps of bert_books.py:cpu:

    clinc150        pre-trained 79.6 +- 1.6 %    from scratch 76.4 +- 5.2 %
    mr_sentiment    pre-trained 72.9 +- 1.0 %    from scratch 74.7 +- 1.0 %

By sweep.py:

    python sweep.py --config=configs/bert_finetune.py:clinc150 --workdir=DIR \
        --sweep=init_from=PRETRAINED, --sweep=seed=0,1,2,3,4 \
        --config.data.tokenizer.path=PRETRAINED/tokenizer.json
"""

from triform.configs import bert_books
from triform.configs.schema import ExperimentConfig
from triform.data.codecs.text import TokenizerConfig
from triform.data.datasets import SequenceClassificationConfig
from triform.runtime.checkpoint import CheckpointConfig
from triform.runtime.optim import OptimConfig
from triform.scores.text import EvaluationConfig
from triform.tasks import ClassificationConfig


def get_config(variant: str = "clinc150") -> ExperimentConfig:
    """Variants: 'clinc150', 'mr_sentiment', 'smoke'."""
    model = bert_books.get_config("smoke" if variant == "smoke" else "cpu").model
    model.masked_head, model.num_labels = False, 150
    model.trunk.dropout = 0.1
    config = ExperimentConfig(
        model=model,
        task=ClassificationConfig(),
        data=SequenceClassificationConfig(
            source="clinc150",
            first="text",
            label="intent",
            max_len=32,
            batch_size=64,
            buckets=(16,),
            tokenizer=TokenizerConfig(kind="wordpiece", lowercase=True),
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=1e-3,
            schedule="linear",
            warmup_steps=60,
            b2=0.98,
            eps=1e-6,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        evaluation=EvaluationConfig(every=300, metrics=()),
        checkpoint=CheckpointConfig(
            every=300, keep_newest=1, metric="eval/accuracy", mode="max"
        ),
        steps=600,
    )
    if variant == "mr_sentiment":
        config.model.num_labels = 2
        config.data.source, config.data.label = "mr_sentiment", "label"
        config.data.max_len, config.data.batch_size = 64, 32
        config.data.buckets = (32,)
        config.optim.learning_rate = 3e-4
    elif variant == "smoke":
        config.data.train_split = config.data.eval_split = "validation[:100]"
        config.data.test_split = "validation[:100]"
        config.data.batch_size = 32
        config.steps, config.log_every = 4, 2
        config.evaluation.every = config.checkpoint.every = 2
    elif variant != "clinc150":
        raise ValueError(
            f"variant {variant!r}: expected 'clinc150', 'mr_sentiment' or 'smoke'"
        )
    return config
