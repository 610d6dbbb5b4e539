"""Batch script writer of a Slurm job chain: the user's script between commands that record its start and end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPT_NAME = "chain.slurm"
COPY_NAME = "chain_script.slurm"
EXIT_ENDED = 3
"""Exit code of `slurm begin`: the job must not train."""


def write_scripts(folder: Path, script: Path, arguments: Sequence[str]) -> None:
    """Write the batch script of a chain's jobs and the copy of the user's script that it runs.

    The copy is what sbatch, too, makes of a script: a change of the file during a chain of weeks has no effect on it.
    """
    content = script.read_bytes()
    (folder / COPY_NAME).write_bytes(content)
    (folder / SCRIPT_NAME).write_text(_batch_script(folder.absolute(), script, arguments), encoding="utf-8")


def script_changed(folder: Path, script: str) -> bool:
    """Return whether the user's script differs from the chain's copy, or was removed."""
    try:
        return Path(script).read_bytes() != (folder / COPY_NAME).read_bytes()
    except OSError:
        return True


def _batch_script(folder: Path, script: Path, arguments: Sequence[str]) -> str:
    lines = script.read_text(encoding="utf-8").splitlines()
    header = []
    for line in lines[1:] if lines[:1] and lines[0].startswith("#!") else lines:
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            header.append(line)
    program = f"{shlex.quote(sys.executable)} -m megatron_lite slurm"
    run = shlex.quote(str(folder))
    return f"""#!/bin/bash
# Written by `megatron-lite slurm submit --chain` for {script.absolute()}.
{chr(10).join(header)}
#SBATCH --open-mode=append

{program} begin {run}
code=$?
if [ "$code" = {EXIT_ENDED} ]; then exit 0; elif [ "$code" != 0 ]; then exit "$code"; fi

# Signals that Slurm sends to the batch shell (--signal=B:USR1@600) are passed on to the script.
trap '[ -z "$!" ] || kill -USR1 "$!"' USR1
trap '[ -z "$!" ] || kill -USR2 "$!"' USR2
trap '[ -z "$!" ] || kill -INT "$!"' INT
trap '[ -z "$!" ] || kill -HUP "$!"' HUP
# With SIGTERM (time limit, scancel, preemption) Slurm ends the script, too, perhaps before the training has saved: the
# next job judges this one.
ended=
trap 'ended=1' TERM
{shlex.join(["bash", str(folder / COPY_NAME), *arguments])} &
while :; do
  wait "$!"
  code=$?
  kill -0 "$!" 2>/dev/null || break
done

if [ -z "$ended" ]; then {program} end --exit-code "$code" {run}; fi
exit "$code"
"""
