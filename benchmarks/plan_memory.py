"""Planned memory beside that of a rehearsal at real sizes, and the time of a search over layouts.

A rehearsal runs one iteration of a rank on meta tensors and counts live memory; the planner computes it from the
command line. Both are without a GPU. Times are processor times.
"""

import shlex
import time

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.layout import rank_of
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.planner.hardware import hardware
from megatron_lite.planner.memory import rank_memory
from megatron_lite.planner.search import search
from megatron_lite.rehearsal.dry_run import rehearse_ranks

GPT = "--num-layers {} --hidden-size {} --num-attention-heads {} --seq-length 2048 --max-position-embeddings 2048"
GPT3, GPT13 = GPT.format(96, 12288, 96), GPT.format(40, 5120, 40)
LLAMA = "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 14336 --group-query-attention"
LLAMA += " --num-query-groups 8 --seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rotary"
LLAMA += " --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights"
LLAMA += " --hidden-dropout 0 --attention-dropout 0"
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
RUN = "--bf16 --use-distributed-optimizer --global-batch-size 256 --train-iters 1 --lr 1e-4"
CASES = (
    ("GPT 13B, tp 2 pp 4, full recomputation", f"{GPT13} {TP} 2 {PP} 4 --recompute-granularity full", 64),
    ("GPT 13B, tp 4 pp 2, interleaved", f"{GPT13} {TP} 4 {PP} 2 --num-layers-per-virtual-pipeline-stage 5", 64),
    ("GPT 13B, tp 2 pp 4, zb-h1", f"{GPT13} {TP} 2 {PP} 4 --sequence-parallel --pipeline-schedule zb-h1", 64),
    ("GPT 175B, tp 8 pp 16", f"{GPT3} {TP} 8 {PP} 16 --sequence-parallel", 1024),
    ("GPT 175B, tp 8 pp 16, zb-v", f"{GPT3} {TP} 8 {PP} 16 --sequence-parallel --pipeline-schedule zb-v", 1024),
    ("Llama 8B, tp 2", f"{LLAMA} {TP} 2 --sequence-parallel", 16),
    ("Llama 8B, tp 1, selective", f"{LLAMA} --recompute-granularity selective", 16),
)


def main() -> None:
    """Print the rows of docs/benchmarks.md."""
    for name, arguments, world in CASES:
        words = shlex.split(f"{arguments} {RUN} --micro-batch-size 1")
        config = with_vocabulary(parse_run(words, world_size=world).config, 50257)
        started = time.process_time()
        memory = rank_memory(config)
        planned = time.process_time() - started
        first = rank_of({"tp": 0, "cp": 0, "dp": 0, "pp": 0}, config.parallel)
        (report,) = rehearse_ranks(config, {first: True})
        assert not report.error, report.error
        counted = max(record.working_bytes for record in report.iterations if record is not None)
        state = sum(report.buffers.values())
        assert state == memory[0].model_state
        print(
            f"| {name} | {state / 2**30:.2f} | {counted / 2**30:.2f} | {memory[0].working / 2**30:.2f} | "
            f"{memory[0].working / counted - 1:+.1%} | {1000 * planned:.0f} ms |",
            flush=True,
        )
    machine = hardware("a100-80gb", per_node=0, network_gbit=0.0)
    config = parse_run(shlex.split(f"{GPT3} {RUN} --micro-batch-size 1"), world_size=1024).config
    started = time.process_time()
    found = search(config, 50257, machine)
    seconds = time.process_time() - started
    print(f"search: {found.tried} layouts, {seconds:.1f} s, {1000 * seconds / found.tried:.2f} s for 1,000")


if __name__ == "__main__":
    main()
