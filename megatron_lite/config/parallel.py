"""Parallelism config: TP, PP and DP sizes, pipeline schedule, gradient buckets, timeouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PipelineKind = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh's axes. The data-parallel size is what is left of the world."""

    world_size: int = 1
    """Ranks of the job, from the launcher's environment or --world-size."""
    tp: int = 1
    pp: int = 1
    num_layers_per_virtual_stage: int = 0
    """Layers of one model chunk under the interleaved schedule; 0: one chunk a rank."""
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    """ZeRO-1: optimizer state and main parameters are split over the data-parallel ranks."""
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    bucket_megabytes: int = 160
    """Size of a gradient bucket (fp32), the unit in which gradients are reduced during backward."""
    pipeline_schedule: PipelineKind = "1f1b"
    partition_method: str = "balanced"
    """balanced (counts embedding and head) | uniform | DeepSpeed's type:regex, as in type:transformer|embedding."""
    first_stage_layers: int = 0
    """Layers of the first stage (--decoder-first-pipeline-num-layers); 0: by partition_method."""
    last_stage_layers: int = 0
    distributed_timeout_minutes: float = 10.0
    rendezvous_timeout_minutes: float = 10.0

    @property
    def dp(self) -> int:
        """Data-parallel replicas. A world that tp * pp does not divide is refused by config/rules.py."""
        return max(1, self.world_size // (self.tp * self.pp))
