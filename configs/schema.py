"""ExperimentConfig: the tree of every experiment, checked and saved as one."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any

from triform.data.datasets import DATASETS, Dataset, Seq2SeqConfig, empty
from triform.models import MODELS, EncoderDecoderConfig
from triform.models.algorithms import ALGORITHMS, options
from triform.models.attention import INITS
from triform.models.decode import DecodeConfig
from triform.models.transformer import FFNS
from triform.runtime.checkpoint import CheckpointConfig
from triform.runtime.optim import OptimConfig
from triform.runtime.partition import PLACEMENTS, MeshConfig
from triform.scores.text import EvaluationConfig
from triform.tasks import TASKS, TokenPredictionConfig


@dataclass
class ExperimentConfig:
    """One experiment: an architecture, data and an objective, and how to run them."""

    model: Any = field(default_factory=EncoderDecoderConfig)  # a key of models.MODELS
    task: Any = field(default_factory=TokenPredictionConfig)  # a key of tasks.TASKS
    data: Any = field(default_factory=Seq2SeqConfig)  # a key of datasets.DATASETS
    optim: OptimConfig = field(default_factory=OptimConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # Parameters to start from: a workdir, or WORKDIR:best|latest|average:K|STEP.
    init_from: str = ""
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
        self._validate_trunk()
        self._validate_fit()
        self._validate_evaluation()

    def _validate_trunk(self) -> None:
        trunk = self.model.trunk
        for name, table in (("attention", ALGORITHMS), ("ffn", FFNS), ("init", INITS)):
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
        if trunk.attention == "local" and not any(trunk.windows):
            raise ValueError(
                f"model.trunk.attention='local': it looks at windows, and "
                f"model.trunk.windows={trunk.windows}; set them, (256,) say, or choose "
                "'flash'"
            )
        known = options(ALGORITHMS[trunk.attention])
        for name in trunk.options():
            if name not in known:
                raise ValueError(
                    f"model.trunk.attention_options={trunk.attention_options!r}: "
                    f"attention={trunk.attention!r} has no option {name!r}; it has "
                    f"{', '.join(known) or 'none'}"
                )

    def _validate_fit(self) -> None:
        """Do data, model and task speak of the same things?"""
        longest = self.model.longest()
        for name, length in (
            ("data.max_len", max(self.data.lengths())),
            ("decode.max_len", self.decode.max_len),
        ):
            if length > longest:
                raise ValueError(
                    f"{name}={length}: must not exceed {longest}, the longest row of "
                    "the model (model.trunk.max_len); lower the one or raise the other"
                )
        limits = self.model.limits()
        has = empty(self.data, 1, self.data.lengths()[0], limits).keys()
        task = TASKS[type(self.task)]
        if "global_attention_mask" in has and not any(self.model.trunk.windows):
            raise ValueError(
                f"data.global_tokens={self.data.global_tokens!r}: without windows all "
                "places see all; set model.trunk.windows or 'none'"
            )
        for part, wanted in (("model", self.model.reads), ("task", task.predicts)):
            if missing := [key for key in wanted if key not in has]:
                kind = type(getattr(self, part)).__name__
                raise ValueError(
                    f"data={type(self.data).__name__}: its batches hold "
                    f"{', '.join(has)}, but {part}={kind} needs {missing[0]!r}; choose "
                    "data and model that fit"
                )
        for key in task.predicts:
            if key not in limits:
                raise ValueError(
                    f"task={type(self.task).__name__}: it predicts {key!r}, for which "
                    f"model={type(self.model).__name__} has no head; set the model's "
                    "heads or choose another task"
                )
        for length in self.data.lengths():
            if length % self.mesh.sequence:
                raise ValueError(
                    f"mesh.sequence={self.mesh.sequence}: must divide every row "
                    f"length; {length} (data.buckets, data.max_len) is not divisible"
                )

    def _validate_evaluation(self) -> None:
        silent = DATASETS[type(self.data)].text is Dataset.text
        if self.evaluation.metrics and silent:
            raise ValueError(
                f"evaluation.metrics={self.evaluation.metrics}: they compare generated "
                f"text, and data={type(self.data).__name__} has no references; set ()"
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
        known = (
            *TASKS[type(self.task)].metrics,
            *DATASETS[type(self.data)].metrics,
            *self.evaluation.metrics,
        )
        if self.checkpoint.metric not in [f"eval/{name}" for name in known]:
            raise ValueError(
                f"checkpoint.metric={self.checkpoint.metric!r}: expected eval/ and one "
                f"of {', '.join(known)} (the task's, the data's and evaluation.metrics)"
            )
        if (
            self.evaluation.metrics
            and self.data.tokenizer.lowercase
            and not self.evaluation.lowercase
        ):
            raise ValueError(
                "data.tokenizer.lowercase=True: all output is lower-case and must be "
                "compared so; set evaluation.lowercase=True"
            )


# Fields that hold one of several config types, and where those are listed.
_CHOICES = {"model": MODELS, "task": TASKS, "data": DATASETS}


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
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = _build(hint, value, f"{where}.{name}")
        if isinstance(value, list):
            of = next(iter(typing.get_args(hint)), None)
            if dataclasses.is_dataclass(of):
                value = [_build(of, x, f"{where}.{name}") for x in value]
            value = tuple(value)
        values[name] = value
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
