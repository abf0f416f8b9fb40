"""The models: one trunk, a short file per family.

Axes, one legend for the whole project: B batch, L queries, S keys, D model width,
H query heads, K key/value heads, E head width, F feed-forward width, V vocabulary,
N layers, M memory (encoder output), P masked positions.

A model maps a batch to logits by output: 'targets' token by token, 'label' of the row.
"""

from flax import linen as nn

from triform.models.autoencoder import Autoencoder, AutoencoderConfig
from triform.models.config import ModelConfig
from triform.models.contrastive import Contrastive, ContrastiveConfig
from triform.models.discrete_vae import DiscreteVAE, DiscreteVAEConfig
from triform.models.distillation import Distillation, DistillationConfig
from triform.models.encoder import Encoder, EncoderConfig
from triform.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from triform.models.language_model import LanguageModel, LanguageModelConfig
from triform.models.lora import LoRA, LoRAConfig
from triform.models.piano_roll import PianoRoll, PianoRollConfig
from triform.models.protein import ProteinConfig
from triform.models.recommender import Recommender, RecommenderConfig
from triform.models.text_to_image import TextToImage, TextToImageConfig
from triform.models.vision import VisionConfig

# config type: module
MODELS = {
    EncoderDecoderConfig: EncoderDecoder,
    LanguageModelConfig: LanguageModel,
    EncoderConfig: Encoder,
    ProteinConfig: Encoder,
    VisionConfig: Encoder,
    LoRAConfig: LoRA,
    DistillationConfig: Distillation,
    AutoencoderConfig: Autoencoder,
    DiscreteVAEConfig: DiscreteVAE,
    TextToImageConfig: TextToImage,
    ContrastiveConfig: Contrastive,
    PianoRollConfig: PianoRoll,
    RecommenderConfig: Recommender,
}


def build(config: ModelConfig) -> nn.Module:
    """The Linen module of a model config, around those of the models that it wraps."""
    return MODELS[type(config)](config, *map(build, config.wraps()))
