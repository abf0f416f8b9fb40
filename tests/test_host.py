"""What is said to the compiler before it starts."""

import os

from triform.runtime import host


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
