"""A chat model, trained on your own conversations. More: docs/chat.md.

    python train.py --config=configs/my_chat.py --workdir=DIR \
        --config.data.source=chats.jsonl
    python generate.py --workdir=DIR --chat

A row is {"messages": [{"role": "user", "content": "..."}, ...]}, or has two columns:
--config.data.prompt=question --config.data.response=answer. From imported weights:
--config.model=from:WORKDIR --config.init_from=WORKDIR; `lora` trains only adapters.
"""

from triform.configs import schema


def _lora(config: schema.ExperimentConfig) -> None:
    config.model = schema.LoRAConfig(config.model, rank=8)
    config.optim.train = (".*/lora_[ab]",)


def _smoke(config: schema.ExperimentConfig) -> None:
    schema.smoke(config, split="all")
    config.data.max_len = 128


VARIANTS = {"full": {}, "lora": _lora, "smoke": _smoke}


def get_config(variant: str = "full") -> schema.ExperimentConfig:
    """Variants: 'full', 'lora', 'smoke'."""
    trunk = schema.TransformerConfig(num_layers=6, d_model=384, num_heads=6, d_ff=1024)
    trunk.positions, trunk.norm, trunk.norm_position = "rotary", "rms", "pre"
    trunk.ffn, trunk.bias, trunk.max_len = "swiglu", "none", 0
    config = schema.ExperimentConfig(
        model=schema.LanguageModelConfig(trunk, vocab_size=8000),
        task=schema.TokenPredictionConfig(label_smoothing=0.0),
        data=schema.ConversationsConfig(source="chats.jsonl", max_len=512),
        optim=schema.OptimConfig(warmup_steps=200, clip_norm=1.0),
        decode=schema.DecodeConfig(method="sample", top_p=0.9),
        evaluation=schema.EvaluationConfig(every=500, metrics=()),
        checkpoint=schema.CheckpointConfig(every=500),
        steps=2000,
    )
    return schema.vary(config, VARIANTS, variant)
