"""Runtime config: device, seed, threads, determinism, compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_lite.config.flag import Flag, option
from megatron_lite.config.values import MAX_SEED

if TYPE_CHECKING:
    from megatron_lite.config.given import Given


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Settings of the machine, which change neither the model nor its data."""

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto",
        Flag("--device", "Kind of device; auto uses a GPU if there is one."),
        may_differ="the device in use is compared instead: auto and cuda may mean the same",
    )
    seed: int = option(1234, Flag("--seed", "Seed of weights, dropout and data order.", most=MAX_SEED))
    compile: bool = option(
        False, Flag("--compile", "torch.compile each stage; dropout breaks the compiled graph.", sets=True)
    )
    deterministic: bool = option(
        False, Flag("--deterministic-mode", "Refuse kernels that are not bit-for-bit reproducible.", sets=True)
    )
    num_threads: int = option(
        0,
        Flag(
            "--num-threads",
            "CPU threads of a rank (0: an equal share of the machine's cores); on a GPU PyTorch's own number.",
            most=4096,
        ),
        may_differ="nodes may have different numbers of cores",
    )
    check_nodes: bool = option(
        False,
        Flag(
            "--check-nodes",
            "Before training, check the nodes as `megatron-lite doctor --fast` does; bad ones are excluded and end the "
            "job.",
            sets=True,
        ),
    )
    dry_run: bool = option(False, Flag("--dry-run", "Check and explain the command, then exit.", sets=True))


def warn_of_compiled_dropout(given: Given) -> None:
    """Warn that dropout breaks the graph of --compile."""
    model = given.run.model
    rates = {"--attention-dropout 0": model.attention_dropout, "--hidden-dropout 0": model.hidden_dropout}
    dropped = [flag for flag, rate in rates.items() if rate > 0]
    if given.run.runtime.compile and dropped:
        given.warnings.append(
            "--compile gains less with dropout, whose random numbers break the compiled graph at each place: "
            f"{' and '.join(dropped)} would avoid it"
        )


RESOLVERS = (warn_of_compiled_dropout,)
