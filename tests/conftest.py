"""What must be set before JAX starts, and what several test files share."""

import dataclasses
import os
import pathlib
import sys
import zlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES = "--xla_force_host_platform_device_count"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
# Compilation dominates: the second run of the tests takes what the first one compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from long_tests import is_long  # noqa: E402

from triform.configs import plugins  # noqa: E402
from triform.data import sources as source_table  # noqa: E402
from triform.models import EncoderDecoderConfig  # noqa: E402
from triform.models.algorithms import ALGORITHMS  # noqa: E402
from triform.models.config import RopeConfig, TransformerConfig  # noqa: E402


def pytest_collection_modifyitems(items):
    """Marks the tests of long_tests.py."""
    for item in items:
        if is_long(item.nodeid):
            item.add_marker("long")


@pytest.fixture(scope="session")
def shared_data():
    """folder -> path of a corpus beside the checkout; without it the test skips.

    TRIFORM_REQUIRE_DATA=1 turns the skip into a failure.
    """

    def find(folder: str) -> str:
        path = source_table.local_copy(folder)
        if not path:
            reason = f"{folder}: not in $TRIFORM_DATA nor in ../shared/data"
            if os.environ.get("TRIFORM_REQUIRE_DATA") == "1":
                pytest.fail(reason)
            pytest.skip(reason)
        return path

    return find


@pytest.fixture(scope="session")
def tiny_config():
    """(fields) -> the config of an encoder-decoder that compiles in a second."""

    def make(vocab_size: int = 11, **fields) -> EncoderDecoderConfig:
        ours = {f.name for f in dataclasses.fields(EncoderDecoderConfig)}
        model = {k: v for k, v in fields.items() if k in ours}
        trunk = {k: v for k, v in fields.items() if k not in ours}
        sizes = {"num_layers": 1, "d_model": 8, "num_heads": 2, "d_ff": 12}
        trunk = TransformerConfig(**{**sizes, "max_len": 16, "dropout": 0.0, **trunk})
        config = EncoderDecoderConfig(trunk, vocab_size, **model)
        config.validate()
        return config

    return make


@pytest.fixture(scope="session")
def pair_batch():
    """(source lengths, target lengths, ...) -> random pairs, right-padded."""

    def make(
        sources, targets, width: int, seed: int = 0, vocab: int = 11
    ) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        shape, slots = (len(sources), width), np.arange(width)
        real = slots < np.array(sources)[:, None]
        said = slots < np.array(targets)[:, None]
        out = np.where(said, rng.integers(3, vocab, shape), 0)
        return {
            "encoder_inputs": np.where(real, rng.integers(3, vocab, shape), 0).astype(
                np.int32
            ),
            "encoder_segments": real.astype(np.int32),
            "inputs": np.pad(out, ((0, 0), (1, 0)))[:, :-1].astype(np.int32),
            "targets": out.astype(np.int32),
            "weights": said.astype(np.float32),
        }

    return make


@pytest.fixture(scope="session")
def packed():
    """(batch, lengths, source lengths) -> its rows in one, and one position of padding.

    The first so many tokens of each row; the second lengths are of the encoder's side.
    """

    def pack(batch, lengths, source_lengths=()) -> dict[str, np.ndarray]:
        out = {}
        for side, counts in (("", lengths), ("encoder_", source_lengths)):
            if not counts:
                continue
            for key in (f"{side}inputs", f"{side}token_type_ids"):
                if key in batch:
                    rows = [batch[key][r, :n] for r, n in enumerate(counts)]
                    out[key] = np.concatenate(rows)
            out[f"{side}segments"] = np.repeat(np.arange(len(counts)) + 1, counts)
            out[f"{side}positions"] = np.concatenate([np.arange(n) for n in counts])
        return {k: np.pad(x, (0, 1))[None].astype(np.int32) for k, x in out.items()}

    return pack


def twice(q, k, v, mask, **options):
    """An algorithm for tests."""
    return 2 * ALGORITHMS["dot"](q, k, v, mask, **options)


