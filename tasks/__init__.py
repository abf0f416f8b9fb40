"""Objectives: what is minimised, measured and predicted, one file each."""

from typing import Any

from flax import linen as nn

from triform.tasks.autoencoding import Autoencoding, AutoencodingConfig
from triform.tasks.base import Context, Task
from triform.tasks.distillation import LabelDistillation, LabelDistillationConfig
from triform.tasks.frames import FramePrediction, FramePredictionConfig
from triform.tasks.image_coding import ImageCoding, ImageCodingConfig
from triform.tasks.matching import Matching, MatchingConfig
from triform.tasks.prediction import (
    Classification,
    ClassificationConfig,
    TokenPrediction,
    TokenPredictionConfig,
)
from triform.tasks.pretraining import Pretraining, PretrainingConfig
from triform.tasks.recommendation import (
    ItemPrediction,
    ItemPredictionConfig,
    SampledItems,
    SampledItemsConfig,
)
from triform.tasks.regression import Regression, RegressionConfig
from triform.tasks.text_to_image import (
    TextToImagePrediction,
    TextToImagePredictionConfig,
)
from triform.tasks.token_regression import TokenRegression, TokenRegressionConfig

__all__ = [
    "TASKS",
    "AutoencodingConfig",
    "ClassificationConfig",
    "Context",
    "FramePredictionConfig",
    "ImageCodingConfig",
    "ItemPredictionConfig",
    "LabelDistillationConfig",
    "MatchingConfig",
    "PretrainingConfig",
    "RegressionConfig",
    "SampledItemsConfig",
    "Task",
    "TextToImagePredictionConfig",
    "TokenPredictionConfig",
    "TokenRegressionConfig",
    "build",
]

# config type: task
TASKS: dict[type, type[Task]] = {
    TokenPredictionConfig: TokenPrediction,
    ClassificationConfig: Classification,
    PretrainingConfig: Pretraining,
    RegressionConfig: Regression,
    TokenRegressionConfig: TokenRegression,
    AutoencodingConfig: Autoencoding,
    ImageCodingConfig: ImageCoding,
    TextToImagePredictionConfig: TextToImagePrediction,
    MatchingConfig: Matching,
    SampledItemsConfig: SampledItems,
    ItemPredictionConfig: ItemPrediction,
    LabelDistillationConfig: LabelDistillation,
    FramePredictionConfig: FramePrediction,
}


def build(config: Any, model: nn.Module) -> Task:
    """The task of a task config, over `model`."""
    return TASKS[type(config)](config, model)
