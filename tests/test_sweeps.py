"""Runs of a sweep: which are started, what became of them, and who stops them.

With a program in place of train.py (see sweep_runs.py).
"""

import fcntl
import json
import math
import os
import signal
import time

import pytest
import sweep_runs
from absl import flags
from sweep_runs import (
    BREAKS,
    DIES,
    FAILS,
    SAVES_LONG,
    gone,
    pid_of,
    starts_of,
    sweep_of,
)

from triform import config_flag
from triform import sweep as program
from triform.configs import plugins
from triform.models.feed_forward import FFNS
from triform.runtime import history, launch
from triform.runtime.errors import UserError
from triform.sweeps import local, pruning, runs, search
from triform.sweeps.values import grid

RATE, ENDS, WAIT = "optim.learning_rate", "optim.warmup_steps", "log_every"


@pytest.fixture
def done(tmp_path, monkeypatch):
    """(sweep, retry) -> does what is to do, in this process: {name: status}."""
    monkeypatch.setattr(local, "TRAIN", sweep_runs.program(tmp_path))

    def do(sweep, retry=False, stop=lambda: ""):
        todo = [m for m in sweep.members if search.is_todo(m, retry)]
        local.run(sweep, todo, stop)
        return {m.name: runs.status_of(m) for m in sweep.members}

    return do


def test_a_run_that_fails_is_a_row_and_stops_no_other(done, tmp_path, capfd):
    plan = [{ENDS: str(how)} for how in (FAILS, BREAKS, DIES, 0)]
    sweep = sweep_of(tmp_path / "out", plan)
    found = [*done(sweep).values()]
    assert [x.state for x in found] == ["failed"] * 3 + ["finished"]
    assert found[0].note == "optim.warmup_steps=1: not today; take another"
    assert found[1].note == "ValueError: of the program"
    assert "signal 9" in found[2].note
    rows = runs.rows_of(sweep)
    assert [row["note"] for row in rows] == [x.note for x in found]
    assert found[0].note in capfd.readouterr().err
    # Failed ones are left as they are, and only they are repeated.
    assert done(sweep) == dict(zip([m.name for m in sweep.members], found, strict=True))
    assert [starts_of(tmp_path / "out" / m.name) for m in sweep.members] == [1] * 4
    done(sweep, retry=True)
    assert [starts_of(tmp_path / "out" / m.name) for m in sweep.members] == [2, 2, 2, 1]


def test_jobs_share_cores_and_gpus(done, tmp_path, monkeypatch):
    sweep = sweep_of(tmp_path / "out", grid({WAIT: (1500, 1501)}), jobs=2)
    done(sweep)
    cores = [
        (tmp_path / "out" / m.name / "cores").read_text().split() for m in sweep.members
    ]
    here = os.sched_getaffinity(0)
    assert all(cores)
    if len(here) > 1:
        assert sorted(cores[0] + cores[1]) == sorted(map(str, here))
    monkeypatch.setattr(local, "gpus", lambda: ["0", "1", "2", "3"])

    def devices(jobs):
        return [x.environment["CUDA_VISIBLE_DEVICES"] for x in local.shares(jobs)]

    assert devices(2) == ["0,1", "2,3"]
    assert devices(3) == ["0", "1", "2,3"]
    assert devices(6) == ["0", "1", "2", "3", "0", "1"]
    memory = local.shares(6)[0].environment["XLA_PYTHON_CLIENT_MEM_FRACTION"]
    assert float(memory) == pytest.approx(0.45)
    assert local.shares(1) == [local.Share()]


