"""DeepSpeed engine settings: JSON entries passed to DeepSpeed unchanged, and features that the engine refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lite.config.flag import Flag, option


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """Settings of the DeepSpeed engine (--engine deepspeed)."""

    settings: str = option(
        "",
        Flag(
            "--deepspeed-settings",
            "Settings of the DeepSpeed engine as JSON text, instead of --deepspeed-config, which they are otherwise "
            "taken from.",
            metavar="JSON",
        ),
        derived=True,
    )

    @property
    def entries(self) -> dict[str, Any]:
        """Return the entries of DeepSpeed's JSON that do not follow from other flags; empty: another engine."""
        entries: dict[str, Any] = json.loads(self.settings) if self.settings else {}
        return entries

    @property
    def zero(self) -> dict[str, Any]:
        """Return the section zero_optimization."""
        section: dict[str, Any] = self.entries.get("zero_optimization", {})
        return section

    @property
    def stage(self) -> int:
        """Return the ZeRO stage: 1 shards the optimizer's state, 2 the gradients, too, 3 also the parameters."""
        return int(self.zero.get("stage", 0))

    def offload_device(self, part: str) -> str:
        """Return the device that "optimizer" state or "param"eters are offloaded to: none, cpu or nvme."""
        section = self.zero.get(f"offload_{part}") or {}
        return str(section.get("device", "none"))

    @property
    def swaps(self) -> bool:
        """Return whether state is offloaded to swap files (device nvme)."""
        return "nvme" in (self.offload_device("optimizer"), self.offload_device("param"))


def write_settings(entries: Mapping[str, Any]) -> str:
    """Return entries as canonical JSON text."""
    return json.dumps(entries, sort_keys=True, separators=(",", ":"))
