"""Tests of the planner's activation memory against rehearsals, which count live meta tensors."""

import math

import pytest

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.layout import rank_of
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.planner.memory import rank_memory
from megatron_lite.rehearsal.dry_run import rehearse_ranks

pytestmark = pytest.mark.slow

SIZES = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64"
BATCH = "--micro-batch-size 2 --train-iters 10 --lr 1e-3 --make-vocab-size-divisible-by 8"
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
LLAMA = f"--position-embedding-type rotary --swiglu --normalization RMSNorm --disable-bias-linear {NO_DROPOUT}"
LLAMA += " --untie-embeddings-and-output-weights"
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
CP = "--context-parallel-size"
LAYOUTS = (
    "",
    "--bf16",
    f"--bf16 {NO_DROPOUT} --micro-batch-size 1",
    f"--bf16 {LLAMA}",
    f"--bf16 {LLAMA} --group-query-attention --num-query-groups 2 --qk-layernorm",
    f"{LLAMA} --group-query-attention --num-query-groups 2 --rotary-percent 0.5",
    f"--bf16 {TP} 2",
    f"--fp16 {TP} 2 --sequence-parallel",
    f"{TP} 4 --sequence-parallel",
    f"--bf16 {TP} 2 --no-gradient-accumulation-fusion",
    "--bf16 --recompute-granularity full",
    f"--recompute-granularity full --recompute-num-layers 2 {TP} 2",
    "--bf16 --recompute-granularity full --recompute-method block --recompute-num-layers 2",
    f"--bf16 {LLAMA} --recompute-granularity selective {TP} 2 --sequence-parallel",
    f"--bf16 {PP} 2",
    f"--bf16 {PP} 2 --pipeline-schedule gpipe",
    f"--bf16 {PP} 2 --num-layers-per-virtual-pipeline-stage 1",
    f"--bf16 {PP} 4 --recompute-granularity full",
    f"--bf16 {PP} 4 --pipeline-schedule zb-h1",
    f"--bf16 {PP} 2 --pipeline-schedule zb-v",
    f"{PP} 2 --pipeline-schedule zb-h1 {TP} 2 --sequence-parallel",
    f"--bf16 {PP} 2 --pipeline-schedule zb-v {TP} 2 --sequence-parallel {LLAMA}",
    "--bf16 --position-embedding-type alibi --embed-layernorm",
    "--bf16 --fp32-residual-connection",
    "--bf16 --squared-relu --apply-layernorm-1p",
    "--bf16 --activation geglu --parallel-residual",
    "--bf16 --activation reglu --apply-residual-connection-post-layernorm",
    f"{CP} 2 --bf16 {NO_DROPOUT}",
    f"{CP} 4 --bf16 {LLAMA} --group-query-attention --num-query-groups 2",
    f"{CP} 4 --cp-comm-type all_gather --bf16 {NO_DROPOUT} {TP} 2 --sequence-parallel",
    f"{CP} 2 --bf16 {NO_DROPOUT} --recompute-granularity selective {PP} 2",
    f"--share-layers all --embedding-size 16 {PP} 2",
    f"--bf16 --reset-attention-mask {NO_DROPOUT}",
)


def run_config(arguments):
    words = arguments.split()
    sizes = [int(words[words.index(flag) + 1]) if flag in words else 1 for flag in (TP, CP, PP)]
    given = BATCH.split()
    if "--micro-batch-size" in words:
        given = given[2:]
    batch = ["--global-batch-size", "8" if PP in words else "4"]
    arguments = [*SIZES.split(), *given, *batch, *words]
    return with_vocabulary(parse_run(arguments, world_size=math.prod(sizes)).config, 127)


@pytest.mark.parametrize("arguments", LAYOUTS)
def test_the_working_memory_is_that_of_a_rehearsal(arguments):
    config = run_config(arguments)
    memory = rank_memory(config)
    ranks = [rank_of({"tp": 0, "cp": 0, "dp": 0, "pp": rank.pp_rank}, config.parallel) for rank in memory]
    reports = list(rehearse_ranks(config, dict.fromkeys(ranks, True)))
    for rank, report in zip(memory, reports, strict=True):
        assert not report.error
        counted = max(record.working_bytes for record in report.iterations if record is not None)
        assert rank.working == pytest.approx(counted, rel=0.05), (rank.pp_rank, rank)
