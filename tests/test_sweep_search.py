"""Searching with Optuna, and the report of a sweep."""

import base64
import io
import json
import math
import os
import re
import sys
import time

import pytest
import sweep_runs
from PIL import Image
from sweep_runs import starts_of, sweep_of

from triform.runtime import files
from triform.runtime.errors import UserError
from triform.sweeps import __main__ as tasks
from triform.sweeps import local, page, report, runs, search, slurm
from triform.sweeps.values import Range, Search

optuna = pytest.importorskip("optuna", reason="an extra: pip install triform[sweeps]")
RATE, ENDS = "optim.learning_rate", "optim.warmup_steps"
SPACE = {RATE: Range(1e-3, 10.0, log=True)}


def searched(folder, trials=12, seeds=(), space=SPACE, **fields):
    sweep = sweep_of(folder / "out", [], **fields)
    sweep.search = Search(dict(space), trials, seeds)
    return sweep


def work(sweep, retry=False, stop=lambda: ""):
    local.work(sweep, search.Queue(sweep, retry), stop)
    return [runs.status_of(member).state for member in sweep.members]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "TRAIN", sweep_runs.program(tmp_path))
    monkeypatch.setattr(local, "LOOK", 0.02)
    return tmp_path


def write_metrics(member, **last):
    """What a finished run leaves behind, without a run."""
    lines = [{"step": 6, **last}, {"step": 6, "test/loss": 1.0}]
    folder = member.folder
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/metrics.jsonl", "w") as f:
        f.writelines(files.dumps(line) + "\n" for line in lines)


def test_a_search_is_kept_in_a_journal_and_comes_to_better_values(tmp_path):
    """The loss is |log10(rate)|: best at 1. No runs: their metrics are written."""
    sweep = searched(tmp_path, trials=40)
    rates = []
    for _ in range(40):
        study = search.Study(sweep)  # as if each trial were of a new process
        study.tell()
        (member,) = study.ask()
        rate = float(member.settings[RATE])
        rates.append(abs(math.log10(rate)))
        write_metrics(member, **{"eval/loss": rates[-1]})
    study = search.Study(sweep)
    study.tell()
    assert study.left() == 0 and len(study.members()) == 40
    first, last = sorted(rates[:10])[5], sorted(rates[-10:])[5]
    assert last < first / 2  # medians
    backend = optuna.storages.journal.JournalFileBackend(
        str(tmp_path / "out" / search.JOURNAL)
    )
    storage = optuna.storages.JournalStorage(backend)
    known = optuna.load_study(study_name="sweep", storage=storage)
    assert known.best_value == pytest.approx(min(rates))


def test_seeds_are_runs_of_one_trial_and_failed_trials_can_be_repeated(folder):
    sweep = searched(folder, trials=5, seeds=("0", "13"), jobs=2)
    states = work(sweep)
    ends = {"0": "finished", "13": "failed"}
    assert len(states) == 10
    assert states == [ends[m.settings["seed"]] for m in sweep.members]
    assert len({m.settings[RATE] for m in sweep.members}) == 5
    again = runs.read(sweep.workdir)
    assert again.members == sweep.members
    assert work(again) == states  # nothing is left to do
    assert {starts_of(folder / "out" / m.name) for m in again.members} == {1}
    work(again, retry=True)
    for member, state in zip(again.members, states, strict=True):
        expected = 2 if state == "failed" else 1
        assert starts_of(folder / "out" / member.name) == expected


def test_a_search_that_was_killed_has_no_trial_that_runs_for_ever(folder):
    sweep = searched(folder, trials=3)
    asked = search.Study(sweep).ask() + search.Study(sweep).ask()  # then killed
    assert {x.state for x in map(runs.status_of, asked)} == {"unfinished"}
    assert work(sweep) == ["finished"] * 3
    assert [m.name for m in sweep.members[:2]] == [m.name for m in asked]


