"""Text that a model writes: targets of a source, continuations of a prompt."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from triform.data import datasets
from triform.data.codecs import Codec
from triform.data.codecs.text import Tokenizer
from triform.experiment import Experiment
from triform.models import decode, repeats
from triform.runtime import host

STRETCH = 8  # tokens between two looks at what has been written
BROKEN = "\ufffd"  # what decoders give for bytes that are no character
# For programs that write token by token. Products are small then: what YNNPACK would
# compute together with one is faster outside (benchmarks/RESULTS.md).
FUSION = "xla_cpu_experimental_ynn_fusion_type"
SMALL_PRODUCTS = {FUSION: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def compiler_options() -> dict[str, str]:
    """Options of jax.jit for programs that write token by token.

    None where XLA_FLAGS says otherwise, or this jaxlib does not know them.
    """
    flag, (value,) = f"--{FUSION}", SMALL_PRODUCTS.values()
    usual = f"{flag}={host.COMPILER_FLAGS[flag]}" in os.environ.get("XLA_FLAGS", "")
    on_cpu = jax.default_backend() == "cpu"
    return SMALL_PRODUCTS if on_cpu and usual and host.known(flag, value) else {}


def row_keys(seed: jax.Array, numbers: jax.Array) -> jax.Array:
    """Keys [B] of requests and their samples, numbers int32 [B, 2].

    A row draws the same whatever the batch that it is in.
    """

    def key(number: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.key(seed), number[0])
        return jax.random.fold_in(own, number[1])

    return jax.vmap(key)(numbers)


@dataclasses.dataclass
class Draft:
    """A text while it is written."""

    prompt: list[int]
    ids: list[int] = dataclasses.field(default_factory=list)  # with the end, if any
    logp: list[float] = dataclasses.field(default_factory=list)
    finish: str = ""  # "end", "stop" or "length"; empty: it goes on
    text: str = ""  # once it is finished
    score: float = 0.0  # sum of logp; of beams also divided by the length's norm


class Targets:
    """Writes the targets of a batch of sources; compiled once.

    What evaluation compares and what is printed are written here. At most `most`
    tokens; 0: as many as the config says.
    """

    def __init__(
        self, experiment: Experiment, codecs: Mapping[str, Codec], most: int = 0
    ):
        config, model = experiment.config, experiment.model
        self.experiment, self.tok = experiment, codecs["text"]
        self.kind = datasets.requests(config.data, codecs, experiment.sizes)
        ends = self.tok.ends
        length = config.decode.max_len or experiment.longest_target()
        length = min(length, most or length)

        @functools.partial(jax.jit, compiler_options=compiler_options())
        def generate(variables: Any, batch: Any, seed: Any, numbers: Any) -> tuple:
            def extend(*args: Any) -> tuple:
                return model.apply(variables, *args, method="extend")

            start = model.apply(variables, batch, length, method="start")
            options = {"eos": ends, "length": length, "rng": row_keys(seed, numbers)}
            return decode.generate(config.decode, extend, *start, **options)

        self._generate = generate

    def __call__(
        self,
        variables: Any,
        batch: Any,
        numbers: np.ndarray,
        seed: int = 0,
        total: int = 0,
    ) -> list[Draft]:
        """One draft a row; `numbers` int32 [B, 2] are those of `row_keys`.

        The batch has all rows, or of `total` those that this process makes.
        """
        placement = self.experiment.placement
        axes = self.experiment.axes()
        inputs = placement.for_generation(variables, batch, axes, total)
        rows = len(next(iter(inputs[1].values())))
        padding = np.zeros((rows - len(numbers), 2), np.int32)
        numbers = np.concatenate([numbers, padding])
        inputs = *inputs, np.uint32(seed % 2**32), numbers
        found = placement.call(self._generate, *inputs)
        drafts = []
        for ids, score, logp in zip(*placement.fetch(found), strict=True):
            count = written(ids, self.tok.ends)
            draft = Draft([], ids[:count].tolist(), logp[:count].tolist(), "length")
            if count and draft.ids[-1] in self.tok.ends:
                draft.finish = "end"
            draft.score, draft.text = float(score), settled(self._text, draft, self.tok)
            drafts.append(draft)
        return drafts

    def _text(self, ids: Sequence[int]) -> str:
        return self.kind.decode(np.array(ids, np.int32))


def written(ids: np.ndarray, ends: Sequence[int]) -> int:
    """How many of ids [length] a model wrote: the first of the ends is the last."""
    over = np.flatnonzero(np.isin(ids, ends))
    return int(over[0]) + 1 if len(over) else len(ids)


def settled(
    decoded: Callable[[Sequence[int]], str], draft: Draft, tok: Tokenizer
) -> str:
    """The text of a draft, without the character in whose middle it was cut."""
    ids, text = draft.ids, decoded(draft.ids)
    if draft.finish != "length" or not text.endswith(BROKEN):
        return text
    # Bytes that are spelled one by one break all of their run: leave out the last.
    for count in range(1, 4):
        if len(ids) < count or ids[-count] not in tok.byte_pieces:
            break
        shorter = decoded(ids[:-count])
        if not shorter.endswith(BROKEN):
            return shorter
    return text.removesuffix(BROKEN)


def plan(given: int, left: int, context: int) -> tuple[int, int]:
    """(how many of the last `given` tokens a pass reads, how many it writes).

    `left` are still to be written. All is read if both fit, or as much as leaves room
    for what is left; a text that outgrows the context goes on from its last half. This
    depends on the text alone, not on others beside it.
    """
    total, half = context + 1, max(1, context // 2)  # what is written last is not read
    if given + left <= total:
        return given, left
    if left <= half:
        return total - left, left
    if given <= context:
        return given, total - given
    return half, min(left, total - half)


class Continuation:
    """Continues prompts piece by piece, as far as wanted; see `plan`.

    With beams in one pass, and so at most as far as half the context; see `most`.
    """

    def __init__(self, experiment: Experiment, tok: Tokenizer):
        self.tokenizer, self.context = tok, experiment.config.model.longest()["L"]
        config, model = experiment.config.decode, experiment.model
        self.placement = experiment.placement
        self.beams = config.method == "beam" and config.beam_size > 1

        def extender(variables: Any) -> decode.Extend:
            return lambda *args: model.apply(variables, *args, method="extend")

        def start(
            variables: Any, batch: Any, seed: Any, numbers: Any, before: Any, room: int
        ) -> decode.Text:
            first = model.apply(variables, batch, room, method="start")
            keys, read = row_keys(seed, numbers), read_ids(batch)
            return decode.begin(*first, room, keys, before, read)

        def advance(
            variables: Any, text: decode.Text, until: Any, ends: tuple[int, ...]
        ) -> decode.Text:
            return decode.advance(config, extender(variables), text, ends, until)

        def search(
            variables: Any, batch: Any, seed: Any, numbers: Any, room: int, ends: Any
        ) -> tuple:
            first = model.apply(variables, batch, room, method="start")
            how = {"rng": row_keys(seed, numbers), "read": read_ids(batch)}
            how |= {"eos": ends, "length": room}
            return decode.generate(config, extender(variables), *first, **how)

        own = {"compiler_options": compiler_options()}
        self._start = jax.jit(start, static_argnums=5)
        self._advance = jax.jit(advance, static_argnums=3, donate_argnums=1, **own)
        self._search = jax.jit(search, static_argnums=(4, 5), **own)

    def most(self, limit: int) -> int:
        """How many of `limit` tokens can be written."""
        return min(limit, max(1, self.context // 2)) if self.beams else limit

    def __call__(
        self,
        variables: Any,
        drafts: list[Draft],
        seed: int,
        numbers: np.ndarray,
        limit: int,
        stop: Sequence[str] = (),
        live: bool = False,
    ) -> Iterator[None]:
        """Fills the drafts; after each stretch of tokens it yields.

        `numbers` int32 [rows, 2] are those of `row_keys`; rows without a draft are
        padding. A stretch is as long as a pass unless `live` or `stop`.
        """
        placement, seed = self.placement, np.uint32(seed % 2**32)
        limit = self.most(limit)
        spread = jax.process_count() > 1
        if spread:  # every device writes some of the rows
            numbers = np.pad(numbers, ((0, -len(numbers) % placement.rows), (0, 0)))
        rows = len(numbers)
        ends = (*self.tokenizer.ends, *self._special(stop))
        room = min(limit, self.context)
        while going := [d for d in drafts if not d.finish]:
            until, before = np.zeros((2, rows), np.int32)
            given: list[list[int]] = [[] for _ in range(rows)]
            for row, draft in enumerate(drafts):
                before[row] = len(draft.ids)
                if not draft.finish:
                    given[row], until[row] = self.reads(draft, limit)
            batch = prompts(given, self.context)
            if spread:
                batch = placement.put(batch, {"inputs": "BL", "segments": "BL"})
            if self.beams:
                found = self._search(variables, batch, seed, numbers, room, ends)
                found = zip(*placement.fetch(found), strict=True)
                for draft, (tokens, score, logp) in zip(drafts, found, strict=False):
                    if not draft.finish:
                        self._take(draft, tokens, logp, ends, limit)
                        self._settle(draft, stop, len(draft.ids))
                        draft.score = float(score)
                yield
                return
            text = self._start(variables, batch, seed, numbers, before, room)
            stretch = STRETCH if live or stop else room
            for end in range(stretch, int(until.max()) + stretch, stretch):
                active = [not d.finish for d in drafts]
                active += [False] * (rows - len(drafts))
                aim = np.where(active, np.minimum(until, end), 0)
                text = self._advance(variables, text, aim, ends)
                tokens, logp = placement.fetch((text.tokens, text.logp))
                for row, draft in enumerate(drafts):
                    if not draft.finish:
                        part = slice(len(draft.ids) - before[row], aim[row])
                        new = tokens[row, part], logp[row, part]
                        self._take(draft, *new, ends, limit)
                        self._settle(draft, stop, len(new[0]))
                        draft.score = sum(draft.logp)
                yield
                if all(d.finish for d in going):
                    break

    def reads(self, draft: Draft, limit: int) -> tuple[list[int], int]:
        """(the ids that the next pass reads of a text, how many it writes)."""
        ids = draft.prompt + draft.ids
        count, room = plan(len(ids), limit - len(draft.ids), self.context)
        # What begins a text stays: models are lost without it.
        lead = [*self.tokenizer.framing("prompt").lead()]
        if count == len(ids) or len(lead) >= count or ids[: len(lead)] != lead:
            lead = []
        return lead + ids[len(ids) - count + len(lead) :], room

    def _special(self, stop: Sequence[str]) -> list[int]:
        """Ids of tokens that a text does not show, by their names."""
        tok = self.tokenizer
        found = (i for i, piece in enumerate(tok.pieces) if piece in stop)
        return [i for i in found if i not in tok.ends and not tok.decode([i])]

    def _take(
        self,
        draft: Draft,
        ids: np.ndarray,
        logp: np.ndarray,
        ends: Sequence[int],
        limit: int,
    ) -> None:
        count = written(ids, ends)
        draft.ids += ids[:count].tolist()
        draft.logp += logp[:count].tolist()
        if count and int(ids[count - 1]) in ends:
            own = int(ids[count - 1]) in self.tokenizer.ends
            draft.finish = "end" if own else "stop"
        elif len(draft.ids) >= limit:
            draft.finish = "length"

    def _settle(self, draft: Draft, stop: Sequence[str], new: int) -> None:
        """Ends a draft at the first of its `new` last tokens that completes a stop, and
        sets the text of what is finished.
        """
        for left in reversed(range(new)) if stop else ():
            count = len(draft.ids) - left
            text = self.tokenizer.continuation(draft.prompt, draft.ids[:count])
            found = [at for at in map(text.find, stop) if at >= 0]
            if found:
                draft.ids, draft.logp = draft.ids[:count], draft.logp[:count]
                draft.text, draft.finish = text[: min(found)], "stop"
                return
        if draft.finish:
            decoded = functools.partial(self.tokenizer.continuation, draft.prompt)
            draft.text = settled(decoded, draft, self.tokenizer)


def prompts(given: list[list[int]], context: int) -> dict[str, np.ndarray]:
    """A batch of these ids, padded on the left as all batches are: with zeros.

    The tokenizer's padding may have no row in the model, and no model reads it. The
    length is a power of two or the context, so that few shapes are compiled.
    """
    length = max(1, *map(len, given))
    length = max(length, min(context, 1 << (length - 1).bit_length()))
    inputs = np.zeros((len(given), length), np.int32)
    segments = np.zeros_like(inputs)
    segments[:, -1] = 1  # rows without a prompt must have a token
    for row, ids in enumerate(given):
        inputs[row, length - len(ids) :] = ids
        segments[row, length - len(ids) :] = 1
    return {"inputs": inputs, "segments": segments}


def read_ids(batch: Mapping[str, Any]) -> jax.Array:
    """int32 [B, L]: the ids of prompts, repeats.NONE where there are none."""
    return jax.numpy.where(batch["segments"] > 0, batch["inputs"], repeats.NONE)


def beginning_of(text: str, stop: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop."""
    longest = max(map(len, stop), default=1) - 1
    return next(
        (
            n
            for n in range(min(longest, len(text)), 0, -1)
            if any(s.startswith(text[-n:]) for s in stop)
        ),
        0,
    )
