"""Node check of a job: measures every rank; rank 0 judges the reports, and all ranks receive its verdict.

Nothing waits without a limit: a rank that is missing, ends or hangs is named after the time-out, with the reports of
the others.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_lite.backend.base import Backend
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.interruptible import first_line, run_interruptibly
from megatron_lite.backend.select import select_backend
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import MegatronLiteError
from megatron_lite.lifecycle.node_speeds import (
    Product,
    axis_links,
    copy_speed,
    host_copy_speed,
    host_pairs,
    matrix_speed,
    pair_links,
)
from megatron_lite.ops.doctor.gpus import find_gpu, query_gpus
from megatron_lite.ops.doctor.hub import GRACE, Clock, Hub, Spoke, free_ports
from megatron_lite.ops.doctor.judgement import judge
from megatron_lite.ops.doctor.node import node_facts, program_versions
from megatron_lite.ops.doctor.report import (
    DEVICE,
    GPU_STATE,
    GROUPS,
    HOST_COPY,
    LINK_STEP,
    MATRIX_PRODUCT,
    MEMORY_COPY,
    STORAGE,
    Gpu,
    Report,
)
from megatron_lite.ops.doctor.storage import probe_storage
from megatron_lite.ops.doctor.verdict import Problem, Thresholds, Verdict
from megatron_lite.parallel.mesh import build_mesh

CPU_MESSAGE = 4 * 2**20
"""Largest message between CPU ranks, bytes."""


@dataclass(frozen=True, kw_only=True)
class CheckPlan:
    """Extent of a node check.

    Attributes:
        runtime: device and threads.
        parallel: sizes of the mesh.
        save: folder whose write speed is measured; empty: none.
        activation_bytes: hidden states of a micro-batch: the messages of tp and pp.
        timeout: seconds after which the check ends, whatever hangs.
        speed_seconds: of one speed measurement.
        written_bytes: written to --save.
        write_seconds: after which writing to --save ends.
        expected: number of ranks by host, from the launcher; empty: unknown.
        thresholds: of the rules.
    """

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    save: str = ""
    activation_bytes: int = 32 * 2**20
    timeout: float = 180.0
    speed_seconds: float = 4.0
    written_bytes: int = 2**28
    write_seconds: float = 15.0
    expected: Mapping[str, int] = field(default_factory=dict)
    thresholds: Thresholds = field(default_factory=Thresholds)

    @property
    def step_seconds(self) -> float:
        """Time within which a measurement ends on a healthy but busy host."""
        return 5 + 2 * self.speed_seconds

    def needed_seconds(self, world_size: int) -> int:
        """Return the smallest time-out with which healthy hosts finish the check."""
        seconds = 10 + 4 * self.speed_seconds + (self.write_seconds if self.save else 0)
        # A third of the time is for the ranks to join.
        return math.ceil(seconds if world_size == 1 else 1.5 * (seconds + 10))


def plan_of(flags: RunConfig, *, timeout: float, expected: Mapping[str, int] | None = None) -> CheckPlan:
    """Return the check of a training command.

    Args:
        flags: layout, device and --save; the model and batch set the size of messages, if they are given.
        timeout: see CheckPlan.
        expected: see CheckPlan.
    """
    hidden_states = flags.batch.seq_length * flags.batch.micro_batch_size * flags.model.hidden_size
    size = hidden_states * flags.precision.itemsize
    return CheckPlan(
        runtime=flags.runtime,
        parallel=flags.parallel,
        save=flags.checkpoint.save,
        activation_bytes=size or CheckPlan.activation_bytes,
        timeout=timeout,
        expected=expected or {},
    )


def fast_check(plan: CheckPlan) -> CheckPlan:
    """Return the plan with shorter measurements: half a minute at most, if all ranks start together."""
    return replace(plan, speed_seconds=1.0, written_bytes=2**26, write_seconds=5.0)


def check_nodes(
    launch: Launch,
    plan: CheckPlan,
    *,
    show: Callable[[Verdict, Mapping[int, Report]], None],
    product: Product = torch.mm,
    clock: Clock = time.time,
) -> Verdict:
    """Measure this rank and return the verdict on all; a collective call that needs no process group.

    Args:
        launch: this rank's place in the job.
        plan: extent of the check.
        show: called on rank 0 with the verdict and the reports of all ranks, before the other ranks have the verdict: a
            launcher ends all ranks once one of them fails.
        product: the matrix product to measure.
        clock: this host's clock, in seconds.

    Returns:
        The verdict, equal on all ranks.

    Raises:
        TrainingError: rank 0 cannot be reached, or has ended.
    """
    began = time.monotonic()
    join_seconds = plan.timeout / 3
    report = Report(rank=launch.rank, local_rank=launch.local_rank, host=launch.host, versions=program_versions())
    if launch.world_size == 1:
        _Measurement(launch, plan, report, lambda: None, began + plan.timeout, product).run({}, None)
        verdict = judge({0: report}, thresholds=plan.thresholds, seconds=time.monotonic() - began)
        show(verdict, {0: report})
        return verdict
    with ExitStack() as stack:
        hub = stack.enter_context(Hub(launch, clock=clock)) if launch.rank == 0 else None
        port = None if hub is None else hub.port
        spoke = stack.enter_context(Spoke(launch, began + join_seconds, port=port, clock=clock))
        if hub is not None:
            # The hub's thread answers; this rank's own pong is sent while it waits for `start`.
            _start_when_joined(hub, began + join_seconds)
        start = spoke.expect("start", began + join_seconds + GRACE)
        deadline = time.monotonic() + plan.timeout - join_seconds  # nearly equal on all ranks
        address = f"tcp://{spoke.address}:{','.join(map(str, start['ports']))}"
        hosts = {int(rank): host for rank, host in start["hosts"].items()}
        measurement = _Measurement(launch, plan, report, lambda: spoke.send(report), deadline, product)
        measurement.run(hosts, None if start["missing"] else address)
        if hub is None:
            return _read_verdict(spoke.expect("verdict", deadline + GRACE))
        hub.wait_reports(deadline)
        for rank, host in hub.hosts.items():  # of a rank that ended before its first report
            hub.reports.setdefault(rank, Report(rank=rank, local_rank=0, host=host))
        verdict = judge(
            hub.reports,
            missing=start["missing"],
            expected=plan.expected,
            join_seconds=join_seconds,
            seconds=time.monotonic() - began,
            lost=hub.lost,
            thresholds=plan.thresholds,
        )
        show(verdict, hub.reports)
        hub.broadcast(verdict=asdict(verdict))
        return verdict


def _start_when_joined(hub: Hub, deadline: float) -> None:
    """Start the measurements in the hub's name once all ranks have joined, or the time to join is over."""

    def start() -> None:
        missing = hub.wait_joined(deadline)
        hosts = {str(rank): host for rank, host in hub.hosts.items()}
        hub.broadcast(start={"hosts": hosts, "missing": missing, "ports": free_ports()})

    threading.Thread(target=start, name="node check start", daemon=True).start()


