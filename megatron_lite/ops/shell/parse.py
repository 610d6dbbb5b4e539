"""Bash parsing by shfmt (pip package shfmt-py, https://github.com/mvdan/sh): syntax tree of a job script as JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_lite.errors import ConfigError, install_extra
from megatron_lite.ops.shell.words import Node


def parse_script(text: str, name: str) -> list[Node]:
    """Return the statements of a bash script as shfmt's syntax tree.

    Raises:
        ConfigError: the script is no valid bash, or shfmt is not installed.
    """
    program = shutil.which("shfmt", path=Path(sys.executable).parent) or shutil.which("shfmt")
    if program is None:
        raise ConfigError("shfmt, which reads job scripts, is not installed", fix=install_extra("slurm"))
    done = subprocess.run(
        [program, "-ln", "bash", "--to-json"], input=text, capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        problem = done.stderr.strip().replace("<standard input>", name)
        raise ConfigError(f"{name} is no valid bash script: {problem}", fix="Repair the line named (bash -n checks it)")
    tree: list[Node] = json.loads(done.stdout).get("Stmts") or []
    return tree
