"""Music that a model writes: it goes on with an opening, or fills in voices.

A kind of requests has a function here that makes its composer, in COMPOSERS:

    composer(variables, items, numbers int32 [rows, 2], how) -> outputs

`numbers` are those of `writing.row_keys`, `how` the options of a call; rows without an
item are padding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from triform.answers.output import Output
from triform.answers.writing import (
    compiler_options,
    plan,
    prompts,
    read_ids,
    row_keys,
    written,
)
from triform.data.codecs.music import LAST, MASK
from triform.data.datasets.music import Melodies, Openings
from triform.data.datasets.piano_roll import FrameOpenings
from triform.data.datasets.requests import Item, Requests
from triform.data.music import Music
from triform.experiment import Experiment
from triform.models import decode
from triform.models.logits import whole
from triform.runtime.errors import UserError

Array = jax.Array
GIBBS_STEPS = 64  # rounds of filling in
LEAST, MOST, RISE = 0.05, 0.9, 0.75  # shares that are drawn anew (Yao et al. 2014)


class TokenComposer:
    """Goes on with tokens until a piece ends, or for as many as are wanted.

    What is longer than the model's context goes on from its last half.
    """

    def __init__(self, experiment: Experiment, kind: Openings):
        self.codec, model = kind.codec, experiment.model
        self.grain, config = kind.config.grain(), experiment.config.decode
        self.context = experiment.config.model.longest()["L"]
        allowed = jnp.asarray(self.codec.allowed())
        if config.method == "beam" and config.beam_size > 1:
            raise UserError(
                "--method=beam: music is continued by greedy or sample; set one of them"
            )

        @functools.partial(
            jax.jit, static_argnames="room", compiler_options=compiler_options()
        )
        def write(
            variables: Any, batch: Any, keys: Any, before: Any, until: Any, room: int
        ) -> tuple:
            def extend(tokens: Array, positions: Array, cache: Any) -> tuple:
                logits, cache = model.apply(
                    variables, tokens, positions, cache, method="extend"
                )
                # Rows begin with whole steps, after the first token of all.
                turn = positions % len(allowed)
                return jnp.where(allowed[turn], logits, decode.NEVER), cache

            start = model.apply(variables, batch, room, method="start")
            text = decode.begin(*start, room, keys, before, read_ids(batch))
            text = decode.advance(config, extend, text, LAST, until)
            return text.tokens, text.logp

        self._write = write

    def __call__(
        self, variables: Any, items: Sequence[Item], numbers: np.ndarray, how: Any
    ) -> list[Output]:
        """Openings and what follows them."""
        keys = row_keys(np.uint32(how.seed % 2**32), jnp.asarray(numbers))
        ids = [item.parts[0].tolist() if item.parts else [] for item in items]
        new: list[list[int]] = [[] for _ in items]
        scores, over = [0.0] * len(items), [not x for x in ids]
        while not all(over):
            until, before = np.zeros((2, len(numbers)), np.int32)
            given: list[list[int]] = [[] for _ in numbers]
            for row, opening in enumerate(ids):
                before[row] = len(new[row])
                if not over[row]:
                    left = how.max_tokens - len(new[row])
                    piece = opening + new[row]
                    given[row], until[row] = reads(
                        piece, left, self.context, self.grain
                    )
            batch = prompts(given, self.context)
            room = min(how.max_tokens, self.context)
            found = self._write(variables, batch, keys, before, until, room)
            tokens, logp = map(np.asarray, found)
            for row in range(len(items)):
                count = written(tokens[row, : until[row]], (LAST,))
                new[row] += tokens[row, :count].tolist()
                scores[row] += float(logp[row, :count].sum())
                ended = new[row][-1:] == [LAST]
                over[row] |= ended or len(new[row]) >= how.max_tokens
        return [
            Output(
                music=decoded(self.codec, [*x[1:], *y], item),
                score=score,
                finish="end" if y[-1:] == [LAST] else "length",
            )
            for item, x, y, score in zip(items, ids, new, scores, strict=True)
        ]


def decoded(codec: Any, ids: Sequence[int], item: Item) -> Music:
    """Music of ids, at the tempi of what was given if ids tell beats."""
    music = codec.decode(np.asarray(ids, np.int32))
    return music.at_tempi_of(item.shown) if item.parts and codec.beats else music


def reads(ids: list[int], left: int, context: int, grain: int) -> tuple[list[int], int]:
    """(the last ids of a piece, which the next pass reads; how many it writes).

    They begin at a multiple of `grain`, as windows of training do: else positions would
    say another beat than they have learned to. It depends on this piece alone.
    """
    count, room = plan(len(ids), left, context)
    start = -(-(len(ids) - count) // grain) * grain
    start = min(start, (len(ids) - 1) // grain * grain)  # something is read
    return ids[start:], min(room, context + 1 - (len(ids) - start))


class FrameComposer:
    """Goes on with frames of a piano roll, as many as are wanted and fit."""

    def __init__(self, experiment: Experiment, kind: FrameOpenings):
        model, config = experiment.model, experiment.config.decode
        self.steps = kind.config.steps
        self.context = experiment.config.model.longest()["T"]
        sample = config.method == "sample"

        @functools.partial(
            jax.jit, static_argnames="room", compiler_options=compiler_options()
        )
        def write(variables: Any, batch: Any, keys: Any, room: int) -> tuple:
            def step(carry: tuple, number: Array) -> tuple:
                frame, at, cache = carry
                logits, cache = model.apply(
                    variables, frame[:, None], at[:, None], cache, method="extend"
                )
                logits = logits[:, 0] / config.temperature
                on = logits > 0
                if sample:
                    own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
                    draw = jax.vmap(jax.random.bernoulli)
                    on = draw(own, jax.nn.sigmoid(logits))
                logp = -jax.nn.softplus(jnp.where(on, -logits, logits)).sum(-1)
                frame = on.astype(frame.dtype)
                return (frame, at + 1, cache), (frame, logp)

            cache, frame, at = model.apply(variables, batch, room, method="start")
            _, (frames, logp) = jax.lax.scan(step, (frame, at, cache), jnp.arange(room))
            return frames.swapaxes(0, 1), logp.sum(0)

        self._write = write

    def __call__(
        self, variables: Any, items: Sequence[Item], numbers: np.ndarray, how: Any
    ) -> list[Output]:
        """Openings and what follows them; of long ones the last frames are read."""
        keys = row_keys(np.uint32(how.seed % 2**32), jnp.asarray(numbers))
        room = min(how.max_tokens, max(1, self.context // 2))
        longest = max(len(item.parts[0]) for item in items if item.parts)
        if longest + how.max_tokens <= self.context + 1:
            room = how.max_tokens
        keep = self.context + 1 - room
        length = min(keep, 1 << (longest - 1).bit_length())
        batch = {
            "frames": np.zeros((len(numbers), length, items_width(items)), np.float32),
            "frame_weights": np.zeros((len(numbers), length), np.float32),
        }
        batch["frame_weights"][:, -1] = 1  # rows without an opening have a frame
        for row, item in enumerate(items):
            for frames in item.parts:
                last = frames[-length:]
                batch["frames"][row, length - len(last) :] = last
                batch["frame_weights"][row, length - len(last) :] = 1
        found, logp = map(np.asarray, self._write(variables, batch, keys, room))
        outputs = []
        for row, item in enumerate(items):
            roll = np.concatenate([x[1:] for x in item.parts] + [found[row]])
            music = Music.of_roll(roll, self.steps)
            if item.parts:
                music = music.at_tempi_of(item.shown)
            outputs.append(Output(music=music, score=float(logp[row]), finish="length"))
        return outputs


def items_width(items: Sequence[Item]) -> int:
    """Keys of a frame."""
    return next(part.shape[-1] for item in items for part in item.parts)


class InpaintingComposer:
    """Fills in what is hidden by blocked Gibbs sampling (Huang et al. 2017, 4.2).

    Round after round a falling share of what was hidden is drawn anew, all of it at
    once, from the rest. What is given stays. What is longer than a row is filled half a
    row after another, each after the half before it.
    """

    def __init__(self, experiment: Experiment, kind: Melodies):
        self.codec, self.length = kind.codec, kind.config.max_len
        self.grain = kind.config.grain()
        model, config = experiment.model, experiment.config.decode
        pick = decode.greedy if config.method != "sample" else decode.sampler(config)
        allowed = np.array(self.codec.allowed().any(0))
        allowed[LAST] = False

        @jax.jit
        def fill(variables: Any, batch: Any, keys: Any) -> tuple:
            hidden = batch["inputs"] == MASK
            rows, length = hidden.shape

            def conditionals(ids: Array) -> Array:
                logits = model.apply(variables, {**batch, "inputs": ids})["targets"]
                logits = whole(logits)
                return jax.nn.log_softmax(jnp.where(allowed, logits, decode.NEVER))

            def step(i: Array, ids: Array) -> Array:
                own = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
                share = jnp.maximum(
                    LEAST, MOST - (MOST - LEAST) * i / (RISE * GIBBS_STEPS)
                )
                chance = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(own)
                anew = hidden & ((chance < share) | (ids == MASK))
                logp = conditionals(jnp.where(anew, MASK, ids))
                each = jax.vmap(lambda key: jax.random.split(key, length))(own)
                drawn = pick(each.reshape(-1), logp.reshape(rows * length, -1))
                return jnp.where(anew, drawn.reshape(ids.shape), ids)

            ids = jax.lax.fori_loop(0, GIBBS_STEPS, step, batch["inputs"])
            logp = jnp.take_along_axis(conditionals(ids), ids[..., None], -1)[..., 0]
            return ids, (logp * hidden).sum(1)

        self._fill = fill

    def __call__(
        self, variables: Any, items: Sequence[Item], numbers: np.ndarray, how: Any
    ) -> list[Output]:
        """All voices. `score`: the pseudo-log-likelihood of what was filled in."""
        keys = row_keys(np.uint32(how.seed % 2**32), jnp.asarray(numbers))
        ids = [np.concatenate([*item.parts, np.zeros(0, np.int32)]) for item in items]
        scores, voices = np.zeros(len(items)), self.codec.voices
        grain = self.grain  # where windows begin in training, too
        half = max(1, self.length // 2 // grain) * grain
        longest = max(map(len, ids))
        for number, start in enumerate(range(0, max(1, longest - half), half)):
            shape = len(numbers), self.length
            batch = {x: np.zeros(shape, np.int32) for x in FIELDS}
            for row, piece in enumerate(ids):
                part = piece[start : start + self.length]
                n = len(part)
                batch["inputs"][row, :n], batch["segments"][row, :n] = part, 1
                batch["token_type_ids"][row, :n] = np.arange(n) % voices
            batch["segments"][:, 0] = 1
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            filled, logp = map(np.asarray, self._fill(variables, batch, own))
            for row, piece in enumerate(ids):
                part = piece[start : start + self.length]
                part[:] = filled[row, : len(part)]
                scores[row] += logp[row]
        return [
            Output(music=decoded(self.codec, x, item), score=float(score), finish="end")
            for item, x, score in zip(items, ids, scores, strict=True)
        ]


FIELDS = ("inputs", "segments", "token_type_ids")

# Requests of a kind of data -> what composes the answers.
COMPOSERS: dict[type[Requests], Callable[[Experiment, Any], Any]] = {
    Openings: TokenComposer,
    FrameOpenings: FrameComposer,
    Melodies: InpaintingComposer,
}
