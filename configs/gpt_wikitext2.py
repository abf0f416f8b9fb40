"""GPT with subwords on WikiText-2.

    python train.py --config=configs/gpt_wikitext2.py:cpu --workdir=DIR

The perplexity is a word's: exp(all nats of the validation text / its 217,646 words, one
<eos> a line among them), so that models with other tokens compare. The nats include the
end of every article. Each token is predicted once; all but the first of the text see at
least max_len - eval_stride tokens before them. Nothing else was trained on.

Measured on 2 cores of an AMD EPYC beside other jobs: `cpu`, 1,500 steps in 16 min
9 s (about one pass over the training text), 19 min 13 s of CPU time: 321.4 a word on
the validation split (44.1 a token, of 4,000), and it was still falling. The full recipe
has not been run.
"""

from triform.configs.schema import ExperimentConfig
from triform.data.datasets import CausalLMConfig
from triform.models import LanguageModelConfig
from triform.models.config import TransformerConfig
from triform.models.decode import DecodeConfig
from triform.runtime.checkpoint import CheckpointConfig
from triform.runtime.optim import OptimConfig
from triform.scores.text import EvaluationConfig
from triform.tasks import TokenPredictionConfig


def get_config(variant: str = "") -> ExperimentConfig:
    """Variants: '' (for an accelerator), 'cpu' (for 2 cores), 'smoke'."""
    trunk = TransformerConfig(
        num_layers=8,
        d_model=512,
        num_heads=8,
        d_ff=2048,
        max_len=256,
        positions="rotary",
        norm="rms",
        norm_position="pre",
        ffn="swiglu",
        bias="none",
        init="depth",
        dropout=0.3,
    )
    config = ExperimentConfig(
        model=LanguageModelConfig(trunk, vocab_size=8000),
        task=TokenPredictionConfig(label_smoothing=0.0),
        data=CausalLMConfig(
            source="wikitext2",
            test_split="validation",
            max_len=256,
            batch_size=32,
            eval_stride=64,
        ),
        optim=OptimConfig(
            name="adamw",
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=200,
            floor=0.1,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        decode=DecodeConfig(method="sample", top_p=0.9),
        evaluation=EvaluationConfig(every=1000, metrics=()),
        checkpoint=CheckpointConfig(
            every=500, keep_newest=2, metric="eval/word_perplexity"
        ),
        steps=10_000,
    )
    if variant == "cpu":
        trunk.num_layers, trunk.d_model, trunk.num_heads, trunk.d_ff = 4, 192, 6, 512
        trunk.max_len = config.data.max_len = 128
        trunk.dropout = 0.1
        config.model.vocab_size = 4000
        config.data.batch_size, config.data.eval_stride = 16, 64
        config.optim.learning_rate = 2e-3
        config.evaluation.every = config.checkpoint.every = 750
        config.steps = 1500
    elif variant == "smoke":
        trunk.num_layers, trunk.d_model, trunk.num_heads, trunk.d_ff = 2, 16, 2, 32
        trunk.max_len = config.data.max_len = 32
        config.model.vocab_size = 400
        config.data.train_split = config.data.eval_split = "validation[:2]"
        config.data.test_split = "validation[:2]"
        config.data.batch_size, config.data.eval_stride = 128, 0
        config.steps, config.log_every = 4, 2
        config.evaluation.every = config.checkpoint.every = 2
    elif variant:
        raise ValueError(f"variant {variant!r}: expected '', 'cpu' or 'smoke'")
    return config