@pytest.fixture
def another(monkeypatch):
    """(trunk, field) -> a value of the field that is allowed and not the trunk's."""
    monkeypatch.setitem(ALGORITHMS, "twice", twice)
    values = {
        "num_layers": (3,),
        "d_model": (24,),
        "num_heads": (4, 8),
        "num_kv_heads": (1,),
        "head_dim": (6,),
        "d_ff": (16,),
        "max_len": (20,),
        "block": ("parallel",),
        "attention": ("twice",),
        "attention_options": (("scale", 0.7),),
        "windows": ((2,),),
        "patterns": (("strided:2",),),
        "positions": ("learned", "none"),
        "norm": ("rms", "layer"),
        "norm_position": ("pre", "post"),
        "norm_eps": (1e-3,),
        "ffn": ("swiglu", "gelu"),
        "bias": ("none", "qkv"),
        "init": ("normal", "xavier"),
        "rope": (RopeConfig(500.0),),
        "dropout": (0.2,),
        "attention_dropout": (0.2,),
        "dtype": ("bfloat16",),
        "remat": (True,),
        "remat_keeps": ("products",),
        "logit_chunks": (2,),
        "scan_layers": (True,),
    }

    def find(trunk: TransformerConfig, field: str):
        return next(x for x in values[field] if x != getattr(trunk, field))

    return find


@pytest.fixture(scope="session")
def layer_names():
    """(trunk, sublayers of attention) -> names of a layer's parameters."""

    def names(trunk: TransformerConfig, attentions, lead: str = "") -> set[str]:
        biased = {"all": ("query", "key", "value", "out", "up", "gate", "down")}
        biased |= {"qkv": ("query", "key", "value"), "none": ()}
        parts = [
            *(f"{a}/{x}" for a in attentions for x in ("query", "key", "value", "out")),
            *("feed_forward/up", "feed_forward/down"),
            *(["feed_forward/gate"] if trunk.ffn in ("geglu", "swiglu") else []),
        ]
        found = {f"{part}/kernel" for part in parts}
        found |= {
            f"{part}/bias" for part in parts if part.split("/")[1] in biased[trunk.bias]
        }
        for sublayer in (*attentions, "feed_forward"):
            found.add(f"{sublayer}_norm/scale")
            if trunk.norm == "layer" and trunk.bias == "all":
                found.add(f"{sublayer}_norm/bias")
        return {lead + name for name in found}

    return names


class Memory:
    """A source of given examples: the same in every split, or by split in a dict."""

    def __init__(self, examples, classes, loads, name):
        self._examples, self._classes = examples, classes
        self._loads, self._name = loads, name

    def examples(self, split):
        self._loads.append((self._name, split))
        return self._of(split)

    def splits(self):
        return tuple(self._examples) if isinstance(self._examples, dict) else ()

    def fingerprint(self, split):
        return f"{self._name}-{split}-{zlib.crc32(repr(self._of(split)).encode())}"

    def classes(self, feature):
        return self._classes.get(f"{self._name}:{feature}", ())

    def column(self, split, feature):
        return [x[feature] for x in self._of(split)]

    def where(self, split, item):
        return ""

    def report(self, split):
        return []

    def _of(self, split):
        return self._examples[split] if self.splits() else self._examples


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """(name=examples, ..., classes={'name:feature': names}) -> list of (name, split)
    as they are read.

    Those are then all the sources there are, every split of them the same unless the
    examples are a dict by split. Their arrays are cached in a folder of the test.
    """

    def provide(classes=(), **corpora) -> list[tuple[str, str]]:
        loads, known = [], dict(classes)

        class Provided:
            def __init__(self, name, *options):
                self.name = name

            def location(self):
                return "in memory"

            def _of(self, split):
                found = corpora[self.name]
                return found[split] if isinstance(found, dict) else found

            def examples(self, split):
                loads.append((self.name, split))
                return self._of(split)

            def splits(self):
                found = corpora[self.name]
                names = ("train", "validation", "test")
                return tuple(found) if isinstance(found, dict) else names

            def fingerprint(self, split):
                content = zlib.crc32(repr(self._of(split)).encode())
                return f"{self.name}-{split}-{content}"

            def classes(self, feature):
                return known.get(f"{self.name}:{feature}", ())

            def column(self, split, feature):
                return [x[feature] for x in self._of(split)]

            def where(self, split, item):
                return ""

            def report(self, split):
                return []

        monkeypatch.setattr(source_table, "source", Provided)
        return loads

    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    return provide


@pytest.fixture
def no_plugins():
    """A process without plugins: what a test loads is gone after it, or when called."""
    kept = {name: dict(table) for name, table in plugins.TABLES.items()}

    def forget():
        for name, table in plugins.TABLES.items():
            table.clear()
            table.update(kept[name])
        for plugin in plugins._loaded.values():
            sys.modules.pop(plugin.module.__name__, None)
        plugins._loaded.clear()

    assert not plugins._loaded
    yield forget
    forget()
