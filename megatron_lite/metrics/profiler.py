"""Profiler: traces chosen iterations with torch.profiler, and sums the time of kernels and operators by kind."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_lite.backend.base import Backend
from megatron_lite.backend.group import Group
from megatron_lite.config.run import RunConfig
from megatron_lite.metrics.reporter import Reporter

IDLE = "idle (waiting, Python)"
OTHER = "elementwise and other"
KINDS = (
    ("communication", r"nccl|gloo|all_?reduce|all_?gather|reduce_?scatter|broadcast|c10d|isend|irecv"),
    ("optimizer", r"adam|multi_tensor|_foreach_|optimizer"),
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|attention|softmax_warp"),
    ("loss", r"log_softmax|nll_loss|cross_entropy|cunn_softmax"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|matmul|addmm|bmm|mkldnn_linear|aten::(mm|linear)\b|scaled_mm"),
    ("norms", r"layer_?norm|rms_?norm"),
    ("copies", r"memcpy|memset|copy_|aten::(to|cat|zero_|fill_|contiguous|clone)\b"),
)
"""Kinds of kernels and operators, by a pattern of their names; the first that matches counts."""
SHOWN = 10
"""Kernels in the list of the longest."""


class Interval(NamedTuple):
    """One kernel, or the own time of one operator; seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Profile:
    """Time of some iterations on one rank.

    Attributes:
        seconds: wall time.
        kinds: seconds by kind, longest first, with the time in which nothing ran as the last.
        longest: (name, calls, seconds) of the kernels that took longest.
    """

    seconds: float
    kinds: dict[str, float]
    longest: list[tuple[str, int, float]]


def kind_of(name: str) -> str:
    """Return the kind of a kernel or operator.

    >>> kind_of("ampere_bf16_s16816gemm_bf16_128x256"), kind_of("triton_poi_fused_add_gelu_0")
    ('matrix products', 'elementwise and other')
    """
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), OTHER)


def summarize(intervals: Iterable[Interval], seconds: float) -> Profile:
    """Return the time by kind of kernel.

    Args:
        intervals: of one device; they may overlap, on several streams.
        seconds: wall time of the profiled iterations.
    """
    kinds, names = defaultdict[str, float](float), defaultdict[str, list[float]](list)
    busy, reached = 0.0, float("-inf")
    for name, start, end in sorted(intervals, key=lambda interval: interval.start):
        kinds[kind_of(name)] += end - start
        names[name].append(end - start)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    longest = sorted(((name, len(times), sum(times)) for name, times in names.items()), key=lambda row: -row[2])
    return Profile(seconds, {**ordered, IDLE: max(0.0, seconds - busy)}, longest[:SHOWN])


def table(found: Profile, title: str) -> str:
    """Return the profile as a table of text."""
    lines = [f"{title}: {found.seconds:.3f} s"]
    for kind, seconds in found.kinds.items():
        lines.append(f"  {kind:<24} {seconds / max(found.seconds, 1e-12):>6.1%} {seconds * 1e3:>12,.2f} ms")
    lines.append("  longest kernels or operators:")
    for name, calls, seconds in found.longest:
        lines.append(f"  {seconds * 1e3:>12,.2f} ms in {calls:>6,} calls  {name[:70]}")
    return "\n".join(lines)


class Profiler:
    """Records the iterations and ranks of a ProfileConfig; a context manager that ends an unfinished recording.

    Args:
        config: the run.
        backend: this rank's device.
        world: all ranks.
        reporter: prints the table.
    """

    def __init__(self, config: RunConfig, backend: Backend, world: Group, reporter: Reporter) -> None:
        self._config = config.profile
        self._backend = backend
        self._world = world
        self._reporter = reporter
        self._mine = world.rank in config.profile.ranks
        base = config.checkpoint.save or config.metrics.tensorboard_dir or "."
        self._folder = Path(base) / "profile"
        self._trace: profile | None = None
        self._records_memory = False
        self._started = 0.0
        self._first = 0

    def before_iteration(self, iteration: int) -> None:
        """Start recording if the iteration is the first to profile."""
        config = self._config
        if not config.on or self._first or not config.after < iteration <= config.last:
            return
        self._first = iteration
        if not self._mine:
            return
        if config.memory:
            self._records_memory = self._backend.record_memory_history(True)
        if config.trace:
            of_device = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}.get(self._backend.device.type)
            self._trace = profile(
                activities=[ProfilerActivity.CPU, *([of_device] if of_device else [])],
                record_shapes=config.shapes,
                with_stack=config.stacks,
            )
            self._trace.start()
        self._backend.synchronize()
        self._started = time.perf_counter()

    def after_iteration(self, iteration: int) -> None:
        """Stop after the last iteration to profile, write the files and print the table; a collective call then."""
        if not self._first or iteration != self._config.last:
            return
        iterations = f"iteration{'s' if iteration > self._first else ''} {self._first}"
        iterations += f" to {iteration}" if iteration > self._first else ""
        lines = self._finish(iterations, f"{self._first}-{iteration}") if self._mine else []
        for of_rank in self._world.all_gather_object(lines):
            for line in of_rank:
                self._reporter.message(line)

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._trace is not None:
            self._trace.stop()
            self._trace = None

    def _finish(self, iterations: str, numbers: str) -> list[str]:
        """Return the messages of this rank."""
        self._backend.synchronize()
        seconds, rank, messages = time.perf_counter() - self._started, self._world.rank, []
        if self._trace is not None:
            self._trace.stop()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._trace is not None:
                found = summarize(intervals_of(self._trace, self._backend.device), seconds)
                messages.append(table(found, f"profile of rank {rank}, {iterations}"))
                path = self._folder / f"rank{rank}-{numbers}.json.gz"
                aside = path.with_name(f"{rank}.partial.json.gz")  # gzip by the name's end
                self._trace.export_chrome_trace(str(aside))
                aside.replace(path)
                messages.append(f"trace of rank {rank}: {path} (open it in https://ui.perfetto.dev)")
            if self._config.memory:
                if self._records_memory:
                    path = self._snapshot_path()
                    self._backend.dump_memory_history(path)
                    messages.append(f"memory snapshot of rank {rank}: {path} (open it in pytorch.org/memory_viz)")
                else:
                    messages.append(f"WARNING: no memory snapshot: {self._backend.device_name()} records no history")
        except OSError as error:
            messages.append(
                f"WARNING: the profile of rank {rank} could not be written to {self._folder}: {error.strerror}"
            )
        finally:
            self._trace = None
            if self._records_memory:
                self._backend.record_memory_history(False)
        return messages

    def _snapshot_path(self) -> Path:
        given, rank = self._config.snapshot, self._world.rank
        if not given:
            return self._folder / f"memory-rank{rank}.pickle"
        path = Path(given)
        return path.with_name(f"{path.stem}-rank{rank}{path.suffix}")


def intervals_of(trace: profile, device: torch.device) -> list[Interval]:
    """Return the kernels of an accelerator, or the own times of operators of a CPU, in seconds."""
    events: Sequence[Any] = trace.events() or []
    if device.type != "cpu":
        kernels = [event for event in events if event.device_type.name == device.type.upper()]
        return [
            Interval(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
            for event in kernels
            if not getattr(event, "is_user_annotation", False)
        ]
    found, clock = [], 0.0
    for event in events:
        if event.name.startswith("autograd::engine"):
            continue  # bookkeeping around the operators of backward
        # Operators nest: their own times are laid one after the other.
        seconds = event.self_cpu_time_total / 1e6
        found.append(Interval(event.name, clock, clock + seconds))
        clock += seconds
    return found
