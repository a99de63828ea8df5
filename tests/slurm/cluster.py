"""A real Slurm cluster on one machine, without root: several slurmd on 127.0.0.1, each with its own port (Debian builds it so).

All state lies in one folder, and only processes that this object started are ended. What each line of the configuration is for:
- cred_expire=5 is also how long a requeued job waits (120 s by default); less is refused.
- SlurmdParameters=config_overrides lets a node have more CPUs than the machine; linuxproc, task/none and no accounting need no cgroup.
- SlurmdTimeout says how soon a silent node is down, KillWait how long ranks live after a SIGTERM.
- Partition `high` takes the nodes of `low`, whose jobs get GraceTime and are then requeued.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONFIGURATION = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=6
SlurmctldTimeout=6
KillWait=5
CompleteWait=0
MinJobAge=3600
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


class ClusterError(RuntimeError):
    """Slurm cannot run here; says why."""


class Cluster:
    """A cluster of `nodes` nodes n1, n2, ... of `cpus` CPUs.

    Raises:
        ClusterError: programs are missing, or the daemons do not come up.
    """

    def __init__(self, *, nodes: int, cpus: int) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
        if missing:
            raise ClusterError(f"no {', '.join(missing)} on this machine (apt-get install slurmctld slurmd slurm-client munge)")
        self.folder = Path(tempfile.mkdtemp(prefix="slurm"))
        self.environment = {**os.environ, "PATH": SEARCHED, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._held_port: socket.socket | None = None
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        try:
            self._configure(cpus)
            self._start(cpus)
        except BaseException:
            self.close()
            raise

    def _configure(self, cpus: int) -> None:
        host, memory = socket.gethostname().split(".")[0], psutil.virtual_memory().total >> 20
        self._held_port, port = _free_ports(len(self.nodes) + 1)
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + number} CPUs={cpus} RealMemory={memory} State=UNKNOWN"
            for number, name in enumerate(self.nodes, start=1)
        ]
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        text = CONFIGURATION.format(host=host, port=port, user=getpass.getuser(), folder=self.folder, nodes="\n".join(lines))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)

    def _start(self, cpus: int) -> None:
        files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        self._await(lambda: (self.folder / "munge.sock").exists(), "munged")
        self._daemon("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for name in self.nodes:
            self.start_node(name)
        self._await(lambda: self.ask("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D") == str(len(self.nodes)), "the nodes")

    def _daemon(self, name: str, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=SEARCHED)
        assert path is not None
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [path, *arguments], env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def _await(self, there: Callable[[], bool], what: str, *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not there():
            ended = [name for name, process in self._daemons.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                last = (self.folder / f"{ended[0] if ended else 'slurmctld'}.out").read_text().strip().splitlines()[-1:]
                raise ClusterError(f"{', '.join(ended) or what} did not come up: {' '.join(last)}")
            time.sleep(0.1)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        (self.folder / name).mkdir(exist_ok=True)
        self._daemon(name, "slurmd", "-D", "-N", name, "-f", self.environment["SLURM_CONF"])

    def fail_node(self, name: str) -> None:
        """What a power cut does: slurmd, the steps and the ranks of a node are gone at once."""
        victims = [process for step in self._steps(name) for process in (step, *step.children(recursive=True))]
        slurmd = self._daemons.pop(name)
        slurmd.kill()
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        slurmd.wait()

    def _steps(self, name: str) -> Iterator[psutil.Process]:
        """The slurmstepd of a node of this cluster: they hold its log file open."""
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                if "slurmstepd" in process.info["name"] and str(self.folder / f"{name}.log") in {
                    file.path for file in process.open_files()
                }:
                    yield process

    def ask(self, *command: str) -> str:
        """What a command of Slurm's says.

        Raises:
            AssertionError: it fails.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode and command[0] != "sinfo":
            raise AssertionError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def job(self, number: int) -> dict[str, str]:
        """What scontrol knows of a job: JobState, Restarts, ExitCode, NodeList, Reason, ..."""
        words = self.ask("scontrol", "-o", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def submit(self, file: Path, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> int:
        """Submit a file; returns the number of its job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(file), *arguments],
            env={**self.environment, **variables}, capture_output=True, text=True, check=True, timeout=60, cwd=file.parent,
        )  # fmt: skip
        return int(done.stdout.strip())

    def close(self) -> None:
        """End the jobs, then the daemons, and remove the folder."""
        with contextlib.suppress(Exception):
            self.ask("scancel", "--full", "--signal=KILL", "-u", getpass.getuser())
            self.ask("scancel", "-u", getpass.getuser())
        for name in self.nodes:
            if name in self._daemons:
                self.fail_node(name)
        for process in self._daemons.values():
            process.send_signal(signal.SIGTERM)
        for process in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
        if self._held_port is not None:
            self._held_port.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(count: int) -> tuple[socket.socket, int]:
    """(a port that is held, the first of so many free ports behind it), below those that the system deals out.

    Whoever holds the first has the others too: clusters that start at the same time cannot take the same ones.
    """
    for first in range(11000, 30000, 100):
        sockets: list[socket.socket] = []
        try:
            for port in range(first, first + count + 1):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
        except OSError:
            sockets[0].close()
            continue
        finally:
            for opened in sockets[1:]:
                opened.close()
        return sockets[0], first + 1
    raise ClusterError("no free ports")
