"""What is said to the compiler before it starts, and paths as they are typed."""

import os
import subprocess
import sys

import pytest

from triform.runtime import host, paths
from triform.runtime.errors import UserError


def test_flags_are_added_once_and_never_over_the_users(monkeypatch):
    name, *others = host.COMPILER_FLAGS
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x {name}=MINE")
    host.set_compiler_flags()
    first = os.environ["XLA_FLAGS"]
    assert first.split()[:2] == ["--xla_dump_to=x", f"{name}=MINE"]
    added = [f"{k}={host.COMPILER_FLAGS[k]}" for k in others]
    assert first.split()[2:] == added
    host.set_compiler_flags()
    assert os.environ["XLA_FLAGS"] == first


def test_flags_may_be_in_a_file(monkeypatch, tmp_path):
    (tmp_path / "flags").write_text(
        "--xla_dump_to=x\n--xla_cpu_enable_fast_math=true\n"
    )
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    host.set_compiler_flags()
    found = os.environ["XLA_FLAGS"].split()
    assert found[:2] == ["--xla_dump_to=x", "--xla_cpu_enable_fast_math=true"]
    assert len(found) == 2 + len(host.COMPILER_FLAGS)
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "none"))
    with pytest.raises(UserError, match="none'.*no such file"):
        host.set_compiler_flags()


def test_flags_that_this_compiler_does_not_know_are_left_out(monkeypatch):
    known = dict(host.COMPILER_FLAGS)
    unknown = {
        "--xla_flag_of_another_version": "true",
        "--xla_disable_hlo_passes": "pass_of_another_version",
    }
    monkeypatch.setattr(host, "COMPILER_FLAGS", known | unknown)
    monkeypatch.setenv("XLA_FLAGS", "")
    host.set_compiler_flags()
    found = dict(x.split("=") for x in os.environ["XLA_FLAGS"].split())
    assert found.keys() == known.keys() - unknown.keys()


def test_a_path_begins_in_the_home_folder_or_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.absolute("~/a") == str(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert paths.absolute("a~/~") == str(tmp_path / "a~" / "~")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no such user
    for typed in ("~", "~/a", "~nobody/a"):
        with pytest.raises(UserError, match="set TRIFORM_CACHE"):
            paths.absolute(typed, setting="TRIFORM_CACHE")


def test_a_temporary_folder_is_found_where_only_the_cache_can_be_written(tmp_path):
    code = """
import tempfile
def none():
    raise FileNotFoundError("No usable temporary directory")
tempfile._get_default_tempdir = none
import triform
print(tempfile.mkdtemp())
"""
    env = dict(os.environ, TRIFORM_CACHE=str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(tmp_path / "cache" / "tmp")), done.stderr
