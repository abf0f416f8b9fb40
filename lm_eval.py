"""Runs the public evaluation harness lm-eval on a workdir.

python -m triform.lm_eval --workdir=DIR --tasks=hellaswag,arc_easy [--limit=100]
python -m triform.lm_eval --workdir=DIR --tasks=mine --include_path=FOLDER_OF_YAML

The harness is an extra: pip install "triform[lm_eval]". Tasks, prompts and metrics are
its own; here is what it asks of a model. Its scores are those of its backend for
transformers on the exported folder.
"""

import functools
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from triform.answers.sampler import Sampler
from triform.answers.writing import Draft
from triform.data.progress import Bar
from triform.runtime import files, launch, paths
from triform.runtime.errors import UserError
from triform.tasks.base import over

# (strings of context and continuation, their ids)
Pair = tuple[Any, list[int], list[int]]
NEW = 256  # tokens that answer, where a task does not say
# How tasks call their number of tokens, the first counts.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def harness() -> Any:
    """The package lm_eval; UserError if it is not installed."""
    # Started in the folder of our sources, these would hide the harness and `evaluate`,
    # which it imports.
    ours = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != ours]
    try:
        for part in ("api.model", "evaluator", "tasks", "utils"):
            importlib.import_module(f"lm_eval.{part}")
    except ImportError as error:
        raise UserError(
            f'the harness is not installed ({error}); pip install "triform[lm_eval]"'
        ) from error
    return importlib.import_module("lm_eval")


