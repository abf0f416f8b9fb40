"""A suggested experiment around a model: the data and the task its heads are for."""

from typing import Any

from triform.configs.schema import ExperimentConfig
from triform.data.datasets import (
    CausalLMConfig,
    ImagesConfig,
    MaskedLMConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
    TokenClassificationConfig,
)
from triform.models import (
    EncoderConfig,
    EncoderDecoderConfig,
    LanguageModelConfig,
    LoRAConfig,
    ProteinConfig,
    VisionConfig,
)
from triform.models.decode import DecodeConfig
from triform.runtime.optim import OptimConfig
from triform.scores.text import EvaluationConfig
from triform.tasks import (
    ClassificationConfig,
    PretrainingConfig,
    RegressionConfig,
    TokenPredictionConfig,
)

LENGTH = 512  # tokens in a row at most, unless the model has fewer


def _encoder(config: EncoderConfig) -> tuple[Any, Any]:
    rows: dict[str, Any] = {"max_len": min(config.longest()["L"], LENGTH)}
    if config.trunk.attention == "local":  # made for long rows and a global first token
        length = config.longest()["L"]
        rows = {"max_len": length, "batch_size": max(1, 32 * LENGTH // length)}
        rows["global_tokens"] = "first"
    if config.masked_head:
        both = config.num_labels > 0
        task = PretrainingConfig() if both else TokenPredictionConfig(0.0)
        return MaskedLMConfig(**rows, next_sentence=both), task
    if config.num_tags:
        return TokenClassificationConfig(**rows), TokenPredictionConfig(0.0)
    if config.num_labels == 1:
        return SequenceClassificationConfig(**rows, target="number"), RegressionConfig()
    return SequenceClassificationConfig(**rows), ClassificationConfig()


def _protein(config: ProteinConfig) -> tuple[Any, Any]:
    data, task = _encoder(config)
    data.tokenizer.kind = "residues"
    return data, task


def _language_model(config: LanguageModelConfig) -> tuple[Any, Any]:
    length = min(config.longest()["L"], LENGTH)
    return CausalLMConfig(max_len=length), TokenPredictionConfig(0.0)


def _encoder_decoder(config: EncoderDecoderConfig) -> tuple[Any, Any]:
    length = min(config.longest()["L"], LENGTH)
    # Short sources are not padded to the longest.
    buckets = tuple(n for n in (32, 64, 128, 256) if n < length)
    return Seq2SeqConfig(max_len=length, buckets=buckets), TokenPredictionConfig(0.0)


def _vision(config: VisionConfig) -> tuple[Any, Any]:
    data = ImagesConfig(size=config.image_size, channels=config.channels)
    return data, ClassificationConfig()


# config type: fn(config) -> (data, task)
SUGGESTED = {
    EncoderConfig: _encoder,
    ProteinConfig: _protein,
    LanguageModelConfig: _language_model,
    EncoderDecoderConfig: _encoder_decoder,
    VisionConfig: _vision,
}


def experiment_config(config: Any) -> ExperimentConfig:
    """An experiment around a model config; sources are to be named before training.

    Of a model with adapters only these are trained.
    """
    optim, inner = OptimConfig(), config
    if isinstance(config, LoRAConfig):
        optim.train, inner = (".*/lora_[ab]",), config.model
    data, task = SUGGESTED[type(inner)](inner)
    evaluation = EvaluationConfig()
    if not isinstance(data, Seq2SeqConfig):
        evaluation.metrics = ()  # there is no text to compare
    return ExperimentConfig(
        model=config,
        task=task,
        data=data,
        optim=optim,
        decode=DecodeConfig(method="greedy"),
        evaluation=evaluation,
    )
