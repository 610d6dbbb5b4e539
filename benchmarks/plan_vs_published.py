"""Published against planned: the planner's prediction beside published training speeds, as a Markdown table.

    python benchmarks/plan_vs_published.py

All rows use the same efficiencies (planner/hardware.py, Efficiency). docs/plan.md holds the printed table.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field

from megatron_lite.config.arguments import parse_run
from megatron_lite.planner.hardware import Hardware, hardware
from megatron_lite.planner.step_time import StepTime, step_time_of
from megatron_lite.schedules.batch_size import final_batch_size
from megatron_lite.tokenizer.vocabulary import fill_vocabulary

COMMON = "--train-iters 100 --lr 1e-4 --tokenizer-type NullTokenizer --mock-data"
MEGATRON = (
    f"{COMMON} --vocab-size 131071 --seq-length 4096 --max-position-embeddings 4096 --bf16 --position-embedding-type "
    "rope --untie-embeddings-and-output-weights --use-distributed-optimizer --attention-dropout 0 --hidden-dropout 0"
)
"""Megatron-LM's README: vocabulary of 131,072, sequences of 4,096. Depth, width, layout and batch are not published as
text; those below give the published numbers of parameters."""
BIGSCIENCE = f"{COMMON} --seq-length 2048 --max-position-embeddings 2048 --checkpoint-activations"
BLOOM = (
    f"{BIGSCIENCE} --num-layers 70 --hidden-size 14336 --num-attention-heads 112 --tensor-model-parallel-size 4 "
    "--pipeline-model-parallel-size 12 --micro-batch-size 2 --global-batch-size 2048 --bf16 --pad-vocab-size-to 250880 "
    "--vocab-size 250679 --position-embedding-type alibi --embed-layernorm --use-distributed-optimizer "
    "--pp-partition-method type:transformer|embedding --attention-backend unfused"
)
"""bigscience-workshop/bigscience, train/tr11-176B-ml; before FlashAttention."""


@dataclass(frozen=True)
class Row:
    """One published speed.

    Attributes:
        quantity: what was published: MFU, TFLOP/s or seconds.
        published: its value.
        machine: arguments of hardware().
    """

    name: str
    flags: str
    ranks: int
    quantity: str
    published: float
    machine: dict[str, object] = field(default_factory=dict)

    @property
    def hardware(self) -> Hardware:
        """The machine of the run."""
        return hardware(**self.machine)  # type: ignore[arg-type]

    def step(self) -> StepTime:
        """Return the predicted step."""
        parsed = parse_run(shlex.split(self.flags), world_size=self.ranks)
        config, _ = fill_vocabulary(parsed.config)
        batch = final_batch_size(config.batch, config.parallel.dp)
        return step_time_of(config, self.hardware, batch, config.batch.seq_length)

    def predicted(self) -> float:
        """Return the predicted value of the published quantity."""
        step = self.step()
        if self.quantity == "seconds a step":
            return step.total
        if self.quantity == "MFU, %":
            return 100.0 * step.model_flops_per_second / self.hardware.device.peak("bf16")
        return step.hardware_flops_per_second / 1e12


H100: dict[str, object] = {"name": "h100-80gb"}
JEAN_ZAY_A100: dict[str, object] = {"name": "a100-80gb", "network_gbit": 50}
"""8 A100 and 4 ports of 100 Gbit/s a node."""
JEAN_ZAY_V100: dict[str, object] = {"name": "v100-32gb", "per_node": 4, "network_gbit": 100}
"""4 V100 and 4 ports of 100 Gbit/s a node."""
ROWS = (
    Row(
        "Megatron-LM 1.7B, 64 H100",
        f"{MEGATRON} --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --micro-batch-size 2 "
        "--global-batch-size 256",
        64,
        "MFU, %",
        41.0,
        H100,
    ),
    Row(
        "Megatron-LM 7.1B, 64 H100",
        f"{MEGATRON} --num-layers 30 --hidden-size 4096 --num-attention-heads 32 --tensor-model-parallel-size 2 "
        "--sequence-parallel --micro-batch-size 2 --global-batch-size 256",
        64,
        "MFU, %",
        47.0,
        H100,
    ),
    Row(
        "Megatron-LM 462B, 6,144 H100",
        f"{MEGATRON} --num-layers 112 --hidden-size 18432 --num-attention-heads 144 --tensor-model-parallel-size 8 "
        "--sequence-parallel --pipeline-model-parallel-size 16 --num-layers-per-virtual-pipeline-stage 1 "
        "--micro-batch-size 1 --global-batch-size 1536",
        6144,
        "MFU, %",
        47.0,
        H100,
    ),
    Row("BLOOM (tr11-176B), 384 A100", BLOOM, 384, "TFLOP/s with recomputation", 150.0, JEAN_ZAY_A100),
    Row("BLOOM (tr11-176B), 384 A100", BLOOM, 384, "seconds a step", 105.0, JEAN_ZAY_A100),
    Row(
        "BigScience tr1-13B, 256 V100",
        f"{BIGSCIENCE} --num-layers 40 --hidden-size 5120 --num-attention-heads 32 --tensor-model-parallel-size 2 "
        "--pipeline-model-parallel-size 4 --micro-batch-size 1 --global-batch-size 1024 --fp16 --vocab-size 50256 "
        "--use-distributed-optimizer --attention-backend unfused",
        256,
        "TFLOP/s with recomputation",
        45.0,
        JEAN_ZAY_V100,
    ),
)


def table() -> str:
    """Return the table."""
    lines = ["| run | quantity | published | predicted | error |", "|---|---|---|---|---|"]
    for row in ROWS:
        found = row.predicted()
        lines.append(
            f"| {row.name} | {row.quantity} | {row.published:.0f} | {found:.1f} | {found / row.published - 1:+.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    sys.exit(0)
