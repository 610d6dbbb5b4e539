"""Profile config: iterations and ranks that PyTorch's profiler records, contents of traces, memory snapshots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lite.config.flag import Flag, Format, option
from megatron_lite.config.values import read_int
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig


def read_ranks(args: Sequence[str]) -> tuple[int, ...]:
    """Read "0 7" as ranks, sorted."""
    try:
        ranks = tuple(sorted({read_int(arg) for arg in " ".join(args).replace(",", " ").split()}))
    except ValueError:
        ranks = (-1,)
    if not ranks or ranks[0] < 0:
        raise ValueError("ranks, for example 0 7")
    return ranks


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Profiler window: the iterations after `after` up to `last`, on `ranks`."""

    trace: bool = option(
        False,
        Flag("--profile", "Trace some iterations with PyTorch's profiler, and print the time by kind.", sets=True),
    )
    after: int = option(10, Flag("--profile-step-start", "Profile the iterations after this one."))
    last: int = option(12, Flag("--profile-step-end", "Last iteration to profile.", least=1))
    ranks: tuple[int, ...] = option(
        (0,),
        Flag(
            "--profile-ranks",
            "Ranks to profile.",
            format=Format(
                metavar="RANK …", example="0 7", read=read_ranks, write=lambda ranks: [str(rank) for rank in ranks]
            ),
        ),
    )
    shapes: bool = option(
        False, Flag("--pytorch-profiler-collect-shapes", "Shapes of tensors in the trace.", sets=True)
    )
    stacks: bool = option(
        False, Flag("--pytorch-profiler-collect-callstack", "Python call stacks in the trace.", sets=True)
    )
    memory: bool = option(
        False,
        Flag(
            "--record-memory-history",
            "Write a snapshot of the GPU's memory with its history over the profiled iterations, for "
            "pytorch.org/memory_viz.",
            sets=True,
        ),
    )
    snapshot: str = option(
        "",
        Flag(
            "--memory-snapshot-path",
            "File of the memory snapshot (in the folder of the traces if not given); the rank is added to its name.",
            metavar="FILE",
        ),
    )

    @property
    def on(self) -> bool:
        """True if any iteration is recorded."""
        return self.trace or self.memory


def profiles_existing_ranks(config: RunConfig) -> Iterator[ConfigError]:
    """Check the profiled iterations and ranks."""
    profile, world = config.profile, config.parallel.world_size
    if not profile.on:
        return
    if profile.last <= profile.after:
        yield ConfigError(
            f"There is no iteration to profile: --profile-step-end {profile.last} is not above --profile-step-start "
            f"{profile.after}",
            rule="The iterations after the start up to the end are profiled",
            fix=f"Give --profile-step-end {profile.after + 2}",
        )
    if missing := [rank for rank in profile.ranks if rank >= world]:
        yield ConfigError(
            f"Cannot profile rank {missing[-1]} of a job with {world} ranks (--profile-ranks)",
            fix=f"Give ranks from 0 to {world - 1}",
        )


RULES = (profiles_existing_ranks,)
