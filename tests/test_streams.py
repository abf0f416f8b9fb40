"""Streams that are closed, full or read by nobody, and files written whole or not."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from triform import evaluate
from triform.runtime import files, metrics

PROGRAM = """
import os, sys
from triform.runtime import streams
streams.prepare(needed={needed})
held = open(sys.argv[1], "w")  # must not get the number of a closed stream
for i in range(3):
    print("line", i)
    print("note", i, file=sys.stderr)
held.write("mine")
held.close()
"""


def shell(tmp_path, how, needed=False, program=PROGRAM):
    """(exit code, stdout, stderr) of a program under a redirection of the shell."""
    text = program.replace("{needed}", str(needed))
    command = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" "$2" {how}']
    done = subprocess.run(
        [*command, sys.executable, text, str(tmp_path / "held")],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


BROKEN = {
    "closed": ">&-",
    "full": ">/dev/full",
    "unread": "| true",
    "closed errors": "2>&-",
    "full errors": "2>/dev/full",
    "all closed": "<&- >&- 2>&-",
    "all full": ">/dev/full 2>&1",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, how):
    code, out, errors = shell(tmp_path, BROKEN[how])
    assert code == 0
    assert (tmp_path / "held").read_text() == "mine"
    assert "Traceback" not in errors + out
    if how in ("closed", "full"):
        assert "standard output: " in errors and errors.count("going on") == 1
        assert errors.count("note") == 3
    if "errors" in how:
        assert out.count("line") == 3


LIBRARY = """
import os, sys
from triform.runtime import streams
streams.prepare()
with open(sys.argv[1], "w") as held:
    held.write("mine")
    held.flush()
    os.write(1, b"from a library")
"""


def test_what_a_library_prints_does_not_land_in_our_files(tmp_path):
    _, _, errors = shell(tmp_path, ">&-", program=LIBRARY)
    assert "Bad file descriptor" in errors.splitlines()[-1]
    assert (tmp_path / "held").read_text() == "mine"


@pytest.mark.parametrize("how", ["closed", "full", "unread"])
def test_an_answer_that_cannot_be_written_is_an_error(tmp_path, how):
    code, _, errors = shell(tmp_path, BROKEN[how], needed=True)
    assert code not in (0, 120)
    assert "standard output" in errors.splitlines()[-1]


@pytest.mark.parametrize("name", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_escaped(name):
    text = "from triform.runtime import streams; streams.prepare(); "
    text += "print('\\u0142\\ud800')"
    done = subprocess.run(
        [sys.executable, "-c", text],
        env=dict(os.environ, PYTHONIOENCODING=name),
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"\\u0142\\ud800\n"


# Files.


@pytest.fixture
def small_files():
    """Files above 4 kB cannot be written: as on a full disk, with another errno."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


LARGE = ["x" * 100] * 100
WRITERS = {
    "report": lambda path: files.write_json(path, {"a": LARGE}),
    "predictions": lambda path: evaluate.write_predictions(path, [{"a": LARGE}]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there(tmp_path, name, small_files):
    path = tmp_path / "file.json"
    path.write_text("before")
    with pytest.raises(OSError, match="too large") as caught:
        WRITERS[name](str(path))
    assert caught.value.errno == errno.EFBIG
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file.json"]


def test_samples_of_a_full_disk(tmp_path, small_files):
    evaluate.write_samples(str(tmp_path), "a", evaluate.Samples("before"))
    with pytest.raises(OSError, match="too large"):
        evaluate.write_samples(str(tmp_path), "a", evaluate.Samples("x" * 9999))
    assert (tmp_path / "samples" / "a.txt").read_text() == "before"
    assert os.listdir(tmp_path / "samples") == ["a.txt"]


def test_a_full_disk_stops_the_metrics_and_the_next_start_goes_on(
    tmp_path, small_files
):
    """Not for ever: TensorBoard's own writer would wait for a thread that died."""
    writer = metrics.MetricWriter(str(tmp_path), 0)
    with pytest.raises(OSError, match="too large"):
        for step in range(1, 1000):
            writer.write(step, {"train/loss": 1.0 / step}, seen=step)
    with pytest.raises(OSError, match="too large"):
        writer.close()
    lines = metrics.read_lines(str(tmp_path))
    assert [x["step"] for x in lines] == [*range(1, len(lines) + 1)]
    again = metrics.MetricWriter(str(tmp_path), 3)
    again.write(4, {"train/loss": float("inf")}, seen=4)
    again.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    steps = [json.loads(x, parse_constant=pytest.fail) for x in text.splitlines()]
    assert [x["step"] for x in steps] == [1, 2, 3, 4]


def test_a_line_torn_within_a_character_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "a": "\xc3')
    assert metrics.read_lines(str(tmp_path)) == [{"step": 1}]


def test_devices_and_links_stay_what_they_are(tmp_path):
    (tmp_path / "to").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "to")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        files.write_json(str(tmp_path / name), [1])
    assert os.read(reader, 99) == (tmp_path / "to").read_bytes() == b"[\n  1\n]\n"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    files.write_json("/dev/null", [1])
    assert not os.path.isfile("/dev/null")


def test_a_file_that_cannot_be_read_is_not_a_file_that_is_missing(tmp_path):
    assert files.read_text(str(tmp_path / "none")) is None
    with pytest.raises(OSError, match="Input/output") as caught:
        files.read_text("/proc/self/mem")
    assert caught.value.errno == errno.EIO


# Reports of an evaluation.


def test_other_results_are_written_beside_and_the_same_once(tmp_path):
    folder, name = str(tmp_path), "evaluation_test_best"
    write = evaluate.write_report
    assert write(folder, name, {"a": "inf", "seconds": 1.0}) == name
    assert write(folder, name, {"a": "inf", "seconds": 2.0}) == name
    assert write(folder, name, {"a": 3.0, "seconds": 2.0}) == f"{name}.2"
    assert write(folder, name, {"a": 3.0, "seconds": 2.0}) == f"{name}.2"
    first = json.loads((tmp_path / f"{name}.json").read_text())
    assert first == {"a": "inf", "seconds": 1.0}


def test_what_fails_does_not_keep_the_others_from_being_written():
    done = []

    def full():
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        evaluate.write_all([full, lambda: done.append(1), lambda: done.append(2)])
    assert done == [1, 2]