def test_gpus_are_those_that_cuda_would_use(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert local.gpus() == ["3", "5"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert local.gpus() == []


def test_whether_a_run_lives_is_read_from_its_folder(tmp_path):
    sweep = sweep_of(tmp_path / "out", [{"seed": "0"}])
    member = sweep.members[0]

    def state():
        return runs.status_of(member).state

    def outcome(text):
        line = {"started": history.now(), "outcome": text}
        (tmp_path / "out" / "seed=0" / "runs.jsonl").write_text(json.dumps(line) + "\n")

    assert state() == "unfinished"
    os.mkdir(member.folder)
    assert state() == "unfinished"
    outcome(None)
    assert state() == "unfinished"  # it was killed
    with runs.locked(member.folder) as ours:
        assert ours and state() == "running"
        with runs.locked(member.folder) as ours:
            assert not ours
        runs.record(member.folder, "error: x", 0)  # of another start: not its line
    assert state() == "unfinished"
    for text, expected in (
        ("interrupted by SIGTERM", "unfinished"),
        ("killed", "unfinished"),
        ("error: too hot", "failed"),
        ("pruned: too slow", "pruned"),
    ):
        outcome(text)
        assert state() == expected
    path = tmp_path / "out" / "seed=0" / "metrics.jsonl"
    path.write_text('{"step": 5, "test/loss": 1.0}\n')
    assert state() == "pruned"  # 5 of 6 steps: tested by a shorter run
    path.write_text('{"step": 6, "test/loss": "nan"}\n')
    assert state() == "finished"
    assert runs.status_of(sweep.member({"seed": "0", "steps": "9"})).state != "finished"


def test_a_run_of_another_process_is_not_written_to(done, tmp_path):
    sweep = sweep_of(tmp_path / "out", [{"seed": "0"}])
    folder = tmp_path / "out" / "seed=0"
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert done(sweep)["seed=0"].state == "running"
    assert not (folder / "runs.jsonl").exists()


def test_a_run_that_is_worse_than_half_of_the_others_is_pruned(
    done, tmp_path, monkeypatch
):
    monkeypatch.setattr(local, "PRUNE", 0.1)
    plan = [{RATE: str(x)} for x in (1.0, 2.0, 3.0, 4.0)]
    sweep = sweep_of(tmp_path / "out", plan, jobs=4, prune=True)
    assert {x.state for x in done(sweep).values()} == {"finished"}
    # 2.4 is better than the median of the others, 2.5; 2.6 is not.
    late = [{RATE: x, WAIT: "3000"} for x in ("2.4", "2.6")]
    sweep.members += [sweep.member(x) for x in late]
    begin = time.monotonic()
    *_, good, bad = done(sweep).values()
    assert (good.state, bad.state) == ("finished", "pruned")
    assert "its best eval/loss 2.6 is worse than the median 2." in bad.note
    assert pruning.reason(sweep.members[0], sweep) == ""  # it is at its last step
    assert time.monotonic() - begin > 3  # the other one was let go on


def test_what_was_asked_to_leave_before_it_began_has_not_failed():
    left = local.interrupted
    assert left(75, asked=False, begun=True)  # by a signal of somebody else
    for code in (-signal.SIGTERM, -signal.SIGINT, 130):
        assert left(code, asked=True, begun=True)
        assert not left(code, asked=False, begun=True)
    assert left(1, asked=True, begun=False)  # KeyboardInterrupt in an import
    assert not left(1, asked=True, begun=True)
    assert not left(1, asked=False, begun=False)
    assert not left(-signal.SIGKILL, asked=True, begun=True)


# The whole program


@pytest.fixture
def main(monkeypatch):
    """(folder, flags of sweep.py) -> the exit code, in this process."""
    monkeypatch.setattr(program, "Stop", lambda: lambda: "")  # leaves signals alone

    def call(folder, *args):
        before = {*flags.FLAGS}
        try:
            program.define()
            words = [f"--config={sweep_runs.CONFIG}", f"--workdir={folder / 'out'}"]
            rest = flags.FLAGS(["sweep", *words, *args], known_only=True)
            return program.main(rest)
        finally:
            for name in {*flags.FLAGS} - before:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()

    return call


@pytest.fixture
def sweep(tmp_path):
    """(flags of sweep.py) -> the process."""
    begun = []

    def start(*args):
        begun.append(sweep_runs.started(tmp_path, *args))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("SIGTERM to the sweep", 75),
        ("SIGINT to all", 75),
        ("SIGTERM to all", 75),
        ("SIGKILL to the sweep", -9),
    ],
)
def test_a_sweep_that_is_stopped_saves_its_runs_and_leaves_none(
    how, code, sweep, tmp_path
):
    process = sweep("--sweep=seed=0,1,2", f"--config.{WAIT}=60000", "--jobs=2")
    for name in ("seed=0", "seed=1"):
        pid_of(tmp_path / "out" / name)
    name, _, whom = how.partition(" to ")
    target = process.pid if whom == "the sweep" else -process.pid
    os.kill(target, getattr(signal, name))
    process.communicate(timeout=60)
    assert process.returncode == code
    assert gone(tmp_path)
    for name in ("seed=0", "seed=1"):
        assert (tmp_path / "out" / name / "saved").exists()
    assert not (tmp_path / "out" / "seed=2").exists()


