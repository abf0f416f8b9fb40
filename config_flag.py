"""The flag --config: which experiment, and --config.KEY=VALUE for each of its values.

--config=NAME[:variant]      one of configs/*.py by name: llama:8b
--config=FILE.py[:variant]   a file with get_config(variant)
--config=WORKDIR             the config of a run that is there
"""

import dataclasses
import difflib
import importlib
import operator
import os
import re
import types
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from triform import forks
from triform import workdir as workdirs
from triform.configs import plugins
from triform.configs.schema import CHOICES, ExperimentConfig
from triform.runtime import files, paths, stores
from triform.runtime.errors import UserError

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")


def names() -> list[str]:
    """What --config=NAME may name: the files of configs/ with a get_config."""
    found = []
    for file in sorted(os.listdir(CONFIGS)):
        if file.endswith(".py"):
            with open(os.path.join(CONFIGS, file), encoding="utf-8") as f:
                if re.search(r"^def get_config\(", f.read(), re.M):
                    found.append(file.removesuffix(".py"))
    return found


def load(text: str) -> ExperimentConfig:
    """The config that --config names; its plugins are loaded. UserError if none."""
    given = f"--config={text}"
    if not text:
        raise UserError(f"--config is empty: {_choices()}")
    folder = paths.workdir(text)
    if os.path.basename(folder) == "config.json":
        folder = os.path.dirname(folder)
    if stores.is_store(folder) or os.path.isdir(folder):
        return workdirs.open_config(folder)
    file, name, variant = re.fullmatch(
        r"(?:(.+\.py)|([^:]*))(?::(.*))?", text, re.S
    ).groups()
    if file:
        module = _file(paths.absolute(file), given)
    elif name in names():
        module = importlib.import_module(f"triform.configs.{name}")
    else:
        close = difflib.get_close_matches(name, names(), 1)
        hint = f"did you mean {close[0]}?" if close else _choices()
        raise UserError(f"{given}: no such config; {hint}")
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{given}: defines no get_config(variant)")
    try:
        with plugins.one_line(module.__file__):
            config = module.get_config(*(() if variant is None else (variant,)))
    except UserError as error:
        # The choices of a variant need no line number.
        known = isinstance(error.__cause__, ValueError)
        raise UserError(f"{given}: {error.__cause__}" if known else error) from error
    if not isinstance(config, ExperimentConfig):
        kind = type(config).__name__
        raise UserError(f"{given}: get_config returned {kind}, not ExperimentConfig")
    return _with_plugins(config, module)


def _choices() -> str:
    return f"name a file, a workdir or one of {', '.join(names())}"


def _file(path: str, given: str) -> types.ModuleType:
    """The module of a config file, ours or the user's."""
    if not os.path.isfile(path):
        name = os.path.basename(path).removesuffix(".py")
        close = difflib.get_close_matches(name, names(), 1)
        hint = f"did you mean --config={close[0]}?" if close else _choices()
        raise UserError(f"{given}: no such file; {hint}")
    folder, file = os.path.split(os.path.realpath(path))
    if folder == os.path.realpath(CONFIGS):
        return importlib.import_module(f"triform.configs.{file.removesuffix('.py')}")
    return plugins.load(path)


def _with_plugins(config: ExperimentConfig, module: types.ModuleType) -> Any:
    """Plugins by full path: those beside the file, and the file itself if it is one."""
    folder = os.path.dirname(os.path.abspath(module.__file__))
    files = [os.path.join(folder, os.path.expanduser(p)) for p in config.plugins]
    if plugins.tables(module):
        files.append(os.path.abspath(module.__file__))
    config.plugins = tuple(dict.fromkeys(files))
    plugins.load_all(config)
    return config


# The flags


