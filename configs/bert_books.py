"""BERT pre-trained on public-domain books: masked tokens and next sentence.

    python train.py --config=configs/bert_books.py:cpu --workdir=DIR
    python train.py --config=configs/bert_finetune.py:clinc150 --config.init_from=DIR \
        --workdir=DIR2

The `cpu` variant, measured on 2 cores of an AMD EPYC beside other jobs: 3,000 steps of
64 rows in 52 minutes, 51 minutes of CPU time; on the three held-out books 28.4 % of the
masked tokens and 70.3 % of the next sentences right, 4.35 nats a masked token. A second
run gave the same digits. With --config.steps=16000 on an H200 (checkpoints and
evaluations every 4,000): 35.6 % and 79.5 %, 3.69 nats. `base`, `large` and `roberta`
were dry-run only.
"""

from triform.configs.schema import ExperimentConfig
from triform.data.codecs.text import TokenizerConfig
from triform.data.datasets import MaskedLMConfig
from triform.models import EncoderConfig
from triform.models.config import TransformerConfig
from triform.runtime.checkpoint import CheckpointConfig
from triform.runtime.optim import OptimConfig
from triform.scores.text import EvaluationConfig
from triform.tasks import PretrainingConfig, TokenPredictionConfig


def get_config(variant: str = "base") -> ExperimentConfig:
    """Variants: 'base', 'large', 'roberta' (whole words, no second sentence), 'cpu'
    (an hour on 2 cores), 'smoke'.
    """
    trunk = TransformerConfig(
        num_layers=12,
        d_model=768,
        num_heads=12,
        d_ff=3072,
        max_len=512,
        positions="learned",
        norm_position="post",
        norm_eps=1e-12,
        ffn="gelu",
        init="normal",
        dropout=0.1,
        attention_dropout=0.1,
    )
    config = ExperimentConfig(
        model=EncoderConfig(trunk, vocab_size=30_522),
        task=PretrainingConfig(),
        data=MaskedLMConfig(
            source="classic_books",
            test_split="validation",
            max_len=512,
            batch_size=256,
            tokenizer=TokenizerConfig(kind="wordpiece", lowercase=True),
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=1e-4,
            schedule="linear",
            warmup_steps=10_000,
            b2=0.999,
            eps=1e-6,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        evaluation=EvaluationConfig(every=5000, metrics=()),
        checkpoint=CheckpointConfig(every=1000),
        steps=100_000,
    )
    if variant == "large":
        trunk.num_layers, trunk.d_model, trunk.num_heads = 24, 1024, 16
        trunk.d_ff, trunk.remat, trunk.scan_layers = 4096, True, True
    elif variant == "roberta":
        config.model.num_types = config.model.num_labels = 0
        config.task = TokenPredictionConfig(label_smoothing=0.0)
        config.data.next_sentence, config.data.whole_word = False, True
        config.optim.b2, config.optim.learning_rate = 0.98, 6e-4
    elif variant == "cpu":
        trunk.num_layers, trunk.d_model, trunk.num_heads, trunk.d_ff = 4, 192, 6, 768
        trunk.max_len = config.data.max_len = 64
        trunk.norm_position = "pre"
        trunk.dropout = trunk.attention_dropout = 0.0
        config.model.vocab_size = 8000
        config.data.batch_size = 64
        config.optim.learning_rate, config.optim.warmup_steps = 1.5e-3, 300
        config.optim.b2 = 0.98
        config.evaluation.every, config.checkpoint.every = 1000, 250
        config.steps = 3000
    elif variant == "smoke":
        trunk.num_layers, trunk.d_model, trunk.num_heads, trunk.d_ff = 2, 16, 2, 32
        trunk.max_len = config.data.max_len = 32
        config.model.vocab_size = 1000
        config.data.train_split = config.data.eval_split = "validation[:2]"
        config.data.test_split = "validation[:2]"
        config.data.batch_size = 256
        config.steps, config.log_every = 4, 2
        config.evaluation.every = config.checkpoint.every = 2
    elif variant != "base":
        raise ValueError(
            f"variant {variant!r}: expected 'base', 'large', 'roberta', 'cpu' or "
            "'smoke'"
        )
    return config
