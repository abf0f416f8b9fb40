"""Law 5 for every family and task: meshes, pmap and micro-batches change nothing."""

import jax
import numpy as np
import pytest
from laws import assert_same_update, update

from triform.configs.schema import ExperimentConfig
from triform.data.datasets import (
    CaptionedImagesConfig,
    CausalLMConfig,
    ImageCodesConfig,
    ImagesConfig,
    InteractionsConfig,
    MaskedInteractionsConfig,
    MaskedLMConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
    TokenClassificationConfig,
)
from triform.experiment import Experiment
from triform.models import (
    AutoencoderConfig,
    ContrastiveConfig,
    DiscreteVAEConfig,
    DistillationConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    LanguageModelConfig,
    RecommenderConfig,
    TextToImageConfig,
    VisionConfig,
)
from triform.models.config import TransformerConfig
from triform.runtime.optim import OptimConfig
from triform.runtime.partition import MeshConfig, MeshPlacement
from triform.scores.text import EvaluationConfig
from triform.tasks import (
    AutoencodingConfig,
    ClassificationConfig,
    ImageCodingConfig,
    ItemPredictionConfig,
    LabelDistillationConfig,
    MatchingConfig,
    PretrainingConfig,
    RegressionConfig,
    SampledItemsConfig,
    TextToImagePredictionConfig,
    TokenPredictionConfig,
    TokenRegressionConfig,
)

ROWS, LENGTH, VOCAB = 6, 8, 16
TEXT = {"max_len": LENGTH, "batch_size": ROWS}


def trunk(**fields):
    sizes = {"num_layers": 1, "d_model": 16, "num_heads": 4, "d_ff": 32, "max_len": 8}
    return TransformerConfig(**{**sizes, "dropout": 0.0, **fields})


LLAMA = {"positions": "rotary", "norm": "rms", "ffn": "swiglu", "bias": "none"}
T5 = {"positions": "relative", "norm": "rms", "norm_position": "pre", "bias": "none"}
LEARNED = {"positions": "learned", "ffn": "gelu"}


def classifier(**fields):
    return EncoderConfig(trunk(**LEARNED, **fields), VOCAB, masked_head=False)


# name: (model, task, data)
SYSTEMS = {
    "llama": (
        LanguageModelConfig(trunk(**LLAMA, num_kv_heads=2), VOCAB, tie_head=False),
        TokenPredictionConfig(label_smoothing=0.0),
        CausalLMConfig(**TEXT, documents="separate"),
    ),
    "t5": (
        EncoderDecoderConfig(trunk(**T5), VOCAB, embedding_scale="head"),
        TokenPredictionConfig(),
        Seq2SeqConfig(**TEXT),
    ),
    "bert": (
        EncoderConfig(trunk(**LEARNED), VOCAB),
        PretrainingConfig(),
        MaskedLMConfig(**TEXT),
    ),
    "regression": (
        EncoderConfig(trunk(**LEARNED), VOCAB, masked_head=False, num_labels=1),
        RegressionConfig(),
        SequenceClassificationConfig(**TEXT, target="number"),
    ),
    "vit, mixed labels": (
        VisionConfig(
            trunk(**{**LEARNED, "norm_position": "pre", "max_len": 5}), 8, 4, 1, "token"
        ),
        ClassificationConfig(label_smoothing=0.1),
        ImagesConfig(size=8, channels=1, batch_size=ROWS, mixup=0.2),
    ),
    "token regression": (
        EncoderConfig(
            trunk(**LEARNED), VOCAB, masked_head=False, num_tags=1, num_labels=0
        ),
        TokenRegressionConfig(),
        TokenClassificationConfig(**TEXT, target="number"),
    ),
    "autoencoder": (
        AutoencoderConfig(8, 1, width=8, stages=1, latent=4),
        AutoencodingConfig(latent_penalty=1e-3, warmup_steps=4),
        ImagesConfig(size=8, channels=1, batch_size=ROWS, label=""),
    ),
    "discrete vae": (
        # Noise that is drawn for other rows differs.
        DiscreteVAEConfig(8, 1, num_codes=16, width=32, stages=1, blocks=1, noise=0.0),
        ImageCodingConfig("squared", kl_steps=4),
        ImagesConfig(
            size=8, channels=1, batch_size=ROWS, label="", mean=(0.0,), std=(1.0,)
        ),
    ),
    "dalle": (
        TextToImageConfig(
            trunk(positions="none", patterns=("row:8:2", "conv:3:8:2")),
            *(VOCAB, 9, LENGTH, 2),
        ),
        TextToImagePredictionConfig(),
        ImageCodesConfig(**TEXT, grid=2),
    ),
    "sasrec": (
        RecommenderConfig(trunk(**LEARNED), VOCAB),
        SampledItemsConfig(),
        InteractionsConfig(**TEXT, negatives=2),
    ),
    "bert4rec": (
        RecommenderConfig(
            trunk(**LEARNED), VOCAB, causal=False, scale=False, output_layer=True
        ),
        ItemPredictionConfig(label_smoothing=0.1),
        MaskedInteractionsConfig(**TEXT),
    ),
    "distillation": (
        # The teacher's dropout is off, or no two runs would agree.
        DistillationConfig(
            classifier(), classifier(num_layers=2, dropout=0.5, attention_dropout=0.5)
        ),
        LabelDistillationConfig(temperature=3.0),
        SequenceClassificationConfig(**TEXT),
    ),
    "probe": (
        classifier(),
        ClassificationConfig(),
        SequenceClassificationConfig(**TEXT),
    ),
}
# name: what is trained, if not all
TRAINED = {"distillation": ("student/.*",), "probe": (".*label_head/.*",)}
SYSTEMS["vit, mixed labels"][0].num_labels = 3
SETTINGS = (
    {"mesh": (2, 2, 2, 1), "accumulate": 2},
    {"mesh": (1, 2, 2, 2)},
    {"placement": "pmap", "accumulate": 3},
)
# Terms that compare rows with one another: with those of all devices, but only of their
# micro-batch.
COUPLED = {
    "contrastive": (
        ContrastiveConfig(
            trunk(**LEARNED), trunk(**{**LEARNED, "max_len": 4}), VOCAB, 8, 4, 1, 6
        ),
        MatchingConfig(),
        CaptionedImagesConfig(**TEXT, size=8, channels=1),
    ),
}


