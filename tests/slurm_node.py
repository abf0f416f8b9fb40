"""A Slurm cluster of one node on this machine, for tests: without systemd or cgroups.

Two partitions: batch, and urgent, whose jobs take the node from those of batch, which
are put back into the queue.
"""

import contextlib
import getpass
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
CONFIG = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# The second is also how long a job waits that was put back into the queue.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=batch Nodes={host} Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes={host} PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str:
    """Why there can be no cluster here; '' if there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    return f"Slurm is not installed: no {', '.join(absent)}" if absent else ""


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
    """A cluster; yields the environment in which its programs find it."""
    # Short: the path of a socket has at most 108 characters.
    folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm"))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    text = CONFIG.format(
        host=host,
        ports=_ports(),
        user=getpass.getuser(),
        folder=folder,
        cores=os.cpu_count(),
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    environment["PATH"] = f"{environment['PATH']}:/usr/sbin:/sbin"
    munge = {
        "key-file": "munge.key",
        "socket": "munge.socket",
        "pid-file": "munged.pid",
    }
    munge |= {"log-file": "munged.log", "seed-file": "munge.seed"}
    options = [f"--{option}={folder / name}" for option, name in munge.items()]
    try:
        for words in (["munged", "--force", *options], ["slurmctld", "-c"], ["slurmd"]):
            subprocess.run(words, env=environment, check=True, capture_output=True)
        _wait_until_idle(environment, folder)
        yield environment
    finally:
        _stop(environment, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _ports() -> list[int]:
    """Two that are free now."""
    with socket.socket() as a, socket.socket() as b:
        for each in (a, b):
            each.bind(("127.0.0.1", 0))
        return [a.getsockname()[1], b.getsockname()[1]]


def _wait_until_idle(environment: dict[str, str], folder: pathlib.Path) -> None:
    for _ in range(120):
        words = ["sinfo", "--noheader", "--format=%T"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if "idle" in done.stdout:
            return
        time.sleep(0.5)
    log = (folder / "slurmctld.log").read_text(errors="replace")
    raise AssertionError(f"Slurm did not come up: {log[-500:]}")


def _stop(environment: dict[str, str], folder: pathlib.Path) -> None:
    """Ends the jobs, whose step daemons would outlive slurmd, then the daemons."""
    user = f"--user={getpass.getuser()}"
    for options in (["--full", "--signal=KILL"], []):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            words = ["scancel", *options, user]
            subprocess.run(words, env=environment, capture_output=True, timeout=20)
    time.sleep(1)
    for name in ("slurmd", "slurmctld", "munged"):
        with contextlib.suppress(OSError, ValueError):
            number = int((folder / f"{name}.pid").read_text())
            os.kill(number, signal.SIGTERM)
            for _ in range(100):
                os.kill(number, 0)
                time.sleep(0.1)
