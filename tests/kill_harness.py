"""Kills a training again and again, and compares what it ends with.

    python tests/kill_harness.py [--kills=100] [--seed=0] [--folder=DIR]

A real training process gets SIGKILL at random moments: while it starts, tokenises,
restores, compiles, trains, saves and evaluates. It is started again each time, until
all kills are done and it may come to its end. Then everything is compared with a run
that nobody disturbed: every array of every checkpoint, the scores and samples byte by
byte; metrics.jsonl byte by byte but for what a clock measures (CLOCK); and the hash of
the rows that every step was given. Only output and files are watched: the product is
as it is.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = ROOT / "tests" / "kill_experiment.py"
EVALUATED = 10  # steps between evaluations in that config
# Fields of metrics.jsonl that a clock measures.
CLOCK = re.compile(r'"(?:time|train/\w+_per_second|train/data_wait)": [^,}]+,? ?')
PHASES = {  # what is interrupted -> how often it is tried
    "start": 1,
    "tokenise": 2,
    "restore": 2,
    "compile": 1,
    "train": 2,
    "save": 3,
    "evaluate": 2,
}
LIMIT = 120  # seconds until something of a life must have happened


def write_corpus(path: pathlib.Path, seed: int = 0) -> None:
    """A JSONL file of 3,000 texts of random words."""
    rng = random.Random(seed)
    words = [
        "".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(500)
    ]
    lines = [" ".join(rng.choices(words, k=rng.randint(5, 30))) for _ in range(3000)]
    path.write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))


@dataclasses.dataclass
class Place:
    """A folder of the harness: the corpus, caches and workdirs."""

    folder: pathlib.Path
    steps: int
    settings: tuple[str, ...] = ()  # further flags of train.py

    def __post_init__(self) -> None:
        self.corpus = self.folder / "corpus.jsonl"
        if not self.corpus.exists():
            write_corpus(self.corpus)

    def start(self, name: str, devices: int = 1) -> "Life":
        """Starts train.py in the workdir of that name."""
        command = [sys.executable, str(ROOT / "train.py"), f"--config={CONFIG}"]
        command += [f"--workdir={self.folder / name}", *self.settings]
        command += [f"--config.data.source={self.corpus}"]
        command += [f"--config.steps={self.steps}"]
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self.folder / "jax"))
        environment = os.environ | {
            "TRIFORM_CACHE": str(self.folder / "cache"),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        return Life(self.folder / name, self.folder / "cache", command, environment)


class Life:
    """One process of a training, watched."""

    def __init__(self, workdir: pathlib.Path, cache: pathlib.Path, command, env):
        self.workdir, self.cache = workdir, cache
        self.lines: list[str] = []
        self.before = reached(workdir)
        self.started = time.perf_counter()
        self.recovered = 0.0  # seconds until the first new step; 0: none
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith("first step") and not self.recovered:
                self.recovered = time.perf_counter() - self.started

    def said(self, *starts: str) -> bool:
        """Was a line printed that starts so?"""
        return any(line.startswith(starts) for line in list(self.lines))

    def until(self, happened: Callable[[], bool]) -> bool:
        """Waits; False if the process ended before."""
        end = time.monotonic() + LIMIT
        while not happened():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, "\n".join(self.lines[-30:])
            time.sleep(0.002)
        return True

    def kill(self) -> bool:
        """SIGKILL; False if it had ended by itself."""
        ended = self.process.poll() is not None
        self.process.kill()
        self.process.wait()
        self._reader.join()
        return not ended

    def finish(self) -> str:
        """Waits for its end; what it printed."""
        code = self.process.wait(timeout=600)
        self._reader.join()
        assert code == 0, f"exit code {code}\n" + "\n".join(self.lines[-40:])
        return "\n".join(self.lines)

    def phase(self) -> str:
        """What a kill interrupted, from what it printed and left behind."""
        if not self.said("evaluation: every"):
            parts = (self.cache / "tokens").glob("triform-parts-*/*.npz")
            return "tokenise" if any(parts) else "start"
        if not self.said("resuming after", "initialising parameters"):
            return "restore"
        if not self.said("first step"):
            return "compile"
        if self.saving():
            return "save"
        due = [s for s in self.saved() if s % EVALUATED == 0 and s > self.before]
        if due and not self.said(f"step {max(due)}: "):
            return "evaluate"
        return "train"

    def saving(self) -> bool:
        """Is there an unfinished checkpoint?"""
        return any("tmp" in x for x in _names(self.workdir / "checkpoints"))

    def saved(self) -> list[int]:
        """The steps of finished checkpoints."""
        return [int(x) for x in _names(self.workdir / "checkpoints") if x.isdigit()]


def _names(folder: pathlib.Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return os.listdir(folder)
    return []


def reached(workdir: pathlib.Path) -> int:
    """The last step of a run's metrics."""
    with contextlib.suppress(FileNotFoundError):
        text = (workdir / "metrics.jsonl").read_text(errors="replace")
        found = re.findall(r'^\{"step": (\d+)', text, re.M)
        return int(found[-1]) if found else 0
    return 0


