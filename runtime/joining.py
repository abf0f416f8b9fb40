"""How several processes become one run: who they are, a roll call, then JAX.

The numbers come from flags, from JAX's variables, or from what started the processes:
srun, mpirun, a TPU pod, a Kubernetes job.

The roll call goes before jax.distributed.initialize, over a socket at the coordinator's
address. JAX itself ends a process with a stack trace if another one is missing, and
never finds out that two of them run different code.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import flags
from jax._src import clusters, distributed
from jax._src.lib import _jax

from triform.runtime import history, hosts
from triform.runtime.errors import HostsError, UserError
from triform.runtime.hosts import HEARTBEAT, TIMEOUT, Hosts
from triform.runtime.progress import QUIET, SOON, Heartbeat

NAMES = ("coordinator", "num_processes", "process_id")
PORTS = range(61_440, 65_536)  # of coordinators that nobody named


@dataclasses.dataclass(frozen=True)
class Group:
    """What a process knows of the others before it has met them."""

    coordinator: str  # HOST:PORT of process 0
    count: int
    index: int
    local: tuple[int, ...] = ()  # numbers of this process's devices; (): all it sees
    how: str = "flags"  # who said so


def define() -> None:
    """Defines the flags."""
    flags.DEFINE_string(
        "coordinator", "", "HOST:PORT of process 0, with several processes."
    )
    flags.DEFINE_integer(
        "num_processes", None, "Number of processes; 1: this process alone."
    )
    flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
    about = "Seconds to wait for the other processes before stopping with an error."
    flags.DEFINE_float("hosts_timeout", TIMEOUT, about, lower_bound=1)
    about = "Seconds without a sign of life after which a process counts as dead."
    flags.DEFINE_float("heartbeat_timeout", HEARTBEAT, about, lower_bound=1)


def join(about: Mapping[str, Any]) -> Hosts:
    """Joins the other processes as the flags or the environment say.

    Called before anything asks for devices. `about`: what must be the same everywhere,
    besides versions and code. Of the others than process 0, standard output is silent
    from here on. UserError, on every process, names who is missing or different.
    """
    flag = flags.FLAGS
    given = {name: flag[name].value for name in NAMES}
    with _one_line():
        group = found(given, os.environ)
    if group is None:
        return hosts.here()
    code, clean = history.commit()
    versions = {**history.versions(), "commit": code, "as committed": clean}
    about = {"versions": versions, **about}
    names = roll_call(group, about, flag.hosts_timeout)
    limits = flag.hosts_timeout, flag.heartbeat_timeout
    _initialize(group, *limits)
    client = distributed.global_state.client
    joined = Hosts(client, group.index, group.count, names, *limits)
    joined.start_watching()
    hosts.set_here(joined)
    devices = jax.local_devices()
    kinds = {"devices": f"{len(devices)} x {devices[0].device_kind}"}
    joined.same("its devices", kinds)
    line = f"process {group.index} of {group.count}, {len(devices)} local of "
    print(f"{line}{len(jax.devices())} devices ({group.how})", file=sys.stderr)
    if not joined.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for good)
    return joined


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What JAX's detection of clusters may raise, as a UserError."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the other processes cannot be found ({type(error).__name__}: {reason}); "
            "give --coordinator=HOST:PORT --num_processes=N --process_id=I, or "
            "--num_processes=1 to run alone"
        ) from error


def asked(*names: str) -> dict[str, Any]:
    """Flags by name, for `join`."""
    return {"flags": {name: flags.FLAGS[name].value for name in names}}


# Who we are


def found(given: Mapping[str, Any], env: Mapping[str, str]) -> Group | None:
    """The group that flags or the environment name; None for a process alone."""
    asked = dict(given)
    asked["coordinator"] = asked["coordinator"] or env.get("JAX_COORDINATOR_ADDRESS")
    for name, variable in (
        ("num_processes", "JAX_NUM_PROCESSES"),
        ("process_id", "JAX_PROCESS_ID"),
    ):
        if asked[name] is None and variable in env:
            asked[name] = int(env[variable])
    if asked["num_processes"] == 1 and not asked["process_id"]:
        return None
    known = all(asked[name] not in (None, "") for name in NAMES)
    started = None if known else _from_launcher(env)
    if not known and started is not None:
        own = (started.coordinator, started.count, started.index)
        for name, value in zip(NAMES, own, strict=True):
            if asked[name] in (None, ""):
                asked[name] = value
    missing = [name for name in NAMES if asked[name] in (None, "")]
    if len(missing) == 3:
        return None
    if missing:
        has = [f"{k}={asked[k]}" for k in NAMES if k not in missing]
        rest = " and ".join(f"--{name}" for name in missing)
        raise UserError(
            f"{', '.join(has)}: {rest} must be given, too, or --num_processes=1 to run "
            "alone"
        )
    coordinator, count, index = (asked[name] for name in NAMES)
    if not 0 <= index < count:
        raise UserError(
            f"process_id={index}: must be at least 0 and below num_processes={count}"
        )
    if not coordinator.rpartition(":")[2].isdigit() or ":" not in coordinator:
        raise UserError(f"coordinator={coordinator!r}: expected HOST:PORT")
    if count == 1:
        return None
    how = "flags" if started is None else started.how
    local = () if started is None else started.local
    if "JAX_LOCAL_DEVICE_IDS" in env:
        local = tuple(map(int, env["JAX_LOCAL_DEVICE_IDS"].split(",")))
    return Group(coordinator, count, index, local, how)


def _from_launcher(env: Mapping[str, str]) -> Group | None:
    """The group that started this process; None if nothing did, or it is alone."""
    # mpirun inside of a Slurm job sets both; its own numbers count.
    for launcher in (_open_mpi, _slurm, _detected):
        group = launcher(env)
        if group is not None:
            return group if group.count > 1 else None
    return None


def _slurm(env: Mapping[str, str]) -> Group | None:
    """The tasks of a job step, which srun starts.

    The script of a batch job and the shell of an interactive allocation are one
    process, whatever SLURM_NTASKS says: the variables of a step count.
    """
    step = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST")
    if not all(name in env for name in step):
        tasks = env.get("SLURM_NTASKS", "1")
        if tasks != "1" and "SLURM_JOB_ID" in env:
            print(
                f"SLURM_NTASKS={tasks}, but not started by srun: one process runs; put "
                "srun in front of the command to use all tasks",
                file=sys.stderr,
            )
        return None
    count, index = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"])
    job, number = int(env["SLURM_JOB_ID"]), env.get("SLURM_STEP_ID", "0")
    number = int(number) if number.isdigit() else 0
    # Steps of a job may run side by side on one node.
    port = env.get("JAX_COORDINATOR_PORT") or PORTS[(16 * job + number) % len(PORTS)]
    host = first_host(env["SLURM_STEP_NODELIST"])
    local = local_devices(env)
    return Group(f"{host}:{port}", count, index, local, f"Slurm job {job}")


def first_host(nodes: str) -> str:
    """'node001' of 'node[001-016,020],gpu3'."""
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return name.partition(",")[0]
    digits = rest.partition("]")[0]
    return name + digits.partition(",")[0].partition("-")[0]


def local_devices(env: Mapping[str, str]) -> tuple[int, ...]:
    """The GPUs of a Slurm task by number; () for all that it sees.

    A task alone on its node takes all, as does one that Slurm gave its own. Several
    that see the same GPUs divide them evenly.
    """
    tasks = int(env.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0])
    bound = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_NTASKS_PER_GPU")
    per_task = "gpu" in env.get("SLURM_TRES_PER_TASK", "")
    if tasks == 1 or per_task or any(env.get(name) for name in bound):
        return ()
    visible = env.get("CUDA_VISIBLE_DEVICES") or env.get("ROCR_VISIBLE_DEVICES")
    count = (
        len(visible.split(",")) if visible else int(env.get("SLURM_GPUS_ON_NODE", 0))
    )
    if not count:
        return ()
    if count % tasks:
        raise UserError(
            f"{count} GPUs and {tasks} tasks on a node: tasks must divide the GPUs; "
            "start one task per node, or set JAX_LOCAL_DEVICE_IDS"
        )
    share = count // tasks
    start = share * int(env["SLURM_LOCALID"])
    return tuple(range(start, start + share))


def _open_mpi(env: Mapping[str, str]) -> Group | None:
    """The processes that mpirun started; only Open MPI before 5 says where it runs."""
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    count, index = (int(env[f"OMPI_COMM_WORLD_{x}"]) for x in ("SIZE", "RANK"))
    coordinator = ""
    if "OMPI_MCA_orte_hnp_uri" in env and count > 1:
        coordinator = _auto("ompi")[0]
    local = tuple(
        local_devices(
            {
                "SLURM_STEP_TASKS_PER_NODE": env["OMPI_COMM_WORLD_LOCAL_SIZE"],
                "SLURM_LOCALID": env["OMPI_COMM_WORLD_LOCAL_RANK"],
                "CUDA_VISIBLE_DEVICES": env.get("CUDA_VISIBLE_DEVICES", ""),
            }
        )
    )
    return Group(coordinator, count, index, local, "Open MPI")


def _detected(env: Mapping[str, str]) -> Group | None:
    """A TPU pod or a Kubernetes job, as JAX finds it."""
    # A pod may run one process, and JAX's detection asks the cluster's server.
    names = ["gketpu", "gcetpu"]
    names += ["k8s"] * ("JOB_COMPLETION_INDEX" in env)
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.name in names and kind.is_env_present():
            if kind.get_process_count() == 1:
                return None
            coordinator, count, index, _ = _auto(kind.name)
            return Group(coordinator, count, index, (), kind.name)
    return None


def _auto(name: str) -> tuple:
    """(coordinator, count, index, devices) as JAX finds them in a kind of cluster."""
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    return detect(None, None, None, None, name, int(TIMEOUT))


# The roll call


def roll_call(group: Group, about: Mapping[str, Any], timeout: float) -> list[str]:
    """The hosts' names by process, once all are there and agree in `about`.

    UserError or HostsError on every process that is there, if not.
    """
    mine = {"index": group.index, "count": group.count, "host": platform.node()}
    mine["about"] = dict(about)
    late = Late(group, time.monotonic() + timeout, timeout)
    heartbeat = Heartbeat(late.text, QUIET if group.index else SOON, sys.stderr)
    try:
        answer = (_call if group.index == 0 else _report)(group, mine, late)
    finally:
        heartbeat.close()
    if error := answer.get("error"):
        raise HostsError(error)
    return answer["names"]


@dataclasses.dataclass
class Late:
    """Who has not come yet, and how long is left."""

    group: Group
    deadline: float
    timeout: float
    missing: list[int] = dataclasses.field(default_factory=lambda: [0])

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def text(self) -> str:
        """'waiting at HOST:PORT for process 3 of 8, 20 s'."""
        seconds = f"{self.timeout - self.left():.0f} s"
        return f"waiting at {self.group.coordinator} for {self.who()}, {seconds}"

    def who(self) -> str:
        """'process 3 of 8'."""
        return Hosts(count=self.group.count).titles(self.missing)


def _call(group: Group, mine: dict[str, Any], late: Late) -> dict[str, Any]:
    """As process 0: hears all, and answers all the same."""
    heard: dict[int, dict[str, Any]] = {0: mine}
    lines: list[socket.socket] = []
    error = ""
    with _listen(group, late) as server:
        while len(heard) < group.count and not error:
            late.missing = [i for i in range(group.count) if i not in heard]
            if late.left() <= 0:
                error = (
                    f"{late.who()} did not come to {group.coordinator} within "
                    f"{late.timeout:.0f} s; see its log, or give the right "
                    "--num_processes"
                )
                break
            server.settimeout(min(1.0, max(0.01, late.left())))
            with contextlib.suppress(TimeoutError):
                line = server.accept()[0]
                line.settimeout(5.0)
                hello = _receive(line)
                if hello is None or hello.keys() != mine.keys():
                    line.close()
                    continue
                lines.append(line)
                error = _misfit(hello, heard, group)
                heard.setdefault(hello["index"], hello)
        names = [heard.get(i, {}).get("host", "") for i in range(group.count)]
        if not error:
            title = Hosts(count=group.count, names=names).title
            error = hosts.difference([heard[i]["about"] for i in sorted(heard)], title)
        answer = {"error": error} if error else {"names": names}
        for line in lines:
            with contextlib.suppress(OSError):
                line.sendall(json.dumps(answer).encode() + b"\n")
                line.close()
    return answer


def _misfit(hello: Mapping[str, Any], heard: Mapping[int, Any], group: Group) -> str:
    """Why a process cannot be one of the group; '' if it can."""
    index, count, host = hello["index"], hello["count"], hello["host"]
    if count != group.count:
        return (
            f"process {index} on {host} was started with num_processes={count}, "
            f"process 0 with {group.count}; start all with the same"
        )
    if index in heard:
        return (
            f"two processes have the number {index} (on {heard[index]['host']} and "
            f"{host}); give each its own --process_id"
        )
    return ""


def _listen(group: Group, late: Late) -> socket.socket:
    """The socket of process 0. A run that has just ended may still have the port."""
    port = int(group.coordinator.rpartition(":")[2])
    while True:
        try:
            if socket.has_dualstack_ipv6():
                options = {"family": socket.AF_INET6, "dualstack_ipv6": True}
                return socket.create_server(("", port), **options)
            return socket.create_server(("", port))
        except OSError as error:
            if late.left() <= late.timeout / 2:
                raise UserError(
                    f"coordinator={group.coordinator}: port {port} cannot be opened on "
                    f"{platform.node()} ({error.strerror}); name another, or start "
                    "process 0 on the coordinator's host"
                ) from error
            time.sleep(0.5)


def _report(group: Group, mine: dict[str, Any], late: Late) -> dict[str, Any]:
    """As another process: reports to process 0, which may start later."""
    host, _, port = group.coordinator.rpartition(":")
    why = "nobody answers"
    while late.left() > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), 5.0) as line:
                line.sendall(json.dumps(mine).encode() + b"\n")
                # Process 0 answers at its own deadline at the latest.
                line.settimeout(late.left() + hosts.GRACE)
                if (answer := _receive(line)) is not None:
                    return answer
                why = "what answers there is no process 0 of Triform"
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(min(0.5, max(0.0, late.left())))
    return {
        "error": f"process 0 of {group.count} is not at {group.coordinator} "
        f"({why}) after {late.timeout:.0f} s; see its log, or correct --coordinator"
    }


def _receive(line: socket.socket) -> Any:
    """One JSON object of a connection; None if something else comes."""
    try:
        with line.makefile("rb") as f:
            found = json.loads(f.readline())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# JAX


def _initialize(group: Group, timeout: float, heartbeat: float) -> None:
    """jax.distributed.initialize; all processes are there and about to call it."""
    # Ours stop all processes at the same step, and for other signals, too.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    name = "get_distributed_runtime_client"
    make = getattr(_jax, name)
    # With a callback, JAX neither logs a stack trace nor aborts at once: see
    # hosts._on_abort for what happens where it cannot call it.
    lost = functools.partial(make, missed_heartbeat_callback=lambda _: hosts.lost())
    setattr(_jax, name, lost)
    try:
        jax.distributed.initialize(
            group.coordinator,
            group.count,
            group.index,
            list(group.local) or None,
            # Found already; JAX's way gives one device to a task with several.
            cluster_detection_method="deactivate",
            initialization_timeout=round(timeout),
            # Ours name the process, and come first.
            heartbeat_timeout_seconds=round(2 * heartbeat) + 10,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise HostsError(
            f"JAX could not join the processes at {group.coordinator} ({reason}); "
            "start all processes again, or name another port"
        ) from error
    finally:
        setattr(_jax, name, make)
