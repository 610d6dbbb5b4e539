"""Tests of the warnings of a plan: each for a run that deserves it, and none for a sound run."""

import pytest
from support.job_commands import SMALL

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.planner.advice import advise
from megatron_lite.planner.hardware import hardware
from megatron_lite.planner.job import Assumptions, plan_job

GPT = (
    "--num-layers 16 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 "
    "--micro-batch-size 2 --global-batch-size 512 --train-iters 100000 --lr 1e-4 --bf16 --use-distributed-optimizer "
    "--save run --save-interval 500 --keep-last 3 --async-save"
)


def warnings_of(more="", world=32, gpu="a100", vocabulary=50257, argv=GPT, assumptions=None, **machine):
    config = with_vocabulary(parse_run([*argv.split(), *more.split()], world_size=world).config, vocabulary)
    found = hardware(gpu, **machine)
    return [str(advice) for advice in advise(config, found, plan_job(config, found, assumptions or Assumptions()))]


def test_a_sound_run_has_no_warning():
    assert warnings_of() == []


@pytest.mark.parametrize(
    ("more", "options", "parts"),
    [
        ("", {"gpu": "v100"}, ("v100-32gb has no bf16 matrix units", "Use --fp16")),
        ("--fp8-format hybrid", {}, ("a100-80gb has no fp8 matrix units", "Remove --fp8-format")),
        (
            "",
            {"argv": GPT.replace("--bf16", "--fp32")},
            ("Products run in fp32, at 19.5 instead of 312 TFLOP/s", "Use --bf16, or --allow-tf32"),
        ),
        (
            "--tensor-model-parallel-size 8 --sequence-parallel",
            {"per_node": 4},
            ("The 8 tensor-parallel ranks do not fit into nodes of 4", "Use --tensor-model-parallel-size 4 or less"),
        ),
        (
            "--context-parallel-size 4 --tensor-model-parallel-size 4 --sequence-parallel --attention-dropout 0",
            {},
            ("Context parallelism crosses nodes: 4 x 4 ranks", "smaller --context-parallel-size"),
        ),
        (
            "--pipeline-model-parallel-size 8 --global-batch-size 32",
            {},
            ("4 micro-batches a replica are fewer for 8 stages (1f1b)", "--pipeline-schedule zb-h1"),
        ),
        (
            "--pipeline-model-parallel-size 4 --pp-partition-method uniform",
            {},
            ("The last stage computes the loss beside as many layers", "Remove --pp-partition-method"),
        ),
        (
            "--rampup-batch-size 2 510 40_000_000",
            {},
            ("the smallest batch is 2 samples for 32 replicas", "Start the ramp-up on fewer nodes"),
        ),
        (
            "--hidden-size 2000",
            {},
            (
                "--hidden-size 2000 on a rank is no multiple of 64",
                "Use multiples of 64",
            ),
        ),
        ("--hidden-size 1984 --num-attention-heads 16 --kv-channels 100", {}, ("heads have 100 channels", "64 or 128")),
        (
            "--pad-vocab-size-to 50260",
            {},
            ("The vocabulary of 50,260 rows gives a rank 50,260, no multiple of 64", "--pad-vocab-size-to 50304"),
        ),
        (
            "--pad-vocab-size-to 64000",
            {},
            ("The vocabulary of 50,257 is padded to 64,000: 21% of the output layer's", "--pad-vocab-size-to 50304"),
        ),
        (
            "--tensor-model-parallel-size 2",
            {},
            ("are repeated on the 2 tensor-parallel ranks", "Add --sequence-parallel"),
        ),
        (
            "--exit-duration-in-mins 10 --no-save-on-exit --save-interval 5000",
            {},
            ("A job ends before its first save", "remove --no-save-on-exit"),
        ),
        (
            "--save-interval 90000",
            {"assumptions": Assumptions(node_hours=100)},
            ("of training apart; with a failure every", "Use --save-interval "),
        ),
        (
            "--save-interval 5",
            {"assumptions": Assumptions(write_rate=2e8)},
            ("Writing a checkpoint takes 00:01:0", "longer than the 5.81 s", "Use a larger --save-interval"),
        ),
        (
            "--engine deepspeed",
            {},
            ("--engine deepspeed, and its time is that of the native engine", "Calibrate with --calibrate"),
        ),
        ("--keep-last 0", {}, ("All 200 checkpoints are kept: ", "Add --keep-last N")),
    ],
)
def test_warnings(more, options, parts):
    found = warnings_of(more, **options)
    assert any(all(part in warning for part in parts) for warning in found), found


def test_saves_that_block():
    blocking = GPT.replace(" --async-save", "").replace("--save-interval 500", "--save-interval 20")
    found = warnings_of(argv=blocking, assumptions=Assumptions(write_rate=5e8))
    assert any("blocks training for" in warning and "Add --async-save" in warning for warning in found), found


def test_a_replicated_optimizer():
    found = warnings_of(argv=GPT.replace("--use-distributed-optimizer ", ""))
    assert found == ["Each of the 32 replicas holds and updates the whole optimizer state. Add "
                     "--use-distributed-optimizer (ZeRO-1)"]  # fmt: skip


def test_without_checkpoints():
    assert "The run writes no checkpoint: a failure loses everything. Add --save FOLDER --save-interval N" in (
        warnings_of(argv=" ".join(SMALL), world=1, vocabulary=1000)
    )
