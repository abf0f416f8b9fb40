"""What a source of examples is, and where corpora that are kept on disk lie."""

import dataclasses
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from triform.runtime.errors import DataError

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Source(Protocol):
    """Examples by split. All methods raise DataError for what is not there."""

    def examples(self, split: str) -> Sequence[Mapping[str, Any]]:
        """Examples by index, of which iteration reads many at once; texts are `str`."""
        ...

    def splits(self) -> tuple[str, ...]:
        """The names of its splits."""
        ...

    def fingerprint(self, split: str) -> str:
        """A string, fit for a file name, that changes whenever the examples do."""
        ...

    def classes(self, feature: str) -> tuple[str, ...]:
        """Names of the classes that a feature numbers; () if it numbers none."""
        ...

    def where(self, split: str, item: int) -> str:
        """File and line of an example; '' if it has none."""
        ...

    def report(self, split: str) -> list[str]:
        """What a reader of the log should know of a split, a line each."""
        ...


@dataclasses.dataclass(frozen=True)
class Column:
    """A column that a config reads."""

    key: str  # of the config: 'label' of data.label
    name: str
    is_text: bool = True  # else labels: numbers or names


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read; sources that are no files ignore it."""

    columns: tuple[Column, ...] = ()
    txt_example: str = "file"  # what of a text file is an example: formats.TXT_EXAMPLES
    held_out: float = 0.05  # share of each split that has no files of its own
    cache: str = ""  # folder for what is found out about files; '': nowhere


class Embedded:
    """A generator: a module with SPLITS, examples(split) and version()."""

    def __init__(
        self,
        module: types.ModuleType,
        name: str,
        data_dir: str,
        manual_dir: str,
        reading: Reading,
    ):
        self.module, self.name = module, name  # no folder: nothing is on disk

    def examples(self, split: str) -> Sequence[Mapping[str, Any]]:
        """The generated examples of a split."""
        return self.module.examples(self._checked(split))

    def splits(self) -> tuple[str, ...]:
        """The names of its splits; slices of them are not available."""
        return tuple(self.module.SPLITS)

    def fingerprint(self, split: str) -> str:
        """Versions of the generator and of its libraries."""
        return f"{self.module.version()}-{self._checked(split)}"

    def classes(self, feature: str) -> tuple[str, ...]:
        """None is named."""
        return ()

    def where(self, split: str, item: int) -> str:
        """Nowhere: it is generated."""
        return ""

    def report(self, split: str) -> list[str]:
        """Nothing."""
        return []

    def _checked(self, split: str) -> str:
        if split not in self.splits():
            raise DataError(
                f"{self.name}: split {split!r}: expected one of "
                f"{', '.join(self.splits())}"
            )
        return split


def local_copy(folder: str) -> str:
    """Path of a corpus kept beside the checkout, or '' if it is not there.

    Looks in `$TRIFORM_DATA/<folder>`, or in `../shared/data/<folder>` relative to the
    repository root when the variable is unset.
    """
    parent = os.environ.get("TRIFORM_DATA") or ROOT.parent / "shared" / "data"
    path = pathlib.Path(parent).expanduser() / folder
    return str(path) if path.is_dir() else ""
