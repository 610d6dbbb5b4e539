"""Measured against planned: calibrates the planner on a CPU run of one model, and predicts the step time of others.

    python benchmarks/plan_vs_measured.py
    python benchmarks/plan_vs_measured.py --iterations 30 --threads 2
    python benchmarks/plan_vs_measured.py --processor-time             # on a machine that others use

Each model trains in a process of its own with --timing-log-level 1; the first one calibrates (`plan --calibrate`), the
others are predicted from their command lines and then measured. Prints seconds of a step, measured and predicted, and
the error.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.run import RunConfig
from megatron_lite.planner.calibration import calibrate, run_of
from megatron_lite.planner.hardware import Hardware, hardware
from megatron_lite.planner.step_time import step_time_of
from megatron_lite.tokenizer.vocabulary import fill_vocabulary

MODELS = {
    "calibrated: 4 x 256, batch 8": (4, 256, 128, 4, 8),
    "8 x 256, batch 8": (8, 256, 128, 4, 8),
    "4 x 512, batch 8": (4, 512, 128, 4, 8),
    "6 x 384, batch 16": (6, 384, 128, 4, 16),
    "4 x 256, 512 tokens": (4, 256, 512, 2, 4),
}
"""Layers, hidden size, sequence length, micro-batch and global batch of each model."""
LIMIT = 0.15


def arguments(shape: tuple[int, int, int, int, int], folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the training command line of a model."""
    layers, hidden, length, micro, batch = shape
    flags: dict[str, object] = {
        "num-layers": layers,
        "hidden-size": hidden,
        "num-attention-heads": hidden // 64,
        "seq-length": length,
        "max-position-embeddings": length,
        "micro-batch-size": micro,
        "global-batch-size": batch,
        "train-iters": options.iterations,
        "lr": 1e-4,
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "eval-iters": 0,
        "timing-log-level": 1,
        "num-threads": options.threads,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": 8191,
        "metrics-file": folder / "metrics.jsonl",
        "device": "cpu",
    }
    return [
        "--mock-data",
        "--no-progress-bar",
        *(str(part) for name, value in flags.items() for part in (f"--{name}", value)),
    ]


def measure(shape: tuple[int, int, int, int, int], folder: Path, options: argparse.Namespace) -> float:
    """Train a model; return the median seconds of an iteration."""
    folder.mkdir()
    clock = "time.perf_counter = time.process_time" if options.processor_time else ""
    program = f"import sys, time; {clock}\nfrom megatron_lite.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "train", *arguments(shape, folder, options)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (measurement,) = run_of(folder / "metrics.jsonl")[2]
    return measurement.seconds[""]


def predicted(config: RunConfig, machine: Hardware) -> float:
    """Return the predicted seconds of an iteration."""
    batch = config.batch
    assert batch.global_batch_size is not None
    return step_time_of(config, machine, batch.global_batch_size, batch.seq_length).total


def main() -> int:
    """Run the comparison; return 1 if an error exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure the process's processor time instead of wall-clock time: beside other work, with one thread",
    )
    options = parser.parse_args()
    machine, errors = hardware("cpu"), []
    print(f"{'model':<32} {'measured s':>10} {'predicted s':>11} {'error':>7}")
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, shape) in enumerate(MODELS.items()):
            folder = Path(temporary) / str(number)
            seconds = measure(shape, folder, options)
            if not number:
                config, _, measurements = run_of(folder / "metrics.jsonl")
                machine = calibrate(config, machine, measurements).machine
            config, _ = fill_vocabulary(parse_run(arguments(shape, folder, options)).config)
            found = predicted(config, machine)
            print(f"{name:<32} {seconds:>10.4f} {found:>11.4f} {found / seconds - 1:>+7.1%}", flush=True)
            errors += [abs(found / seconds - 1)] if number else []
    print(f"largest error {max(errors):.1%}, mean {statistics.fmean(errors):.1%} (limit {LIMIT:.0%})")
    return int(max(errors) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