def strike(life: Life, phase: str, rng: random.Random) -> bool:
    """Waits for a random moment of a phase and kills; False if it ended before."""
    step = life.before + rng.randint(1, 6)
    next_due = (life.before // EVALUATED + 1) * EVALUATED
    moments = {
        "start": (lambda: True, 2.0),
        "tokenise": (lambda: any(life.cache.glob("tokens/*parts-*/*.npz")), 0.05),
        "restore": (lambda: life.said("evaluation: every"), 0.1),
        "compile": (lambda: life.said("resuming", "initialising"), 0.3),
        "train": (lambda: reached(life.workdir) >= step, 0.05),
        "save": (life.saving, 0.01),
        "evaluate": (lambda: any(s >= next_due for s in life.saved()), 0.1),
    }
    happened, longest = moments[phase]
    if not life.until(happened):
        return False
    time.sleep(rng.uniform(0, longest))
    return life.kill()


@dataclasses.dataclass
class Report:
    """What the kills were, and how long the starts after them took."""

    hit: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    recovered: list[float] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        found = ", ".join(f"{name} {self.hit[name]}" for name in PHASES)
        times = self.recovered or [0.0]
        return (
            f"kills: {self.hit.total()} ({found})\n"
            "seconds from a start to its first new step: median "
            f"{statistics.median(times):.1f}, longest {max(times):.1f} "
            f"({len(self.recovered)} starts)"
        )


def torture(place: Place, name: str, kills: int, seed: int, log=print) -> Report:
    """Kills the run of that name so often, then lets it end."""
    rng, report = random.Random(seed), Report()
    # Every phase as often as its weight says, in random order.
    phases = [x for x, weight in PHASES.items() for _ in range(weight)]
    plan = [phases[i % len(phases)] for i in range(kills)]
    rng.shuffle(plan)
    for number, phase in enumerate(plan):
        if phase == "tokenise":
            for path in (place.folder / "cache").glob("tokens/*"):
                subprocess.run(["rm", "-r", str(path)], check=True)
        life = place.start(name)
        if not strike(life, phase, rng):
            life.finish()
            raise AssertionError(f"finished after {number} of {kills} kills")
        found = life.phase()
        report.hit[found] += 1
        if life.recovered:
            report.recovered.append(life.recovered)
        log(
            f"{number + 1}: in {found} (aimed at {phase}), step {reached(life.workdir)}"
        )
    last = place.start(name)
    last.finish()
    report.recovered.append(last.recovered)
    return report


# What a run ends with.


def metrics_of(workdir: pathlib.Path) -> str:
    """metrics.jsonl without what a clock measures."""
    return CLOCK.sub("", (workdir / "metrics.jsonl").read_text())


def rows_of(workdir: pathlib.Path) -> list[float]:
    """The hash of the rows of every logged pair of steps, in order."""
    return _values(workdir, "train/rows")


def losses_of(workdir: pathlib.Path) -> list[float]:
    """The losses of every logged pair of steps, in order."""
    return _values(workdir, "train/loss")


def _values(workdir: pathlib.Path, name: str) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def contents(workdir: pathlib.Path) -> dict[str, str]:
    """What must be equal: a digest of every array and file, by name."""
    from triform.runtime import saved
    from triform.runtime.checkpoint import CheckpointConfig, Checkpointer

    found = {}
    with Checkpointer(str(workdir / "checkpoints"), CheckpointConfig()) as kept:
        for step in kept.steps():
            arrays, meta = saved.read(kept, step)
            meta.pop("config")  # holds the path of the corpus
            found[f"{step}/meta"] = digest(json.dumps(meta, sort_keys=True).encode())
            for path, x in arrays.items():
                found[f"{step}/{path}"] = digest(x.tobytes())
    for path in (workdir / "scores.json", *sorted(workdir.glob("samples/*"))):
        found[path.name] = digest(path.read_bytes())
    found["metrics.jsonl"] = digest(metrics_of(workdir).encode())
    found["rows"] = digest(json.dumps(rows_of(workdir)).encode())
    return found


def digest(content: bytes) -> str:
    """SHA-256, shortened."""
    return hashlib.sha256(content).hexdigest()[:16]


def differing(place: Place, one: str, other: str) -> list[str]:
    """Names of what two runs do not have in common."""
    a, b = contents(place.folder / one), contents(place.folder / other)
    return sorted(k for k in {**a, **b} if a.get(k) != b.get(k))


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="")
    given = parser.parse_args()
    folder = given.folder or tempfile.mkdtemp(prefix="triform-kills-")
    os.makedirs(folder, exist_ok=True)
    place = Place(pathlib.Path(folder), steps=6 * given.kills + 20)
    begun = time.perf_counter()
    place.start("whole").finish()
    report = torture(place, "killed", given.kills, given.seed)
    print(report)
    found = differing(place, "whole", "killed")
    count = len(contents(place.folder / "whole"))
    print(f"{count} arrays and files compared, {len(found)} differ {found or ''}")
    print(f"hash of the rows: {contents(place.folder / 'killed')['rows']}")
    print(f"{folder}: {time.perf_counter() - begun:.0f} s in all")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
