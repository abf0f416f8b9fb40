"""A workdir as a function: requests -> outputs."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from triform import workdir as workdirs
from triform.answers.composing import COMPOSERS
from triform.answers.drawing import Drawing, best_first
from triform.answers.inputs import Asked, chunks
from triform.answers.output import Output
from triform.answers.writing import (
    Continuation,
    Draft,
    Targets,
    beginning_of,
    plan,
)
from triform.data import datasets
from triform.data.codecs import Codec
from triform.data.codecs.text import Stream
from triform.data.datasets import Item
from triform.data.lines import for_terminal
from triform.models.decode import DecodeConfig
from triform.runtime import paths
from triform.runtime.errors import DataError, UserError

SETTINGS = tuple(field.name for field in dataclasses.fields(DecodeConfig))
# Settings that one method alone reads: given without a method, they choose it.
OF_BEAMS = ("beam_size", "length_penalty")
OF_SAMPLING = ("temperature", "top_k", "top_p")


@dataclasses.dataclass(frozen=True)
class Options:
    """What may differ from one call of a sampler to the next."""

    seed: int = 0  # of sampling
    max_tokens: int = 256  # written, at most
    num_samples: int = 1  # texts for each request
    stop: tuple[str, ...] = ()  # strings before which a text ends
    scores: bool = False  # the log-probability of every token, too
    strict: bool = False  # refuse what is otherwise cut, replaced or left out

    def __post_init__(self) -> None:
        for name in ("max_tokens", "num_samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if isinstance(self.stop, str) or not all(self.stop):
            raise UserError(f"stop={self.stop!r}: expected some strings, none empty")


class Sampler:
    """A workdir as a function: requests -> outputs, one each, in order.

    A language model continues, an encoder-decoder writes, a classifier gives label and
    probabilities, a tagger the tags of words; a masked model fills [MASK]; of items the
    next ones are listed, 10 or decode.top_k; music is continued or filled in. A request
    is a text, a mapping with the columns of training, an image (a path, Pillow's or an
    array) or music (a path or Music). `decode` replaces settings of config.decode:
    method="sample", temperature=0.8. `rerank` is a workdir that scores pairs of texts
    and pictures: of several samples the best come first.
    """

    def __init__(
        self, workdir: str, checkpoint: str = "best", rerank: str = "", **decode: Any
    ):
        config = workdirs.open_config(paths.workdir(workdir))
        for name, value in with_method(decode).items():
            if name not in SETTINGS:
                raise UserError(
                    f"{name}={value!r}: no setting of decoding; expected one of "
                    f"{', '.join(SETTINGS)}"
                )
            setattr(config.decode, name, value)
        self.run = workdirs.open_run(workdir, checkpoint, config)
        self.config, self.experiment = config, self.run.experiment
        self.codecs: Mapping[str, Codec] = self.run.codecs
        experiment = self.experiment
        self.kind = datasets.requests(config.data, self.codecs, experiment.sizes)
        self.kind.most = config.decode.top_k or self.kind.most
        self.writes = config.model.generates()
        self.continues = self.writes and self.kind.continues
        self.draws = self.writes and "image" in self.kind.gives
        self.composes = "music" in self.kind.gives
        texts = self.writes and not self.draws and not self.composes
        self.gives = ("text", "score") if texts else self.kind.gives
        self.ranker = Sampler(rerank) if rerank else None
        self._check_pictures(workdir)
        if not self.kind.answers():
            raise UserError(
                f"{workdir}: there are no requests of data={type(config.data).__name__}"
                "; score it with evaluate.py"
            )
        self._targets: dict[int, Targets] = {}
        if self.continues:
            self.continuation = Continuation(experiment, self.codecs["text"])
        elif self.composes:
            self.composer = COMPOSERS[type(self.kind)](experiment, self.kind)
        elif self.draws:
            self.drawing = Drawing(experiment, self.codecs)
        elif not self.writes:
            self._answer = experiment.placement.compile_eval(experiment.predict_step)

    def __call__(
        self, requests: Iterable[Any], *, batch_size: int = 32, **options: Any
    ) -> list[Output]:
        """One output per request, in order; `options` are those of `Options`.

        What is too long is cut, what cannot be read is left out, and the warnings of
        its output say so; with strict=True it is a UserError.
        """
        return list(self.stream(requests, batch_size=batch_size, **options))

    def stream(
        self, requests: Iterable[Any], *, batch_size: int = 32, **options: Any
    ) -> Iterator[Output]:
        """The same as they come: requests are read batch by batch."""
        how = Options(**{k: _tuple(k, v) for k, v in options.items()})
        self._check_samples(how)
        size = max(1, batch_size // how.num_samples)
        number, rows = 0, 0
        for part in chunks(requests, size):
            asked = [_asked(x, number + i + 1) for i, x in enumerate(part)]
            rows = max(rows, len(asked))
            yield from self._answers(asked, rows, number, how)
            number += len(asked)

    def live(
        self, request: Any, *, number: int = 0, **options: Any
    ) -> Iterator[str | Output]:
        """A prompt and its continuation while it is written, in the end the output.

        `number` is that of the request: it decides what is drawn. Joined, the parts are
        the output's prompt and text, but for what would move a terminal's cursor.
        """
        how = Options(**{k: _tuple(k, v) for k, v in options.items()})
        asked = _asked(request, number + 1)
        item, draft, notes = self._draft(asked, how)
        yield for_terminal(item.shown)
        stream = Stream(self.codecs["text"], draft.prompt)
        sure = shown = ""
        numbers = np.array([[number, 0]], np.int32)
        for _ in self._continue([draft], numbers, how, live=True):
            if not draft.finish:
                sure += stream(draft.ids)
                safe = sure[: len(sure) - beginning_of(sure, how.stop)]
                yield for_terminal(safe[len(shown) :])
                shown = safe
        if draft.text.startswith(shown):
            yield for_terminal(draft.text[len(shown) :])
        notes += self._outgrown(draft, how)
        output = self._output(draft, how, item.shown)
        yield dataclasses.replace(output, warnings=tuple(notes))

    # Requests

    def read(self, asked: Asked, how: Options) -> tuple[Item, list[str]]:
        """(a request as it will be written, warnings); with strict a UserError for what
        cannot be read as it is.
        """
        notes = [*asked.notes]
        try:
            if asked.fault:
                raise DataError(asked.fault)
            item = self.kind.checked(self.kind.read(asked.value))
            notes += item.notes
        except DataError as error:
            item = Item([], "")
            notes.append(f"failed: {error}")
        if notes and how.strict:
            raise UserError(
                f"{asked.where}: {notes[0]}; correct it or leave out strict"
            )
        if item.empty and not notes:
            notes.append("empty: there is nothing to answer")
        return item, notes

    def _cut(
        self, asked: Asked, left: int, total: int, limit: str, how: Options
    ) -> str:
        if how.strict:
            raise UserError(
                f"{asked.where} ({str(asked.value)[:40]!r}): {total} tokens, {left} "
                f"more than the model reads at most: {limit}; shorten or split it, or "
                "leave out strict"
            )
        return f"cut: {left} of {total} tokens left out"

    def _check_pictures(self, workdir: str) -> None:
        """UserError for what only pictures that are drawn from texts have."""
        if self.ranker is not None and self.ranker.gives != ("score",):
            raise UserError(
                f"rerank={self.ranker.run.path}: does not score pairs of texts and "
                "pictures; name a workdir of configs/contrastive.py"
            )
        guidance = self.config.decode.guidance
        if not self.draws and (guidance != 1 or self.ranker is not None):
            name = "rerank" if guidance == 1 else f"guidance={guidance}"
            raise UserError(
                f"{name}: {workdir} draws no pictures from texts; leave it out"
            )

    def _check_samples(self, how: Options) -> None:
        if how.num_samples == 1:
            return
        if not self.writes and not self.composes:
            raise UserError(
                f"num_samples={how.num_samples}: model="
                f"{type(self.config.model).__name__} writes no text; set 1"
            )
        if self.config.decode.method != "sample":
            raise UserError(
                f"num_samples={how.num_samples}: method={self.config.decode.method!r} "
                "gives one text; set method='sample'"
            )

    # Answers

    def _answers(
        self, asked: Sequence[Asked], rows: int, first: int, how: Options
    ) -> list[Output]:
        """Outputs of up to `rows` requests, of which `first` is the first's number."""
        numbers = np.zeros((rows * how.num_samples, 2), np.int32)
        order = np.arange(len(asked) * how.num_samples)
        numbers[: len(order), 0] = first + order // how.num_samples
        numbers[: len(order), 1] = order % how.num_samples
        if self.continues:
            return self._continued(asked, numbers, how)
        read = [self.read(one, how) for one in asked]
        items = [item for item, _ in read]
        if all(item.empty for item in items):
            return [Output(warnings=tuple(notes)) for _, notes in read]
        copies = [item for item in items for _ in range(how.num_samples)]
        if self.composes:
            outputs = self.composer(self.run.variables, copies, numbers, how)
            return self._joined(outputs, [notes for _, notes in read], items, how)
        batch, left_out = self.kind.batch(copies, len(numbers))
        for i, (one, item) in enumerate(zip(asked, items, strict=True)):
            if left := left_out[i * how.num_samples]:
                total, limit = sum(map(len, item.parts)), self.kind.limit()
                read[i][1].append(self._cut(one, left, total, limit, how))
        if self.draws:
            drawn = self.drawing(self.run.variables, batch, numbers, how.seed)
            outputs = drawn[: len(copies)]
        else:
            run = self._written if self.writes else self._predicted
            outputs = run(batch, copies, numbers, how)
        return self._joined(outputs, [notes for _, notes in read], items, how)

    def _joined(
        self,
        outputs: list[Output],
        notes: list[list[str]],
        items: list[Item],
        how: Options,
    ) -> list[Output]:
        """One output a request, with all its samples and its warnings."""
        found, n = [], how.num_samples
        for i, item in enumerate(items):
            samples = outputs[i * n : (i + 1) * n]
            if self.ranker is not None and not item.empty:
                samples = best_first(self.ranker, item.shown, samples)
            output = Output() if item.empty else dataclasses.replace(samples[0])
            output.warnings = tuple(notes[i])
            if n > 1 and not item.empty:
                output.samples = samples
            found.append(output)
        return found

    def _predicted(
        self, batch: Any, items: list[Item], numbers: np.ndarray, how: Options
    ) -> list[Output]:
        step, put = np.int32(self.run.step), self.experiment.put(batch)
        _, rows = self._answer(self.run.variables, step, put)
        rows = self.experiment.placement.fetch(rows)
        outputs = []
        for i, item in enumerate(items):
            row = {k: x[i] for k, x in rows.items()}
            outputs.append(
                Output() if item.empty else Output(**self._fields(item, row))
            )
        return outputs

    def _fields(self, item: Item, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
        try:
            return self.kind.answer(item, row)
        except KeyError as error:
            raise UserError(
                f"{self.run.path}: task={type(self.config.task).__name__} does not say "
                f"{error} of a request, which data={type(self.config.data).__name__} "
                "needs; score it with evaluate.py"
            ) from error

    def _written(
        self, batch: Any, items: list[Item], numbers: np.ndarray, how: Options
    ) -> list[Output]:
        most = how.max_tokens
        if most not in self._targets:
            self._targets[most] = Targets(self.experiment, self.codecs, most)
        drafts = self._targets[most](self.run.variables, batch, numbers, how.seed)
        for draft in drafts:
            found = [at for at in map(draft.text.find, how.stop) if at >= 0]
            if found:
                draft.text, draft.finish = draft.text[: min(found)], "stop"
        return [self._output(draft, how) for draft in drafts[: len(items)]]

    def _continued(
        self, asked: Sequence[Asked], numbers: np.ndarray, how: Options
    ) -> list[Output]:
        read = [self._draft(one, how) for one in asked]
        copies = [
            dataclasses.replace(draft, ids=[], logp=[])
            for _, draft, _ in read
            for _ in range(how.num_samples)
        ]
        for _ in self._continue(copies, numbers, how):
            pass
        n = how.num_samples
        outputs = [
            self._output(draft, how, read[i // n][0].shown)
            for i, draft in enumerate(copies)
        ]
        for i, draft in enumerate(copies[::n]):
            read[i][2].extend(self._outgrown(draft, how))
        notes = [notes for _, _, notes in read]
        return self._joined(outputs, notes, [item for item, _, _ in read], how)

    def _draft(self, asked: Asked, how: Options) -> tuple[Item, Draft, list[str]]:
        """(the prompt, nothing written yet, warnings)."""
        item, notes = self.read(asked, how)
        if item.empty:
            return item, Draft([], finish="end"), notes
        draft = Draft(item.parts[0].tolist())
        context, total = self.continuation.context, len(draft.prompt)
        new = self.continuation.most(how.max_tokens)
        left = total - plan(total, new, context)[0]
        if left:
            limit = f"a context of {context} tokens, up to {new} of them new"
            notes.append(self._cut(asked, left, total, limit, how))
        return item, draft, notes

    def _outgrown(self, draft: Draft, how: Options) -> list[str]:
        """What to say of a text that is longer than the model's context."""
        context, most = self.continuation.context, self.continuation.most
        if draft.finish == "length" and most(how.max_tokens) < how.max_tokens:
            return [
                f"shortened: beams write {most(how.max_tokens)} tokens at most, half "
                "of the context"
            ]
        given, new = len(draft.prompt), len(draft.ids)
        if plan(given, new, context)[1] >= new or len(draft.ids) < 1:
            return []
        return [
            f"outgrown: {given} tokens of prompt and {new} new ones exceed the context "
            f"of {context}; later ones saw no more than the last {context // 2} before "
            "them at times"
        ]

    def _continue(
        self, drafts: list[Draft], numbers: np.ndarray, how: Options, live: bool = False
    ) -> Iterator[None]:
        options = how.seed, numbers, how.max_tokens, how.stop, live
        return self.continuation(self.run.variables, drafts, *options)

    def _output(self, draft: Draft, how: Options, prompt: str = "") -> Output:
        output = Output(draft.text, prompt, draft.score, draft.finish)
        if how.scores:
            output.tokens = [self.codecs["text"].show([i]) for i in draft.ids]
            output.token_scores = draft.logp
        return output


def with_method(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with the method that they imply; UserError if they are of two."""
    implied = {}
    if any(name in given for name in OF_BEAMS):
        implied = {"method": "beam"}
    if any(name in given for name in OF_SAMPLING):
        implied = {"method": "sample"}
    found = implied | dict(given)
    for method, names in (("beam", OF_BEAMS), ("sample", OF_SAMPLING)):
        for name in names:
            if name in given and found["method"] != method:
                raise UserError(
                    f"{name}={given[name]!r}: method={found['method']!r} does not read "
                    f"it; leave it out, or set method={method!r}"
                )
    return found


def _tuple(name: str, value: Any) -> Any:
    """Options from the user's lists."""
    return tuple(value) if name == "stop" and not isinstance(value, str) else value


def _asked(request: Any, number: int) -> Asked:
    return request if isinstance(request, Asked) else Asked(request, f"input {number}")