def experiment(name, devices=8, mesh=(0, 1, 1, 1), accumulate=1, placement="mesh"):
    model, task, data = (SYSTEMS | COUPLED)[name]
    optim = OptimConfig("adamw", 1e-2, warmup_steps=1, eps=1e-2, weight_decay=0.1)
    optim.accumulate, optim.train = accumulate, TRAINED.get(name, optim.train)
    evaluation = EvaluationConfig(metrics=())
    config = ExperimentConfig(model, task, data, optim, evaluation=evaluation)
    config.placement, config.mesh = placement, MeshConfig(*mesh)
    made = Experiment(config)
    if devices == 1:
        rows = made.placement.parameters
        made.placement = MeshPlacement(MeshConfig(), jax.devices()[:1], rows)
    return made


def batch_of(made):
    """Rows of very unequal weight; the last one is padding."""
    rng = np.random.default_rng(0)
    batch = made.empty_batch(made.config.data.shapes()[0], ROWS)
    for key, x in batch.items():
        if key.endswith("weights"):
            batch[key] = rng.choice([0.0, 0.25, 1.0], x.shape).astype(np.float32)
        elif key in ("segments", "encoder_segments"):
            batch[key] = (np.arange(LENGTH) < rng.integers(3, 9, (ROWS, 1))) * 1
        elif key == "positions":
            batch[key] = np.broadcast_to(np.arange(LENGTH), x.shape)
        elif key == "masked_positions":
            batch[key] = rng.integers(0, LENGTH, x.shape)
        elif x.dtype == np.int32:
            limit = made.sizes.get(made.spec[key].below, made.spec[key].below or 2)
            batch[key] = rng.integers(0, limit, x.shape)
        else:
            batch[key] = rng.random(x.shape)
        batch[key] = np.asarray(batch[key], x.dtype)
        batch[key][-1] = 0
    return batch


@pytest.mark.parametrize("name", [*SYSTEMS, *COUPLED])
def test_every_placement_updates_alike(name):
    alone = experiment(name, devices=1)
    start = jax.tree.map(np.asarray, jax.jit(alone.make_state)().replace(rng=None))
    batch = batch_of(alone)
    expected = update(alone, start, batch)
    moved = [
        np.abs(new - old).max()
        for new, old in zip(
            jax.tree.leaves(expected[0].params),
            jax.tree.leaves(start.params),
            strict=True,
        )
    ]
    assert max(moved) > 1e-3
    for settings in SETTINGS:
        if name in COUPLED:
            settings = settings | {"accumulate": 1}
        assert_same_update(update(experiment(name, **settings), start, batch), expected)