def _read_verdict(content: dict[str, Any]) -> Verdict:
    findings = tuple(Problem(**{**finding, "hosts": tuple(finding["hosts"])}) for finding in content["findings"])
    return Verdict(**{**content, "findings": findings})


class _Measurement:
    """Steps of one rank, each with a time limit.

    Args:
        launch: this rank's place in the job.
        plan: extent of the check.
        report: to fill.
        send: sends the report to rank 0.
        deadline: time.monotonic() at which all steps have to be over.
        product: the matrix product to measure.
    """

    def __init__(
        self,
        launch: Launch,
        plan: CheckPlan,
        report: Report,
        send: Callable[[], None],
        deadline: float,
        product: Product,
    ) -> None:
        self._launch = launch
        self._plan = plan
        self._report = report
        self._send = send
        # The report has to arrive before rank 0 stops waiting.
        self._deadline = deadline - min(5.0, 0.1 * plan.timeout)
        self._product = product
        self._hangs = False
        self._gpus: dict[str, Gpu] = {}
        self._device: Backend | None = None

    def run(self, hosts: Mapping[int, str], address: str | None) -> None:
        """Run all steps.

        Args:
            hosts: of the ranks that joined.
            address: for the rendezvous of the process groups; None: ranks are missing, or there is one rank.
        """
        report, plan, world = self._report, self._plan, self._launch.world_size
        if world < plan.parallel.world_size:
            report.notes.append(
                f"{world} of the job's {plan.parallel.world_size} ranks were checked: start the check with srun or "
                "torchrun on all nodes"
            )
        self._step(GPU_STATE, self._read_gpus)
        self._device = local = self._step(DEVICE, self._open_device)
        if local is not None:
            seconds = plan.speed_seconds
            self._speed(MATRIX_PRODUCT, lambda: matrix_speed(local, seconds=seconds, product=self._product))
            self._speed(MEMORY_COPY, lambda: copy_speed(local, seconds=seconds / 2))
            if local.device.type != "cpu":
                self._speed(HOST_COPY, lambda: host_copy_speed(local, seconds=seconds / 2))
        if self._launch.local_rank == 0 and plan.save:
            self._step(STORAGE, self._probe_storage, limit=3 * plan.write_seconds + 10)
        if address is not None:
            self._measure_links(hosts, address)
        elif address is None and world > 1:
            report.notes.append("links were not measured: ranks are missing")
        report.step, report.done = "", True
        self._send()

    def _step(self, name: str, call: Callable[[], Any], *, limit: float = float("inf")) -> Any:
        """Return the result of a step; None: it failed, which the report records.

        Nothing runs after a step that hangs. A step for which too little of the check's time was left is unmeasured.

        Args:
            name: of the step.
            call: the step.
            limit: seconds, beside those of the whole check.
        """
        if self._hangs:
            return None
        self._report.step = name
        self._send()
        seconds = max(0.1, min(limit, self._deadline - time.monotonic()))
        try:
            return run_interruptibly(lambda: self._on_device(call), seconds=seconds)
        except TimeoutError:
            self._hangs = True
            if seconds < min(limit, self._plan.step_seconds):
                self._report.unmeasured = name
            else:
                self._report.failures[name] = f"no end within {seconds:.0f} s"
        except MegatronLiteError as error:
            self._report.failures[name] = error.description
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            self._report.failures[name] = getattr(error, "strerror", None) or first_line(error)
        return None

    def _on_device(self, call: Callable[[], Any]) -> Any:
        """Return the result of `call`, made in a new thread."""
        if self._device is not None:
            # Else pinned memory would belong to the first GPU, for which every rank would open a context.
            self._device.use_in_thread()
        return call()

    def _speed(self, name: str, measure: Callable[[], float]) -> None:
        if (speed := self._step(name, measure)) is not None:
            self._report.speeds[name] = speed

    def _read_gpus(self) -> None:
        gpus = None if self._plan.runtime.device == "cpu" else query_gpus()
        self._gpus = gpus or {}
        if gpus:
            self._report.versions["driver"] = next(iter(gpus.values())).driver
        if self._launch.local_rank == 0:
            self._report.node = node_facts(None if gpus is None else len(gpus))

    def _open_device(self) -> Backend:
        launch = replace(self._launch, rank=0, world_size=1)
        backend = select_backend(self._plan.runtime, ParallelConfig(), launch)
        report = self._report
        if backend.device.type == "cpu" and self._gpus:
            raise RuntimeError(f"nvidia-smi lists {len(self._gpus)} GPUs, and torch {torch.__version__} finds none")
        report.device, report.uuid = backend.device_name(), backend.device_uuid()
        report.peak_flops = backend.peak_flops(torch.bfloat16)
        report.versions |= backend.library_versions()
        report.gpu = find_gpu(self._gpus, report.uuid)
        return backend

    def _probe_storage(self) -> None:
        plan = self._plan
        try:
            storage = probe_storage(Path(plan.save), size=plan.written_bytes, seconds=plan.write_seconds)
        except OSError as error:
            raise RuntimeError(f"{error.strerror or error} (--save {plan.save})") from error
        self._report.storage = storage

    def _measure_links(self, hosts: Mapping[int, str], address: str) -> None:
        """Measure each axis of the mesh, and the links between neighbouring hosts."""
        plan, report = self._plan, self._report
        sizes = plan.parallel
        backend: Backend | None = self._step(GROUPS, lambda: self._connect(sizes, address))
        if backend is None:
            return
        mesh = self._step(GROUPS, lambda: build_mesh(backend, self._with_limits(sizes)))
        cpu = backend.device.type == "cpu"
        bucket = sizes.bucket_megabytes * 2**20
        for axis, group in mesh.axes.items() if mesh is not None else ():
            size = bucket if axis == "dp" else plan.activation_bytes
            if group.size > 1:
                message = min(size, CPU_MESSAGE) if cpu else size
                links = self._step(f"{LINK_STEP}{axis}", partial(axis_links, backend, group, message))
                report.links += links or []
        pairs = host_pairs(hosts)
        if mesh is not None and pairs:
            size = CPU_MESSAGE if cpu else plan.activation_bytes
            links = self._step(f"{LINK_STEP}hosts", partial(pair_links, backend, mesh.world, pairs, size, "hosts"))
            report.links += links or []
        self._step(GROUPS, backend.shutdown)

    def _with_limits(self, sizes: ParallelConfig) -> ParallelConfig:
        minutes = max(1.0, self._deadline - time.monotonic()) / 60
        return replace(
            sizes,
            world_size=self._launch.world_size,
            rendezvous_timeout_minutes=minutes,
            # NCCL ends the process after this time: the step's own limit comes first.
            distributed_timeout_minutes=3 * minutes,
        )

    def _connect(self, sizes: ParallelConfig, address: str) -> Backend:
        launch = replace(self._launch, init_method=address, job=f"{self._launch.job} node check groups")
        return select_backend(self._plan.runtime, self._with_limits(sizes), launch)
