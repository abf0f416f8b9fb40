"""What was compiled is kept; a wrong entry costs a compilation and a line."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

from triform import compilation
from triform.runtime import compile_cache, files, lazy
from triform.runtime.compile_cache import Cache

PROGRAM = """
import sys
from triform.runtime import compile_cache
compile_cache.prepare()
import jax, numpy as np
found = jax.jit(lambda x: (x @ x).sum())(np.ones((4, 4), np.float32))
print(float(found), compile_cache.hits(), jax.config.jax_compilation_cache_dir)
"""


def run(root, **more):
    """(the program's result, hits of the cache, folder, lines on standard error)."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env = {**ours, "JAX_PLATFORMS": "cpu", "TRIFORM_CACHE": str(root), **more}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    value, hits, folder = done.stdout.split()
    return float(value), int(hits), folder, done.stderr.splitlines()


def test_processes_share_what_they_compile(tmp_path):
    value, hits, folder, errors = run(tmp_path)
    assert (value, hits, errors) == (64, 0, [])
    assert folder.startswith(f"{tmp_path}/compiled-")
    (entry,) = (os.path.join(folder, name) for name in os.listdir(folder))
    assert run(tmp_path)[:2] == (64, 1)
    # Torn, as a full disk leaves it: a miss, one line, and whole again afterwards.
    os.truncate(entry, os.path.getsize(entry) // 2)
    value, hits, _, errors = run(tmp_path)
    assert (value, hits, len(errors)) == (64, 0, 1)
    assert entry in errors[0]
    assert run(tmp_path)[:2] == (64, 1)
    # Whole, but XLA refuses it: from now on the folder is not used, and that is told
    # once, with the command that tries again.
    Cache(folder, -1).put("x", b"no executable")
    os.replace(Cache(folder, -1)._file("x"), entry)
    value, hits, _, errors = run(tmp_path)
    assert (value, hits, len(errors)) == (64, 0, 1)
    assert f"rm -r {folder}" in errors[0]
    assert run(tmp_path) == (64, 0, folder, [])
    # The user's own folder wins, and so does switching it off.
    mine = str(tmp_path / "mine")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=mine)[2] == mine
    assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="0")[2] == "None"
    # No folder can be made there: the program goes on without.
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == (64, 0, "None", [])


def test_an_entry_is_whole_or_not_there(tmp_path, capsys):
    cache = Cache(str(tmp_path), -1)
    assert cache.get("a") is None
    cache.put("a", b"program")
    assert cache.get("a") == b"program"
    path = cache._file("a")
    text = pathlib.Path(path).read_bytes()
    for position in range(len(text)):
        damaged = bytearray(text)
        damaged[position] ^= 1
        with open(path, "wb") as f:
            f.write(damaged)
        assert Cache(str(tmp_path), -1).get("a") is None, position
        assert not os.path.exists(path)
    assert capsys.readouterr().err.count("damaged") == len(text)


def test_what_cannot_be_written_is_told_once(tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    cache = Cache(str(tmp_path), -1)
    monkeypatch.setattr(files, "replacing", full)
    for key in "abc":
        cache.put(key, b"program")
        assert cache.get(key) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left" in line
    assert "TRIFORM_CACHE" in line


def test_the_oldest_entries_make_room(tmp_path):
    folder = tmp_path / "version"
    folder.mkdir()
    cache = Cache(str(folder), 1000)
    for number in range(4):
        cache.put(str(number), bytes(200))
        os.utime(cache._file(str(number)), (number, number))
    assert cache.get("0") == bytes(200)  # used just now
    cache.put("4", bytes(200))
    there = {k for k in "01234" if os.path.exists(cache._file(k))}
    assert "0" in there
    assert "4" in there
    assert "1" not in there
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1000
    cache.put("5", bytes(2000))  # larger than all that may be kept
    assert cache.get("5") is None
    assert cache.get("4") == bytes(200)


def test_the_folder_is_of_this_jaxlib_and_this_cpu(tmp_path, monkeypatch):
    names = {compile_cache.folder_of("root")}
    assert names == {compile_cache.folder_of("root")}
    monkeypatch.setattr(compile_cache.jaxlib, "__version__", "0.0.1")
    names.add(compile_cache.folder_of("root"))
    for flags in ("fpu avx", "fpu avx avx512f"):
        text = f"processor: 0\nflags : {flags}\nprocessor: 1\nflags : {flags}\n"
        monkeypatch.setattr(files, "read_text", lambda path, text=text: text)
        names.add(compile_cache.folder_of("root"))
    monkeypatch.setattr(compile_cache.importlib.util, "find_spec", lambda name: name)
    names.add(compile_cache.folder_of("root"))
    assert len(names) == 5


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 3, [1, 0]),
        (2, 3, [0]),
        (0, 4, [1, 0, 2]),
        (0, 9, [1, 0, 2]),
        (3, 9, [2, 1, 0]),
    ],
)
def test_the_shapes_that_a_run_needs_come_in_its_order(start, stop, expected):
    """Four batches an epoch; what comes after the epoch may need any shape."""
    plan = [1, 1, 0, 2]
    train = types.SimpleNamespace(
        per_epoch=4, ids=lambda step: (plan[step % 4], None), shapes=lambda: [0, 1, 2]
    )
    assert compilation.needed(train, start, stop) == expected


def test_a_lazy_module_is_imported_when_it_is_used(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    module = lazy.Module("this")
    assert "this" not in sys.modules
    assert module.d["a"] == "n"
    assert "this" in sys.modules
