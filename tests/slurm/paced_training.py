"""pretrain_gpt.py with slowed iterations: a test interrupts training at a known place on a machine of any speed.

Each iteration takes the seconds in the file `pace` beside the --save folder at least. Rank 0 appends one line for each
iteration to `iterations.log` there: job, restart, iteration. Arguments are those of pretrain_gpt.py.
"""

import os
import sys
import time
from pathlib import Path

from megatron_lite.cli.main import main
from megatron_lite.lifecycle.stopping import Stopper

_after_iteration = Stopper.after_iteration


def _paced(self, progress, **options):
    folder = Path(sys.argv[sys.argv.index("--save") + 1]).parent
    if os.environ.get("SLURM_PROCID") == "0":
        with (folder / "iterations.log").open("a", encoding="utf-8") as file:
            job, restart = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
            file.write(f"{job} {restart} {progress.iteration}\n")
    pace = folder / "pace"
    if pace.exists():
        time.sleep(float(pace.read_text(encoding="utf-8")))
    return _after_iteration(self, progress, **options)


if __name__ == "__main__":
    Stopper.after_iteration = _paced
    sys.exit(main(["train", *sys.argv[1:]]))
