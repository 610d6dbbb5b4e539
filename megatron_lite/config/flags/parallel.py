"""Flag entries: tensor, pipeline and data parallelism, DeepSpeed's equivalents."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.config.flags.flag import Flag
from megatron_lite.config.values import read_int


def _bucket_megabytes(words: Sequence[str]) -> int:
    """--ddp-bucket-size counts fp32 elements."""
    elements = read_int(words[0])
    if elements < 1:
        raise ValueError("a number of elements, 1 or more")
    return -(-4 * elements // 2**20)


PARALLEL = (
    Flag(
        "--world-size",
        "parallel.world_size",
        "Ranks of the job, where no launcher says it (explain, --dry-run).",
        most=10**7,
    ),
    Flag(
        "--tensor-model-parallel-size",
        "parallel.tp",
        "Ranks that share each layer.",
        aliases=("--model-parallel-size",),
    ),
    Flag("--pipeline-model-parallel-size", "parallel.pp", "Pipeline stages."),
    Flag(
        "--pipe-parallel-size",
        "parallel.pp",
        "The same, as Megatron 1.1 with DeepSpeed and GPT-NeoX spell it; 0 is 1.",
        read=lambda words: read_int(words[0]) or 1,
        metavar="N",
        example="4",
        means="--pipeline-model-parallel-size",
    ),
    Flag("--sequence-parallel", "parallel.sequence_parallel", "Split norms and dropout by sequence.", sets=True),
    Flag(
        "--use-distributed-optimizer",
        "parallel.distributed_optimizer",
        "Split the optimizer's state over the replicas (ZeRO-1).",
        sets=True,
    ),
    Flag(
        "--overlap-grad-reduce",
        "parallel.overlap_grad_reduce",
        "Reduce gradients while backward runs.",
        sets=True,
    ),
    Flag(
        "--no-overlap-grad-reduce",
        "parallel.overlap_grad_reduce",
        "Reduce gradients after backward.",
        sets=False,
    ),
    Flag(
        "--overlap-param-gather",
        "parallel.overlap_param_gather",
        "Gather parameters (ZeRO-1) while forward runs.",
        sets=True,
    ),
    Flag("--no-overlap-param-gather", "parallel.overlap_param_gather", "Gather them before forward.", sets=False),
    Flag("--bucket-megabytes", "parallel.bucket_megabytes", "Size of a gradient bucket (fp32)."),
    Flag(
        "--ddp-bucket-size",
        "parallel.bucket_megabytes",
        "The same in gradients instead of megabytes.",
        words="some",
        read=_bucket_megabytes,
        metavar="GRADIENTS",
        example="40_000_000",
        means="--bucket-megabytes",
    ),
    Flag(
        "--distributed-timeout-minutes",
        "parallel.distributed_timeout_minutes",
        "Longest wait of a collective.",
        most=10**7,
    ),
    Flag(
        "--rendezvous-timeout-minutes",
        "parallel.rendezvous_timeout_minutes",
        "Longest wait for all ranks at the start.",
        most=10**7,
    ),
)

PIPELINE = (
    Flag("--pipeline-schedule", "parallel.pipeline_schedule", "The order of a stage's forwards and backwards."),
    Flag(
        "--num-layers-per-virtual-pipeline-stage",
        "parallel.num_layers_per_virtual_stage",
        "Layers of a model chunk under the interleaved schedule (0: one chunk a rank).",
    ),
    Flag(
        "--num-virtual-stages-per-pipeline-rank",
        "command.virtual_stages",
        "The same as a number of chunks a rank.",
        least=1,
        most=10_000,
    ),
    Flag(
        "--pp-partition-method",
        "parallel.partition_method",
        "How layers are dealt out to stages: balanced by work (head counted), uniform, parameters, or a count of "
        "the layers that match, as type:transformer|embedding.",
        metavar="METHOD",
    ),
    Flag(
        "--decoder-first-pipeline-num-layers",
        "parallel.first_stage_layers",
        "Layers of the first stage (0: by --pp-partition-method).",
    ),
    Flag(
        "--decoder-last-pipeline-num-layers",
        "parallel.last_stage_layers",
        "Layers of the last stage (0: by --pp-partition-method).",
    ),
)

DEEPSPEED = (
    Flag(
        "--deepspeed",
        "command.deepspeed",
        "Take DeepSpeed's meaning of the flags and its JSON; the native engine runs the job all the same.",
        sets=True,
    ),
    Flag(
        "--deepspeed-config",
        "command.deepspeed_config",
        "DeepSpeed's JSON: precision, loss scale, clipping, ZeRO stage and curriculum are taken from it.",
        metavar="FILE",
    ),
    Flag(
        "--zero-stage",
        "command.zero_stage",
        "1 is --use-distributed-optimizer, 0 is without; 2 and 3 are refused.",
    ),
)
