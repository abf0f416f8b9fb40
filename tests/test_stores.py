"""Workdirs on an object store behave as local ones; against a local S3 server."""

import concurrent.futures
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from laws import SPEED

from triform import config_flag, forks, plan, tools
from triform import workdir as workdirs
from triform.configs import transformer_cldr
from triform.interop.staging import all_or_nothing
from triform.recovery import go_back
from triform.runtime import files, history, lease, metrics, paths, saved, stores
from triform.runtime.checkpoint import CheckpointConfig, Checkpointer
from triform.runtime.errors import UserError
from triform.runtime.lease import Lease

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def bucket():
    """The URL of a bucket of a local S3 server."""
    pytest.importorskip("s3fs", reason="pip install 'triform[stores]'")
    server = pytest.importorskip("moto.server", reason="pip install 'triform[test]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        stores._system.cache_clear()
        stores._system("s3").mkdir("runs")
        yield "s3://runs"
    running.stop()


@pytest.fixture
def url(bucket, request):
    """A workdir of its own for a test."""
    return f"{bucket}/{request.node.name.replace('[', '-').rstrip(']')}"


def test_a_store_and_a_folder_do_the_same(url, tmp_path):
    def story(folder):
        seen = [files.is_folder(folder), files.read_text(f"{folder}/a.json")]
        files.make_folder(folder)
        files.write_json(f"{folder}/a.json", {"größe": 1.5})
        files.append(f"{folder}/lines", "1\n")
        files.append(f"{folder}/lines", "2\n")
        with pytest.raises(KeyError), files.replacing(f"{folder}/lines") as f:
            f.write("torn")
            raise KeyError
        with files.replacing(f"{folder}/bytes", binary=True) as f:
            f.write(b"\xff\n\r")
        names = ("a.json", "lines", "bytes")
        seen += [files.read_text(f"{folder}/{x}", "replace") for x in names]
        seen += [files.exists(f"{folder}/{x}") for x in ("a.json", "b")]
        return [*seen, files.is_folder(folder)]

    assert story(url) == story(str(tmp_path / "local"))
    stores.move(f"{url}", f"{url}-moved")
    assert stores.names(url) == []
    assert stores.names(f"{url}-moved") == ["a.json", "bytes", "lines"]


def test_growing_files_are_put_when_due(url, tmp_path, monkeypatch):
    put = []
    monkeypatch.setattr(stores, "write", lambda url, *_: put.append(url))
    with stores.Mirror(url) as mirror:
        for name in "ab":
            with open(os.path.join(mirror.folder, name), "w") as f:
                f.write(name)
        mirror.push(only_if_due=True)
        assert put == [f"{url}/a", f"{url}/b"]
        with open(os.path.join(mirror.folder, "a"), "a") as f:
            f.write("more")
        mirror.push(only_if_due=True)  # the last was a moment ago
        assert len(put) == 2
        mirror.push()
        assert put[2:] == [f"{url}/a"]  # the other has not changed
    assert not os.path.exists(mirror.folder)
    assert stores.Mirror(str(tmp_path)).folder == str(tmp_path)


def test_metrics_are_there_before_a_step_counts_as_saved(url):
    writer = metrics.MetricWriter(url, 0)
    writer.write(1, {"train/loss": 1.0}, 10)
    writer.flush()
    assert [x["step"] for x in metrics.read_lines(url)] == [1]
    writer.write(2, {"train/loss": 2.0}, 20)
    assert [x["step"] for x in metrics.read_lines(url)] == [1]  # killed here
    writer = metrics.MetricWriter(url, 1)
    writer.write(2, {"train/loss": 3.0}, 20)
    writer.close()
    assert [x["train/loss"] for x in metrics.read_lines(url)] == [1.0, 3.0]
    assert stores.names(f"{url}/tensorboard")


STATE = {"params": {"a": jnp.arange(24.0).reshape(4, 6), "b": jnp.ones(3, jnp.int32)}}


def test_checkpoints(url, tmp_path):
    """The laws of local ones: retention, the best step, bits, scores, set aside."""

    def story(workdir):
        config = CheckpointConfig(every=1, keep_newest=1)
        with Checkpointer(workdirs.checkpoint_dir(workdir), config) as kept:
            for step in (1, 2, 4):
                state = jax.tree.map(lambda x, n=step: x * n, STATE)
                kept.save(step, state, meta={"step": step}, wait=True)
                kept.record(step, {"eval/loss": abs(step - 1)})
        with Checkpointer(workdirs.checkpoint_dir(workdir), config) as kept:
            seen = [kept.steps(), kept.best(), kept.metrics_of(4)]
            state, meta = kept.restore(jax.eval_shape(lambda: STATE))
            seen += [meta, *(np.asarray(x).tobytes() for x in jax.tree.leaves(state))]
            moved = kept.set_aside([4])
            seen += [str(moved[0]).removeprefix(workdir), kept.steps()]
        return seen

    assert story(url) == story(str(tmp_path))


def test_a_torn_upload_is_no_checkpoint(url):
    """Nor is it in the way when its step is saved again; a damaged one is moved."""
    folder, config = workdirs.checkpoint_dir(url), CheckpointConfig(every=1)
    with Checkpointer(folder, config) as kept:
        kept.save(1, STATE, meta={}, wait=True)
    stores.write(f"{folder}/2/state/manifest.ocdbt", b"torn")
    abstract = jax.eval_shape(lambda: STATE)
    with Checkpointer(folder, config) as kept:
        assert kept.steps() == [1]
        assert kept.restore(abstract)[1] == {}
        kept.save(2, STATE, meta={"again": 1}, wait=True)
        assert kept.steps() == [1, 2]
    files.write_json(f"{folder}/2/meta/metadata", {"body": {}, "crc32": 1})
    with Checkpointer(folder, config) as kept:
        assert kept.restore(abstract)[1] == {}
        assert kept.steps() == [1]
    assert stores.names(f"{url}/corrupt") == ["2"]


def test_one_run_at_a_time(url):
    with Lease(url):
        with pytest.raises(UserError, match="another train.py runs in it"):
            Lease(url)
        stores.write(f"{url}/x", b"1")
    with Lease(url):  # the one before has said that it ended
        pass

    def start(_):
        try:
            return Lease(url)
        except UserError:
            return None

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [x for x in pool.map(start, range(4)) if x is not None]
    assert len(found) == 1
    found[0].close()


def test_a_run_that_ended_without_saying_so(url, monkeypatch, capsys):
    first = Lease(url, beat=60)
    own = lease._process()
    # A process of this machine that has ended, or has given its number to another.
    number = stores.names(f"{url}/.lock")[-1]
    gone = {"owner": "x", **own, "since": "1"}
    stores.write(f"{url}/.lock/{number}", json.dumps(gone).encode())
    second = Lease(url, beat=0.1)
    assert "ended without saying so; taking over" in capsys.readouterr().err
    # Another machine's: heard of in time, then no more.
    monkeypatch.setattr(lease, "_lives", lambda found: None)
    with pytest.raises(UserError, match="another train.py runs in it"):
        Lease(url, stale=30)
    second._ended.set()
    second._thread.join()
    started = time.monotonic()
    third = Lease(url, stale=2)
    assert 0.5 < time.monotonic() - started < 10
    told = capsys.readouterr().err
    assert "counts as dead after 2 s" in told and "taking over" in told
    third.close()
    first.close()


def test_who_was_taken_over_writes_nothing_more(url, monkeypatch):
    with Lease(url, beat=0.05):
        stores.write(f"{url}/.lock/9", b"{}")
        deadline = time.monotonic() + 20
        while url not in stores._lost and time.monotonic() < deadline:
            time.sleep(0.02)
        for write in (
            lambda: files.write_json(f"{url}/x.json", 1),
            lambda: Checkpointer(f"{url}/checkpoints", CheckpointConfig()).save(
                1, STATE, meta={}
            ),
        ):
            with pytest.raises(UserError, match="another run has taken over"):
                write()
        stores.write(f"{url}-beside/x", b"1")
    stores.regain(url)
    assert stores.names(url) == [".lock"]


def test_mistakes_are_one_line(bucket, monkeypatch, tmp_path):
    for path, parts in {
        "s3://no-such-bucket/run": ("no such bucket",),
        "ftp://host/run": ("ftp://", "s3://"),
        f"{bucket}/no-such-run": ("holds no config.json",),
    }.items():
        with pytest.raises(UserError) as found:
            config_flag.load(path)
            Lease(path)
        assert all(part in str(found.value) for part in parts), found.value
    with pytest.raises(UserError, match="no such bucket"):
        Lease("s3://no-such-bucket/run")
    with pytest.raises(UserError, match="no such folder"):
        workdirs.parse(f"{bucket}/no-such-run:best")
    for local_only in (paths.absolute, lambda path: all_or_nothing(path).__enter__()):
        with pytest.raises(UserError, match="only a workdir"):
            local_only(f"{bucket}/x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(stores.LIBRARIES, "gs", "no_such_library")
    stores._system.cache_clear()
    with pytest.raises(UserError, match=r"needs no_such_library; pip install"):
        config_flag.load("gs://bucket/run")
    stores._system.cache_clear()
    assert not os.listdir(tmp_path)  # no folder that is called 's3:'


def test_no_credentials_and_no_server_are_one_line(bucket, monkeypatch):
    class Failing:
        def cat_file(self, url):
            raise self.error

    monkeypatch.setattr(stores, "_system", lambda scheme: Failing)
    exceptions = pytest.importorskip("botocore.exceptions")
    Failing.cat_file = classmethod(Failing.cat_file)
    Failing.error = exceptions.NoCredentialsError()
    with pytest.raises(UserError, match="no credentials .*AWS_ACCESS_KEY_ID"):
        stores.read(f"{bucket}/x")
    Failing.error = exceptions.EndpointConnectionError(endpoint_url="http://x")
    with pytest.raises(OSError, match="Could not connect") as found:
        stores.read(f"{bucket}/x")
    assert found.value.filename == f"{bucket}/x"


def test_plugins_are_kept_with_the_run(url, tmp_path, no_plugins):
    path = tmp_path / "mine.py"
    path.write_text("import jax\nFFNS = {'mine': jax.nn.relu}\n")
    config = transformer_cldr.get_config("smoke")
    config.plugins = (str(path),)
    workdirs.plugins.load_all(config)
    workdirs.claim(url, config, {})
    no_plugins()
    (plugin,) = workdirs.saved_config(url).plugins
    assert os.path.basename(plugin) == "mine.py" and plugin != str(path)
    assert stores.names(f"{url}/code") == ["SHA256SUMS", "mine.py"]


def command(script, workdir, *args):
    return [sys.executable, str(ROOT / script), f"--workdir={workdir}", *args]


def environment(tmp_path):
    env = dict(os.environ, TRIFORM_CACHE=str(tmp_path / "cache"), JAX_PLATFORMS="cpu")
    return env | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


def ran(tmp_path, *words):
    done = subprocess.run(
        command(*words),
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def state_of(workdir, step):
    """Every array of a checkpoint by path, as bytes, and the JSON beside them."""
    with Checkpointer(workdirs.checkpoint_dir(workdir), CheckpointConfig()) as kept:
        arrays, meta = saved.read(kept, step)
    return {path: x.tobytes() for path, x in arrays.items()}, meta


def lines_of(workdir):
    lines = metrics.read_lines(workdir)
    return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]


def test_a_run_killed(url, tmp_path):
    """Law 6: killed on a store and resumed there, byte for byte a run in a folder."""
    args = ("--config=transformer_cldr:smoke", "--config.steps=12")
    args += ("--config.log_every=3", "--config.evaluation.every=12")
    whole = str(tmp_path / "whole")
    ran(tmp_path, "train.py", whole, *args)
    killed = subprocess.Popen(
        command("train.py", url, *args), cwd=tmp_path, env=environment(tmp_path)
    )
    marker = f"{workdirs.checkpoint_dir(url)}/4/{stores.COMMITTED}"
    while killed.poll() is None and not stores.exists(marker):
        time.sleep(0.05)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert history.read(url)[-1]["outcome"] is None
    again = ran(tmp_path, "train.py", url, *args, "--profile=11:12")
    assert "profile" in stores.names(url)
    assert files.size_below(f"{url}/checkpoints/4/meta") > 1000
    assert "ended without saying so; taking over" in again.stderr
    assert "resuming after step" in again.stdout
    (ours, meta), (theirs, other) = state_of(url, 12), state_of(whole, 12)
    assert ours == theirs
    assert (meta["data"], meta["window"]) == (other["data"], other["window"])
    assert lines_of(url) == lines_of(whole)
    assert [x["outcome"] for x in history.read(url)] == ["killed", "finished"]
    scores = [files.read_text(f"{x}/scores.json") for x in (url, whole)]
    assert scores[0] == scores[1]
    assert stores.names(f"{url}/samples") == sorted(os.listdir(f"{whole}/samples"))

    scored = json.loads(ran(tmp_path, "evaluate.py", url, "--examples=8").stdout)
    assert scored["validation/examples"] == 8
    assert "evaluation_validation_best.json" in stores.names(url)

    tokenizers = [workdirs.load(x).tokenizer for x in (url, whole)]
    assert tokenizers[0].digest() == tokenizers[1].digest()
    config = config_flag.load(url)
    assert f"--workdir={url}" in plan.what_next(config, url, 12)
    config.init_from = f"{url}:best"
    assert config.resolved().init_from == config.init_from
    assert workdirs.parse(config.init_from) == (url, "best")
    with Checkpointer(workdirs.checkpoint_dir(url), config.checkpoint) as kept:
        steps = kept.steps()
        go_back(url, kept, config, steps[0])
        assert kept.steps() == steps[:1]
    aside = ["metrics.jsonl", "scores.jsonl", *map(str, steps[1:])]
    assert stores.names(f"{url}/set_aside") == sorted(aside)
    there = str(tmp_path / "fork")
    for source, target in ((url, there), (url, f"{url}-fork"), (whole, f"{url}-3")):
        forks.begin(target, config_flag.load(source), f"{source}:{steps[0]}")
        assert state_of(target, steps[0])[0] == state_of(whole, steps[0])[0]
    assert tools.verify(f"{url}-fork") == 0
    assert sorted(os.listdir(tmp_path)) == ["cache", "fork", "whole"]