def test_a_search_that_was_killed_while_it_asked_goes_on(tmp_path):
    """After every line of its journal, and in the middle of one."""
    space = SPACE | {ENDS: ("0", "1")}
    sweep = searched(tmp_path, trials=2, space=space)
    (first,) = search.Study(sweep).ask()
    path = tmp_path / "out" / search.JOURNAL
    before = path.read_bytes()
    search.Study(sweep).ask()
    after = path.read_bytes()
    assert after.startswith(before)
    lines = [i for i in range(len(before), len(after)) if after[i - 1] == ord("\n")]
    assert len(lines) == 4  # nothing, the study, a trial, one of its two values
    for end in (*lines, *(i - 1 for i in lines[1:]), len(before) + 9, len(after) - 9):
        path.write_bytes(after[:end])
        study = search.Study(sweep)
        study.tell()
        assert study.left() == 1 and study.members() == [first]
        (again,) = study.ask()
        assert search.Study(sweep).members() == [first, again]
    path.write_bytes(after[: len(before) - 5] + after[len(before) :])
    with pytest.raises(UserError, match="is damaged"):
        search.Study(sweep)


def test_another_search_needs_another_workdir(tmp_path):
    search.Study(searched(tmp_path)).ask()
    assert search.Study(searched(tmp_path, trials=20)).left() == 19
    other = {RATE: Range(1e-3, 1.0, log=True)}
    for wrong in (searched(tmp_path, space=other), searched(tmp_path)):
        wrong.mode = "max" if wrong.search.space == SPACE else "min"
        with pytest.raises(UserError, match="name another workdir"):
            search.Study(wrong)


def test_without_optuna_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"triform\[sweeps\].*random:N"):
        search.Study(searched(tmp_path))


# Slurm's scripts, without Slurm


def options_of(path):
    with open(path) as f:
        found = re.findall(r'^#SBATCH --([\w-]+)(?:="?(.*?)"?)?$', f.read(), re.M)
    return dict(found)


def test_scripts_of_a_grid_and_of_a_search(tmp_path):
    sweep = sweep_of(tmp_path / "out", [{"seed": str(i)} for i in range(5)], jobs=2)
    where = slurm.place("gpu,2,1.5", ["--mem=16G"])
    ((path, after),) = slurm.scripts(sweep, sweep.members, where)
    found = options_of(path)
    assert after is None and found["array"] == "0-4%2" and found["gres"] == "gpu:2"
    assert found["time"] == "0-01:30:00" and found["mem"] == "16G"
    assert found["signal"] == "USR1@120" and "requeue" in found
    # Newer srun take one core unless they are told.
    assert "--cpus-per-task=$SLURM_CPUS_PER_TASK" in files.read_text(path)
    # The number of an array's last task, SLURM_JOB_ID, names all of its tasks.
    assert 'requeue "$SLURM_JOB_ID' not in files.read_text(path)
    sweep = searched(tmp_path, trials=5, seeds=("0", "1"), jobs=2)
    found = slurm.scripts(sweep, [], where)
    assert [after for _, after in found] == [None, "afterok"] + [
        "afterany",
        "afterok",
    ] * 2
    sizes = [options_of(path)["array"] for path, _ in found[1::2]]
    assert sizes == ["0-3%2", "0-3%2", "0-1%2"]
    for text in ("gpu", "gpu,1", "gpu,1,0", "a b,1,1", "gpu,1,1,1"):
        with pytest.raises(UserError, match="PARTITION,GPUS,HOURS"):
            slurm.place(text)


def test_waves_are_submitted_at_once_and_none_twice(tmp_path, monkeypatch):
    """With programs in place of Slurm's, which note how they are called."""
    (tmp_path / "bin").mkdir()
    for name, text in {
        "sbatch": 'echo "$*" >> calls; wc -l < calls',
        "squeue": "cat queued 2>/dev/null",
        "scancel": 'echo "scancel $*" >> calls',
    }.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    sweep, where = searched(tmp_path, trials=4, jobs=2), slurm.place("cpu,0,1")
    assert slurm.submit(sweep, [], where) == ["1", "2", "3", "4"]
    calls = (tmp_path / "calls").read_text().splitlines()
    found = [re.search(r"--dependency=(\S+)", call) for call in calls]
    after = [match and match[1] for match in found]
    assert after == [None, "afterok:1", "afterany:2", "afterok:3"]
    (tmp_path / "queued").write_text("3\n9\n")
    assert slurm.queued(sweep) == ["3"]
    (tmp_path / "queued").unlink()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho no such >&2; exit 1\n")
    with pytest.raises(UserError, match="no such"):
        slurm.submit(sweep, [], where)


