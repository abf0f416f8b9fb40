"""A student beside the teacher that it learns from (Hinton et al. 2015)."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from flax import linen as nn

from triform.models.config import ModelConfig, TransformerConfig
from triform.models.encoder import EncoderConfig

Array = jax.Array


@dataclasses.dataclass(unsafe_hash=True)
class DistillationConfig(ModelConfig):
    """Two models that read the same batch.

    Parameters are those of both, below student/ and teacher/. Train with
    optim.train=("student/.*",).
    """

    student: ModelConfig = dataclasses.field(default_factory=EncoderConfig)
    teacher: ModelConfig = dataclasses.field(default_factory=EncoderConfig)

    @property
    def PARAMETERS(self) -> tuple[tuple[str, str], ...]:
        """Both models' rows of the table of parameter axes."""
        return tuple(self.student.PARAMETERS) + tuple(self.teacher.PARAMETERS)

    def reads(self) -> dict[str, tuple[str, str]]:
        """Field -> (axes, dtype) that a batch must have."""
        return self.teacher.reads() | self.student.reads()

    def outputs(self) -> dict[str, str]:
        """The student's by name, and the teacher's as teacher_NAME."""
        taught = {f"teacher_{k}": size for k, size in self.teacher.outputs().items()}
        return self.student.outputs() | taught

    def sizes(self) -> dict[str, int]:
        """Name of a size -> its value; both have the same."""
        return self.teacher.sizes() | self.student.sizes()

    def longest(self) -> dict[str, int]:
        """Axis letter -> longest row that both take."""
        limits = self.teacher.longest()
        for axis, limit in self.student.longest().items():
            limits[axis] = min(limit, limits.get(axis, limit))
        return limits

    def axes(self) -> dict[str, int]:
        """Axis letter -> the size that every batch must have."""
        return self.teacher.axes() | self.student.axes()

    def trunks(self) -> dict[str, TransformerConfig]:
        """Path in this config -> trunk."""
        return {
            f"{name}.{path}": trunk
            for name in ("student", "teacher")
            for path, trunk in getattr(self, name).trunks().items()
        }

    def wraps(self) -> tuple[ModelConfig, ...]:
        """Student and teacher."""
        return (self.student, self.teacher)

    def adapt(
        self, name: str, saved: np.ndarray, fresh: np.ndarray
    ) -> tuple[np.ndarray, str] | None:
        """As the model that the parameter is of."""
        part, _, rest = name.partition("/")
        return getattr(self, part).adapt(rest, saved, fresh)

    def origin(self, name: str) -> str:
        """As the model that the parameter is of."""
        part, _, rest = name.partition("/")
        return f"{part}/{getattr(self, part).origin(rest)}"

    def validate(self) -> None:
        """Raises ValueError with the value, the rule and the fix."""
        self.student.validate()
        self.teacher.validate()
        theirs = self.teacher.sizes()
        for name, size in self.student.sizes().items():
            if theirs.get(name, size) != size:
                raise ValueError(
                    f"model.student.{name}={size}: must equal model.teacher.{name}="
                    f"{theirs[name]}, both read the same batch; set one to the other"
                )
        ours, theirs = self.student.axes(), self.teacher.axes()
        if any(theirs.get(axis, size) != size for axis, size in ours.items()):
            raise ValueError(
                f"model.student reads {ours}, model.teacher {theirs}: both read the "
                "same batch; set their sizes alike"
            )


class Distillation(nn.Module):
    """Outputs of the student by name, and those of the teacher as teacher_NAME.

    The teacher runs as in evaluation, without dropout, and passes no gradient.
    """

    config: DistillationConfig
    student: nn.Module
    teacher: nn.Module

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """See the class."""
        if self.is_initializing():
            taught = self.teacher(batch)
        else:
            # Applied to its own variables, it has no random streams.
            teacher, variables = self.teacher.unbind()
            taught = teacher.apply(jax.lax.stop_gradient(variables), batch)
        named = {f"teacher_{name}": x for name, x in taught.items()}
        return self.student(batch) | named