def test_a_sweep_passes_a_signal_on_at_once_whatever_it_is_busy_with(
    done, tmp_path, monkeypatch
):
    """A terminal tells the runs, too: later on it would be a second signal."""
    plan = [{ENDS: str(SAVES_LONG), WAIT: "60000"}, {WAIT: "1"}]
    sweep = sweep_of(tmp_path / "out", plan, jobs=2)
    handlers = {x: signal.getsignal(x) for x in signal.valid_signals()}
    stop, folder = local.Stop(), tmp_path / "out" / sweep.members[0].name

    def busy(queue, member):
        if stop():
            return
        pid = pid_of(folder)
        while "step" not in (folder / "output.log").read_text():
            time.sleep(0.01)
        for each in (pid, os.getpid()):
            os.kill(each, signal.SIGINT)
        time.sleep(1.5)

    monkeypatch.setattr(local.Listed, "ended", busy)
    try:
        done(sweep, stop=stop)
    finally:
        for number, handler in handlers.items():
            if handler is not None and number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, handler)
    assert stop() == "SIGINT" and (folder / "saved").exists()


def test_a_sweep_passes_a_second_signal_on(sweep, tmp_path):
    """To runs that take long to save."""
    words = (
        "--sweep=seed=0,1",
        f"--config.{WAIT}=60000",
        f"--sweep={ENDS}={SAVES_LONG}",
    )
    process = sweep(*words, "--jobs=2")
    for seed in (0, 1):
        pid_of(tmp_path / "out" / f"{ENDS}={SAVES_LONG},seed={seed}")
    for _ in range(2):
        process.terminate()
        time.sleep(1.2)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert gone(tmp_path)
    assert not [*(tmp_path / "out").glob("*/saved")]


