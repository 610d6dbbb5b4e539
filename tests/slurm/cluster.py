"""Slurm cluster on one machine, for tests: munged, slurmctld and four nodes, each node in namespaces of its own.

`make slurm-up`, `make slurm-down`, and `python tests/slurm/cluster.py enter COMMAND …`, which runs a command on the
host of slurmctld (sbatch, squeue). Needs root, and Debian's packages slurm-wlm, munge and iproute2. Each node has its
own network, host name and process ids, and is powered off by killing its first process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

NETWORK = "10.77.0"
CONTROLLER = "ctl"
NODES = ("n1", "n2", "n3", "n4")
CPUS = 16
"""Of a node as Slurm counts them, more than the machine has: several jobs share a node."""
PACKAGES = "slurm-wlm munge iproute2"
START_SECONDS = 30
FOLDER = Path("/tmp/megatron_lite_slurm")
"""Of the cluster that `make slurm-up` starts."""
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """The cluster whose files lie in `folder`.

    Args:
        folder: for configuration, state and logs.
        prefix: of the network namespaces' names.
    """

    def __init__(self, folder: Path, prefix: str = "mlite") -> None:
        self.folder = folder
        self._prefix = prefix

    @property
    def environment(self) -> dict[str, str]:
        """Variables for Slurm's commands."""
        return {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def check(self) -> None:
        """Check that a cluster can be started.

        Raises:
            RuntimeError: a program is missing, or this is not root.
        """
        programs = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
        if missing := [name for name in programs if shutil.which(name, path=PATH) is None]:
            raise RuntimeError(
                f"The Slurm cluster needs programs that are not installed: {', '.join(missing)}. On Debian and Ubuntu: "
                f"apt-get install --no-install-recommends {PACKAGES}"
            )
        if os.geteuid() != 0:
            raise RuntimeError("The Slurm cluster makes network and process namespaces, which needs root: use sudo")

    def start(self) -> None:
        """Start all daemons and wait until every node is idle.

        Raises:
            RuntimeError: as check, or the nodes did not come up; it names the logs.
        """
        self.check()
        self.stop()
        for name in ("state", "log", "run", "munge"):
            (self.folder / name).mkdir(parents=True)
        # munged refuses a socket below a folder to which others can write.
        self.folder.chmod(0o755)
        self._make_network()
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        run(
            *("munged", f"--key-file={key}", f"--socket={self.folder}/run/munge.socket", "--num-threads=2"),
            *(f"--pid-file={self.folder}/run/munged.pid", f"--log-file={self.folder}/log/munged.log"),
            f"--seed-file={self.folder}/munge/munge.seed",
        )
        (self.folder / "slurm.conf").write_text(self._configuration(), encoding="utf-8")
        self.run("slurmctld", "-f", f"{self.folder}/slurm.conf")
        for node in NODES:
            self.power_on(node)
        self.wait_for_nodes()

    def wait_for_nodes(self, count: int = len(NODES)) -> None:
        """Wait until `count` nodes are idle."""
        deadline = time.monotonic() + START_SECONDS
        while self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() != str(count):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"Slurm's nodes did not come up: {self.run('sinfo', check=False)} (logs in {self.folder}/log)"
                )
            time.sleep(0.2)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Run a command on the controller's host; return its output."""
        return run(*self._entered(CONTROLLER), *command, check=check, env=self.environment, cwd=cwd)

    def enter(self, *command: str) -> int:
        """Run a command on the controller's host with this process's input and output; return its exit code."""
        if not (self.folder / "slurm.conf").exists():
            raise RuntimeError("The Slurm cluster does not run: start it with make slurm-up")
        return subprocess.run((*self._entered(CONTROLLER), *command), env=self.environment, check=False).returncode

    def _entered(self, host: str, *namespaces: str) -> tuple[str, ...]:
        """Return the beginning of a command that runs on a host."""
        inner = f'hostname {host}; mount --bind {self.folder}/hosts /etc/hosts; exec "$@"'
        network = f"--net=/run/netns/{self._prefix}{host}"
        return ("nsenter", network, "unshare", "--uts", "--mount", *namespaces, "bash", "-c", inner, "-")

    def power_on(self, node: str) -> None:
        """Start a node: its first process starts slurmd and reaps orphans."""
        entered = self._entered(node, "--pid", "--fork", "--mount-proc", "--kill-child")
        first = f"slurmd -f {self.folder}/slurm.conf; while :; do sleep 3600 & wait; done"
        with (self.folder / "log" / f"{node}.out").open("a") as log:
            process = subprocess.Popen(
                [*entered, "bash", "-c", first],
                **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": self.environment},
                start_new_session=True,
            )
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + START_SECONDS
        while not (child := children.read_text(encoding="utf-8").split()):
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"node {node} did not start (log in {self.folder}/log/{node}.out)")
            time.sleep(0.02)
        (self.folder / "run" / f"{node}.init").write_text(child[0], encoding="utf-8")

    def power_off(self, node: str) -> None:
        """Kill all processes of a node at once, as a power cut does."""
        os.kill(int((self.folder / "run" / f"{node}.init").read_text(encoding="utf-8")), signal.SIGKILL)

    def stop(self) -> None:
        """Stop all daemons, also those of a start that was interrupted, and remove the networks and the files."""
        deadline = time.monotonic() + START_SECONDS
        while processes := self._processes():
            if time.monotonic() > deadline:
                raise RuntimeError(f"Processes of the Slurm cluster do not end: {processes}")
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for name in (CONTROLLER, *NODES):
            if (Path("/run/netns") / f"{self._prefix}{name}").exists():
                run("ip", "netns", "del", f"{self._prefix}{name}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _processes(self) -> list[int]:
        """Return the processes of this cluster: those whose command or SLURM_CONF names its folder."""
        marks = (f"{self.folder}/munge/".encode(), f"SLURM_CONF={self.folder}/slurm.conf\0".encode())
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    content = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
                    if any(mark in content for mark in marks):
                        found.append(int(entry.name))
        return found

    def _make_network(self) -> None:
        """Make a bridge on the controller with one link to each node."""
        controller = f"{self._prefix}{CONTROLLER}"
        lines = ["127.0.0.1 localhost", f"{NETWORK}.1 {CONTROLLER}"]
        for name in (CONTROLLER, *NODES):
            run("ip", "netns", "add", f"{self._prefix}{name}")
            run("ip", "-n", f"{self._prefix}{name}", "link", "set", "lo", "up")
        run("ip", "-n", controller, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", controller, "addr", "add", f"{NETWORK}.1/24", "dev", "br0")
        run("ip", "-n", controller, "link", "set", "br0", "up")
        for number, node in enumerate(NODES, 11):
            name, link = f"{self._prefix}{node}", f"{self._prefix}{node}l"
            run("ip", "link", "add", link, "netns", controller, "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "-n", controller, "link", "set", link, "master", "br0", "up")
            run("ip", "-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            lines.append(f"{NETWORK}.{number} {node}")
        (self.folder / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _configuration(self) -> str:
        folder = self.folder
        nodes = [
            f"NodeName={node} NodeAddr={NETWORK}.{number} CPUs={CPUS} RealMemory=64000"
            for number, node in enumerate(NODES, 11)
        ]
        return "\n".join(
            [
                "ClusterName=test",
                f"SlurmctldHost={CONTROLLER}({NETWORK}.1)",
                "SlurmUser=root",
                "SlurmdUser=root",
                "AuthType=auth/munge",
                f"AuthInfo=socket={folder}/run/munge.socket,cred_expire=6",
                # With proctrack/cgroup and no cgroups, srun prints a failure and exits with 0.
                "ProctrackType=proctrack/linuxproc",
                "TaskPlugin=task/none",
                "JobAcctGatherType=jobacct_gather/none",
                "SelectType=select/cons_tres",
                "SelectTypeParameters=CR_Core",
                "MpiDefault=none",
                "ReturnToService=2",
                "SlurmdParameters=config_overrides",
                f"StateSaveLocation={folder}/state",
                f"SlurmctldPidFile={folder}/run/slurmctld.pid",
                f"SlurmctldLogFile={folder}/log/slurmctld.log",
                f"SlurmdSpoolDir={folder}/spool.%n",
                f"SlurmdPidFile={folder}/run/slurmd.%n.pid",
                f"SlurmdLogFile={folder}/log/slurmd.%n.log",
                "SlurmdTimeout=10",
                "SlurmctldTimeout=10",
                "MessageTimeout=10",
                "SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2",
                "JobCompType=jobcomp/filetxt",
                f"JobCompLoc={folder}/log/jobcomp.txt",
                *nodes,
                "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
                "",
            ]
        )


def run(*command: str, check: bool = True, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command; return its output.

    Raises:
        RuntimeError: it failed and `check` is set.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def main(arguments: list[str]) -> int:
    """Run `up`, `down` or `enter COMMAND`."""
    cluster = Cluster(FOLDER)
    try:
        if arguments == ["up"]:
            cluster.start()
            print(cluster.run("sinfo"), end="")
            print(f"Run Slurm's commands with: {sys.executable} {sys.argv[0]} enter sinfo")
        elif arguments == ["down"]:
            cluster.stop()
        elif arguments[:1] == ["enter"] and arguments[1:]:
            return cluster.enter(*arguments[1:])
        else:
            print(__doc__)
            return 2
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
