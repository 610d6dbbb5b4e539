"""Run metadata: parameters, devices, hosts, command line, versions and start-up time, recorded at the start."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_lite import __version__
from megatron_lite.backend.base import Backend
from megatron_lite.backend.environment import host_name
from megatron_lite.backend.kernels import Kernels
from megatron_lite.config.counts import parameter_count
from megatron_lite.config.run import RunConfig
from megatron_lite.metrics.report import RunFacts
from megatron_lite.model.gpt import DTYPES
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.runs.code_version import PACKAGE, git_revision
from megatron_lite.schedules.length import last_iteration
from megatron_lite.schedules.progress import Progress


@dataclass(frozen=True)
class Origin:
    """Origin of a start, for the records.

    Attributes:
        command: command line of the job.
        began: time.monotonic() when the job began, or rolled back.
        after_rollback: whether the job has rolled itself back.
    """

    command: Sequence[str] = ()
    began: float = field(default_factory=time.monotonic)
    after_rollback: bool = False


def run_facts(config: RunConfig, mesh: Mesh, progress: Progress, origin: Origin, kernels: Kernels) -> RunFacts:
    """Return the facts of a run before its first iteration; a collective call."""
    backend, world = mesh.backend, mesh.world
    return RunFacts(
        parameters=parameter_count(config.model),
        train_iterations=last_iteration(config),
        start_iteration=progress.iteration,
        validation_due=bool(progress.validation_due),
        world_size=config.parallel.world_size,
        data_parallel=config.parallel.dp,
        device=backend.device_name(),
        peak_flops=peak_flops(config, backend),
        dtype=config.precision.dtype,
        hosts=world.all_gather_object(backend.launch.host or host_name()),
        command=[str(word) for word in origin.command],
        environment=_environment(kernels, backend) if world.rank == world.size - 1 else {},
        startup_seconds=time.monotonic() - origin.began,
        after_rollback=origin.after_rollback,
    )


def peak_flops(config: RunConfig, backend: Backend) -> float | None:
    """Return the peak FLOP/s of a device in the dtype of the run; None: unknown."""
    return backend.peak_flops(DTYPES[config.precision.dtype])


def _environment(kernels: Kernels, backend: Backend) -> dict[str, str]:
    """Return the versions of what this rank runs, for the reporting rank: git is a process of its own."""
    revision = git_revision(PACKAGE)
    versions = {
        "megatron_lite": f"{__version__} at git revision {revision}" if revision else __version__,
        "Python": platform.python_version(),
        **backend.library_versions(),
        "system": platform.platform(),
        "processors": f"{os.cpu_count()} ({platform.machine()})",
        **{f"kernel of {function}": kernel for function, kernel in kernels.names.items()},
    }
    return {name: text for name, text in versions.items() if text}
