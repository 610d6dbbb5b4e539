"""Benchmark of training on one GPU against plain PyTorch: tokens/s, MFU, peak memory, and a step's time by kind.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --json gpu.json --minutes 9

Models: 124M (sequences of 1,024), 1.3B (2,048; one micro-batch of 8, and four accumulated), and two layers of 13B's
width. Each is trained eagerly and compiled, in bf16 and fp8, beside the GPT-2 of step_vs_plain.py in the style of
nanoGPT: fp32 parameters, bf16 autocast, torch.compile, fused AdamW. One side at a time is in memory; the compiled bf16
step and the plain one take turns. The tests marked `gpu` run first, if pytest is installed. What does not fit into
--minutes is left out, and named.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from step_vs_plain import PlainGPT2, gpt2_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.counts import flops_per_token
from megatron_lite.config.fp8 import Fp8Config
from megatron_lite.config.learning_rate import LrConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.metrics.profiler import intervals_of, summarize
from megatron_lite.model.batch import MicroBatch
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.schedules.iteration import plan_iteration
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine

Step = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """Model and batch of a measurement; the batch is `micro_batches` of `batch` samples."""

    name: str
    layers: int
    hidden: int
    heads: int
    seq: int
    batch: int
    micro_batches: int = 1
    vocab: int = 50304

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.seq * self.batch * self.micro_batches

    def model(self) -> ModelConfig:
        """Return the architecture, without dropout."""
        return gpt2_model(self.layers, self.hidden, self.heads, self.seq, self.vocab)

    def micro_batch_tokens(self, device: torch.device) -> list[Tensor]:
        """Return random tokens [b, s + 1] of each micro-batch."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.micro_batches, self.batch, self.seq + 1)
        return list(torch.randint(0, self.vocab, shape, generator=generator).to(device))


SHAPES = (
    Shape("124M", 12, 768, 12, 1024, 16),
    Shape("1.3B", 24, 2048, 16, 2048, 8),
    Shape("1.3B, 4 micro-batches", 24, 2048, 16, 2048, 8, micro_batches=4),
    Shape("13B, 2 layers", 2, 5120, 40, 2048, 4),
)
PLAIN = "plain PyTorch, compiled"
TURNS = ("bf16 compiled", PLAIN)
"""Sides that take turns, since their ratio counts."""
OURS = {"bf16 compiled": ("off", True), "bf16 eager": ("off", False), "fp8 compiled": ("hybrid", True),
        "fp8 eager": ("hybrid", False)}  # fmt: skip
"""Names of our sides, with fp8 format and compilation."""


@dataclass
class Result:
    """Measurement of one side at one shape; `kinds`: seconds of a profiled step by kind of kernel."""

    shape: str
    side: str
    seconds: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    kinds: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


def our_step(shape: Shape, device: torch.device, fp8: str, compiled: bool) -> Step:
    """Return a function that runs a run's training step."""
    config = RunConfig(
        model=shape.model(),
        batch=BatchConfig(
            seq_length=shape.seq, micro_batch_size=shape.batch, global_batch_size=shape.batch * shape.micro_batches
        ),
        training=TrainingConfig(train_iters=10**6),
        lr=LrConfig(lr=1e-4, style="constant"),
        precision=PrecisionConfig(dtype="bf16"),
        fp8=Fp8Config(format=fp8),  # type: ignore[arg-type]
        runtime=RuntimeConfig(device=device.type, compile="stage" if compiled else "off"),  # type: ignore[arg-type]
    )
    backend = select_backend(config.runtime, config.parallel, Launch())
    engine = build_engine(config, build_mesh(backend, config.parallel))
    plan = plan_iteration(config, Progress())
    batches = [MicroBatch(tokens[:, :-1], tokens[:, 1:]) for tokens in shape.micro_batch_tokens(device)]
    pending: list[Any] = []

    def step() -> None:
        pending.append(engine.train_step(plan, batches.__getitem__))
        if len(pending) > 1:  # as the training loop does: an outcome is read while the next step runs
            pending.pop(0).outcome()

    return step


