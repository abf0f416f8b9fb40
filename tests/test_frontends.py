"""Another source of an encoder-decoder is a config; so is a deeper encoder."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from families import LEARNED, LENGTH, VOCAB, trunk
from laws import (
    CLOSE,
    assert_decoding_equals_the_full_pass,
    flat,
    init,
)

from triform import models
from triform.models import EncoderDecoderConfig
from triform.models.config import TransformerConfig
from triform.models.encoder_decoder import EncoderDecoder
from triform.models.frontends import Patches


@dataclasses.dataclass(unsafe_hash=True)
class CaptionConfig(EncoderDecoderConfig):
    """Images in, tokens out."""

    share_embeddings: bool = False
    image_size: int = 8
    patch_size: int = 4

    def frontend(self) -> Patches:
        sizes = self.image_size, self.patch_size, 1
        return Patches(self.encoder_trunk(), *sizes, prefix="encoder_")


@dataclasses.dataclass(unsafe_hash=True)
class DeepEncoderConfig(EncoderDecoderConfig):
    """An encoder with layers of its own (Kasai et al. 2021)."""

    encoder_layers: int = 3

    def encoder_trunk(self) -> TransformerConfig:
        return dataclasses.replace(self.trunk, num_layers=self.encoder_layers)


@pytest.fixture
def captions(monkeypatch):
    """(config, batch) of captioning."""
    monkeypatch.setitem(models.MODELS, CaptionConfig, EncoderDecoder)
    config = CaptionConfig(trunk(**LEARNED, norm_position="pre"), VOCAB)
    config.validate()
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.standard_normal((3, 8, 8, 1)).astype(np.float32),
        "inputs": rng.integers(3, VOCAB, (3, LENGTH)).astype(np.int32),
    }
    return config, batch


def test_a_captioner_says_what_it_reads(captions):
    config, _ = captions
    assert config.reads() == {
        "image": ("BHWC", "float32"),
        "inputs": ("BL", "int32"),
    }
    assert config.axes() == {"H": 8, "W": 8, "C": 1}
    assert config.longest() == {"L": config.trunk.max_len}
    assert config.outputs() == {"targets": "vocab_size"}


def test_a_captioner_learns_from_its_images(captions):
    config, batch = captions
    model, targets = models.build(config), np.roll(batch["inputs"], -1, 1)
    tx = optax.adam(1e-2)

    def loss(params):
        logits = model.apply({"params": params}, batch)["targets"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value, grads

    params = init(config, batch)
    state = tx.init(params)
    after, state, first, grads = step(params, state)
    assert loss(after) < first
    for name in ("patches/kernel", "encoder_positions/table/embedding"):
        assert np.abs(flat(grads)[name]).max() > 0
    # Its source is seen: another image, other logits.
    found = model.apply({"params": params}, batch)["targets"]
    other = model.apply({"params": params}, batch | {"image": -batch["image"]})
    assert np.abs(found - other["targets"]).max() > 1e-3


def test_cached_captions_equal_the_full_pass(captions):
    config, batch = captions
    slots = np.array([[0, 1, 2, 3, 4, 5, -1, -1], [-1, -1, 0, 1, 2, 3, 4, 5]])
    slots = np.concatenate([slots, slots[:1]])
    first, at = assert_decoding_equals_the_full_pass(config, batch, batch, slots, CLOSE)
    np.testing.assert_array_equal(first, batch["inputs"][:, 0])
    np.testing.assert_array_equal(at, 0)


def test_an_image_shares_no_table_with_tokens(captions):
    config = dataclasses.replace(captions[0], share_embeddings=True)
    with pytest.raises(ValueError, match="share_embeddings=True") as error:
        config.validate()
    assert "False" in str(error.value)


def test_an_encoder_may_be_deeper_than_the_decoder(monkeypatch, pair_batch):
    monkeypatch.setitem(models.MODELS, DeepEncoderConfig, EncoderDecoder)
    config = DeepEncoderConfig(trunk(), VOCAB)
    params = init(config, pair_batch([3], [3], 3))
    assert {k for k in params["encoder"] if k[:5] == "layer"} == {
        "layer_0",
        "layer_1",
        "layer_2",
    }
    assert {k for k in params["decoder"] if k[:5] == "layer"} == {"layer_0", "layer_1"}