def test_a_sweep_started_again_does_what_is_unfinished(sweep, tmp_path):
    words = ("--sweep=seed=0,1", f"--sweep={RATE}=inf,2,4", f"--sweep={ENDS}=0,1")
    process = sweep(*words, "--jobs=2")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "6 of 12 runs failed" in errors and "not today" in errors
    text = (tmp_path / "out" / "sweep.json").read_text()
    report = json.loads(text, parse_constant=pytest.fail)
    states = [(x["settings"][ENDS], x["state"]) for x in report["runs"]]
    assert sorted(set(states)) == [("0", "finished"), ("1", "failed")]
    rows = {row["name"]: row["scores"]["test/loss"] for row in report["rows"]}
    lead, tail = f"{RATE}=", f",{ENDS}=0"
    assert rows == {
        f"{lead}inf{tail}": ["inf", "nan", 2],
        f"{lead}2{tail}": [2.0, 0.0, 2],
        f"{lead}4{tail}": [4.0, 0.0, 2],
    }
    table = [line.split() for line in out.splitlines()]
    header = ["eval/loss", "test/loss", RATE, ENDS]
    first = table.index(header) + 1
    assert [row[-2:] for row in table[first : first + 3]] == [
        [x, "0"] for x in ("2", "4", "inf")
    ]
    # Other values: those that stay are not started, the others are named.
    process = sweep("--sweep=seed=0,1,2", f"--sweep={RATE}=2,3", f"--sweep={ENDS}=0,1")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "no longer asked for, and kept: optim." in out
    count = {p.name: starts_of(p) for p in (tmp_path / "out").iterdir() if p.is_dir()}
    assert count.pop("config") == 0
    assert len(count) == 20 and set(count.values()) == {1}
    # Without flags it is the same sweep.
    process = sweep("--retry")
    assert process.wait(timeout=60) == 1
    count = {p.name: starts_of(p) for p in (tmp_path / "out").iterdir() if p.is_dir()}
    repeated = {name for name, number in count.items() if number == 2}
    assert repeated == {
        f"{RATE}={rate},{ENDS}=1,seed={seed}" for seed in "012" for rate in "23"
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep=optim.learning_rat=1,2"], "did you mean optim.learning_rate"),
        (["--sweep=optim.learning_rate=1,two"], "two"),
        (["--sweep=seed=0,1", "--config.stepz=3"], "did you mean steps"),
        (["--sweep=seed"], "expected KEY=VALUE,VALUE"),
        (["--sweep=model=Encoder,LanguageModelConfig"], "expected one of Encoder"),
        (["--sweep=seed=0,1", "--on=packed", "--jobs=2"], "leave out --jobs=2"),
        (["--sweep=seed=0,1", "--on=cloud"], "expected local,"),
        (["--sweep=seed=0,1", "--on=slurm:gpu"], "PARTITION,GPUS,HOURS"),
        (["--sweep_file=nowhere"], "one of sizes"),
        ([], "nothing is swept"),
        (["--sweep=seed=0,1", "reprot"], "'reprot'"),
        (["--sweep=log_every=1,2", "--search=tpe:2", "--on=print"], "random:N"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_run(words, message, tmp_path, main):
    with pytest.raises((UserError, flags.Error)) as caught:
        main(tmp_path, *words)
    line = launch.one_line(caught.value)
    assert message in line and len(line.splitlines()) == 1, line
    assert not any((tmp_path / "out").glob("*"))


def test_a_sweep_goes_on_with_further_flags(main, tmp_path, capsys):
    """Which are checked as the first ones are; and flags may be two words."""
    out, shown = tmp_path / "out", "--on=print"
    hexadecimal = ("--sweep=steps=0x10,20", "--jobs=2", shown)
    assert main(tmp_path, *program._joined(["--config.steps", "9"]), *hexadecimal) == 0
    assert main(tmp_path, shown, "--config.log_every=7") == 0
    assert main(tmp_path, shown, "--config.log_every=7") == 0
    before = runs.read(str(out))
    assert before.arguments == ["--config.steps=9", "--config.log_every=7"]
    assert [m.steps for m in before.members] == [16, 20] and before.jobs == 2
    for wrong in ("--config.log_evry=7", "--search=random:3", "--retyr"):
        with pytest.raises((UserError, flags.Error)):
            main(tmp_path, shown, wrong)
    assert runs.read(str(out)) == before
    joined = ["--config.a", "-1", "--config.b", "--on", "print", "--config.c=x", "y"]
    assert program._joined(joined) == [
        *("--config.a=-1", "--config.b", "--on", "print", "--config.c=x", "y")
    ]


def test_a_sweep_file_may_have_the_name_of_its_config(main, tmp_path, capsys):
    (tmp_path / "sweeps").mkdir()
    config, plan = tmp_path / "mine.py", tmp_path / "sweeps" / "mine.py"
    config.write_text("from triform.configs.gpt_shakespeare_char import get_config\n")
    plan.write_text("def get_sweep():\n    return [{'seed': 1}, {'log_every': 2}]\n")
    words = (f"--config={config}", f"--sweep_file={plan}", "--on=print")
    assert main(tmp_path, *words) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 2
    plan.write_text("def get_sweep():\n    return 1 / 0\n")
    with pytest.raises(UserError, match=r"mine.py:2: ZeroDivisionError"):
        main(tmp_path, *words)


def test_a_run_of_another_program_is_not_said_to_be_done(main, tmp_path, capsys):
    run = tmp_path / "out" / "seed=0"
    run.mkdir(parents=True)
    (run / "runs.jsonl").write_text(json.dumps({"outcome": None}) + "\n")
    with runs.locked(str(run)):
        assert main(tmp_path, "--sweep=seed=0") == 75
    assert "by another program: 1 of 1 runs" in capsys.readouterr().err


def test_printed_commands_are_those_of_the_unfinished_runs(main, tmp_path, capsys):
    assert main(tmp_path, "--sweep=seed=0,1", "--on=print", "--config.steps=3") == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2
    assert all("train" in x and f"--config={tmp_path}/out/config" in x for x in lines)
    assert "--config.seed=1" in lines[1] and f"{tmp_path}/out/seed=1" in lines[1]


def test_printed_scripts_say_how_they_are_submitted(main, tmp_path, capsys):
    assert main(tmp_path, "--sweep=seed=0,1", "--on=print:cpu,0,1") == 0
    first, *script = capsys.readouterr().out.splitlines()
    assert first == f"# sbatch --parsable {tmp_path}/out/slurm/1/wave0.sh"
    assert "\n".join(script).strip() == (
        (tmp_path / "out" / "slurm" / "1" / "wave0.sh").read_text().strip()
    )


def test_what_slurm_still_does_is_not_started_again(main, tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    jobs = tmp_path / "out" / "slurm" / "1" / "jobs.json"
    jobs.parent.mkdir(parents=True)
    jobs.write_text('["7"]')
    for where in ("local", "packed", "slurm:cpu,0,1", "print"):
        with pytest.raises(UserError, match="jobs 7 of this sweep"):
            main(tmp_path, "--sweep=seed=0", f"--on={where}")
    assert os.listdir(tmp_path / "out") == ["slurm"]  # what they use is as it was


def test_a_sweep_whose_config_is_gone_says_so(main, tmp_path):
    assert main(tmp_path, "--sweep=seed=0", "--on=print") == 0
    (tmp_path / "out" / "config" / "config.json").unlink()
    with pytest.raises(UserError, match="config: is gone; start the sweep again"):
        main(tmp_path, "--on=print")
    assert main(tmp_path, "--sweep=seed=0", "--on=print") == 0


def test_runs_have_the_config_of_the_start_whatever_becomes_of_its_file(
    main, tmp_path, capsys
):
    """The file and its plugin are edited while runs wait."""
    config, plugin = tmp_path / "edited.py", tmp_path / "plug.py"
    text = (
        "from triform.configs import gpt_shakespeare_char\n"
        "def get_config(variant=''):\n"
        "    config = gpt_shakespeare_char.get_config('smoke')\n"
        "    config.plugins = ('plug.py',)\n"
        "    config.steps = {steps}\n"
        "    return config\n"
    )
    config.write_text(text.format(steps=7))
    plugin.write_text("FFNS = {'of_the_start': None}\n")
    words = (f"--config={config}", "--sweep=seed=0,1", "--on=print")
    assert main(tmp_path, *words, "--config.log_every=3") == 0
    assert main(tmp_path, *words, "--config.log_every=3") == 0
    assert "config: " not in capsys.readouterr().out  # nothing has changed
    assert main(tmp_path, *words, "--config.log_every=3") == 0
    member = runs.read(str(tmp_path / "out")).members[0]
    config.write_text("raise ValueError('half of an edit')\n")
    plugin.unlink()
    plugins._loaded.pop("plug.py")  # as in another process
    del FFNS["of_the_start"]
    words_of_first = capsys.readouterr().out.splitlines()[0].split()
    base, *own = [x for x in words_of_first if x.startswith("--config")]
    found = config_flag.configured(base.partition("=")[2], own)
    assert (found.steps, found.log_every, found.seed) == (7, 3, 0)
    assert "of_the_start" in FFNS and member.steps == 7
    # Its own flags alone: they change that config, which is kept, too.
    assert main(tmp_path, words[0], "--on=print", "--config.steps=9") == 0
    assert "config: steps was 7, is now 9" in capsys.readouterr().out
    sweep = runs.read(str(tmp_path / "out"))
    assert config_flag.load(sweep.base).steps == sweep.members[1].steps == 9
    assert set(os.listdir(tmp_path / "out")) == {".lock", "config", "sweep.json"}
    plugins._loaded.pop("plug.py")
    del FFNS["of_the_start"]


def test_means_of_what_is_not_finite():
    sweep = runs.Sweep("", "", [], "", 1, "m", "min")
    assert sweep.better(1.0, math.nan) and not sweep.better(math.nan, 1.0)
    assert not sweep.better(math.nan, math.nan)
    assert runs.best_of([(1, math.nan), (2, 3.0), (3, 2.0)], sweep) == 2.0
    assert runs.best_of([], sweep) is None
