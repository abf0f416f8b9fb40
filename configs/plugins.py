"""Plugins: Python files outside the repository, whose tables join those of the product.

A plugin holds literal tables with names from TABLES, such as FFNS = {"relu2": ...}.
`config.plugins` names the files. A run keeps copies of them, with checksums, in
workdir/code; every program that opens the workdir later loads the copies.
"""

import dataclasses
import difflib
import functools
import hashlib
import os
import shlex
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from triform.data.datasets import DATASETS
from triform.data.sources import SOURCES, Source
from triform.models import MODELS
from triform.models.algorithms import ALGORITHMS, STATES
from triform.models.blocks import BLOCKS
from triform.models.feed_forward import FFNS
from triform.models.layers import INITS
from triform.models.patterns import PATTERNS
from triform.models.positions import POSITIONS
from triform.runtime import paths, stores
from triform.runtime.errors import TriformError, UserError
from triform.runtime.optim import OPTIMIZERS, SCHEDULES
from triform.scores import SCORES
from triform.tasks import TASKS

# The tables that a plugin may have, by the name that both call them. Rows are found by
# a name, or by the type of a config, whose name counts.
TABLES: dict[str, dict] = {
    "ALGORITHMS": ALGORITHMS,
    "BLOCKS": BLOCKS,
    "DATASETS": DATASETS,
    "FFNS": FFNS,
    "INITS": INITS,
    "MODELS": MODELS,
    "OPTIMIZERS": OPTIMIZERS,
    "PATTERNS": PATTERNS,
    "POSITIONS": POSITIONS,
    "SCHEDULES": SCHEDULES,
    "SCORES": SCORES,
    "SOURCES": SOURCES,
    "STATES": STATES,
    "TASKS": TASKS,
}
CODE = "code"  # folder of a workdir
SUMS = "SHA256SUMS"  # as the program sha256sum writes and checks it


@dataclasses.dataclass
class Plugin:
    """A file that was loaded."""

    path: str
    digest: str  # SHA-256 of the file
    module: types.ModuleType
    rows: set[str]  # names that it adds to tables
    needs: list[str]  # paths of the plugins that it loads

    @property
    def name(self) -> str:
        """The name of the file: a process holds one plugin of a name."""
        return os.path.basename(self.path)


_loaded: dict[str, Plugin] = {}  # by name
_loading: list[list[str]] = []  # `needs` of the files that are executed now


def load(path: str, beside: str = "") -> types.ModuleType:
    """The module of a plugin; its tables are merged when it is loaded first.

    Args:
      path: a Python file; relative to the folder of `beside`, else to the present one.
      beside: usually the `__file__` of the config or plugin that needs it.

    Raises UserError for a file that is not there or fails, for a row that is taken, and
    for another version of a file that this process has loaded.
    """
    folder = os.path.dirname(os.path.abspath(beside)) if beside else os.getcwd()
    path = os.path.abspath(os.path.join(folder, os.path.expanduser(path)))
    if _loading:
        _loading[-1].append(path)
    return _load(path).module


def _load(path: str) -> Plugin:
    name = os.path.basename(path)
    stem, end = os.path.splitext(name)
    if end != ".py" or not stem.isidentifier():
        raise UserError(f"plugin {path}: must be a Python file, NAME.py; rename it")
    try:
        with open(path, "rb") as f:
            text = f.read()
    except OSError as error:
        raise UserError(f"plugin {path}: {error.strerror}; name a file") from error
    digest, known = hashlib.sha256(text).hexdigest(), _loaded.get(name)
    if known is not None:
        if known.digest != digest:
            raise UserError(_two_versions(path, known.path))
        return known
    module = types.ModuleType(f"triform_plugin_{stem}")
    module.__file__ = path
    plugin = Plugin(path, digest, module, set(), [])
    # Dataclasses and type hints look their module up there.
    sys.modules[module.__name__] = module
    _loaded[name] = plugin
    _loading.append(plugin.needs)
    try:
        with one_line(path):
            code = compile(text, path, "exec", dont_inherit=True)
            exec(code, module.__dict__)
        _merge(plugin)
    except BaseException:
        del sys.modules[module.__name__], _loaded[name]
        raise
    finally:
        _loading.pop()
    return plugin


