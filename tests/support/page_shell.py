"""Shell of the commands of a page: bash whose programs are answered by this process (support/page_programs.py)."""

import json
import os
import re
import select
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from support.page_programs import ROOT, Programs

TOOLS = ("cat", "cp", "ls", "mkdir", "rm", "head", "tail", "tee", "dirname")
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
SCRIPT = re.compile(r"^((?:\w+=\S+ +)*)(?=(?:examples|slurm)/)", re.MULTILINE)  # checked, not run
BEGINNING = 'command_not_found_handle() { flags "$@"; }\n'


class PageShell:
    """Folder and shell of a page.

    Args:
        folder: where its commands run.
        files: maker of toy files.
    """

    def __init__(self, folder, files):
        self.folder = folder
        self.files = files
        self.bin = tempfile.TemporaryDirectory()  # the path of a socket has at most 107 characters
        self.programs = Programs(files, Path(self.bin.name))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{self.bin.name}/server")
        self.listener.listen()
        for name in self.programs.by_name:
            path = Path(self.bin.name) / name
            path.write_text(f"#!{sys.executable} -IS\n{STAND_IN}", encoding="utf-8")
            path.chmod(0o755)
        for name in TOOLS:
            path = next(path for folder in ("/bin", "/usr/bin") if (path := Path(folder) / name).exists())
            (Path(self.bin.name) / name).symlink_to(path)
        for name in LINKS:
            (folder / name).symlink_to(ROOT / name)
        (folder / "megatron_lite").mkdir()  # cd megatron_lite

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
        self.programs.parsed_only = block.parsed_only
        self.faults = []
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            bash = subprocess.Popen(
                ["/bin/bash", "-e", "-o", "pipefail", "-c", BEGINNING + SCRIPT.sub(r"\1bash ", block.text)],
                cwd=self.folder,
                env={"PATH": self.bin.name, "LANG": "C.UTF-8", "HOME": str(self.folder)},
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
                result = self.programs.answer(request["argv"], request["stdin"])
            finally:
                os.chdir(before)
            if result.code:
                self.faults.append(f"$ {shlex.join(request['argv'])}\n{result.out[-500:]}{result.err}")
            stream.write(json.dumps([result.code, result.out]) + "\n")
