"""The models: one trunk, a short file per family.

Axes, one legend for the whole project: B batch, L queries, S keys, D model width,
H query heads, K key/value heads, E head width, F feed-forward width, V vocabulary,
N layers, M memory (encoder output), P places to predict.

A model maps a batch to logits of what it predicts, by the batch's name for it:
'targets' token by token, 'label' of the whole row.
"""

from triform.models.encoder import Encoder, EncoderConfig
from triform.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from triform.models.language_model import LanguageModel, LanguageModelConfig
from triform.models.vision import Vision, VisionConfig

# config type: module
MODELS = {
    EncoderDecoderConfig: EncoderDecoder,
    LanguageModelConfig: LanguageModel,
    EncoderConfig: Encoder,
    VisionConfig: Vision,
}


def build(config):
    """The Linen module of a model config."""
    return MODELS[type(config)](config)
