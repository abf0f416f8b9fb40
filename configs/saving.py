"""Trees of dataclasses as JSON values, and back."""

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any

Choices = Mapping[str, Iterable[type]]  # field at the top -> the types it may hold


def tree_of(value: Any, hint: Any) -> Any:
    """Dictionaries and lists; a dataclass whose type `hint` leaves open has "type"."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        tree = {
            f.name: tree_of(getattr(value, f.name), hints[f.name])
            for f in dataclasses.fields(value)
        }
        return tree if type(value) is hint else {"type": type(value).__name__, **tree}
    if isinstance(value, tuple | list):
        items = zip(value, _item_hints(hint, len(value)), strict=True)
        return [tree_of(x, h) for x, h in items]
    return value


def from_tree(tree: Any, hint: Any, choices: Choices, where: str = "") -> Any:
    """The inverse of `tree_of`; `where` is the key of the tree in the config.

    Raises ValueError on unknown keys and types.
    """
    if isinstance(tree, list):
        items = zip(tree, _item_hints(hint, len(tree)), strict=True)
        return tuple(from_tree(x, h, choices, where) for x, h in items)
    if not isinstance(tree, dict):
        return tree
    fields = dict(tree)
    if not dataclasses.is_dataclass(hint) or "type" in fields:
        types, kind = _types(hint, choices, where), fields.pop("type", None)
        if kind not in types:
            expected = ", ".join(types)
            raise ValueError(f"{where}.type={kind!r}: expected one of {expected}")
        hint = types[kind]
    names = [f.name for f in dataclasses.fields(hint)]
    if unknown := sorted(set(fields) - set(names)):
        raise ValueError(
            f"{where or 'config'}: unknown key {unknown[0]!r}; it was written by "
            "another version of Triform"
        )
    hints, prefix = typing.get_type_hints(hint), f"{where}." if where else ""
    values = {
        name: from_tree(value, hints[name], choices, prefix + name)
        for name, value in fields.items()
    }
    return hint(**values)


def _types(hint: Any, choices: Choices, where: str) -> dict[str, type]:
    """Name -> type of what a field may hold."""
    known = [t for types in choices.values() for t in types]
    if hint is Any:
        known = [*choices.get(where, known)]
    elif isinstance(hint, type):
        known = [t for t in known if issubclass(t, hint)]
    return {t.__name__: t for t in known}


def _item_hints(hint: Any, count: int) -> list[Any]:
    """The hints of `count` items of a tuple."""
    arguments = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return [arguments[0]] * count
    return [*arguments, *[Any] * count][:count]
