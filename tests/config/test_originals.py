"""Published job scripts that break a rule of their own: the error, and not a guess, is the right answer to each."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from megatron_lite.config.arguments import parse_run, to_argv
from megatron_lite.errors import ConfigError

BASE = shlex.split(
    "--num-layers 96 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024 "
    "--micro-batch-size 1 --global-batch-size 512 --train-samples 1_000_000 --lr 1e-4 "
    "--vocab-file vocab.json --merge-file merges.txt --data-path corpus_text_document"
)

# What of each script breaks the rule, at the number of ranks that it starts.
BROKEN = {
    "Megatron-DeepSpeed/run_bf16.sh": (
        1,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        "The number of ranks must be a multiple of tensor x pipeline-parallel size",
    ),
    "Megatron-LM/examples/gpt3/train_gpt3_175b_distributed.sh": (
        8,
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16",
        "The number of ranks must be a multiple of tensor x pipeline-parallel size",
    ),
    "bigscience/experiments/gpt2-meg/meg_gpt2_perf_n4.slurm": (
        16,
        "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 8",
        "The number of ranks must be a multiple of tensor x pipeline-parallel size",
    ),
    "bigscience/train/tr11-176B-ml/smaller_models/tr11f-6B3-ml.slurm": (
        8,
        "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 4",
        "The number of ranks must be a multiple of tensor x pipeline-parallel size",
    ),
    "bigscience/train/tr11-176B-ml/tr11-176B-ml.slurm": (
        16,
        "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 12",
        "The number of ranks must be a multiple of tensor x pipeline-parallel size",
    ),
    "bigscience/train/tr8b-104B/tr8b-104B-cl.slurm and -a100-16n": (
        512,
        "--lr-decay-tokens --lr-decay-style cosine",
        "Cannot read --lr-decay-tokens with nothing after it: expected one value",
    ),
    "bigscience/train/tr14-mup (three scripts)": (
        16,
        "--lr checkpoints --min-lr --mup",
        "Cannot read --lr checkpoints: expected a number",
    ),
    "Megatron-LM/examples/mixtral/train_mixtral_8x7b_distributed.sh": (16, "--num-experts 8", "Mixture of experts"),
}


@pytest.mark.parametrize("script", BROKEN)
def test_a_script_that_breaks_a_rule_of_its_own(script):
    ranks, words, message = BROKEN[script]
    with pytest.raises(ConfigError, match=message):
        parse_run([*BASE, *words.split()], world_size=ranks)


ZERO_3 = {
    "stage": 3,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_prefetch_bucket_size": 60397977,
    "stage3_param_persitence_threshold": 81920,
    "reduce_bucket_size": 67108864,
    "contiguous_gradients": True,
}
IN_HOST_MEMORY = {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize("offload", [{}, {"offload_optimizer": IN_HOST_MEMORY, "offload_param": IN_HOST_MEMORY}])
def test_the_zero_3_scripts_run_on_deepspeed(offload, tmp_path, monkeypatch):
    """bigscience/experiments/gpt2-meg-ds-zero: with flags of Megatron 1.1 and a misspelt entry in the JSON."""
    monkeypatch.chdir(tmp_path)
    entries = {"train_micro_batch_size_per_gpu": 48, "gradient_accumulation_steps": 1, "steps_per_print": 10}
    entries |= {"zero_optimization": {**ZERO_3, **offload}, "gradient_clipping": 1.0, "wall_clock_breakdown": False}
    entries |= {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 10, "hysteresis": 2}}
    Path("zero_3.json").write_text(json.dumps({**entries, "zero_allow_untested_optimizer": False}))
    command = (
        "--model-parallel-size 4 --num-layers 64 --hidden-size 8192 --num-attention-heads 32 --seq-length 1024 "
        "--max-position-embeddings 1024 --batch-size 48 --train-iters 1000 --lr-decay-iters 800 --lr 1.5e-4 "
        "--lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 1e-2 --clip-grad 1.0 --warmup 0.01 --fp16 "
        "--vocab-file v.json --merge-file m.txt --data-path openwebtext --data-impl mmap --split 949,50,1 "
        "--distributed-backend nccl --deepspeed --deepspeed_config zero_3.json --zero-stage 3 "
        "--zero-reduce-bucket-size 50000000 --zero-allgather-bucket-size 5000000000 --zero-contigious-gradients "
        "--zero-reduce-scatter --checkpoint-activations --deepspeed-activation-checkpointing --checkpoint-num-layers 1 "
        "--partition-activations --checkpoint-in-cpu --synchronize-each-layer --contigious-checkpointing"
    )
    parsed = parse_run(command.split(), world_size=64)
    config, zero = parsed.config, parsed.config.deepspeed.zero
    assert config.runtime.engine == "deepspeed"
    assert (config.deepspeed.stage, config.batch.global_batch_size) == (3, 48 * 16)
    assert zero["stage3_param_persistence_threshold"] == 81920
    assert zero["stage3_max_live_parameters"] == 10**9 and isinstance(zero["stage3_max_live_parameters"], int)
    assert config.deepspeed.offload_device("param") == ("cpu" if offload else "none")
    assert any("stage3_param_persitence_threshold is read as" in note for note in parsed.notes)
    assert parse_run(to_argv(config), world_size=64).config == config


def test_the_base_command_is_valid():
    parse_run(BASE, world_size=512)
