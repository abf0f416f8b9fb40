"""A pre-trained encoder on sentences: 150 intents, or the polarity of film reviews.

    python train.py --config=configs/bert_finetune.py:clinc150 --workdir=DIR \
        --config.init_from=PRETRAINED

PRETRAINED is a workdir of configs/bert_books.py:cpu. Without init_from, the same model
starts from scratch; --config.data.tokenizer.path=PRETRAINED/tokenizer.json then gives
it the same tokens.

Measured on 2 cores of an AMD EPYC beside other jobs: test accuracy, mean and standard
deviation over 5 seeds. The pre-trained model had 3,000 steps of bert_books.py:cpu:

    clinc150        pre-trained 79.6 +- 1.6 %    from scratch 76.4 +- 5.2 %
    mr_sentiment    pre-trained 72.9 +- 1.0 %    from scratch 74.7 +- 1.0 %

`probe` was not run. The table was made with sweep.py:

    python sweep.py --config=configs/bert_finetune.py:clinc150 --workdir=DIR \
        --sweep=init_from=PRETRAINED, --sweep=seed=0,1,2,3,4 \
        --config.data.tokenizer.path=PRETRAINED/tokenizer.json
"""

from triform.configs import bert_books
from triform.configs.schema import (
    CheckpointConfig,
    ClassificationConfig,
    EvaluationConfig,
    ExperimentConfig,
    LoRAConfig,
    OptimConfig,
    SequenceClassificationConfig,
    TokenizerConfig,
    smoke,
    vary,
)


def _add_adapters(config: ExperimentConfig) -> None:
    """Queries and values get LoRA of rank 8 (Hu et al. 2022)."""
    config.model = LoRAConfig(config.model, rank=8, alpha=16.0)


VARIANTS = {
    "clinc150": {},
    "mr_sentiment": {
        "model.num_labels": 2,
        "data": {
            "source": "mr_sentiment",
            "label": "label",
            "max_len": 64,
            "batch_size": 32,
            "buckets": (32,),
        },
        "optim.learning_rate": 3e-4,
    },
    "lora": (
        _add_adapters,
        {"optim": {"train": (".*lora_[ab]", ".*label_head/.*", ".*pooler/.*")}},
    ),
    "probe": {"optim": {"train": (".*label_head/.*",), "learning_rate": 1e-2}},
    # As in bert_books:smoke; transformers has BERT with norms in this order only.
    "smoke": (smoke, {"model.trunk.norm_position": "post"}),
}


def get_config(variant: str = "clinc150") -> ExperimentConfig:
    """Variants: 'clinc150', 'mr_sentiment', and of clinc150 'lora' (trains adapters and
    the classifier) and 'probe' (trains the classifier only); 'smoke'.
    """
    model = bert_books.get_config("cpu").model
    model.masked_head, model.num_labels = False, 150
    model.trunk.max_len, model.trunk.dropout = 64, 0.1  # as many positions as before
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
    return vary(config, VARIANTS, variant)
