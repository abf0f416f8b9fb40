"""Which runs one program can train together: the settings that may differ."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from triform.configs import schema
from triform.configs.schema import ExperimentConfig
from triform.runtime.errors import TriformError

# Settings that a program may take as inputs: those that are only computed with,
PLAIN = (
    "seed|steps",
    r"optim\.(learning_rate|warmup_steps|floor|b1|b2|eps|weight_decay)",
)
# and those that Python asks about first, `if rate` (see runtime/traced.py).
ASKED = (
    r"optim\.(clip_norm|ema_decay)",
    r"model\.(.*\.)?(dropout|attention_dropout)",
    r"task\.(label_smoothing|z_loss|latent_penalty)",
    r"task\.(label_share|teacher_share|temperature)",
)
TRACED = (*PLAIN, *ASKED)
# Of these, 0 leaves a part of the program out: it and another number are two programs.
SWITCHES = (r"optim\.(clip_norm|ema_decay)", r"model\.(.*\.)?attention_dropout")
# Settings that no program depends on, if batches have the same shapes.
HOST = (
    r"(data|decode|checkpoint|evaluation)\..*|evaluations|init|init_from|log_every|"
    r"recovery\.(spike|window|leave_out|most)"
)
# Errors of a config that is none.
NOT_VALID = (TriformError, ValueError, TypeError, AttributeError)


@dataclasses.dataclass
class Group:
    """Runs that one program trains, as positions in the list that was asked for."""

    members: list[int]
    inputs: tuple[str, ...]  # keys whose values differ, which the program takes
    apart: str = ""  # why they are not with the group before, one line


def groups(members: Sequence[tuple[ExperimentConfig, str]]) -> list[Group]:
    """All members, divided into groups that can be trained in one program each."""
    found: dict[Any, list[int]] = {}
    trees = [schema.flat(_resolved(config)) for config, _ in members]
    for index, (config, _) in enumerate(members):
        found.setdefault(_program(config, trees[index], index), []).append(index)
    result: list[Group] = []
    for program, indices in found.items():
        first = trees[indices[0]]
        inputs = tuple(
            key
            for key in first
            if matches(TRACED, key)
            and any(trees[i][key] != first[key] for i in indices)
        )
        apart = ""
        if isinstance(program, int) and first["placement"] == "mesh":
            apart = "its config is not valid"
        elif result:
            apart = _difference(trees[result[0].members[0]], first)
        result.append(Group(indices, inputs, apart))
    return result


def _resolved(config: ExperimentConfig) -> ExperimentConfig:
    try:
        return config.resolved()
    except NOT_VALID:
        return config


def _program(config: ExperimentConfig, tree: Mapping[str, Any], index: int) -> Any:
    """What is equal for runs that one program can train."""
    kept = {k: x for k, x in tree.items() if not matches((*TRACED, HOST), k)}
    kept |= {k: bool(x) for k, x in tree.items() if matches(SWITCHES, k)}
    try:
        shapes = config.data.shapes()
        rows = [config.data.rows(shape) for shape in shapes]
        kept["batches"] = [repr(config.data.spec()), shapes, rows]
        config.resolved()
    except NOT_VALID:
        return index  # its run will say so
    if config.placement != "mesh":
        return index
    return json.dumps(kept, sort_keys=True, default=str)


def _difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Why two runs are two programs."""
    if other["placement"] != "mesh":
        return f"placement={other['placement']!r}: only runs on a mesh train together"
    data = []
    for key in {**first, **other}:
        ours, theirs = (x.get(key, "absent") for x in (other, first))
        if ours == theirs:
            continue
        switched = matches(SWITCHES, key) and bool(ours) != bool(theirs)
        if switched or not matches((*TRACED, HOST), key):
            return f"{key}={ours!r}, which is {theirs!r} in the first group"
        if key.startswith("data."):
            data.append(f"{key}={ours!r}")
    return f"its batches have other shapes than the first group's: {', '.join(data)}"


def matches(patterns: Sequence[str], key: str) -> bool:
    """Is a setting among these?"""
    return any(re.fullmatch(pattern, key) for pattern in patterns)