def define(argv: Sequence[str], known: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Defines --config and --config.KEY for every key that argv sets, in `known`.

    Returns argv without --config itself, which may stand anywhere. Without it the
    config is that of --workdir, or of the run of --fork. UserError for a config or a
    key that is not there.
    """
    argv = known.read_flags_from_files(list(argv), force_gnu=False)
    text, rest = _take(argv, "config")
    if text is None:
        workdir = _take(argv, "workdir")[0]
        if not workdir or not files.exists(os.path.join(workdir, "config.json")):
            fork = _take(argv, "fork")[0]
            workdir = forks.parse(fork)[0] if fork else ""
        if not workdir:
            raise UserError(
                f"no --config, and no --workdir of a run to go on with; {_choices()}"
            )
        text = workdir
    config = load(text)
    for key, value in _keys(rest):
        if key == "plugins":  # types of theirs may be chosen below
            config.plugins += tuple(re.findall(r"[^,()\[\]'\"]+", value))
    plugins.load_all(config)
    for key in CHOICES:
        kind, rest = _take(rest, f"config.{key}")
        if kind is not None:
            choose(config, key, kind)
    _check_sections(config, rest)
    for key, value in _keys(rest):
        check_key(config, key, value)
        if not value and isinstance(operator.attrgetter(key)(config), tuple):
            # Without a value it is empty, not a tuple of one empty text.
            bare = f"--config.{key}=", f"-config.{key}="
            rest = [f"{word}()" if word in bare else word for word in rest]
    config_flags.DEFINE_config_dataclass(
        "config", config, "The experiment.", sys_argv=rest, flag_values=known
    )
    # Without a value it is all of them.
    return ["--keys=" if word in ("--keys", "-keys") else word for word in rest]


def choose(config: ExperimentConfig, key: str, name: str) -> None:
    """Sets model, task or data to the type of that name.

    What the old value has, too, is kept. A model may be from:WORKDIR, the architecture
    of that run with the heads of this config. UserError names the choices.
    """
    if key == "model" and name.startswith("from:"):
        source = name.removeprefix("from:")
        config.model = workdirs.architecture(source, config.model)
        config.plugins += workdirs.open_config(workdirs.parse(source)[0]).plugins
        return
    kinds = {kind.__name__: kind for kind in CHOICES[key]}
    if name not in kinds:
        raise UserError(f"--config.{key}={name}: expected one of {', '.join(kinds)}")
    section = getattr(config, key)
    old = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    known = {field.name for field in dataclasses.fields(kinds[name])}
    setattr(config, key, kinds[name](**{k: x for k, x in old.items() if k in known}))


def configured(text: str, words: Sequence[str]) -> ExperimentConfig:
    """The config that --config=TEXT and --config.KEY=VALUE words make.

    UserError or flags.Error for what they cannot name or set.
    """
    known = flags.FlagValues()
    known(define(["configured", f"--config={text}", *words], known))
    plugins.load_all(known.config)
    return known.config


def value() -> ExperimentConfig:
    """The config as the flags have it, with its plugins loaded."""
    config = flags.FLAGS.config
    plugins.load_all(config)
    return config


def _take(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """(the last value of a flag, argv without it)."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        found = re.fullmatch(rf"--?{name}(?:=(.*))?", word, re.S)
        if found:
            value = next(words, "") if found[1] is None else found[1]
        else:
            rest.append(word)
    return value, rest


def _keys(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, value) of every --config.KEY=VALUE."""
    for word in argv[1:]:
        if word == "--":
            return
        if found := re.fullmatch(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", word, re.S):
            yield found[1], found[2] or ""


def _check_sections(config: Any, argv: Sequence[str]) -> None:
    """UserError for --confg.KEY, and for --KEY without 'config.'."""
    for word in argv[1:]:
        found = re.match(r"--?([a-z_]+)\.([\w.]+)", word)
        if not found or found[1] == "config":
            continue
        key = f"{found[1]}.{found[2]}"
        if difflib.get_close_matches(found[1], ["config"]):
            key = found[2]
        check_key(config, key, "")
        raise UserError(f"unknown flag {found[0]}: did you mean --config.{key}?")


def check_key(config: Any, key: str, value: str) -> None:
    """UserError with the nearest name unless `key` is one value of the config."""
    owner, path = config, key.split(".")
    for depth, name in enumerate(path):
        where = ".".join(path[:depth])
        kind = type(owner).__name__
        if not dataclasses.is_dataclass(owner):
            raise UserError(
                f"--config.{key}: {where} is a value, {owner!r}, without keys below it"
            )
        known = [field.name for field in dataclasses.fields(owner)]
        if name not in known:
            raise UserError(
                f"unknown config key {key!r}: no field {name!r} of {kind}; "
                f"{_hint(config, where, path[depth:], known)}"
            )
        owner = getattr(owner, name)
    if dataclasses.is_dataclass(owner):
        raise UserError(
            f"--config.{key}={value}: it is a section; set one of its keys, which "
            f"--keys={key} lists"
        )


def _hint(config: Any, where: str, rest: Sequence[str], known: list[str]) -> str:
    """The nearest name for rest[0]: of another section, the same, and then the end."""
    lead, every = f"{where}." if where else "", [*all_keys(config)]
    same = [key for key in every if key.endswith(f".{rest[0]}")]
    if 0 < len(same) <= 3:
        return f"did you mean {' or '.join(same)}?"
    if close := difflib.get_close_matches(rest[0], known, 1):
        return f"did you mean {lead}{close[0]}?"
    tail = [key for key in every if f".{key}".endswith(f".{rest[-1]}")]
    if 0 < len(tail) <= 3:
        return f"did you mean {' or '.join(tail)}?"
    return f"it has {', '.join(known)}"


def all_keys(config: Any, lead: str = "") -> Iterator[str]:
    """Dotted names of all values and sections."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{lead}{field.name}"
        yield key
        if dataclasses.is_dataclass(value):
            yield from all_keys(value, f"{key}.")