class Workdir:
    """What lm-eval's TemplateLM leaves to a model: ids, scores, generation.

    See `model` for the whole class.
    """

    def __init__(self, sampler: Sampler, batch_size: int):
        super().__init__()
        if not sampler.continues:
            raise UserError(
                f"{sampler.run.path}: the harness asks language models; score it with "
                "evaluate.py"
            )
        self.sampler, self.batch_size = sampler, batch_size
        self.tok = sampler.codecs["text"]
        self.max_length = sampler.continuation.context
        model = sampler.experiment.model

        def of_targets(logits: Any, targets: Any) -> tuple:
            logp = jax.nn.log_softmax(logits, -1)
            chosen = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
            return chosen, logits.argmax(-1) == targets

        @jax.jit
        def score(variables: Any, inputs: Any, targets: Any) -> tuple:
            logits = model.apply(variables, {"inputs": inputs})["targets"]
            return over(logits, of_targets, targets)

        self._score = functools.partial(score, sampler.run.variables)

    # Ids

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tok.eos

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context."""
        return self.tok.eos if self.tok.bos is None else self.tok.bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Ids as transformers gives them: special tokens by name; what the tokenizer
        puts around a text unless it begins with that already.
        """
        if add_special_tokens is None:
            begins = self.tok.show([self.prefix_token_id])
            add_special_tokens = not string.startswith(begins)
        if add_special_tokens and string:
            return self.tok.prompts([string])[0].tolist()
        return self.tok.encode([string], specials=True)[0].tolist()

    # Scores

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of a continuation, whether greedy decoding writes it)."""
        longest = self.max_length
        rows = [(given + new)[-longest - 1 :] for _, given, new in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        with Bar("scoring", len(rows), "continuations") as bar:
            for first in range(0, len(order), self.batch_size):
                part = order[first : first + self.batch_size]
                scored = self._scored([rows[i] for i in part])
                for i, (logp, greedy) in zip(part, scored, strict=True):
                    new = min(len(requests[i][2]), len(logp))
                    at = len(logp) - new
                    total = float(logp[at:].sum(dtype=np.float64))
                    found[i] = total, bool(greedy[at:].all())
                bar.update(len(part))
        return found

    def _scored(self, rows: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of every row (log-probability of each id but the first, is it likeliest)."""
        length = max(len(row) - 1 for row in rows)
        length = min(self.max_length, 1 << (length - 1).bit_length())
        padded = np.zeros((2, self.batch_size, length), np.int32)
        for number, row in enumerate(rows):
            padded[0, number, : len(row) - 1] = row[:-1]
            padded[1, number, : len(row) - 1] = row[1:]
        logp, greedy = map(np.asarray, self._score(*padded))
        sizes = [len(row) - 1 for row in rows]
        return [(logp[i, :n], greedy[i, :n]) for i, n in enumerate(sizes)]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows of the context's length."""
        utils, windows, counts = harness().utils, [], []
        for request in requests:
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *utils.make_disjoint_window(window)) for window in found]
            windows += parts
            counts.append(len(parts))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    # Generation

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Texts that end before the first of a request's strings."""
        found: list[str] = []
        with Bar("writing", len(requests), "answers") as bar:
            for first in range(0, len(requests), self.batch_size):
                part = requests[first : first + self.batch_size]
                asked = [(r.args[0], *self._limits(r.args[1])) for r in part]
                found += self._written(asked)
                bar.update(len(part))
        return found

    def _limits(self, options: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
        """(tokens at most, strings that end a text) of a task's settings."""
        if options.get("do_sample") or options.get("temperature"):
            raise UserError(
                f"the task asks for sampling ({dict(options)}); only greedy generation "
                "is scored here: choose another task"
            )
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        new = next((int(options[n]) for n in LIMITS if options.get(n)), NEW)
        if new >= self.max_length:
            raise UserError(
                f"the task asks for {new} new tokens, and the model reads and writes "
                f"at most {self.max_length}; set max_gen_toks below that in the task"
            )
        return new, (*filter(None, until), self.tok.show([self.eot_token_id]))

    def _written(self, asked: list[tuple[str, int, tuple[str, ...]]]) -> list[str]:
        drafts = []
        for text, new, _ in asked:
            ids = self.tok_encode(text)[new - self.max_length :]
            drafts.append(Draft(ids or [self.prefix_token_id]))
        # Requests of one call stop alike: each goes with those of its settings.
        for setting in dict.fromkeys((new, until) for _, new, until in asked):
            group = [d for d, x in zip(drafts, asked, strict=True) if x[1:] == setting]
            numbers = np.zeros((self.batch_size, 2), np.int32)
            new, until = setting
            run = self.sampler.continuation(
                self.sampler.run.variables, group, 0, numbers, new, until
            )
            for _ in run:
                pass
        texts = []
        for draft, (_, _, until) in zip(drafts, asked, strict=True):
            text = self.tok.decode(draft.ids)  # alone, as the harness decodes it
            ends = [at for at in map(text.find, until) if at >= 0]
            texts.append(text[: min(ends, default=len(text))])
        return texts

    # Chat

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps rendered requests by."""
        return f"{self.sampler.run.path}-{self.tok.digest()[:16]}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, if one is to be applied."""
        return self._chat().template if chat_template else None

    def apply_chat_template(
        self,
        chat_history: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of messages; without the prompt, the last one is to go on."""
        chat = self._chat()
        text = chat.render(chat_history, prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].rstrip()
        return text[: text.rfind(last) + len(last)]

    def _chat(self) -> Any:
        if "chat" not in self.sampler.codecs:
            raise UserError(
                f"{self.sampler.run.path}: it holds no chat template; leave out "
                "--apply_chat_template"
            )
        return self.sampler.codecs["chat"]


def model(workdir: str, checkpoint: str = "best", batch_size: int = 16) -> Any:
    """A workdir as lm-eval's own kind of model, for `lm_eval.simple_evaluate`."""
    base = harness().api.model.TemplateLM
    kind = type("TriformLM", (Workdir, base), {})
    return kind(Sampler(workdir, checkpoint, method="greedy"), batch_size)


def run(
    workdir: str,
    tasks: Sequence[str],
    *,
    checkpoint: str = "best",
    batch_size: int = 16,
    include_path: str = "",
    **options: Any,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns; `options` are its own (limit=100)."""
    package = harness()
    path = paths.absolute(include_path) if include_path else None
    manager = package.tasks.TaskManager(include_path=path)
    return package.evaluator.simple_evaluate(
        model=model(workdir, checkpoint, batch_size),
        tasks=list(tasks),
        task_manager=manager,
        batch_size=batch_size,
        **options,
    )


def main(argv: list[str]) -> None:
    """Prints the harness's table of scores."""
    flag = flags.FLAGS
    found = run(
        launch.workdir_flag(),
        flag.tasks,
        checkpoint=flag.checkpoint,
        batch_size=flag.batch_size,
        include_path=flag.include_path,
        num_fewshot=flag.num_fewshot,
        limit=flag.limit,
        apply_chat_template=flag.apply_chat_template,
        log_samples=False,
    )
    print(harness().utils.make_table(found), flush=True)
    if flag.output:
        files.write_json(paths.absolute(flag.output), found["results"])


def define() -> None:
    """Defines the flags."""
    flags.DEFINE_string(
        "workdir", None, "A workdir of a language model.", required=True
    )
    flags.DEFINE_list(
        "tasks", None, "Names of tasks, separated by commas.", required=True
    )
    flags.DEFINE_string("include_path", "", "A folder with tasks of your own (YAML).")
    flags.DEFINE_string("checkpoint", "best", "best, latest, average:K, or a step.")
    flags.DEFINE_integer("batch_size", 16, "Rows per batch.", lower_bound=1)
    flags.DEFINE_integer("num_fewshot", None, "Number of few-shot examples.")
    flags.DEFINE_integer(
        "limit", None, "Largest number of examples per task; default: all."
    )
    flags.DEFINE_bool(
        "apply_chat_template", False, "Format requests with the chat template."
    )
    flags.DEFINE_string("output", "", "Write the scores to this JSON file.")


def cli(argv: Sequence[str], program: str = "lm_eval") -> None:
    """The program, from the command line to the exit code."""
    launch.launch(main, define, __doc__, argv, answers=True)


if __name__ == "__main__":
    cli(sys.argv)
