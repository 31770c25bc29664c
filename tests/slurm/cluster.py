"""A real SLURM for tests: `with Cluster(nodes=4) as slurm:` starts munged, slurmctld and N slurmd on this machine.

What it guarantees: everything lives under one directory, which is gone afterwards together with every
process of the cluster, jobs and waiting clients included. It touches no other SLURM, so several clusters
may stand at once. It needs no root, though root gets more: fake GPUs and jobs that resolve node names.

Written by hand because nothing else shows submission scripts what they must survive: the real queue's
requeues, preemption, dependencies and a node that vanishes, in seconds and without a container.
The price: nodes share one kernel, host name and network, so a cut cable cannot be tested here.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
FINAL_STATES = frozenset(
    ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"]
)
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # daemons live where users do not look

# The keys are those of SLURM 22.05: an unknown one would stop every daemon and every client.
_SLURM_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again: 120 s if not set
AuthInfo=socket={directory}/munge/socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/run/slurmctld.pid
SlurmdPidFile={directory}/run/%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/%n.log
# no cgroups: they would need root
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/none
SlurmdTimeout=10
KillWait=5
OverTimeLimit=0
MinJobAge=600
JobRequeue=1
ReturnToService=2
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=-1
# the signal a job asked for comes when preemption begins, SIGTERM after the partition's GraceTime
SlurmctldParameters=preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# a node has what is written here, whatever the machine has
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=8 CoresPerSocket=8 RealMemory=2000000 {gres}
{nodes}
PartitionName=batch Nodes=ALL Default=YES PriorityTier=100 MaxTime=UNLIMITED
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=15 MaxTime=UNLIMITED
"""
# of a job's record; the fields named here may hold anything, and scontrol gives each the rest of its line
_FIELD = re.compile(r"(JobName|\w*Comment|Command|WorkDir|StdErr|StdIn|StdOut)=(.*)|(\S+?)=(\S*)")


