"""What can be set: every key of a config with its value, choices and meaning.

The meaning of a key is the comment beside its field in the source, or the comment lines
directly above it. The meaning of a section is the first line of its class's docstring.
The choices are those that `validate` names when it refuses a value.
"""

import ast
import copy
import dataclasses
import difflib
import functools
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from typing import Any

from triform.configs.schema import CHOICES, UNKNOWN, ExperimentConfig
from triform.runtime.errors import UserError

WIDTH = 88
_NONE = "?"  # a value that no key with choices can have


@dataclasses.dataclass(frozen=True)
class Key:
    """One value or section of a config."""

    name: str  # dotted
    value: Any
    choices: tuple[str, ...]  # () where any value of the type may be right
    meaning: str

    def __str__(self) -> str:
        shown = repr(self.value)
        if dataclasses.is_dataclass(self.value):
            shown = type(self.value).__name__
        lines = [f"{self.name} = {shown}"]
        if self.choices:
            lines.append(f"    one of {', '.join(self.choices)}")
        if self.meaning:
            lines.append(f"    {self.meaning}")
        return "\n".join(lines)


def listing(config: ExperimentConfig, section: str = "") -> list[Key]:
    """All keys below a section ("": all of the config), or the one key of that name.

    Raises UserError if there is none.
    """
    unknown = {k: 2 for k, size in config.model.sizes().items() if size == UNKNOWN}
    sound = config.resolved(unknown)
    found = [
        Key(name, value, _choices(sound, name, value), meaning)
        for name, value, meaning in _walk(config)
        if not section or f"{name}.".startswith(f"{section}.")
    ]
    if not found:
        names = [name for name, _, _ in _walk(config)]
        tops = ", ".join(field.name for field in dataclasses.fields(config))
        close = difflib.get_close_matches(section, names, 1)
        hint = f"did you mean {close[0]}?" if close else f"the first ones are {tops}"
        raise UserError(f"--keys={section}: no such key; {hint}")
    return found


def _walk(owner: Any, lead: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted name, value, meaning) of everything below."""
    for field in dataclasses.fields(owner):
        value, name = getattr(owner, field.name), f"{lead}{field.name}"
        if dataclasses.is_dataclass(value):
            about = inspect.getdoc(type(value)) or ""
            yield name, value, about.partition("\n")[0]
            yield from _walk(value, f"{name}.")
        else:
            yield name, value, meaning(type(owner), field.name)


@functools.cache
def meaning(kind: type, field: str) -> str:
    """What the source says of a field of a dataclass; '' if nothing.

    A class that only changes a default inherits it.
    """
    for owner in kind.__mro__:
        own = vars(owner).get("__annotations__", {})
        if field in own and (found := _comments(owner).get(field)):
            return found
    return ""


@functools.cache
def _comments(kind: type) -> dict[str, str]:
    """Field -> its comment, of the fields that a class itself has."""
    source = inspect.cleandoc("\n" + inspect.getsource(kind))
    beside, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("# ")
            whole = token.line.lstrip().startswith("#")
            (alone if whole else beside)[line] = text
    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        lines = range(node.lineno, node.end_lineno + 1)
        above = node.lineno
        while above - 1 in alone:
            above -= 1
        parts = [beside[n] for n in lines if n in beside]
        parts = parts or [alone[n] for n in range(above, node.lineno)]
        found[node.target.id] = " ".join(parts)
    return found


def _choices(config: ExperimentConfig, name: str, value: Any) -> tuple[str, ...]:
    if name in CHOICES:
        return tuple(kind.__name__ for kind in CHOICES[name])
    if isinstance(value, bool):
        return ("True", "False")
    if not isinstance(value, str):
        return ()
    changed = copy.deepcopy(config)
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, changed)
    try:
        setattr(owner, last, _NONE)
        changed.validate()
    except dataclasses.FrozenInstanceError:
        return ()
    except (ValueError, KeyError) as error:
        found = re.search(r"expected one of (.+?)(?:$|[;:(])", str(error))
        if found and f"{last}={_NONE!r}" in str(error):
            return tuple(x.strip(" '\"") for x in found[1].split(","))
    return ()
