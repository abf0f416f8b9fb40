"""ExperimentConfig: the tree of every experiment, checked and saved as one."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any

from triform.decode import DecodeConfig
from triform.input_pipeline import DataConfig
from triform.models import MODELS, EncoderDecoderConfig
from triform.models.algorithms import ALGORITHMS
from triform.models.transformer import FFNS
from triform.runtime.checkpoint import CheckpointConfig
from triform.runtime.optim import OptimConfig
from triform.runtime.partition import PLACEMENTS, MeshConfig
from triform.scoring import EvaluationConfig
from triform.tasks import TASKS, TokenPredictionConfig


@dataclass
class ExperimentConfig:
    """One experiment: an architecture, data and an objective, and how to run them."""

    model: Any = field(default_factory=EncoderDecoderConfig)  # a key of models.MODELS
    task: Any = field(default_factory=TokenPredictionConfig)  # a key of tasks.TASKS
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    placement: str = "mesh"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 100_000  # updates in all
    seed: int = 0  # of parameters, dropout and data order
    log_every: int = 100  # steps

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix in one line."""
        for name in ("model", "task", "data", "optim", "decode", "evaluation"):
            getattr(self, name).validate()
        self.checkpoint.validate()
        self.mesh.validate()
        for name in ("steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: must lie in [0, 2**32)")
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"placement={self.placement!r}: expected one of {', '.join(PLACEMENTS)}"
            )
        trunk = self.model.trunk
        for name, table in (("attention", ALGORITHMS), ("ffn", FFNS)):
            value = getattr(trunk, name)
            if callable(value):
                raise ValueError(
                    f"model.trunk.{name}={value!r}: an experiment is saved as text; "
                    "add the function to its table and give its name"
                )
            if value not in table:
                raise ValueError(
                    f"model.trunk.{name}={value!r}: expected one of {', '.join(table)}"
                )
        if self.data.max_len > trunk.max_len:
            raise ValueError(
                f"data.max_len={self.data.max_len}: must not exceed "
                f"model.trunk.max_len={trunk.max_len}; lower the one or raise the other"
            )
        if self.decode.max_len > trunk.max_len:
            raise ValueError(
                f"decode.max_len={self.decode.max_len}: must not exceed model.trunk."
                f"max_len={trunk.max_len}; lower the one or raise the other"
            )
        for length in self.data.lengths():
            if length % self.mesh.sequence:
                raise ValueError(
                    f"mesh.sequence={self.mesh.sequence}: must divide every row "
                    f"length; {length} (data.buckets, data.max_len) is not divisible"
                )
        if self.evaluation.every % self.checkpoint.every:
            raise ValueError(
                f"evaluation.every={self.evaluation.every}: must be a multiple of "
                f"checkpoint.every={self.checkpoint.every}, so that what was scored is "
                "what was saved"
            )
        most = min(self.checkpoint.keep_newest, -(-self.steps // self.checkpoint.every))
        if self.evaluation.average > most:
            raise ValueError(
                f"evaluation.average={self.evaluation.average}: must not exceed "
                f"checkpoint.keep_newest={self.checkpoint.keep_newest} nor the "
                f"checkpoints of {self.steps} steps, one every {self.checkpoint.every}"
            )
        known = (*TASKS[type(self.task)].metrics, *self.evaluation.metrics)
        if self.checkpoint.metric not in [f"eval/{name}" for name in known]:
            raise ValueError(
                f"checkpoint.metric={self.checkpoint.metric!r}: expected eval/ and one "
                f"of {', '.join(known)} (evaluation.metrics and the task's own)"
            )
        if self.data.tokenizer.lowercase and not self.evaluation.lowercase:
            raise ValueError(
                "data.tokenizer.lowercase=True: all output is lower-case and must be "
                "compared so; set evaluation.lowercase=True"
            )


# Fields that hold one of several config types, and where those are listed.
_CHOICES = {"model": MODELS, "task": TASKS}


def to_json(config: ExperimentConfig) -> str:
    """The whole config; `from_json` of it is equal."""
    tree = dataclasses.asdict(config)
    for name in _CHOICES:
        tree[name] = {"type": type(getattr(config, name)).__name__, **tree[name]}
    return json.dumps(tree, indent=2)


def from_json(text: str) -> ExperimentConfig:
    """The config that `to_json` wrote; ValueError if it has other fields than ours."""
    tree = json.loads(text)
    parts = {}
    for name, table in _CHOICES.items():
        types = {t.__name__: t for t in table}
        fields = dict(tree.pop(name))
        kind = fields.pop("type")
        if kind not in types:
            raise ValueError(
                f"{name}.type={kind!r}: expected one of {', '.join(types)}"
            )
        parts[name] = _build(types[kind], fields, name)
    return dataclasses.replace(_build(ExperimentConfig, tree, "config"), **parts)


def _build(cls: type, tree: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = set(tree) - set(hints)
    if unknown:
        raise ValueError(
            f"{where}: unknown key {sorted(unknown)[0]!r}; it was written by another "
            "version of Triform"
        )
    values = {}
    for name, value in tree.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _build(hints[name], value, f"{where}.{name}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def differences(old: ExperimentConfig, new: ExperimentConfig) -> dict[str, tuple]:
    """{'optim.learning_rate': (old, new)} for every value that differs."""

    def flat(tree: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix[:-1]: tree}
        pairs = (flat(v, f"{prefix}{k}.") for k, v in tree.items())
        return {k: v for d in pairs for k, v in d.items()}

    a, b = (flat(json.loads(to_json(c)), "") for c in (old, new))
    names = [*a, *(k for k in b if k not in a)]
    return {
        k: (a.get(k, "absent"), b.get(k, "absent"))
        for k in names
        if a.get(k, "absent") != b.get(k, "absent")
    }
