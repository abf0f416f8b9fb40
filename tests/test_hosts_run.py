"""Several real processes train one run: killed, interrupted and resumed with another
number of processes; and the same examples and losses as one process has.

Every process is one CPU device; they talk by gloo. Tests share their runs: a start of
two processes takes as long as the two need to compile.
"""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, HEARTBEAT = 16, 10
# A model that compiles in a second, with all that a step's number decides: dropout,
# shuffling, accumulation. Its file notes every row that a process makes.
CONFIG = """
import hashlib, json, os, time
from triform.configs import gpt_shakespeare_char
from triform.input_pipeline import TrainBatches

def get_config(variant=""):
    config = gpt_shakespeare_char.get_config("smoke")
    trunk, data = config.model.trunk, config.data
    trunk.num_layers, trunk.d_model, trunk.d_ff, trunk.dropout = 1, 8, 8, 0.1
    data.source, data.train_split = "FOLDER/data", "train"
    data.eval_split = data.test_split = "validation"
    data.max_len, data.batch_size = 8, 8
    data.tokenizer.kind, config.model.vocab_size = "bytes", 259
    config.optim.accumulate, config.steps, config.log_every = 2, STEPS, 2
    config.evaluation.every, config.checkpoint.every = 8, 4
    return config

made = TrainBatches.batch

def batch(self, step, rows=slice(None)):
    found = made(self, step, rows)
    time.sleep(float(os.environ["PAUSE"]))
    with open(f"{os.environ['EXAMPLES']}.{os.getpid()}", "a") as f:
        for row in range(len(found["inputs"])):
            content = b"".join(found[k][row].tobytes() for k in sorted(found))
            key = hashlib.md5(content).hexdigest()
            f.write(json.dumps([step, (rows.start or 0) + row, key]) + "\\n")
    return found

TrainBatches.batch = batch
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("hosts"), random.Random(0)
    (folder / "data").mkdir()
    for split, count in (("train", 60), ("validation", 13), ("test", 9)):
        texts = (draw.choices("abcde ", k=draw.randint(5, 30)) for _ in range(count))
        text = "".join("".join(x) + "\n" for x in texts)
        (folder / "data" / f"{split}.txt").write_text(text)
    text = CONFIG.replace("FOLDER", str(folder)).replace("STEPS", str(STEPS))
    (folder / "tiny.py").write_text(text)
    return folder


class Group:
    """Started processes of one run; what they print is in files."""

    def __init__(
        self,
        folder,
        name,
        count,
        *args,
        pause=0.0,
        program="train",
        more=(),
        claims=0,
        timeout=120,
        heartbeat=120,
    ):
        self.folder, self.name, self.count = folder, name, count
        with socket.socket() as free:
            free.bind(("localhost", 0))
            where = f"localhost:{free.getsockname()[1]}"
        env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="", PAUSE=str(pause))
        env |= {"TRIFORM_CACHE": str(folder / "cache")}
        env["EXAMPLES"] = str(folder / f"{name}.examples")
        self.processes = []
        for i in range(count):
            command = [sys.executable, str(ROOT / f"{program}.py"), *args]
            if count > 1 or claims:
                command += [f"--coordinator={where}", f"--process_id={i}"]
                command += [f"--num_processes={claims or count}"]
                command += [f"--hosts_timeout={timeout}"]
                command += [f"--heartbeat_timeout={heartbeat}"]
            command += more[i] if more else ()
            with open(self.path(i), "wb") as out:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                        env=env,
                    )
                )

    def path(self, index):
        return self.folder / f"{self.name}.{index}.log"

    def log(self, index):
        return self.path(index).read_text(errors="replace")

    def until(self, text, index=0):
        """Waits until a process has printed this."""
        deadline = time.monotonic() + 240
        while text not in self.log(index):
            assert time.monotonic() < deadline, self.log(index)[-2000:]
            assert self.processes[index].poll() is None, self.log(index)[-2000:]
            time.sleep(0.02)

    def codes(self):
        """Exit codes; nothing stays behind."""
        try:
            return [process.wait(240) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


def trained(folder, name, workdir):
    """count -> started training in this workdir."""

    def start(count, **options):
        given = f"--workdir={folder / workdir}", f"--config={folder / 'tiny.py'}"
        return Group(folder, f"{name}{count}", count, *given, **options)

    return start


def lines(workdir):
    """{(step, first name): numbers} of metrics.jsonl, but for speeds."""
    found = {}
    for text in (workdir / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        kind = next(k for k in line if "/" in k).partition("/")[0]
        assert (line["step"], kind) not in found, "written twice"
        kept = {k: v for k, v in line.items() if isinstance(v, int | float)}
        for name in ("time", *[k for k in kept if "per_second" in k or "wait" in k]):
            del kept[name]
        found[line["step"], kind] = kept
    return found


def examples(folder, *names):
    """{(step, row): content} of all processes of these runs; rows agree or it fails."""
    found = {}
    for name in names:
        for path in folder.glob(f"{name}.examples.*"):
            for text in path.read_text().splitlines():
                step, row, content = json.loads(text)
                assert found.setdefault((step, row), content) == content
    return found


@pytest.fixture(scope="module")
def alone(folder):
    """One process, undisturbed."""
    group = trained(folder, "alone", "alone")(1)
    assert group.codes() == [0], group.log(0)[-2000:]
    return lines(folder / "alone"), examples(folder, "alone1")


def test_killed_interrupted_and_resumed_with_other_numbers(folder, alone):
    start, workdir = trained(folder, "run", "run"), folder / "run"

    # Two processes, of which one is killed: the other names it and ends.
    group = start(2, pause=0.2, heartbeat=HEARTBEAT)
    group.until("step 6/")
    group.processes[1].kill()
    killed = time.monotonic()
    assert group.codes() == [1, -signal.SIGKILL]
    took = time.monotonic() - killed
    assert took < HEARTBEAT + 10
    last = group.log(0).strip().splitlines()[-1]
    assert last.startswith("error: process 1 of 2") and "no sign of life" in last
    assert "Traceback" not in group.log(0)
    assert "process 1 of 2, 1 local of 2 devices" in group.log(1)

    # Four go on; one gets a signal, all save the same step and leave.
    group = start(4, pause=0.2)
    group.until("step 8/")
    group.processes[2].send_signal(signal.SIGTERM)
    assert group.codes() == [75] * 4, group.log(0)[-2000:]
    assert "SIGTERM on process 2: step" in group.log(0)
    saved = sorted(map(int, os.listdir(workdir / "checkpoints")))
    assert saved[-1] < STEPS
    starts = [json.loads(x) for x in (workdir / "runs.jsonl").read_text().splitlines()]
    assert "process 1 of 2" in starts[0]["outcome"]
    assert starts[1]["outcome"] == "interrupted by SIGTERM on process 2"
    assert [start["processes"] for start in starts] == [2, 4]

    # One ends it. The same examples exactly; losses but for the order of sums.
    group = start(1)
    assert group.codes() == [0], group.log(0)[-2000:]
    expected, rows = alone
    found = lines(workdir)
    assert found.keys() == expected.keys()
    for key, line in expected.items():
        assert found[key] == pytest.approx(line, rel=2e-5, abs=1e-6), key
        if "tokens" in line:
            assert found[key]["tokens"] == line["tokens"]
    assert examples(folder, "run2", "run4", "run1") == rows
    first = [examples(folder, name) for name in ("run2", "run4", "run1")]
    assert all(first), "each has made some"


def test_the_first_process_dies_and_the_rest_is_told(folder, alone):
    group = trained(folder, "zero", "zero")(2, pause=0.2)
    group.until("step 2/")
    group.processes[0].kill()
    killed = time.monotonic()
    assert group.codes() == [-signal.SIGKILL, 1]
    assert time.monotonic() - killed < 10
    last = group.log(1).strip().splitlines()[-1]
    assert last.startswith("error: process 0 of 2") and "died" in last

    # Two go on with what one began. Scores and text of two processes are those of one.
    # Parameters are split over both: every array of a checkpoint spans processes.
    more = ["--config.mesh.fsdp=2", f"--fork={folder / 'alone'}:8"]
    group = trained(folder, "fork", "fork")(2, more=[more, more])
    assert group.codes() == [0, 0], group.log(0)[-2000:]
    expected = alone[0]
    assert lines(folder / "fork")[STEPS, "test"] == pytest.approx(
        expected[STEPS, "test"], rel=2e-5, abs=1e-6
    )
    where = f"--workdir={folder / 'fork'}"
    prompts = folder / "prompts.txt"
    prompts.write_text("abc\nd\nbead cab\n")
    answers = []
    for count in (1, 2):
        out = folder / f"predicted{count}.jsonl"
        group = Group(
            *(folder, f"evaluate{count}", count, where, "--split=validation"),
            *(f"--predictions={out}",),
            program="evaluate",
        )
        assert group.codes() == [0] * count, group.log(0)[-2000:]
        text = folder / f"written{count}.jsonl"
        asked = f"--input_file={prompts}", f"--output={text}", "--max_tokens=6"
        group = Group(
            *(folder, f"generate{count}", count, where, *asked), program="generate"
        )
        assert group.codes() == [0] * count, group.log(0)[-2000:]
        answers.append([x.read_text().splitlines() for x in (out, text)])
    (one, written), (two, others) = answers
    assert len(one) == len(two) > 10
    for a, b in zip(map(json.loads, one), map(json.loads, two), strict=True):
        assert a["example"] == b["example"] and a.keys() == b.keys()
    assert [json.loads(x)["text"] for x in written] == [
        json.loads(x)["text"] for x in others
    ]


def test_what_differs_or_is_missing_is_named_by_all_within_the_timeout(folder):
    start = trained(folder, "odd", "odd")
    group = start(2, more=[["--config.seed=1"], ["--config.seed=2"]])
    assert group.codes() == [1, 1]
    for index in range(2):
        log = group.log(index)
        assert log.count("error: ") == 1 and "Traceback" not in log
        assert "config.seed is 2, 1 on process 0" in log and "process 1 of 2" in log

    group = start(1, claims=3, timeout=3)
    began = time.monotonic()
    assert group.codes() == [1]
    assert time.monotonic() - began < 60  # most of it for imports
    last = group.log(0).strip().splitlines()[-1]
    assert last.startswith("error: processes 1, 2 of 3 did not come") and "3 s" in last
    assert "Traceback" not in group.log(0)
