"""Synthetic files of a training run of any length, in the trainer's format, with restarts, spikes and a rollback."""

import json
import math
import random
from dataclasses import asdict

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.learning_rate import LrConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.metrics.report import RunFacts
from megatron_lite.runs.metrics_file import encode

BEGAN = 1_700_000_000.0
SEQ, BATCH = 2048, 64


def config(lr=6e-4):
    return RunConfig(
        model=ModelConfig(num_layers=24, hidden_size=2048, num_attention_heads=16, vocab_size=50257),
        batch=BatchConfig(seq_length=SEQ, micro_batch_size=4, global_batch_size=BATCH),
        parallel=ParallelConfig(world_size=8, tp=2, pp=2),
        lr=LrConfig(lr=lr),
        precision=PrecisionConfig(dtype="bf16"),
    )


class RunFiles:
    """Writes the metrics.jsonl of a run to a folder, with a clock of its own."""

    def __init__(self, folder, lr=6e-4, seed=1):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.lr, self.now, self.draw = folder, lr, BEGAN, random.Random(seed)
        self.file = (folder / "metrics.jsonl").open("wb")

    def write(self, kind, **values):
        self.file.write(encode({"kind": kind, "time": self.now, **values}))

    def start(self, iteration=0, gap=0.0, startup=40.0, **facts):
        self.now += gap + startup
        known = RunFacts(
            parameters=1_315_000_000,
            train_iterations=3000,
            start_iteration=iteration,
            world_size=8,
            data_parallel=2,
            device="NVIDIA H100 80GB HBM3",
            peak_flops=989e12,
            dtype="bf16",
            hosts=["n1"] * 4 + ["n2"] * 4,
            command=["--num-layers", "24", "--hidden-size", "2048", "--lr", f"{self.lr:g}", "--data-path", "a <b>"],
            environment={"Python": "3.12.1", "PyTorch": "2.11.0"},
            startup_seconds=startup,
        )
        values = asdict(known) | facts
        self.write("start", iteration=iteration, **values, config=asdict(config(self.lr)))

    def loss(self, iteration):
        return 2.2 + 8.5 * math.exp(-iteration / 200) + 1.2 / (1 + iteration / 400) + self.draw.gauss(0, 0.03)

    def iterations(self, first, last, *, sources=(), measured=0, **changes):
        for iteration in range(first, last + 1):
            seconds = 0.92 * self.draw.uniform(0.98, 1.03) + (6.0 if iteration == first else 0.0)
            self.now += seconds
            loss = self.loss(iteration)
            speed = BATCH * SEQ / seconds
            values = {
                "iteration": iteration,
                "train_iterations": 3000,
                "consumed_train_samples": iteration * BATCH,
                "consumed_train_tokens": iteration * BATCH * SEQ,
                "losses": {"lm loss": loss, **{f"lm loss {name}": loss + 0.2 * n for n, name in enumerate(sources)}},
                "learning_rate": self.lr
                * min(1.0, iteration / 200)
                * (0.55 + 0.45 * math.cos(iteration / 3000 * 3.14)),
                "global_batch_size": BATCH,
                "seq_length": SEQ,
                "loss_scale": 1.0,
                "grad_norm": 0.4 + 3 * math.exp(-iteration / 60) + self.draw.random() * 0.1,
                "skipped": 0,
                "seconds": seconds,
                "tokens_per_second": speed,
                "tflops_per_device": speed * 8.1e9 / 8e12,
                "mfu": speed * 8.1e9 / 8 / 989e12,
            }
            if measured and iteration % measured == 1 and iteration > first:
                values["parts"] = {"compute": 0.71, "data": 0.01, "gradients": 0.05, "optimizer": 0.03}
                values["rank_seconds"] = [0.7, 0.72, 0.7, 0.71, 0.7, 0.9, 0.71, 0.7]
            self.write("iteration", **values | changes)

    def validation(self, iteration, seconds=9.0, **values):
        self.now += seconds
        fields = {
            "iteration": iteration,
            "consumed_train_samples": iteration * BATCH,
            "consumed_train_tokens": iteration * BATCH * SEQ,
            "losses": {"lm loss": self.loss(iteration) + 0.05},
            "split": "validation",
            "seconds": seconds,
            "samples": 640,
        }
        self.write("validation", **fields | values)

    def save(self, iteration, blocking=3.0):
        self.now += blocking
        self.write("save", iteration=iteration, seconds=blocking + 20.0, size=18_400_000_000, blocking_seconds=blocking)

    def message(self, iteration, text):
        self.write("message", iteration=iteration, text=text)

    def discarded(self, iteration, iterations, seconds, starts=0, **values):
        self.now += seconds
        fields = {"iteration": iteration, "iterations": iterations, "seconds": seconds, "starts": starts}
        self.write("discarded", **fields | values)

    def rollback(self, iteration, skipped):
        entry = {"time": self.now, "from": "1200", "to": iteration, "skipped_samples": skipped, "automatic": True}
        with (self.folder / "rollbacks.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry | {"moved_to": "rolled-back-1"}) + "\n")


def eventful_run(folder, lr=6e-4, seed=1):
    """Write a run of 3,000 iterations with two sources, a restart after a crash, two spikes and a rollback."""
    run = RunFiles(folder, lr, seed)
    run.start()
    for first in range(1, 3001, 500):
        if first == 1001:
            run.discarded(1000, 130, 125.0)
            run.start(1000, gap=5400.0)
        if first == 2001:
            spike = "WARNING: loss spike: the loss rose to {} in iterations {}, from a median of 2.500000E+00"
            run.message(2000, spike.format("4.912000E+00", "1701 to 1703"))
            ended = {"time": run.now + 50.0, "text": spike.format("5.102000E+00", "2050 to 2052")}
            run.discarded(2000, 60, 58.0, spikes=[ended])
            run.rollback(2000, [131072, 131584])
            run.start(2000, startup=15.0, after_rollback=True)
        run.iterations(first, first + 499, sources=("wiki", "code"), measured=100)
        run.validation(first + 499)
        run.save(first + 499)
    run.message(3000, "WARNING: the validation data has fewer samples than one evaluation reads")
    run.file.close()
    (folder / "completed_iteration.txt").write_text("3000\n", encoding="utf-8")
    return run
