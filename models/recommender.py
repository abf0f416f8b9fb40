"""Items in, states and the table that scores items out.

SASRec (Kang & McAuley 2018), BERT4Rec (Sun et al. 2019). The score of item i at a
position is the product of the state there with row i of the table. Logits over all
items are left to the task, which rarely needs them: a catalogue may be large.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from triform.models.config import ModelConfig, TransformerConfig
from triform.models.frontends import Tokens
from triform.models.heads import Transform
from triform.models.transformer import Stack

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True)
class RecommenderConfig(ModelConfig):
    """A stack over the item history of a user; the item table is also the output."""

    trunk: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    num_items: int = -1  # number of items; -1: taken from the data
    # Causal attention (SASRec). False: bidirectional attention (BERT4Rec), and the item
    # table has one more row for the mask.
    causal: bool = True
    scale: bool = True  # multiply input embeddings by sqrt(d_model)
    # Add BERT4Rec's output layer: dense, activation, norm, and a bias per item.
    output_layer: bool = False

    def frontend(self) -> Tokens:
        """Items and positions."""
        return Tokens(
            self.trunk,
            self.sizes()["num_inputs"],
            scale=self.trunk.d_model**0.5 if self.scale else 1.0,
            # As Glorot's for a large table, whose rows are scores, too.
            stddev=0.01 if self.scale else 0.02,
            causal=self.causal,
            norm=self.trunk.norm_position == "post",
        )

    def reads(self) -> dict[str, tuple[str, str]]:
        """Field -> (axes, dtype) that a batch must have."""
        return self.frontend().reads()

    def outputs(self) -> dict[str, str]:
        """States of all positions, and a row for every item, equally wide."""
        return {"states": "", "items": ""}

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value; num_inputs counts the mask, too."""
        masks = int(not self.causal and self.num_items > 0)
        return {"num_items": self.num_items, "num_inputs": self.num_items + masks}

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        rule = "must be at least 2, or -1 for those of the data"
        self.require(self.num_items >= 2, "num_items", rule)
        self.trunk.validate()


class Recommender(nn.Module):
    """Embeddings, stack, and the output layer if there is one.

    Parameters: embedding, positions/table, embedding_norm (post-norm), encoder; and
    output_layer, item_bias.
    """

    config: RecommenderConfig

    def setup(self) -> None:
        """Submodule names are public: checkpoints and partition rules match on them."""
        cfg = self.config
        self.frontend = cfg.frontend()
        nn.share_scope(self, self.frontend)
        self.encoder = Stack(cfg.trunk)
        if cfg.output_layer:
            self.transform = Transform(cfg.trunk, name="output_layer")
            zeros = nn.initializers.zeros
            self.item_bias = self.param("item_bias", zeros, (cfg.num_items,))

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """{'states': [B, L, W], 'items': [items, W]}, float32.

        Reads inputs [B, L] and, where rows are packed or padded, segments and
        positions. W is d_model, with an output layer one more: the bias is a product
        with 1.
        """
        x, mask = self.frontend(batch)
        x, _ = self.encoder(x, mask)
        items = self.frontend.embedding.embedding[: self.config.num_items]
        if self.config.output_layer:
            x = self.transform(x)
            x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
            items = jnp.concatenate([items, self.item_bias[:, None]], -1)
        return {"states": x.astype(jnp.float32), "items": items}