class one_line:
    """Turns any error of a user's file into a UserError with file and line."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, TriformError):
            return
        line, text = 0, str(error)
        if isinstance(error, SyntaxError):
            line, text = error.lineno or 0, error.msg
        elif found := [
            frame.lineno
            for frame in traceback.extract_tb(trace)
            if frame.filename == self.path
        ]:
            line = found[-1]
        where = f"{self.path}:{line}" if line else self.path
        text = " ".join(text.split())
        if isinstance(error, ModuleNotFoundError):
            text += "; a file beside it is loaded by plugins.load('NAME.py', __file__)"
        raise UserError(f"{where}: {type(error).__name__}: {text}") from error


def _two_versions(new: str, old: str) -> str:
    text = (
        f"plugin {os.path.basename(new)}: {new} is another version than {old}, which "
        "this process uses"
    )
    saved = [p for p in (new, old) if os.path.basename(os.path.dirname(p)) == CODE]
    if len(saved) != 1:
        return f"{text}; start a new process, or give one of them another name"
    other, folder = old if saved[0] == new else new, os.path.dirname(saved[0])
    accept = f"cp {shlex.quote(other)} {shlex.quote(saved[0])} && {_resum(folder)}"
    return (
        f"{text}; name another workdir, or only the workdir to go on with its own "
        f"version, or take the other into it: {accept}"
    )


def _resum(folder: str) -> str:
    return f"(cd {shlex.quote(folder)} && sha256sum *.py > {SUMS})"


# Tables


def _name(row: Any) -> str:
    return row.__name__ if isinstance(row, type) else row


def tables(module: types.ModuleType) -> dict[str, dict]:
    """The tables that a module holds itself, by name; UserError for a wrong one."""
    found = {}
    for name, value in vars(module).items():
        if not isinstance(value, dict) or not name.isupper():
            continue
        close = difflib.get_close_matches(name, TABLES, 1, 0.8)
        if name in TABLES:
            if value is not TABLES[name]:  # else imported from the product
                found[name] = value
        elif close:
            raise UserError(
                f"plugin {module.__file__}: {name}: no such table; did you mean "
                f"{close[0]}? (tables: {', '.join(TABLES)})"
            )
    return found


def _merge(plugin: Plugin) -> None:
    """Adds the rows of a plugin to the product's tables: all of them, or none."""
    found = tables(plugin.module)
    for table, rows in found.items():
        taken = {_name(row) for row in TABLES[table]}
        for row in map(_name, rows):
            if row in taken:
                owner = next((p.path for p in _loaded.values() if row in p.rows), "")
                raise UserError(
                    f"plugin {plugin.path}: {table}[{row!r}]: "
                    f"{owner or 'Triform itself'} has a row of this name; rename it"
                )
    for table, rows in found.items():
        if table == "SOURCES":
            rows = {k: functools.partial(_Keyed, x, plugin) for k, x in rows.items()}
        TABLES[table].update(rows)
        plugin.rows |= set(map(_name, rows))


class _Keyed:
    """A plugin's source, whose fingerprints change with the plugin's file.

    So neither cached arrays nor a run that goes on can mix two versions of it.
    """

    def __init__(self, make: Callable[..., Source], plugin: Plugin, *args: str):
        self._source, self._digest = make(*args), plugin.digest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def fingerprint(self, split: str) -> str:
        """That of the source, and which version of the plugin it is."""
        return f"{self._source.fingerprint(split)}-{self._digest[:16]}"


# The plugins of a config and of a workdir


def closure(files: Iterable[str]) -> list[Plugin]:
    """These plugins, loaded, and all that they load; UserError if two have one name."""
    found: dict[str, Plugin] = {}
    waiting = [paths.absolute(path) for path in files]
    for path in waiting:
        plugin = _load(path)
        if plugin.name not in found:
            found[plugin.name] = plugin
            waiting += plugin.needs
    return [*found.values()]


def load_all(config: Any) -> None:
    """Loads the plugins of a config and names them, with what they load, by full path.

    Raises UserError if the config uses rows of a plugin that it does not name.
    """
    used = closure(config.plugins)
    config.plugins = tuple(plugin.path for plugin in used)
    named = {plugin.name for plugin in used}
    for key, value in _values(config):
        for plugin in _loaded.values():
            # Patterns are "NAME:NUMBER".
            known = {value, value.partition(":")[0]} & plugin.rows
            if known and plugin.name not in named:
                raise UserError(
                    f"{key}={value}: it is in {plugin.path}, which config.plugins does "
                    "not name; add it"
                )


def _values(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text or name of a type) of everything in a config."""
    if dataclasses.is_dataclass(config):
        yield key, type(config).__name__
        for field in dataclasses.fields(config):
            below = f"{key}.{field.name}" if key else field.name
            yield from _values(getattr(config, field.name), below)
    elif isinstance(config, tuple | list):
        for value in config:
            yield from _values(value, key)
    elif isinstance(config, str):
        yield key, config


def save(files: Iterable[str], workdir: str) -> None:
    """Copies the plugins into a workdir, with their checksums."""
    used = closure(files)
    if not used:
        return
    folder = os.path.join(workdir, CODE)
    os.makedirs(folder, exist_ok=True)
    for plugin in used:
        target = os.path.join(folder, plugin.name)
        if not os.path.exists(target):
            with open(plugin.path, "rb") as f:
                text = f.read()
            if hashlib.sha256(text).hexdigest() != plugin.digest:
                raise UserError(
                    f"plugin {plugin.path}: it was changed after it was loaded; start "
                    "again"
                )
            _write(target, text)
    sums = [f"{plugin.digest}  {plugin.name}\n" for plugin in used]
    _write(os.path.join(folder, SUMS), "".join(sums).encode())


def _write(path: str, text: bytes) -> None:
    with open(f"{path}.tmp", "wb") as f:
        f.write(text)
    os.replace(f"{path}.tmp", path)


def saved(workdir: str, names: Iterable[str]) -> tuple[str, ...]:
    """Full paths of the plugins of a workdir, by name, loaded.

    Raises UserError if one is gone, was edited, or differs from what is loaded.
    """
    folder = os.path.join(os.path.abspath(stores.local(workdir)), CODE)
    sums = _sums(folder) if (names := tuple(names)) else {}
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.exists(path) or name not in sums:
            raise UserError(
                f"{path}: the run's plugin or its line in {SUMS} is gone; restore it"
            )
        with open(path, "rb") as f:
            digest = hashlib.sha256(f.read()).hexdigest()
        if digest != sums[name]:
            raise UserError(
                f"{path}: the run's plugin was edited; restore it, or accept the "
                f"change: {_resum(folder)}"
            )
    return tuple(_load(os.path.join(folder, name)).path for name in names)


def _sums(folder: str) -> Mapping[str, str]:
    """Name -> digest of the files of a folder, as its list of checksums has them."""
    try:
        with open(os.path.join(folder, SUMS), encoding="utf-8") as f:
            lines = [line.split(maxsplit=1) for line in f if line.strip()]
        return {name.strip().lstrip("*"): digest for digest, name in lines}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/{SUMS}: cannot be read; restore it") from error
