"""Conversations <-> token ids, by a chat template in Jinja.

A template is a foreign program that writes messages as one text, usually the one of a
published tokenizer. What is trained is found without its help: `ChatTemplate.turns`.
"""

import datetime
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from triform.data.codecs.text import HuggingFaceTokenizer, Tokenizer
from triform.runtime.errors import DataError

FILE = "chat_template.jinja"  # in a workdir, and in folders of transformers
ASSISTANT = "assistant"
# Keys and roles of ShareGPT's files -> the usual ones.
KEYS = {"from": "role", "value": "content"}
ROLES = {"human": "user", "gpt": ASSISTANT, "model": ASSISTANT}
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# Templates by name, for tokenizers that have none.
TEMPLATES = {
    # Special tokens around every turn.
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # For any tokenizer: plain text, and the end of a text after every answer.
    "plain": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ message.role | capitalize + ': ' + message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{{ '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}
# Noncharacters of Unicode, which no text may hold. ESCAPE breaks the name of a special
# token in a message; MARK stands before those that the template writes.
ESCAPE, MARK = "\ufdd0", "\ufdd1"

Message = Mapping[str, Any]
Encoded = tuple[np.ndarray, np.ndarray]  # ids int32 [L], trained bool [L]
Turns = list[tuple[str, bool]]  # a text in parts: (part, whether it is trained)


# --- Messages ---


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Messages with role and content, of a list of them, of ShareGPT's, or of JSON.

    Keys without a value are left out: tables have every key in every row. DataError if
    it is none of these.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(
                f"not a list of messages, nor JSON of one ({error}); correct it"
            ) from error
    plain = _plain(value)
    if not isinstance(plain, list) or not plain:
        raise DataError(f"{value!r:.40} is no list of messages; correct the example")
    return [_message(number, one) for number, one in enumerate(plain)]


def _message(number: int, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        found = {KEYS.get(k, k): x for k, x in value.items()}
        role = found.get("role")
        if isinstance(role, str):
            return found | {"role": ROLES.get(role, role)}
    raise DataError(
        f"message {number} is {value!r:.60}: expected an object with role and content "
        "(or from and value); correct the example"
    )


def _plain(value: Any) -> Any:
    """JSON's types alone, without keys that have no value."""
    if isinstance(value, Mapping):
        return {str(k): _plain(x) for k, x in value.items() if x is not None}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise DataError(f"{value!r:.40} is no text, number, list or object; correct it")


def contents(value: Any) -> list[str]:
    """The texts of messages: what a new tokenizer is trained on."""
    texts = (message.get("content") for message in messages_of(value))
    return [text for text in texts if isinstance(text, str)]


# --- The template's world: Jinja in a sandbox, with what published templates use ---


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: what is inside, unchanged."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Not Jinja's own, which writes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _environment(now: Callable[[str], str]) -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    env.filters["tojson"] = _json
    env.globals |= {"raise_exception": _refuse, "strftime_now": now}
    return env


# --- Text in which special tokens are marked -> ids, by kind of tokenizer ---


class _Library:
    """Of a tokenizer.json: a whole text at once, as transformers does it.

    A copy of the tokenizer in which special tokens are called MARK + name: so a name
    without a mark is text.
    """

    def __init__(self, tok: HuggingFaceTokenizer):
        content = json.loads(tok.core.to_str())
        content["post_processor"] = None  # adds tokens, and offsets without spaces
        added = content["added_tokens"]
        names = [entry["content"] for entry in added]
        self.specials = {
            entry["content"]: tok.core.token_to_id(entry["content"])
            for entry in added
            if entry["special"]
        }
        for entry in added:
            if entry["special"]:
                entry |= {"content": MARK + entry["content"], "normalized": False}
        self.core = tokenizers.Tokenizer.from_str(json.dumps(content))
        # Renamed tokens have other ids, and so may have those added after them.
        vocabulary = self.core.get_vocab()
        self.ids = np.arange(max(vocabulary.values()) + 1, dtype=np.int32)
        for name in names:
            own = MARK + name if name in self.specials else name
            self.ids[vocabulary[own]] = tok.core.token_to_id(name)

    def __call__(self, texts: Sequence[Turns]) -> list[Encoded]:
        whole = ["".join(part for part, _ in text) for text in texts]
        found = self.core.encode_batch(whole, add_special_tokens=False)
        encoded = []
        for text, one in zip(texts, found, strict=True):
            ids = self.ids[np.asarray(one.ids, np.int64)]
            starts = np.array([start for start, _ in one.offsets], np.int64)
            # A token belongs to the part in which it begins.
            ends = np.cumsum([len(part) for part, _ in text])
            part = np.searchsorted(ends[:-1], starts, side="right")
            encoded.append((ids, np.array([t for _, t in text], bool)[part]))
        return encoded


class _Parts:
    """Of other tokenizers: part by part, and special tokens between them."""

    def __init__(self, tok: Tokenizer):
        self.tok = tok
        self.specials = {tok.pieces[i]: i for i in tok.names if i < len(tok.pieces)}
        every = sorted(self.specials, key=len, reverse=True)
        self.split = re.compile(f"({MARK}(?:{'|'.join(map(re.escape, every))}))")

    def __call__(self, texts: Sequence[Turns]) -> list[Encoded]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: Turns) -> Encoded:
        ids, trained = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
        for part, is_trained in text:
            for piece in filter(None, self.split.split(part)):
                if piece.startswith(MARK):
                    found = np.array([self.specials[piece[1:]]], np.int32)
                else:
                    found = self.tok.encode_batch([piece])[0]
                ids.append(found)
                trained.append(np.full(len(found), is_trained))
        return np.concatenate(ids), np.concatenate(trained)


# --- The codec ---


class ChatTemplate:
    """Messages -> ids, and which of them the assistant writes.

    Special tokens that the template writes are such; in a message their names are
    text. Otherwise ids equal those of transformers' `apply_chat_template`.

    Args:
      tokenizer: its special tokens are `bos_token`, `eos_token` ... in the template.
      template: in Jinja.
      day: what `strftime_now` gives, "2026-01-31"; "": today.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, day: str = ""):
        self.tokenizer, self.template, self.day = tokenizer, template, day
        self.size = tokenizer.size

    @functools.cached_property
    def _tokens(self) -> _Library | _Parts:
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            return _Library(self.tokenizer)
        return _Parts(self.tokenizer)

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        def now(form: str) -> str:
            day = self.day or datetime.date.today().isoformat()
            return datetime.datetime.fromisoformat(day).strftime(form)

        try:
            return _environment(now).from_string(self.template)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"chat template, line {error.lineno}: {error.message}; correct it, or "
                f"set data.template to one of {', '.join(TEMPLATES)}"
            ) from error

    @functools.cached_property
    def _variables(self) -> dict[str, str]:
        """'bos_token' and so on, those that there are."""
        tok = self.tokenizer
        roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
        ids = {role: getattr(tok.specials, role) for role in roles}
        known = {r: i for r, i in ids.items() if i is not None and i < len(tok.pieces)}
        return {f"{role}_token": tok.pieces[i] for role, i in known.items()}

    @functools.cached_property
    def _special(self) -> re.Pattern:
        """A special token's name, but no escaped one."""
        names = sorted(self._tokens.specials, key=len, reverse=True)
        return re.compile(
            f"(?:{'|'.join(map(re.escape, names)) or '(?!)'})(?!{ESCAPE})"
        )

    def _escaped(self, value: Any) -> Any:
        if isinstance(value, str):
            if ESCAPE in value or MARK in value:
                raise DataError(
                    "a message holds U+FDD0 or U+FDD1, which are no characters; "
                    "remove them"
                )
            return self._special.sub(lambda m: m[0][0] + ESCAPE + m[0][1:], value)
        if isinstance(value, dict):
            return {k: self._escaped(x) for k, x in value.items()}
        return [self._escaped(x) for x in value] if isinstance(value, list) else value

    def _marked(self, text: str) -> str:
        return self._special.sub(lambda m: MARK + m[0], text).replace(ESCAPE, "")

    def _render(self, messages: list, tools: list | None, prompt: bool = False) -> str:
        """The text, with ESCAPE in what are no special tokens."""
        # The names under which templates ask for what was thought before an answer.
        given = []
        for message in messages:
            names = ("reasoning_content", "thinking", "reasoning")
            thought = next((message[n] for n in names if n in message), None)
            both = {} if thought is None else dict.fromkeys(names[:2], thought)
            given.append(both | message)
        try:
            return self._compiled.render(
                messages=given,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except DataError:
            raise
        except Exception as error:  # a foreign program may raise anything
            why = " ".join(f"{type(error).__name__}: {error}".split())
            # The assistant speaks first: it was asked nothing.
            count = f"{len(messages)} message{'s' * (len(messages) > 1)}"
            what = count if messages else "a prompt alone"
            raise DataError(
                f"the chat template cannot write {what} ({why:.200}); "
                "correct the example or set data.template"
            ) from error

    def render(
        self, messages: Sequence[Message], tools: Any = None, prompt: bool = False
    ) -> str:
        """The text; with `prompt` up to where the assistant's next answer begins."""
        found, tools = self._given(messages, tools)
        return self._render(found, tools, prompt).replace(ESCAPE, "")

    def _given(self, messages: Any, tools: Any) -> tuple[list, list | None]:
        return self._escaped(messages_of(messages)), self._escaped(
            _plain(tools)
        ) or None

    def turns(self, messages: Sequence[Message], tools: Any = None) -> list[Turns]:
        """What a conversation gives to read and to train on: texts in parts.

        An answer is what the template adds for it to the text that the model was given
        to answer: the messages before it, and the prompt. It ends with the last special
        token; a line break behind that is not the model's.

        Usually it is one text. Where the template writes earlier turns in another way
        once others follow (leaves out what was thought, ends the last one differently),
        the texts are several, each of them what the model reads and writes at one time;
        every answer is trained in one of them. DataError if an answer does not begin
        with the prompt for it.
        """
        given, tools = self._given(messages, tools)
        texts: list[Turns] = []
        read = ""
        for k, message in enumerate(given):
            if message["role"] != ASSISTANT:
                continue
            before = self._render(given[:k], tools, prompt=True)
            after = self._render(given[: k + 1], tools)
            if not after.startswith(before):
                raise DataError(
                    f"message {k}: the chat template prompts for it with "
                    f"{before[-30:]!r} and writes it otherwise; correct the example or "
                    "set data.template"
                )
            if texts and before.startswith(read):
                texts[-1].append((before[len(read) :], False))
            else:
                texts.append([(before, False)])
            answer, rest = self._divided(after[len(before) :])
            texts[-1] += [(answer, True), (rest, False)]
            read = after
        if not texts or given[-1]["role"] != ASSISTANT:
            whole = self._render(given, tools)
            if not texts:
                texts = [[(whole, False)]]
            elif whole.startswith(read):
                texts[-1].append((whole[len(read) :], False))
        return [[(self._marked(t), is_trained) for t, is_trained in x] for x in texts]

    def _divided(self, added: str) -> tuple[str, str]:
        """(answer with its end, blanks behind it)."""
        end = max((m.end() for m in self._special.finditer(added)), default=len(added))
        return (added, "") if added[end:].strip() else (added[:end], added[end:])

    def encode_batch(self, texts: Sequence[Turns]) -> list[Encoded]:
        """(ids int32 [L], trained bool [L]) of each of these texts."""
        return self._tokens(texts)

    def encode(self, messages: Sequence[Message], tools: Any = None) -> list[Encoded]:
        """(ids int32 [L], trained bool [L]) of a conversation, one pair or several.

        Several where the template changes earlier turns; see `turns`.
        """
        return self.encode_batch(self.turns(messages, tools))

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> np.ndarray:
        """ids int32 [L] that the assistant's next answer follows."""
        given, tools = self._given(messages, tools)
        text = self._marked(self._render(given, tools, prompt=True))
        return self.encode_batch([[(text, False)]])[0][0]

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids up to an end."""
        return self.tokenizer.decode(ids)

    def end(self) -> tuple[int, ...]:
        """The id that follows the words of an answer; () if it is no special token."""
        given = [{"role": "user", "content": "?"}]
        given.append({"role": ASSISTANT, "content": "Answer!"})
        try:
            text = self._render(given, None)
        except DataError:
            return ()  # it may want other messages
        words, _, rest = text.rpartition("Answer!")
        match = self._special.match(rest.lstrip())
        return (self._tokens.specials[match[0]],) if words and match else ()

    def digest(self) -> str:
        """Changes whenever an id of a conversation does."""
        day = self.day if "strftime_now" in self.template else ""
        parts = (self.tokenizer.digest(), self.template, day)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def save(self, directory: str) -> str:
        """Writes the template; returns the file's path."""
        path = os.path.join(directory, FILE)
        with open(path + ".tmp", "w", encoding="utf-8", newline="") as f:
            f.write(self.template)
        os.replace(path + ".tmp", path)
        return path


# --- Which template ---


def own(folder: str) -> str:
    """The template in a workdir or beside a tokenizer; '' if there is none."""
    path = os.path.join(folder, FILE)
    if os.path.exists(path):
        return _read(path)
    path = os.path.join(folder, "tokenizer_config.json")
    if not os.path.exists(path):
        return ""
    try:
        found = json.loads(_read(path)).get("chat_template") or ""
        if isinstance(found, list):  # several by name
            found = {x["name"]: x["template"] for x in found}.get("default", "")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {error}; copy the file again") from error
    return found


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}; name a text file") from error


def choose(name: str, tokenizer: Tokenizer, folder: str, day: str) -> ChatTemplate:
    """The template of that name or file; '': the folder's own, or else chatml.

    What ends its answers then ends all texts that the tokenizer decodes. DataError if
    there is none such, or the tokenizer lacks its tokens.
    """
    if name in TEMPLATES:
        text = TEMPLATES[name]
    elif name and os.path.exists(name):
        text = _read(name)
    else:
        text = own(folder) if folder else ""
        if name and not text:
            raise DataError(
                f"data.template={name!r}: no such file; expected a file in Jinja, one "
                f"of {', '.join(TEMPLATES)}, or '' for the tokenizer's own"
            )
    found = ChatTemplate(tokenizer, text or TEMPLATES["chatml"], day)
    if name:  # that of a workdir need not be used
        try:
            found._compiled  # noqa: B018
        except DataError as error:
            raise DataError(f"data.template={name!r}: {error}") from error
    if found.template == TEMPLATES["chatml"] and not found.end():
        raise DataError(
            f"data.template={name!r}: the tokenizer has no token {CHATML_TOKENS[1]!r}, "
            "with which chatml ends a turn; set data.template='plain' or name a file "
            "in Jinja"
        )
    tokenizer.end_at(found.end())
    return found
