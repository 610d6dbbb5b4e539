"""Runtime config: device, seed, threads, determinism, compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What does not change the model or its data, only how they are run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 1234
    compile: bool = False
    """torch.compile each stage."""
    deterministic: bool = False
    """Refuse kernels that do not give the same bits twice."""
    num_threads: int = 0
    """CPU threads of one rank; 0: the machine's cores shared among its ranks."""
    dry_run: bool = False
    """Parse, validate and explain, then exit."""
