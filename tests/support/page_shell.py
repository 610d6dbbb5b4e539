"""Shell of the commands of a page: bash whose programs are answered by this process (support/page_programs.py).

Slurm's programs are stand-ins: a job given to sbatch runs after the block that submitted it, as the first task of an
array; one that begins after another does not run.
"""

import json
import os
import select
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from support.page_blocks import read_blocks
from support.page_programs import ROOT, Programs

TOOLS = (
    *(
        "bash",
        "sh",
        "cat",
        "cp",
        "cut",
        "date",
        "dirname",
        "env",
        "grep",
        "head",
        "id",
        "ls",
        "mkdir",
        "realpath",
        "rm",
    ),
    *("tail", "tee", "tr", "wc"),
)
# The arguments of a job are a line of the file "jobs" beside the programs; the number of the line is that of the job.
STAND_INS = {
    "sbatch": """printf '%q ' "$PWD" "$@" >> "${0%/*}/jobs"; echo >> "${0%/*}/jobs"; wc -l < "${0%/*}/jobs" """,
    "sinfo": "exit 1",  # as on a laptop: the checks of a job are those without a cluster
    # The one host of a TPU slice is this machine.
    "gcloud": """while [ $# != 0 ]; do
  case $1 in describe) echo ACTIVE ;; --command) exec bash -c "$2" ;; esac; shift
done""",
    "curl": "case $* in *number) echo 0 ;; *endpoints) echo n:0:127.0.0.1 ;; *) echo v4-8 ;; esac",
    **dict.fromkeys(("squeue", "scancel", "scontrol", "mountpoint", "tar"), ""),
}
# Options of sbatch with which a job begins after the end or the start of another job.
LATER = ("--begin", "--dependency=afterany")
LINKS = ("pretrain_gpt.py", "tools", "examples", "benchmarks", "slurm", "docs", "Makefile")
# A program in PATH: sends its arguments to this process and prints the answer.
STAND_IN = """\
import json, os, socket, stat, sys
piped = stat.S_ISFIFO(os.fstat(0).st_mode)
request = {"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "cwd": os.getcwd()}
request["stdin"] = sys.stdin.read() if piped else None
with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), "server"))
    server.sendall(json.dumps(request).encode() + b"\\n")
    code, out = json.loads(server.makefile(encoding="utf-8").readline())
sys.stdout.buffer.write(out.encode())
sys.exit(code)
"""
# Flags alone in a block are a command that bash does not find.
BEGINNING = 'command_not_found_handle() { flags "$@"; }\n'


def run_page(name, shell):
    """Run the blocks of a page, a path in the repository; return what went wrong, empty if nothing did."""
    page = (ROOT / name).read_text(encoding="utf-8")
    return "\n".join(f"{name}:{block.line}\n{fault}" for block in read_blocks(page) if (fault := shell.run(block)))


class PageShell:
    """Folder and shell of a page.

    Args:
        folder: where its commands run.
        files: maker of toy files.
        programs: class of the programs by name.
    """

    def __init__(self, folder, files, programs=Programs):
        self.folder = folder
        self.files = files
        self.bin = tempfile.TemporaryDirectory()  # the path of a socket has at most 107 characters
        self.programs = programs(files, Path(self.bin.name))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{self.bin.name}/server")
        self.listener.listen()
        for name in self.programs.by_name:
            path = Path(self.bin.name) / name
            path.write_text(f"#!{sys.executable} -IS\n{STAND_IN}", encoding="utf-8")
            path.chmod(0o755)
        self.slurm = Path(self.bin.name) / "slurm"
        self.slurm.mkdir()
        (self.slurm / "jobs").touch()
        self.num_jobs = 0
        for name, text in STAND_INS.items():
            (self.slurm / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
            (self.slurm / name).chmod(0o755)
        for name in TOOLS:
            path = next(path for folder in ("/bin", "/usr/bin") if (path := Path(folder) / name).exists())
            (Path(self.bin.name) / name).symlink_to(path)
        for name in LINKS:
            (folder / name).symlink_to(ROOT / name)
        (folder / "megatron_lite").symlink_to(folder)  # cd megatron_lite

    def close(self):
        """Remove the programs."""
        self.listener.close()
        self.bin.cleanup()

    def run(self, block):
        """Prepare and run a block; return what went wrong, empty if nothing did."""
        for kind, paths in block.made:
            for path in paths:
                self.files.make(kind, self.folder / path)
        if block.file:
            text = block.text.replace("MORE FLAGS", shlex.join(self.files.job()))
            (self.folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / block.file).write_text(text, encoding="utf-8")
            (self.folder / block.file).chmod(0o755)
            return ""
        self.faults = []
        fault = self._bash(["-e", "-o", "pipefail", "-c", BEGINNING + block.text], self.folder)
        return fault or self._run_jobs()

    def _run_jobs(self):
        """Run the jobs that were submitted; return what went wrong."""
        while len(lines := (self.slurm / "jobs").read_text(encoding="utf-8").splitlines()) > self.num_jobs:
            folder, *args = shlex.split(lines[self.num_jobs])
            self.num_jobs += 1
            if any(word.startswith(LATER) for word in args):
                continue
            script = next(place for place, word in enumerate(args) if not word.startswith("-"))
            number = str(self.num_jobs)
            variables = {"SLURM_JOB_ID": number, "SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": "0"}
            more = {"SLURM_ARRAY_TASK_COUNT": "1", "SLURM_CPUS_PER_TASK": "1", "PYTHONPATH": str(ROOT)}
            if fault := self._bash(args[script:], folder, variables | more):
                return f"in the job of {shlex.join(args)}:\n{fault}"
        return ""

    def _bash(self, args, folder, variables=None):
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            bash = subprocess.Popen(
                ["/bin/bash", *args],
                cwd=folder,
                env={
                    "PATH": f"{self.bin.name}:{self.slurm}",
                    "LANG": "C.UTF-8",
                    "HOME": str(self.folder),
                    **(variables or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            while bash.poll() is None:
                if select.select([self.listener], [], [], 0.01)[0]:
                    self._answer()
            errors.seek(0)
            return "\n".join(self.faults) or (errors.read() if bash.returncode else "")

    def _answer(self):
        connection, _ = self.listener.accept()
        with connection, connection.makefile("rw", encoding="utf-8") as stream:
            request = json.loads(stream.readline())
            before = Path.cwd()
            os.chdir(request["cwd"])
            try:
                with mock.patch.dict(os.environ, PATH=f"{self.slurm}:{os.environ['PATH']}"):
                    result = self.programs.answer(request["argv"], request["stdin"])
            finally:
                os.chdir(before)
            if result.code:
                self.faults.append(f"$ {shlex.join(request['argv'])}\n{result.out[-500:]}{result.err}")
            stream.write(json.dumps([result.code, result.out]) + "\n")
