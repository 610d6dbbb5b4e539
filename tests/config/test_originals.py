"""Published job scripts that break a rule of their own: the error, and not a guess, is the right answer to each."""

from __future__ import annotations

import shlex

import pytest

from megatron_lite.config.arguments import parse_run
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
    "bigscience/experiments/gpt2-meg-ds-zero (two scripts)": (64, "--zero-stage 3", "ZeRO stage 3|--zero-stage 3"),
}


@pytest.mark.parametrize("script", BROKEN)
def test_a_script_that_breaks_a_rule_of_its_own(script):
    ranks, words, message = BROKEN[script]
    with pytest.raises(ConfigError, match=message):
        parse_run([*BASE, *words.split()], world_size=ranks)


def test_the_base_command_is_valid():
    parse_run(BASE, world_size=512)
