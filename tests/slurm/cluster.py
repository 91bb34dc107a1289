"""A whole Slurm on this host: munged, slurmctld and a slurmd for each of two emulated nodes, in one directory.

    with Cluster(directory) as cluster:
        cluster.ask("sbatch", "--parsable", "jobs/train_one_node.slurm", ...)

Everything is its own: keys, sockets, ports, state. Nothing outside of the directory is written, so several clusters,
and a real Slurm, can be on the same host. At the end every daemon, and what it started, ends by its pid.

What makes two nodes of one host: each slurmd has a port and a host name of its own (a UTS namespace: Open MPI takes
ranks for neighbours only where PMIx's host name is Slurm's), and a folder for PMIx's files, which two nodes of one job
would otherwise both make under the same name. Cores, memory and network are the host's; nothing is bound to cores, so
what --cpu-bind does is not tested.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from tests import helpers

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
PACKAGES = "slurm-wlm munge libpmix-dev"
PMIX = "*/pmix2/lib/libpmix.so"     # Slurm's plug-in loads it by this name, which only the -dev package has
NODES = ("n1", "n2")
SECONDS = 120.0     # on a machine that has much else to do
CONFIGURATION = """
ClusterName=test
# Numbers that no other cluster of tests has had: MPICH names its shared memory by them, and leaves it behind when it is
# killed.
FirstJobId={first_job}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# How long a requeued job waits at least before it starts again is the lifetime of credentials: 5 s at least, 120 s
# if less or nothing is given.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmdLogFile={directory}/slurmd-%n.log
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
PlugStackConfig={directory}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MailProg=/bin/true
ReturnToService=2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1_port} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2_port} CPUs=2 State=UNKNOWN
PartitionName=normal Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=60 PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """What this host lacks for a cluster; nothing: it has all."""
    lacking = [program for program in PROGRAMS if _which(program) is None]
    if lacking or not list(Path("/usr/lib").glob(PMIX)):
        return f"no {', '.join(lacking) or PMIX} here: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "only root can start these daemons"
    own_name = subprocess.run(["unshare", "--uts", "true"], capture_output=True, timeout=SECONDS, check=False)
    return "" if own_name.returncode == 0 else "this container may not give processes a host name of their own"


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")


class Cluster:
    """The daemons, as a context. `environment` makes Slurm's commands speak with them."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.daemons = directory, dict[str, subprocess.Popen[str]]()
        self.environment = helpers.clean_environment() | {"SLURM_CONF": str(directory / "slurm.conf")}
        ports = _free_ports(3)
        (directory / "state").mkdir()
        (directory / "plugstack.conf").touch()
        text = CONFIGURATION.format(directory=directory, controller_port=ports[0], n1_port=ports[1], n2_port=ports[2],
                                    first_job=1 + secrets.randbelow(10**7))
        (directory / "slurm.conf").write_text(text)
        for node in NODES:
            own = directory / node
            own.mkdir()
            (own / "slurm.conf").write_text(text)
            (own / "mpi.conf").write_text(f"PMIxCliTmpDirBase={own}\n")
        key = directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

    def __enter__(self) -> Cluster:
        try:
            files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid",
                     "seed-file": "munge.seed", "log-file": "munge.log"}
            self._start("munged", "--foreground", "--force", "--num-threads=2",
                        *(f"--{option}={self.directory / file}" for option, file in files.items()))
            self.until((self.directory / "munge.socket").exists, "munged has no socket")
            self._start("slurmctld", "-D")
            for node in NODES:
                self.start_node(node)
            self.until(lambda: self.ask("sinfo", "-h", "-N", "-o", "%T", "-p", "normal").split() == ["idle"] * 2,
                       "not all nodes are idle")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
                 ) -> None:
        self._end()

    def start_node(self, node: str) -> None:
        """A node comes up."""
        daemon = f"hostname {node} && exec {_which('slurmd')} -D -N {node}"
        self._start("unshare", "--uts", "sh", "-c", daemon, name=node)

    def lose_node(self, node: str) -> None:
        """A node goes down: all that ran there is gone, and Slurm has noticed."""
        helpers.kill(self.processes(node))
        self.daemons.pop(node).wait(timeout=5)
        self.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def _start(self, program: str, *options: str, name: str = "") -> None:
        """Start a daemon, which ends when the tests do, however they end."""
        home = self.directory / name
        name = name or program
        with (self.directory / f"{name}.txt").open("w") as words:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", str(_which(program)), *options], text=True, cwd=self.directory,
                env=self.environment | {"SLURM_CONF": f"{home}/slurm.conf"}, stdin=subprocess.DEVNULL, stdout=words,
                stderr=subprocess.STDOUT, start_new_session=True)

    def _end(self) -> None:
        """End all jobs, then the daemons, munged last; what is still there after that is killed."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.ask("scancel", "--signal=KILL", "--user=root")
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=5)
        helpers.kill(self.processes())
        for daemon in self.daemons.values():
            daemon.wait(timeout=5)

    def processes(self, node: str = "") -> list[int]:
        """Processes that have this cluster's configuration in their environment: daemons, and what they started; all,
        or those of one node."""
        mark, found = f"SLURM_CONF={self.directory}/".encode(), []
        there = {mark + f"{node}/slurm.conf".encode(), f"SLURMD_NODENAME={node}".encode()}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = set((entry / "environ").read_bytes().split(b"\0"))
                if any(word.startswith(mark) for word in words) and (not node or words & there):
                    found.append(int(entry.name))
        return found

    def ask(self, *command: str) -> str:
        """What a command of Slurm's prints; fails when the command does."""
        done = subprocess.run(command, env=self.environment, cwd=helpers.REPOSITORY, capture_output=True, text=True,
                              timeout=SECONDS, stdin=subprocess.DEVNULL, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def until(self, ready: Callable[[], bool], otherwise: str, *, seconds: float = SECONDS,
              more: Callable[[], str] = str) -> None:
        """Wait until `ready()`; fail with `otherwise`, `more()` and the daemons' words when it takes too long."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(AssertionError):
                if ready():
                    return
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"{otherwise} (daemons that ended: {ended})\n{more()}\n{self.words()}")
            time.sleep(0.1)

    def words(self) -> str:
        """The last lines of every daemon."""
        return "\n".join(f"--- {name} ---\n{(self.directory / f'{name}.txt').read_text()[-2000:]}"
                         for name in self.daemons)


def _free_ports(number: int) -> Sequence[int]:
    """Ports nobody has; another process may take one before the daemon does, which then says so."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
