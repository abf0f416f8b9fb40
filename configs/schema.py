"""ExperimentConfig: the tree of every experiment, checked and saved as one.

An experiment file imports everything it needs from here.
"""

import copy
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from triform.configs import saving
from triform.configs.variants import adapters, smoke, update, vary
from triform.data.batch import Field
from triform.data.codecs.text import TokenizerConfig
from triform.data.datasets import (
    DATASETS,
    CausalLMConfig,
    ConversationsConfig,
    Corpus,
    Dataset,
    ImagesConfig,
    MaskedLMConfig,
    MixtureConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
    SpanCorruptionConfig,
    TokenClassificationConfig,
)
from triform.data.sources import absolute
from triform.models import (
    MODELS,
    EncoderConfig,
    EncoderDecoderConfig,
    LanguageModelConfig,
    LoRAConfig,
    VisionConfig,
)
from triform.models.algorithms import ALGORITHMS, options
from triform.models.blocks import BLOCKS
from triform.models.config import ModelConfig, RopeConfig, TransformerConfig
from triform.models.decode import DecodeConfig
from triform.models.feed_forward import FFNS
from triform.models.layers import INITS
from triform.models.positions import POSITIONS
from triform.runtime import paths
from triform.runtime.checkpoint import CheckpointConfig
from triform.runtime.guard import RecoveryConfig
from triform.runtime.optim import OptimConfig
from triform.runtime.partition import BATCH_AXES, PLACEMENTS, MeshConfig
from triform.scores.text import SCORES, EvaluationConfig
from triform.tasks import (
    TASKS,
    ClassificationConfig,
    PretrainingConfig,
    RegressionConfig,
    TokenPredictionConfig,
)

__all__ = [
    "CausalLMConfig",
    "CheckpointConfig",
    "ClassificationConfig",
    "ConversationsConfig",
    "Corpus",
    "DecodeConfig",
    "EncoderConfig",
    "EncoderDecoderConfig",
    "EvaluationConfig",
    "EvaluationSplit",
    "ExperimentConfig",
    "ImagesConfig",
    "InitRule",
    "LanguageModelConfig",
    "LoRAConfig",
    "MaskedLMConfig",
    "MeshConfig",
    "MixtureConfig",
    "OptimConfig",
    "PretrainingConfig",
    "RecoveryConfig",
    "RegressionConfig",
    "RopeConfig",
    "Seq2SeqConfig",
    "SequenceClassificationConfig",
    "SpanCorruptionConfig",
    "TokenClassificationConfig",
    "TokenPredictionConfig",
    "TokenizerConfig",
    "TransformerConfig",
    "VisionConfig",
    "adapters",
    "differences",
    "from_json",
    "smoke",
    "to_json",
    "update",
    "vary",
]

UNKNOWN = -1  # a number of classes that is left to the data
# Axis letter -> settings of the data, and of the model, that decide its size: what
# messages name.
SETTINGS = {
    "L": (("max_len",), "trunk.max_len"),
    "S": (("max_source_len", "max_len"), "trunk.max_len"),
    "H": (("size",), "image_size"),
    "W": (("size",), "image_size"),
    "C": (("channels",), "channels"),
}


@dataclass(frozen=True)
class InitRule:
    """Which parameters of another run initialise which of this one."""

    source: str  # a workdir, or WORKDIR:best|latest|average:K|STEP
    # (regular expression, replacement), in order: from saved names to ours.
    rename: tuple[tuple[str, str], ...] = ()
    only: str = ".*"  # regular expression of our names, searched after renaming

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        if not self.source:
            raise ValueError("init: source='' in a rule: name a workdir")
        for pattern in (*(old for old, _ in self.rename), self.only):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"init: {pattern!r} is no regular expression ({error}); correct it"
                ) from error


@dataclass(frozen=True)
class EvaluationSplit:
    """One more evaluation of a run, besides that of data.eval_split."""

    name: str  # prefix of its metrics: 'name/loss'
    split: str
    source: str = ""  # '': the source of the training data
    scores: tuple[str, ...] = ()  # names in scores.SCORES; (): losses only

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        if not re.fullmatch(r"\w+", self.name) or self.name in ("train", "test"):
            raise ValueError(
                f"evaluations: name={self.name!r}: must be a word, other than train "
                "and test, which are taken"
            )
        if not self.split:
            raise ValueError(f"evaluations: {self.name} has split='': name a split")
        if unknown := [name for name in self.scores if name not in SCORES]:
            raise ValueError(
                f"evaluations: {self.name} has scores={self.scores}: {unknown[0]!r} is "
                f"unknown, expected some of {', '.join(SCORES)}"
            )


