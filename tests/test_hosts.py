"""What several processes agree on and how they end, with a table in memory in place of
JAX's coordination service; and who a process says it is.
"""

import os
import socket
import threading
import time

import jax
import pytest

from triform.runtime import aborts, hosts, joining
from triform.runtime.errors import HostsError, UserError
from triform.runtime.hosts import Hosts
from triform.runtime.joining import Group


class Table:
    """Keys and values as JAX's client has them, shared by threads."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, folder):
        with self.changed:
            return [(k, x) for k, x in self.values.items() if k.startswith(folder)]

    def key_value_delete(self, key):
        with self.changed:
            gone = [k for k in self.values if k == key or k.startswith(f"{key}/")]
            for name in gone:
                del self.values[name]

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, 0.05):
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {milliseconds}")
            return self.values[key]


def group(count, **options):
    table, names = Table(), [f"node{i // 2}" for i in range(count)]
    return [Hosts(table, i, count, names, **options) for i in range(count)]


def together(members, call):
    """[call(member) or the error it raised], each in a thread of its own."""
    found = [None] * len(members)

    def one(index):
        try:
            found[index] = call(members[index])
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return found


# Agreeing


def test_all_get_the_values_of_all_in_order_and_nothing_piles_up():
    members = group(4)

    def call(one):
        for number in range(20):
            found = one.agree("x", [one.index, number])
            assert found == [[i, number] for i in range(4)]
            assert one.broadcast("y", one.index + number) == number
        return one.total(one.index, due=False), one.total(1, due=True)

    assert together(members, call) == [(0, 0 + 1 + 2 + 3 + 4)] * 4
    assert len(members[0]._client.values) < 10


def test_one_process_alone_waits_for_nothing():
    alone = Hosts()
    assert alone.agree("x", 3) == [3] and alone.is_first
    assert alone.in_turn("x", lambda: 5) == 5
    assert (alone.total(7, due=False), alone.total(7, due=True)) == (7, 7)
    stop = lambda: "now"  # noqa: E731
    assert alone.stop(stop) is stop
    alone.same("x", {"a": 1})
    alone.publish("no", 1)
    alone.finish()
    alone.exit(0)


@pytest.mark.parametrize("missing", [0, 2])
def test_who_does_not_come_is_named_on_every_process(missing, monkeypatch):
    monkeypatch.setattr(hosts, "GRACE", 0.3)
    members = group(4, timeout=0.3)
    present = [one for one in members if one.index != missing]
    for error in together(present, lambda one: one.agree("opening the data")):
        assert isinstance(error, HostsError)
        for part in (
            f"process {missing} of 4 (node{missing // 2})",
            "opening the data",
        ):
            assert part in str(error)
        assert "\n" not in str(error)


def test_processes_at_different_points_are_told_apart():
    members = group(2)
    found = together(members, lambda one: one.agree("saving" if one.index else "a"))
    assert "process 1 of 2 (node0) is at 'saving', this one at 'a'" in str(found[0])


def test_what_differs_is_named_on_every_process():
    members = group(3)

    def call(one):
        one.same("x", {"optim": {"rate": 0.1 if one.index < 2 else 0.2}, "seed": 1})

    for error in together(members, call):
        assert isinstance(error, UserError)
        for part in ("process 2 of 3", "optim.rate is 0.2, 0.1 on process 0"):
            assert part in str(error)
        assert "seed" not in str(error)


def test_the_first_prepares_then_one_of_each_host_then_the_rest():
    members, order = group(5), []
    together(members, lambda one: one.in_turn("x", lambda: order.append(one.index)))
    assert order[0] == 0
    assert set(order[1:3]) == {2, 4}  # node1 and node2
    assert set(order[3:]) == {1, 3}


def test_a_wait_says_for_whom(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "SOON", 0.05)
    members = group(3)

    def call(one):
        time.sleep(0.4 if one.index == 1 else 0)
        one.barrier("restoring")

    together(members, call)
    assert "restoring: waiting for process 1 of 3 (node0)" in capsys.readouterr().out


def test_a_process_0_that_stops_answering_is_named_by_the_others(monkeypatch, capfd):
    """Whoever asks it waits for ever then; and the kernel still accepts connections."""
    members, ended, awake = group(3, heartbeat=0.4), [], threading.Event()
    get = Table.blocking_key_value_get

    def stopped(self, key, milliseconds):
        if members[0].over.is_set():
            awake.wait(20)
        return get(self, key, milliseconds)

    monkeypatch.setattr(Table, "blocking_key_value_get", stopped)
    monkeypatch.setattr(hosts.aborts, "call_instead", lambda call: None)
    monkeypatch.setattr(hosts.os, "_exit", ended.append)
    for one in members:
        one.start_watching()
    time.sleep(1.0)
    assert not ended
    members[0].over.set()  # in the test: it is stopped
    deadline = time.monotonic() + 10
    while len(ended) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    awake.set()
    for one in members:
        one.over.set()
    assert ended == [1, 1]
    assert capfd.readouterr().err.count("error: process 0 of 3 (node0) gave no") == 2


def test_a_port_that_accepts_and_says_nothing_does_not_answer():
    with socket.create_server(("localhost", 0)) as server:
        where = f"localhost:{server.getsockname()[1]}"
        assert not aborts.answers(where)
    assert not aborts.answers(where)


# Stopping


@pytest.mark.parametrize("who", [0, 3])
def test_all_stop_at_the_same_question(who):
    """Whoever has the reason, and however far apart they are."""
    members, asked = group(4), [0] * 4

    def call(one):
        stop = one.stop(
            lambda: "SIGTERM" if one.index == who and asked[who] > 5 else ""
        )
        while not (reason := stop()):
            asked[one.index] += 1
            time.sleep(0.002 * one.index)
            assert asked[one.index] < 5000
        assert stop() == reason  # for good
        return reason

    assert together(members, call) == [f"SIGTERM on process {who}"] * 4
    assert len(set(asked)) == 1


def test_two_reasons_at_once_are_one():
    members, asked = group(2), [0, 0]

    def call(one):
        stop = one.stop(lambda: f"reason {one.index}")
        while not (reason := stop()):
            asked[one.index] += 1
        return reason

    found = together(members, call)
    assert found[0] == found[1]
    assert asked[0] == asked[1]


# Who a process is

FLAGS = {"coordinator": "", "num_processes": None, "process_id": None}
SRUN = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[003-006]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def test_flags_and_jax_variables():
    given = {"coordinator": "a:1234", "num_processes": 8, "process_id": 3}
    assert joining.found(given, SRUN) == Group("a:1234", 8, 3)
    env = {"JAX_COORDINATOR_ADDRESS": "b:1", "JAX_NUM_PROCESSES": "2"}
    env |= {"JAX_PROCESS_ID": "1", "JAX_LOCAL_DEVICE_IDS": "2,3"}
    assert joining.found(FLAGS, env) == Group("b:1", 2, 1, (2, 3))
    assert joining.found(FLAGS, {}) is None
    assert joining.found({**FLAGS, "num_processes": 1}, SRUN) is None


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"coordinator": "a:1"}, ["--num_processes and --process_id must be given"]),
        ({"num_processes": 4, "process_id": 1}, ["--coordinator must be given"]),
        (
            {"coordinator": "a:1", "num_processes": 4, "process_id": 4},
            ["process_id=4", "below num_processes=4"],
        ),
        (
            {"coordinator": "a", "num_processes": 4, "process_id": 1},
            ["coordinator='a'", "HOST:PORT"],
        ),
    ],
)
def test_half_of_the_numbers_is_a_mistake(given, parts):
    with pytest.raises(UserError) as error:
        joining.found({**FLAGS, **given}, {})
    assert all(part in str(error.value) for part in parts)


def test_a_task_of_srun():
    found = joining.found(FLAGS, SRUN)
    assert (found.count, found.index, found.local) == (8, 5, ())
    host, port = found.coordinator.split(":")
    assert host == "gpu003" and int(port) in joining.PORTS
    # Another step of the same job, at the same time, has another port.
    other = joining.found(FLAGS, {**SRUN, "SLURM_STEP_ID": "1"}).coordinator
    assert other != found.coordinator


@pytest.mark.parametrize(
    "env",
    [
        # The script of a batch job: no step's variables, number 0 of itself.
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
        # salloc's shell on the login node.
        {"SLURM_NTASKS": "8"},
        # An interactive step: one task, whatever the allocation has.
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_without_srun_a_process_is_alone(env, capsys):
    env = {"SLURM_JOB_ID": "12", **env}
    assert joining.found(FLAGS, env) is None
    told = capsys.readouterr().err
    assert ("srun" in told) == (
        "SLURM_STEP_NUM_TASKS" not in env and env["SLURM_NTASKS"] != "1"
    )


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("a1,b[2-3]", "a1"),
        ("gpu[003-006]", "gpu003"),
        ("n[1,7-9],m2", "n1"),
    ],
)
def test_first_host(nodes, host):
    assert joining.first_host(nodes) == host


@pytest.mark.parametrize(
    ("tasks", "more", "devices"),
    [
        ("1", {"SLURM_GPUS_ON_NODE": "8"}, ()),  # one task: all
        ("2(x4)", {"SLURM_GPUS_ON_NODE": "8"}, (4, 5, 6, 7)),
        ("2", {"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
        ("2", {"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_TASK": "4"}, ()),  # its own
        ("2", {}, ()),
    ],
)
def test_a_task_uses_all_of_its_gpus(tasks, more, devices):
    env = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": "1", **more}
    assert joining.local_devices(env) == devices


def test_gpus_that_tasks_cannot_share():
    env = {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_LOCALID": "1"}
    with pytest.raises(UserError, match="8 GPUs and 3 tasks"):
        joining.local_devices({**env, "SLURM_GPUS_ON_NODE": "8"})


def test_mpirun_within_a_slurm_job():
    env = {**SRUN, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
    env |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    found = joining.found({**FLAGS, "coordinator": "a:1"}, env)
    assert (found.count, found.index) == (4, 2)
    with pytest.raises(UserError, match="--coordinator must be given"):
        joining.found(FLAGS, env)


# The roll call, over real sockets


def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def call_roll(groups, abouts, timeout=5.0):
    pairs = list(zip(groups, abouts, strict=True))
    return together(pairs, lambda pair: joining.roll_call(*pair, timeout))


def test_the_roll_call_gives_all_names():
    where = f"localhost:{port()}"
    groups = [Group(where, 3, i) for i in range(3)]
    found = call_roll(groups, [{"versions": {"jax": "1"}}] * 3)
    assert found == [[os.uname().nodename] * 3] * 3


@pytest.mark.parametrize(
    ("groups", "abouts", "parts"),
    [
        ([(3, 0), (3, 2)], ["a", "a"], ["process 1 of 3 did not come"]),
        ([(2, 0), (2, 1)], ["a", "b"], ["process 1 of 2", "'b', 'a' on process 0"]),
        ([(2, 0), (3, 1)], ["a", "a"], ["num_processes=3, process 0 with 2"]),
        ([(3, 0), (3, 1), (3, 1)], ["a"] * 3, ["two processes have the number 1"]),
    ],
)
def test_the_roll_call_names_what_is_wrong_everywhere(groups, abouts, parts):
    where = f"localhost:{port()}"
    groups = [Group(where, *numbers) for numbers in groups]
    for error in call_roll(groups, [{"seed": x} for x in abouts], timeout=1.5):
        assert isinstance(error, HostsError)
        assert all(part in str(error) for part in parts), error


def test_nobody_at_the_coordinators_address():
    where = f"localhost:{port()}"
    with pytest.raises(HostsError) as error:
        joining.roll_call(Group(where, 2, 1), {}, 0.5)
    assert "process 0 of 2" in str(error.value) and where in str(error.value)


def test_strangers_at_the_port_are_ignored():
    where = f"localhost:{port()}"
    words = iter([b"GET / HTTP/1.1\n", b'{"index": 1}\n'])

    def stranger(_):
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                with socket.create_connection(
                    ("localhost", int(where[10:])), 1
                ) as line:
                    line.sendall(next(words))
                return
            except OSError:
                time.sleep(0.01)

    def member(index):
        time.sleep(0.5 * index)
        return joining.roll_call(Group(where, 2, index), {}, 10.0)

    calls = [0, 1, None, None]
    found = together(calls, lambda i: stranger(i) if i is None else member(i))
    assert found[0] == found[1] and len(found[0]) == 2
