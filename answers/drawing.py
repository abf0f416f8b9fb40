"""Pictures that a model writes as codes, after a text."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from triform.answers.output import Output
from triform.answers.writing import compiler_options, row_keys
from triform.data.codecs import Codec
from triform.experiment import Experiment
from triform.models import decode
from triform.runtime.errors import UserError

Array = jax.Array


def guided(given: Array, plain: Array, weight: float) -> Array:
    """Scores of codes, moved by `weight` from those without the text to those with it.

    1: those with the text. (Ho & Salimans 2022, classifier-free guidance, on logits.)
    """
    return plain + weight * (given - plain)


class Drawing:
    """Draws the codes of a batch of texts, with one cache, and decodes them.

    Where a row has codes (code_weights are not 0), the upper half of its picture, whole
    rows of codes, is kept.
    """

    def __init__(self, experiment: Experiment, codecs: Mapping[str, Codec]):
        config, self.experiment = experiment.config.decode, experiment
        self.codec, apply = codecs["codes"], experiment.model.apply
        grid, weight = self.codec.grid, config.guidance
        if weight != 1 and config.method == "beam" and config.beam_size > 1:
            raise UserError(
                f"guidance={weight}: not with beams; set --method=sample or greedy"
            )

        @functools.partial(jax.jit, compiler_options=compiler_options())
        def draw(variables: Any, batch: Any, seed: Any, numbers: Any) -> tuple:
            def start(batch: Any) -> tuple:
                return apply(variables, batch, method="start")

            rows = len(batch["text"])
            kept = (grid // 2 * grid) * (batch["code_weights"].sum(1) > 0)
            if weight == 1:
                cache, first, at = start(batch)
            else:
                bare = jnp.zeros_like(batch["text_segments"]).at[:, 0].set(1)
                blind = {**batch, "text_segments": bare}
                both = jax.tree.map(lambda *x: jnp.concatenate(x), dict(batch), blind)
                cache, firsts, ats = start(both)
                first, at, unseen = firsts[:rows], ats[:rows], firsts[rows:]

            def extend(ids: Array, positions: Array, cache: Any) -> tuple:
                step = positions - at[:1]  # which code comes next
                if weight == 1:
                    logits, cache = apply(
                        variables, ids, positions, cache, method="extend"
                    )
                else:
                    # Without the text, another id comes before the first code.
                    others = jnp.where(step == 0, unseen[:, None], ids)
                    doubled = (
                        jnp.concatenate([ids, others]),
                        jnp.concatenate([positions, positions]),
                    )
                    logits, cache = apply(variables, *doubled, cache, method="extend")
                    logits = guided(logits[:rows], logits[rows:], weight)
                index = jnp.clip(step, 0, grid**2 - 1)
                given = jnp.take_along_axis(batch["codes"], index, 1)
                only = jax.nn.one_hot(given, logits.shape[-1]) > 0
                fixed = jnp.where(only, 0.0, decode.NEVER)
                free = (step >= kept[:, None])[..., None]
                return jnp.where(free, logits, fixed), cache

            options = {
                "eos": (),
                "length": grid**2,
                "rng": row_keys(seed, numbers),
            }
            return decode.generate(config, extend, cache, first, at, **options)

        self._draw = draw

    def __call__(
        self, variables: Any, batch: Any, numbers: np.ndarray, seed: int = 0
    ) -> list[Output]:
        """One picture a row; `numbers` int32 [B, 2] are those of `row_keys`."""
        experiment = self.experiment
        inputs = experiment.placement.for_generation(
            variables, batch, experiment.axes()
        )
        rows = len(inputs[1]["text"])
        padding = np.zeros((rows - len(numbers), 2), np.int32)
        numbers = np.concatenate([numbers, padding])
        found = self._draw(*inputs, np.uint32(seed % 2**32), numbers)
        codes, scores, _ = map(np.asarray, found)
        images = self.codec.decode(codes)
        return [
            Output(image=image, score=float(score), finish="end")
            for image, score in zip(images, scores, strict=True)
        ]


def best_first(
    ranker: Any, text: str, samples: Sequence[Output], batch_size: int = 32
) -> list[Output]:
    """Pictures of one text in the order in which they match it, with those scores."""
    pairs = [{"text": text, "image": sample.image} for sample in samples]
    found = ranker(pairs, batch_size=batch_size)
    for sample, answer in zip(samples, found, strict=True):
        sample.score = answer.score
    return sorted(samples, key=lambda sample: -sample.score)