@dataclass
class ExperimentConfig:
    """One experiment: an architecture, data and an objective, and how to run them."""

    model: Any = field(default_factory=EncoderDecoderConfig)  # a key of models.MODELS
    task: Any = field(default_factory=TokenPredictionConfig)  # a key of tasks.TASKS
    data: Any = field(default_factory=Seq2SeqConfig)  # a key of datasets.DATASETS
    optim: OptimConfig = field(default_factory=OptimConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    evaluations: tuple[EvaluationSplit, ...] = ()  # evaluations on more splits
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    # Initial parameters: WORKDIR or WORKDIR:best|latest|average:K|STEP; '': random.
    init_from: str = ""
    init: tuple[InitRule, ...] = ()  # in place of init_from: several runs, by name
    placement: str = "mesh"  # mesh: jit over a device mesh; pmap
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 100_000  # total number of updates
    seed: int = 0  # of initial parameters, dropout and data order
    plugins: tuple[str, ...] = ()  # Python files with your own components
    log_every: int = 100  # steps between progress lines
    log_norms: bool = False  # log norms of gradients, parameters, updates per layer

    def needs_classes(self) -> bool:
        """Whether `resolved` needs the data: a number of classes is left to them."""
        return UNKNOWN in self.model.sizes().values()

    def resolved(self, classes: Mapping[str, int] | None = None) -> "ExperimentConfig":
        """A copy in which values that are left to the data are set, and paths absolute.

        These are trunk.max_len=0, an image's image_size=0 and channels=0, and numbers
        of classes of -1. `classes` holds the latter by name: {"num_labels": 150}. What
        remains open, `validate` refuses.
        """
        config = copy.deepcopy(self)
        config.data.make_absolute()
        config.evaluations = tuple(
            replace(x, source=absolute(x.source)) for x in config.evaluations
        )
        config.init_from = self.init_from and paths.workdir(self.init_from)
        config.init = tuple(
            replace(x, source=x.source and paths.workdir(x.source)) for x in self.init
        )
        try:
            config.data.validate()
        except ValueError:
            return config  # `validate` raises it again
        config.model.derive(_longest_rows(config.data), classes or {})
        return config

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix in one line."""
        self.data.validate()
        self.task.validate()
        self._validate_fields()
        for name, size in self.model.sizes().items():
            if size == UNKNOWN:
                raise ValueError(
                    f"{_key(self.model, name)}={size}: the number of classes is left "
                    "to the data, which were not read; give the number"
                )
        parts = ("model", "optim", "decode", "evaluation", "checkpoint", "recovery")
        for name in (*parts, "mesh"):
            getattr(self, name).validate()
        for name in ("steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: must lie in [0, 2**32)")
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"placement={self.placement!r}: expected one of {', '.join(PLACEMENTS)}"
            )
        if self.init_from and self.init:
            raise ValueError(
                f"init_from={self.init_from!r}: init has rules, too; set only one"
            )
        for rule in self.init:
            rule.validate()
        for path, trunk in self.model.trunks().items():
            _validate_trunk(trunk, f"model.{path}")
        self._validate_predictions()
        self._validate_shapes()
        self._validate_evaluation()
        self._validate_checkpoint()

    def _validate_fields(self) -> None:
        """Do the batches have the fields that model and task read?"""
        spec = self.data.spec()
        reads = self.model.reads()
        wanted = (
            *(("model", name) for name in reads),
            *(("task", name) for name in TASKS[type(self.task)].fields),
        )
        for part, name in wanted:
            if name not in spec:
                kind = type(getattr(self, part)).__name__
                raise ValueError(
                    f"data={type(self.data).__name__}: its batches hold "
                    f"{', '.join(spec)}, but {part}={kind} needs {name!r}; choose "
                    f"data and {part} that fit"
                )
        for name, (axes, dtype) in reads.items():
            if (spec[name].axes, spec[name].dtype) != (axes, dtype):
                raise ValueError(
                    f"data={type(self.data).__name__}: its {name!r} is "
                    f"{spec[name].dtype} {list(spec[name].axes)}, but "
                    f"model={type(self.model).__name__} reads {dtype} {list(axes)}; "
                    "choose data and model that fit"
                )

    def _validate_predictions(self) -> None:
        """Has the model the outputs that the task compares with fields of the data?"""
        outputs, spec = self.model.outputs(), self.data.spec()
        for name in TASKS[type(self.task)].needs:
            if name not in outputs:
                raise ValueError(
                    f"task={type(self.task).__name__}: it needs the output {name!r}, "
                    f"and model={type(self.model).__name__} has "
                    f"{', '.join(outputs) or 'none'}; set the sizes of the model's "
                    "heads or choose another task"
                )
            size = outputs[name]
            if name in spec and size:
                self._validate_kind(name, spec[name])
            if name in spec and size and not self._comparable(spec[name], size):
                below, key = spec[name].below, _key(self.model, size)
                what = f"ids below {below}" if below else "numbers"
                fix = "" if below else f"set {key}=1 for numbers, or "
                raise ValueError(
                    f"{key}={self.model.sizes().get(size, 0)}: its output {name!r} is "
                    f"one of so many classes, and data={type(self.data).__name__} has "
                    f"{what}; {fix}choose data, model and task that fit"
                )

    def _validate_kind(self, name: str, true: Field) -> None:
        """Does the task predict a class where the data have one, else a number?"""
        task, number = type(self.task), name in TASKS[type(self.task)].numbers
        if number == (not true.below and true.axes[-1] in BATCH_AXES):
            return
        kinds = ("numbers", "classes") if number else ("classes", "numbers")
        fix = "choose data and task that fit"
        if hasattr(self.data, "target"):
            target = "number" if number else "class"
            fix = f"set data.target={target!r}, or {fix}"
        raise ValueError(
            f"task={task.__name__}: it predicts {kinds[0]}, and data="
            f"{type(self.data).__name__} has {kinds[1]} in {name!r}; {fix}"
        )

    def _comparable(self, true: Field, size: str) -> bool:
        """Does an output whose last axis has the size of that name predict a field?"""
        count = self.model.sizes().get(size, 0)
        if isinstance(true.below, str):
            return true.below == size
        if true.below:
            return true.below <= count
        last = true.axes[-1]  # of distributions and vectors
        vectors = last not in BATCH_AXES
        return count == 1 or (vectors and self.data.shapes()[0][last] in (size, count))

    def _validate_shapes(self) -> None:
        """Do rows of the data fit into the model and onto the mesh?"""
        rows, longest = _longest_rows(self.data), self.model.longest()
        for axis, limit in longest.items():
            ours, theirs = self._settings(axis)
            given = [(ours, rows.get(axis, 0), f"; {theirs}=0 follows the data")]
            if axis == "L" and self.model.generates():
                given.append(("decode.max_len", self.decode.max_len, ""))
            for name, length, hint in given:
                if length > limit:
                    raise ValueError(
                        f"{name}={length}: must not exceed {limit}, the longest row of "
                        f"the model ({theirs}); lower the one or raise the other{hint}"
                    )
        for axis, size in self.model.axes().items():
            if rows.get(axis) != size:
                ours, theirs = self._settings(axis)
                raise ValueError(
                    f"{theirs}={size}: must equal {ours}={rows.get(axis)}; set one to "
                    f"the other, or {theirs}=0, which follows the data"
                )
        for shape in self.data.shapes():
            for axis, length in shape.items():
                split = "sequence" in BATCH_AXES.get(axis, ())
                if split and length % self.mesh.sequence:
                    raise ValueError(
                        f"mesh.sequence={self.mesh.sequence}: must divide every row "
                        f"length; {length} (data.buckets, {self._settings(axis)[0]}) "
                        "is not divisible"
                    )
        # Where all positions see all, nothing would read them.
        chosen = getattr(self.data, "global_tokens", "none")
        trunks = self.model.trunks().values()
        if chosen != "none" and not any((*t.windows, *t.patterns) for t in trunks):
            raise ValueError(
                f"data.global_tokens={chosen!r}: without windows all positions see "
                "all; set model.trunk.windows or 'none'"
            )

    def _settings(self, axis: str) -> tuple[str, str]:
        """Keys of the data and of the model that decide the size of an axis."""
        ours, theirs = SETTINGS.get(axis, ((f"shapes()[{axis!r}]",), f"axis {axis}"))
        given = [name for name in ours if getattr(self.data, name, 0)]
        return f"data.{(*given, *ours)[0]}", _key(self.model, theirs)

    def _validate_evaluation(self) -> None:
        silent = DATASETS[type(self.data)].text is Dataset.text
        if self.evaluation.metrics and silent:
            raise ValueError(
                f"evaluation.metrics={self.evaluation.metrics}: they compare generated "
                f"text, and data={type(self.data).__name__} has no references; set ()"
            )
        names = ["eval"]
        for split in self.evaluations:
            split.validate()
            self.evaluation.require_words(split.scores)
            if split.name in names:
                raise ValueError(
                    f"evaluations: name={split.name!r}: two have it (data.eval_split's "
                    "is eval); choose another"
                )
            if split.scores and silent:
                raise ValueError(
                    f"evaluations: {split.name} has scores={split.scores}: they need "
                    f"references, and data={type(self.data).__name__} has none; set ()"
                )
            names.append(split.name)

    def _validate_checkpoint(self) -> None:
        most = min(self.checkpoint.keep_newest, -(-self.steps // self.checkpoint.every))
        if self.evaluation.average > most:
            raise ValueError(
                f"evaluation.average={self.evaluation.average}: must not exceed "
                f"checkpoint.keep_newest={self.checkpoint.keep_newest} nor the "
                f"checkpoints of {self.steps} steps, one every {self.checkpoint.every}"
            )
        known = (*TASKS[type(self.task)].reports, *DATASETS[type(self.data)].metrics)
        scores = {"eval": self.evaluation.metrics}
        scores |= {split.name: split.scores for split in self.evaluations}
        choices = [f"{k}/{name}" for k, own in scores.items() for name in known + own]
        if self.checkpoint.metric not in choices:
            raise ValueError(
                f"checkpoint.metric={self.checkpoint.metric!r}: expected one of "
                f"{', '.join(choices)} (the task's, the data's, evaluation.metrics)"
            )


def _validate_trunk(trunk: TransformerConfig, where: str) -> None:
    """What needs the tables of the parts' functions."""
    for name, table in (
        ("block", BLOCKS),
        ("attention", ALGORITHMS),
        ("positions", POSITIONS),
        ("ffn", FFNS),
        ("init", INITS),
    ):
        value = getattr(trunk, name)
        if value not in table:
            raise ValueError(
                f"{where}.{name}={value!r}: expected one of {', '.join(table)}"
            )
    if trunk.attention == "local" and not any(trunk.windows):
        raise ValueError(
            f"{where}.attention='local': it needs windows, and "
            f"{where}.windows={trunk.windows}; set them, (256,) say, or choose 'flash'"
        )
    known = options(ALGORITHMS[trunk.attention])
    for name in trunk.options():
        if name not in known:
            raise ValueError(
                f"{where}.attention_options={trunk.attention_options!r}: "
                f"attention={trunk.attention!r} has no option {name!r}; it has "
                f"{', '.join(('scale', *known))}"
            )


def _key(model: ModelConfig, name: str) -> str:
    """Key of a setting of a model, or else of the first model in it that has it."""
    owners = [("model", model)]
    for at, owner in owners:
        own = {f.name: getattr(owner, f.name) for f in fields(owner)}
        if name.partition(".")[0] in own:
            return f"{at}.{name}"
        inner = {k: x for k, x in own.items() if isinstance(x, ModelConfig)}
        owners += [(f"{at}.{k}", x) for k, x in inner.items()]
    return f"model.{name}"


def _longest_rows(data: Any) -> dict[str, int]:
    """Axis letter -> its largest size in any batch, where that is a number."""
    rows: dict[str, int] = {}
    for axis, size in (item for shape in data.shapes() for item in shape.items()):
        if isinstance(size, int):
            rows[axis] = max(size, rows.get(axis, 0))
    return rows


# What a field may hold whose hint leaves the type open.
CHOICES = {"model": MODELS, "task": TASKS, "data": DATASETS}


def to_json(config: ExperimentConfig) -> str:
    """The config as text; `from_json` of it is equal.

    Where the schema leaves the type open, the text has a key "type". Of plugins it has
    the names: a workdir keeps copies.
    """
    tree = saving.tree_of(config, ExperimentConfig)
    tree["plugins"] = [os.path.basename(path) for path in config.plugins]
    return json.dumps(tree, indent=2)


def from_json(text: str) -> ExperimentConfig:
    """The config that `to_json` wrote; ValueError if it has other fields than ours."""
    return saving.from_tree(json.loads(text), ExperimentConfig, CHOICES)


def flat(config: ExperimentConfig) -> dict[str, Any]:
    """{'optim.learning_rate': 0.001} of every value, as JSON has it."""

    def pairs(tree: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix[:-1]: tree}
        found = (pairs(v, f"{prefix}{k}.") for k, v in tree.items())
        return {k: v for d in found for k, v in d.items()}

    return pairs(json.loads(to_json(config)), "")


def differences(old: ExperimentConfig, new: ExperimentConfig) -> dict[str, tuple]:
    """{'optim.learning_rate': (old, new)} for every value that differs."""
    a, b = map(flat, (old, new))
    return {
        k: (a.get(k, "absent"), b.get(k, "absent"))
        for k in {**a, **b}
        if a.get(k, "absent") != b.get(k, "absent")
    }