def plain_step(shape: Shape, device: torch.device, backend: str) -> Step:
    """Return a function that runs a training step in the style of nanoGPT."""
    model = PlainGPT2(shape.vocab, shape.seq, shape.layers, shape.hidden, shape.heads).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    compiled = torch.compile(model, backend=backend)
    batches = shape.micro_batch_tokens(device)

    def step() -> None:
        for tokens in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = compiled(tokens[:, :-1], tokens[:, 1:]) / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(result: Result, shape: Shape, device: torch.device, compile_backend: str, steps: int) -> None:
    """Build one side, time its steps, and free it; a failure is recorded as the result's problem."""
    profiled = not result.kinds and result.side != PLAIN
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = (
            plain_step(shape, device, compile_backend)
            if result.side == PLAIN
            else our_step(shape, device, *OURS[result.side])
        )
        for _ in range(3):
            step()
        synchronize(device)
        for _ in range(steps):
            start = time.perf_counter()
            step()
            synchronize(device)
            result.seconds.append(time.perf_counter() - start)
        if device.type == "cuda":
            result.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
        if profiled:
            result.kinds = profile_step(step, device)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        result.problem = str(error).splitlines()[0][:120]
    step = None  # type: ignore[assignment]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def profile_step(step: Step, device: torch.device) -> dict[str, float]:
    """Return the seconds of a step by kind of kernel."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as trace:
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds = time.perf_counter() - start
    return summarize(intervals_of(trace, device), seconds).kinds


def run_tests() -> str:
    """Run the tests marked gpu; return the last line of their output."""
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "tests"],
        cwd=root,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else done.stderr.strip()[-200:]


def run(
    shapes: tuple[Shape, ...], device: torch.device, *, compile_backend: str = "inductor", steps: int = 10,
    minutes: float = 9.0,
) -> list[Result]:  # fmt: skip
    """Measure every side at every shape within a time; the sides of TURNS first, and twice."""
    deadline, results = time.perf_counter() + 60 * minutes, []
    order = [(shape, side) for side in (*TURNS, *(side for side in OURS if side not in TURNS)) for shape in shapes]
    for shape, side in order:
        results.append(Result(shape.name, side))
    again = [result for result in results if result.side in TURNS]
    for result in [*results[: len(again)], *again, *results[len(again) :]]:
        shape = next(shape for shape in shapes if shape.name == result.shape)
        if result.problem:
            continue
        if time.perf_counter() > deadline:
            if not result.seconds:
                result.problem = "left out: no time was left"
            continue
        print(f"measuring {shape.name}: {result.side}", file=sys.stderr, flush=True)
        measure(result, shape, device, compile_backend, steps)
    return results


def report(results: list[Result], shapes: tuple[Shape, ...], peak_flops: float | None) -> str:
    """Return the table of speeds, with the ratio to plain PyTorch, and the table of kinds."""
    lines = [f"{'model':<24}{'side':<26}{'tokens/s':>12}{'ratio':>8}{'MFU':>8}{'peak GiB':>10}"]
    for shape in shapes:
        of_shape = [result for result in results if result.shape == shape.name]
        plain = next((result for result in of_shape if result.side == PLAIN and result.seconds), None)
        for result in of_shape:
            if not result.seconds:
                lines.append(f"{shape.name:<24}{result.side:<26}  {result.problem}")
                continue
            speed = shape.tokens / result.median
            ratio = f"{plain.median / result.median:.3f}" if plain is not None else ""
            mfu = f"{speed * flops_per_token(shape.model(), shape.seq) / peak_flops:.1%}" if peak_flops else ""
            lines.append(f"{shape.name:<24}{result.side:<26}{speed:>12,.0f}{ratio:>8}{mfu:>8}{result.peak_gib:>10.1f}")
    lines.append("")
    for result in results:
        if result.kinds:
            total = sum(result.kinds.values())
            shares = ", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in result.kinds.items())
            lines.append(f"{result.shape}, {result.side}: {shares}")
    return "\n".join(lines)


def main() -> int:
    """Measure on the GPU and print the tables; return 1 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    parser.add_argument("--minutes", type=float, default=8.5, help="time after which nothing further is measured")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side and turn")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="measure the first N models only")
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests marked gpu")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a GPU that PyTorch can use", file=sys.stderr)
        return 1
    started, device = time.perf_counter(), torch.device("cuda", 0)
    tests = "left out" if args.no_tests else run_tests()
    shapes = SHAPES[: args.shapes]
    minutes = args.minutes - (time.perf_counter() - started) / 60
    results = run(shapes, device, steps=args.steps, minutes=minutes)
    peak = select_backend(RuntimeConfig(device="cuda"), ParallelConfig(), Launch()).peak_flops(torch.bfloat16)
    card = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    print(f"{card}\ntests marked gpu: {tests}\n\n{report(results, shapes, peak)}")
    if args.json:
        record = {"card": card, "tests": tests, "peak_flops": peak, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
