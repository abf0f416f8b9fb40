"""What must be set before JAX starts, and what several test files share."""

import dataclasses
import os
import pathlib
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

from triform import datasets  # noqa: E402
from triform.models import EncoderDecoderConfig  # noqa: E402
from triform.models.config import TransformerConfig  # noqa: E402


@pytest.fixture(scope="session")
def shared_data():
    """folder -> path of a corpus beside the checkout; without it the test skips.

    TRIFORM_REQUIRE_DATA=1 turns the skip into a failure.
    """

    def find(folder: str) -> str:
        path = datasets.local_copy(folder)
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


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """(name=examples, ..., classes={'name:feature': names}) -> list of (name, split)
    as they are read.

    Those are then all the sources there are, every split of them the same unless the
    examples are a dict by split. Their arrays are cached in a folder of the test.
    """

    def provide(classes=(), **corpora) -> list[tuple[str, str]]:
        loads, classes = [], dict(classes)

        def load(name, split, *, data_dir="", manual_dir=""):
            loads.append((name, split))
            return find(name, split)

        def find(name, split):
            found = corpora[name]
            return found[split] if isinstance(found, dict) else found

        def fingerprint(name, split, *, data_dir="", manual_dir=""):
            return f"{name}-{split}-{zlib.crc32(repr(find(name, split)).encode())}"

        def label_names(name, feature, *, data_dir="", manual_dir=""):
            return classes.get(f"{name}:{feature}", ())

        monkeypatch.setattr(datasets, "label_names", label_names, raising=False)
        monkeypatch.setattr(datasets, "load", load)
        monkeypatch.setattr(datasets, "fingerprint", fingerprint)
        return loads

    monkeypatch.setenv("TRIFORM_CACHE", str(tmp_path / "cache"))
    return provide
