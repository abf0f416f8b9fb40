"""The models: one trunk, a short file per family.

Axes, one legend for the whole project: B batch, L queries, S keys, D model width,
H query heads, K key/value heads, E head width, F feed-forward width, V vocabulary,
N layers, M memory (encoder output).
"""

from triform.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

# config type: module
MODELS = {EncoderDecoderConfig: EncoderDecoder}


def build(config):
    """The Linen module of a model config."""
    return MODELS[type(config)](config)
