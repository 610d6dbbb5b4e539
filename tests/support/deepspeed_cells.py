"""Cells of the layout matrix on the DeepSpeed engine."""

from dataclasses import dataclass, replace

from support.layout_matrix import Cell

from megatron_lite.config.deepspeed import DeepSpeedConfig, write_settings


@dataclass(frozen=True)
class ZeroCell(Cell):
    """A layout with a ZeRO stage and further entries of zero_optimization, as (name, value) pairs."""

    stage: int = 0
    zero: tuple = ()

    def config(self):
        config = super().config()
        aio = {"block_size": 4096}  # smaller tensors stay in memory
        settings = write_settings({"zero_optimization": {"stage": self.stage, **dict(self.zero)}, "aio": aio})
        return replace(
            config,
            runtime=replace(config.runtime, engine="deepspeed"),
            deepspeed=DeepSpeedConfig(settings=settings),
        )

    def __str__(self):
        return "-".join([super().__str__(), f"stage{self.stage}", *(name for name, _ in self.zero)])


OFFLOAD = (("offload_optimizer", {"device": "cpu"}),)
OFFLOAD_ALL = (*OFFLOAD, ("offload_param", {"device": "cpu"}))


def nvme(folder, **optimizer):
    """Return the entries that offload optimizer state and all parameters to swap files in a folder.

    Args:
        folder: is created.
        optimizer: further entries of offload_optimizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = {"device": "nvme", "nvme_path": str(folder)}
    return (
        ("offload_optimizer", {**place, **optimizer}),
        ("offload_param", {**place, "max_in_cpu": 0, "buffer_count": 8}),
    )