class Cluster:
    """A SLURM of `nodes` nodes (node1, node2, ...), partitions `batch` (default) and `low` (preempted by `batch`).

    `environment` is what a client needs, `gpus` the GPUs a node pretends to have (0 where device files
    may not be made), `namespace` the command that slurmd runs under so that jobs resolve node names (empty
    where that is not permitted), `directory` where logs and jobs are.
    """

    def __init__(self, nodes: int = 4) -> None:
        self.nodes = [f"node{index + 1}" for index in range(nodes)]
        self.directory = Path()
        self.environment: dict[str, str] = {}
        self.gpus = 0
        self.namespace: list[str] = []
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        # not pytest's tmp_path: a socket's path holds 108 bytes at most
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        # tests may run inside a job of another SLURM, whose variables are options to ours
        inherited = {key: value for key, value in os.environ.items() if not re.match("SLURM|SBATCH|SRUN", key)}
        self.environment = {**inherited, "PATH": _PATH, "SLURM_CONF": str(self.directory / "slurm.conf")}
        try:
            self._configure()
            self._start_daemons()
        except BaseException as error:
            for file in sorted(self.directory.glob("log/*.out")):
                error.add_note(f"--- {file.name}\n{_tail(file)}")
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        shutil.rmtree(self.directory)

    def run(self, *argv: object, check: bool = True, timeout: float = 60, **options: Any) -> str:
        """Run a client and return its output, stripped; `options` are those of `subprocess.run`.

        Variables in `env` come on top of `environment`. Raises RuntimeError with what a failed command printed.
        """
        options["env"] = {**self.environment, **(options.get("env") or {})}
        try:
            done = subprocess.run([*map(str, argv)], capture_output=True, text=True, timeout=timeout, **options)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{error}\nstdout: {error.stdout!r}\nstderr: {error.stderr!r}") from error
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, argv))}: exit {done.returncode}\n{done.stderr}{done.stdout}")
        return done.stdout.strip()

    def sbatch(self, *args: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Submit a job and return its id. Without `cwd` it runs in the cluster's directory, not in the checkout."""
        return self.run("sbatch", "--parsable", *args, env=env, cwd=cwd or self.directory / "jobs").split(";")[0]

    def job(self, id: str) -> dict[str, str]:
        """Return the record of a job, as `scontrol show job` names its fields (of an array: its first record)."""
        text = self.run("scontrol", "show", "job", id).split("\n\n")[0]
        return {free or key: rest.rstrip() or value for free, rest, key, value in _FIELD.findall(text)}

    def wait(self, id: str, *states: str, timeout: float = 240) -> dict[str, str]:
        """Return the job's record once its state is one of `states` (default: any final one).

        AssertionError with the record and the end of its output if that is late or the job has ended otherwise.
        """
        wanted, deadline = frozenset(states) or FINAL_STATES, time.monotonic() + timeout
        while (job := self.job(id))["JobState"] not in wanted:
            if job["JobState"] in FINAL_STATES or time.monotonic() > deadline:
                what = f"job {id} is {job['JobState']}, not {' or '.join(sorted(wanted))}, within {timeout:g} s"
                raise AssertionError(f"{what}\n{job}\n--- its output\n{_tail(Path(job.get('StdOut', '')))}")
            time.sleep(0.3)
        return job

    def wait_until(self, condition: Callable[[], object], timeout: float, what: str) -> None:
        """Return once `condition()` is true; AssertionError if that is late or a daemon has died by itself."""
        deadline = time.monotonic() + timeout
        while not condition():
            if dead := [name for name, daemon in self._daemons.items() if daemon.poll() is not None]:
                raise AssertionError(f"waited for {what}, but dead: {', '.join(dead)}")
            if time.monotonic() > deadline:
                nodes, jobs = self.run("sinfo", "-N", "-l", check=False), self.run("squeue", "-l", check=False)
                raise AssertionError(f"not within {timeout:g} s: {what}\n{nodes}\n{jobs}")
            time.sleep(0.1)

    def idle(self, timeout: float = 120) -> None:
        """Wait until all nodes are idle."""
        self.wait_until(lambda: self._states(*self.nodes) == {"idle"}, timeout, "all nodes idle")

    def kill_node(self, name: str) -> None:
        """Kill slurmd, its stepds and all tasks of a node, as a power cut does; SLURM notices in 20 to 30 s."""
        self._kill(name)

    def mark_down(self, name: str) -> None:
        """Tell SLURM that a killed node is down, instead of waiting for it to notice; a living slurmd would deny it."""
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def boot(self, name: str, timeout: float = 120) -> None:
        """Start a killed node again; returns when it is idle, or at work already for a job that waited for it."""
        self.mark_down(name)  # one that SLURM does not miss yet would seem idle before its slurmd serves
        self._start_node(name)
        self.wait_until(lambda: self._states(name) <= {"idle", "mixed", "allocated"}, timeout, f"{name} in service")

    def _configure(self) -> None:
        for folder in ("state", "run", "log", "munge", "dev", "jobs", *(f"spool/{name}" for name in self.nodes)):
            (self.directory / folder).mkdir(parents=True)
        key = self.directory / "munge" / "key"
        key.touch(mode=0o600)  # munged refuses a key that others can read
        key.write_bytes(os.urandom(128))
        self._make_gpus()
        self._try_namespace()
        ports = _free_ports(1 + len(self.nodes))
        nodes = [f"NodeName={name} NodeAddr=127.0.0.1 Port={ports.pop()}" for name in self.nodes]
        host, gres = socket.gethostname().split(".")[0], f"Gres=gpu:{self.gpus}" if self.gpus else ""
        values = {"directory": self.directory, "user": pwd.getpwuid(os.getuid()).pw_name, "host": host, "gres": gres}
        conf = _SLURM_CONF.format(**values, port=ports.pop(), nodes="\n".join(nodes))
        (self.directory / "slurm.conf").write_text(conf)
        # the default looks for a mounted cgroup file system, and slurmd refuses to start without one
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _try_namespace(self) -> None:
        """Have slurmd see its own hosts file, the machine's and the names of the nodes, where that is permitted."""
        hosts = self.directory / "hosts"
        hosts.write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {' '.join(self.nodes)}\n")
        script = 'mount --bind "$0" /etc/hosts && exec "$@"'
        namespace = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(hosts)]
        if subprocess.run([*namespace, "true"], capture_output=True).returncode == 0:
            self.namespace = namespace

    def _make_gpus(self) -> None:
        """Make what SLURM takes for GPUs: devices. A plain file, or a count without one, it refuses."""
        device = str(self.directory / "dev" / "gpu")
        with contextlib.suppress(PermissionError):
            for index in range(8):
                os.mknod(f"{device}{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # a second /dev/null
            (self.directory / "gres.conf").write_text(f"Name=gpu File={device}[0-7]\n")
            self.gpus = 8

    def _start_daemons(self) -> None:
        munge = self.directory / "munge"
        files = [f"--{kind}-file={munge / kind}" for kind in ("key", "seed", "pid", "log")]
        # --force: the directory is the user's alone, which munged takes for a mistake
        self._start("munged", "munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        self.wait_until((munge / "socket").exists, 30, "munged up")
        self._start("slurmctld", "slurmctld", "-D", "-i", "-f", self.environment["SLURM_CONF"])
        self.wait_until(lambda: "is UP" in self.run("scontrol", "ping", check=False), 30, "slurmctld up")
        for name in self.nodes:
            self._start_node(name)
        self.idle()

    def _start_node(self, name: str) -> None:
        self._start(name, *self.namespace, "slurmd", "-D", "-N", name, "-f", self.environment["SLURM_CONF"])

    def _start(self, name: str, *command: str) -> None:
        """Start a daemon in the foreground, as our child: its end is seen, and no pid file must be believed."""
        with open(self.directory / "log" / f"{name}.out", "ab") as output:
            # a process group of its own: Ctrl-C is for the tests, which then stop the cluster
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
            )

    def _states(self, *nodes: str) -> set[str]:
        return set(self.run("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%T").split())

    def _kill(self, node: str = "") -> None:
        # Parents first: a living stepd would report the death of its tasks, and the job of a lost node would fail.
        deadline = time.monotonic() + 20
        # Two looks before it is over: a process within exec has no environment to be known by.
        while processes := self._processes(node) or self._processes(node):
            if time.monotonic() > deadline:
                raise AssertionError(f"processes of {self.directory} survive SIGKILL: {processes}")
            for process in processes:
                with contextlib.suppress(psutil.Error):  # ended; or another process by now, which psutil notices
                    process.kill()
            time.sleep(0.02)
        for name in [node] if node else list(self._daemons):
            self._daemons.pop(name).wait()

    def _processes(self, node: str = "") -> list[psutil.Process]:
        """Return the living processes of the cluster or of one node, parents before children."""
        log = f"{self.directory}/log/{node + '.' if node else ''}"
        marks = {"SLURM_CONF": self.environment["SLURM_CONF"]} | ({"SLURMD_NODENAME": node} if node else {})
        found: set[psutil.Process] = set()
        # without zombies, which stay for ever where the first process of a container does not reap them
        living = {each for each in psutil.process_iter(["status"]) if each.info["status"] != psutil.STATUS_ZOMBIE}
        for process in living:
            with contextlib.suppress(psutil.Error):  # ended, or another user's
                # a stepd hides its environment but has its slurmd's log open; a task shows one or has parents that do
                logs = any(file.path.startswith(log) for file in process.open_files())
                if logs or marks.items() <= process.environ().items():
                    found |= {process, *process.children(recursive=True)}
        found -= {psutil.Process(), *psutil.Process().parents()}  # never ours to kill, whatever their environment says
        return sorted(found & living, key=lambda process: (process.create_time(), process.pid))


def missing_programs() -> list[str]:
    """Return the names of the programs that a cluster needs and this machine lacks."""
    return [program for program in PROGRAMS if not shutil.which(program, path=_PATH)]


def _free_ports(count: int) -> list[int]:
    """Find free ports at random below 32768, where no outgoing connection and hardly another cluster takes them."""
    ports = []
    for port in random.sample(range(20000, 32000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports.append(port)
    return ports[:count]


def _tail(file: Path) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-20:]) if file.is_file() else f"no file {file}"
