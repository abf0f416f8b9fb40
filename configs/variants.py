"""Variants of an experiment: a table of changes to one config."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from triform.data.sources import SOURCES
from triform.models import LoRAConfig
from triform.models.config import ModelConfig

# {'optim.learning_rate': 1e-3, 'data': {'batch_size': 8}}, a function that changes a
# config, or several of these.
Change = Mapping[str, Any] | Callable[[Any], Any] | tuple


def vary(config: Any, variants: Mapping[str, Change], name: str) -> Any:
    """The config, changed by variants[name]; ValueError names the choices."""
    if name not in variants:
        choices = ", ".join(map(repr, variants))
        raise ValueError(f"variant {name!r}: expected one of {choices}")
    change = variants[name]
    for step in change if isinstance(change, tuple) else (change,):
        if callable(step):
            step(config)
        else:
            update(config, step)
    return config


def update(config: Any, values: Mapping[str, Any]) -> None:
    """Sets values by dotted key, or by key and a mapping of what is below it.

    Raises ValueError if there is no such key.
    """
    for key, value in values.items():
        *path, last = key.split(".")
        owner = config
        for name in path:
            owner = getattr(owner, name)
        if not hasattr(owner, last):
            raise ValueError(f"{key}: {type(owner).__name__} has no {last!r}")
        if isinstance(value, Mapping):
            update(getattr(owner, last), value)
        else:
            setattr(owner, last, copy.deepcopy(value))


def adapters(*trained: str) -> Callable[[Any], None]:
    """A change: a model gets adapters (LoRA), and only they are trained, and parameters
    whose paths the patterns match.
    """

    def change(config: Any) -> None:
        config.model = LoRAConfig(config.model)
        config.optim.train = (".*lora_[ab]", *trained)

    return change


def smoke(config: Any, split: str = "") -> None:
    """Makes a config tiny and short: seconds on one core.

    `split` replaces all three splits; by default it is the evaluation split, of sources
    that have slices its first 100 examples.
    """
    for model in _models(config.model):
        if hasattr(model, "vocab_size"):
            model.vocab_size = min(model.vocab_size, 1000)
    for trunk in config.model.trunks().values():
        cycle = trunk.cycle() if trunk.scan_layers else 1  # scanned: whole ones
        trunk.num_layers = min(trunk.num_layers, max(2, cycle))
        trunk.d_model, trunk.num_heads, trunk.d_ff, trunk.max_len = 16, 2, 32, 0
        trunk.num_kv_heads = min(trunk.num_kv_heads, 1)
        trunk.head_dim = min(trunk.head_dim, 8)
    data = config.data
    for name in ("max_len", "max_source_len", "eval_stride"):
        if hasattr(data, name):
            setattr(data, name, min(getattr(data, name), 32))
    data.batch_size = min(data.batch_size, 64)
    if hasattr(data, "buckets"):
        data.buckets = ()
    if not split:
        whole = data.source in SOURCES or "[" in data.eval_split
        split = data.eval_split if whole else f"{data.eval_split}[:100]"
    data.train_split = data.eval_split = data.test_split = split
    config.decode.max_len = 0  # whatever the rows are set to
    config.steps, config.log_every = 6, 2
    config.evaluation.every = config.checkpoint.every = 4
    if config.evaluation.metrics:  # generating takes most of the time
        config.evaluation.examples = 8
    config.evaluation.average = min(config.evaluation.average, 2)


def _models(model: ModelConfig) -> Iterator[ModelConfig]:
    """A model and all that it is built around."""
    yield model
    for inner in model.wraps():
        yield from _models(inner)
