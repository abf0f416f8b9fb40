"""A conversation with a trained workdir, line by line."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from triform.answers.inputs import Asked
from triform.answers.output import Output
from triform.answers.sampler import Sampler
from triform.answers.writing import plan
from triform.data.lines import one_line
from triform.runtime.errors import UserError

RESET = "/reset"  # a line that begins another conversation


class Conversation:
    """What was said so far; `answer` adds what is asked and what is answered.

    It begins with what the system says, if anything.
    """

    def __init__(self, sampler: Sampler, system: str = ""):
        if not sampler.continues or "chat" not in sampler.codecs:
            raise UserError(
                f"{sampler.run.path}: it holds no chat template; train on "
                "conversations (configs/my_chat.py), or put a chat_template.jinja into "
                "it"
            )
        self.sampler, self.answers = sampler, 0
        self.begun = [{"role": "system", "content": system}] if system else []
        self.messages = [*self.begun]
        sampler.codecs["text"].end_at(sampler.codecs["chat"].end())

    def answer(self, asked: Asked, **options: Any) -> Iterator[str | Output]:
        """The answer while it is written, in the end its output.

        `options` are those of `Sampler.live`. What does not fit into the context any
        more is forgotten, the oldest turns first; a warning says so.
        """
        self.messages.append({"role": "user", "content": asked.value})
        forgotten = self._forget(options.get("max_tokens", 256))
        notes = asked.notes
        if forgotten:
            notes += (f"forgotten: the oldest {forgotten} turns, to fit the context",)
        whole = dataclasses.replace(asked, value=[*self.messages], notes=notes)
        for part in self.sampler.live(whole, number=self.answers, **options):
            if isinstance(part, Output):
                if any(note.startswith("failed") for note in part.warnings):
                    self.messages.pop()
                else:
                    said = {"role": "assistant", "content": part.text.strip()}
                    self.messages.append(said)
            yield part
        self.answers += 1

    def _forget(self, new: int) -> int:
        """Removes turns behind the system's until `new` tokens fit; how many."""
        first = 1 if self.messages[0]["role"] == "system" else 0
        context, removed = self.sampler.continuation.context, 0
        while len(self.messages) > first + 1:
            total = len(self.sampler.codecs["chat"].prompt(self.messages))
            if plan(total, min(new, context // 2), context)[0] == total:
                break
            del self.messages[first : first + 2]
            removed += 2
        return removed


def talk(
    sampler: Sampler, lines: Iterable[Asked], options: dict[str, Any], system: str = ""
) -> None:
    """Answers every line: as it is written on a terminal, else in one line.

    '/reset' begins anew, and is not answered.
    """
    conversation = Conversation(sampler, system)
    live = sys.stdout.isatty()
    for asked in lines:
        if not isinstance(asked.value, str):
            raise UserError(
                f"--chat: {asked.where} is no line of text; leave out --chat to answer "
                "conversations that are written down"
            )
        if asked.value.strip() == RESET:
            conversation.messages = [*conversation.begun]
            continue
        output = Output()
        if asked.value.strip():
            for part in conversation.answer(asked, **options):
                if isinstance(part, Output):
                    output = part
                elif live:
                    print(part, end="", flush=True)
        for warning in output.warnings:
            print(f"warning: {asked.where}: {warning}", file=sys.stderr)
        print("" if live else one_line(output.text), flush=True)