def test_a_wave_is_asked_for_once_and_no_trial_is_too_many(folder):
    sweep = searched(folder, trials=3, seeds=("0", "1"))
    runs.write(sweep)
    listed = []
    for wave in (0, 0, 1):  # the first job is put back into the queue
        path = str(folder / "out" / f"wave{wave}.json")
        assert tasks.ask(sweep.workdir, path, "2") == 0
        listed.append(json.loads(files.read_text(path)))
        for member in runs.read(sweep.workdir).members:
            write_metrics(member, **{"eval/loss": 1.0})
    assert [len(x) for x in listed] == [4, 4, 2] and listed[0] == listed[1]
    found = runs.read(sweep.workdir)
    assert [m.settings for m in found.members] == listed[0] + listed[2]


def test_a_task_does_its_run_and_says_with_its_code_what_came_of_it(
    folder, monkeypatch
):
    monkeypatch.setattr(local, "Stop", lambda: lambda: "")
    sweep = sweep_of(folder / "out", [{ENDS: "0"}, {ENDS: "1"}])
    runs.write(sweep)
    ((script, _),) = slurm.scripts(sweep, sweep.members, slurm.place("cpu,0,1"))
    path = script.replace(".sh", ".json")
    assert [tasks.run(path, str(i)) for i in range(3)] == [0, 1, 0]
    assert [runs.status_of(m).state for m in sweep.members] == ["finished", "failed"]
    # Stopped before its end: 75, which puts the task back into the queue.
    stopped = sweep_of(folder / "out", [{"log_every": "60000"}])
    runs.write(stopped)
    slurm.write_runs(path, stopped.members)
    begin = time.monotonic()
    late = lambda: "SIGTERM" if time.monotonic() - begin > 1 else ""  # noqa: E731
    monkeypatch.setattr(local, "Stop", lambda: late)
    assert tasks.run(path, "0") == 75


# The report


@pytest.mark.parametrize("keys", [1, 3])
def test_a_report_is_one_page_and_says_what_is_not_finished(tmp_path, keys):
    plan = [
        {
            RATE: f"1e-{i}",
            "seed": seed,
            **({ENDS: str(i), "steps": "6"} if keys > 1 else {}),
        }
        for i in range(1, 5)
        for seed in ("0", "1")
    ]
    sweep = sweep_of(tmp_path / "out", plan)
    for index, member in enumerate(sweep.members[:6]):
        write_metrics(member, **{"eval/loss": float(10 - index)})
    runs.record(sweep.members[6].folder, "error: <too> hot", 0)
    runs.record(sweep.members[7].folder, "pruned: too slow", 0)
    text = report.run(sweep.workdir, sweep)
    rows = [x for x in text.splitlines() if re.match(r"\d  ", x)]
    assert len(rows) == 3 and " 1e-3" in rows[0] and "5.5 +- 0.71 (2)" in rows[0]
    assert RATE in text.splitlines()[0]
    assert "failed: 1" in text and "<too> hot" in text and "pruned: 1" in text
    html = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;too&gt; hot" in html and "too slow" in html
    assert not re.search(r'(?:src|href)="(?!data:)', html) and "http" not in html
    image = base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])
    assert (tmp_path / "out" / "report.png").read_bytes() == image
    assert Image.open(io.BytesIO(image)).size[0] > 1000


def test_a_report_of_a_sweep_that_has_just_begun(tmp_path):
    sweep = sweep_of(tmp_path / "out", [{"seed": "0"}, {"seed": "1"}])
    text = report.run(sweep.workdir, sweep)
    assert "unfinished: 2" in text
    with pytest.raises(UserError, match=r"holds no sweep.json"):
        report.run(sweep.workdir, None)


def test_positions_of_values_are_logarithmic_where_they_span_much():
    scale, logarithmic = page._scale(["0.001", "0.01", "0.1"])
    assert logarithmic and scale["0.01"] == pytest.approx(0.5)
    scale, logarithmic = page._scale(["1", "2", "3"])
    assert not logarithmic and scale["2"] == pytest.approx(0.5)
    assert page._scale(["b", "a", "c"])[0] == {"a": 0, "b": 0.5, "c": 1}
