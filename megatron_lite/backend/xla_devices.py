"""XLA devices of this host, counted without torch_xla, so that flags can be checked before it is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

TWO_CORES = ("v2", "v3")
"""Generations of TPUs whose chips are two devices."""


def count_xla_devices(environment: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> int | None:
    """Return the number of XLA devices of this host; None: unknown.

    Args:
        environment: variables to read; None: the process's own.
        devices: folder of device files: accelN for each TPU chip (v2 to v4), vfio/N (v5 and later).
    """
    variables = os.environ if environment is None else environment
    if variables.get("PJRT_DEVICE") == "CPU":
        text = variables.get("CPU_NUM_DEVICES", "1")
        return int(text) if text.isdigit() else None
    chips = len(list(devices.glob("accel[0-9]*"))) or len(list(devices.glob("vfio/[0-9]*")))
    return chips * (2 if variables.get("TPU_ACCELERATOR_TYPE", "").startswith(TWO_CORES) else 1) or None
