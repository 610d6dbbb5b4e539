from dataclasses import replace

import pytest
from support.job_commands import BIG_RAMP

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.names import claimed_sizes, name_warnings


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("runs/104B-wide/checkpoints", [("104B", 104e9)]),
        ("tr3-1B3-baseline", [("1B3", 1.3e9)]),
        ("gpt_2.7B", [("2.7B", 2.7e9)]),
        ("a/350M/b", [("350M", 350e6)]),
        ("13B/run-13B", [("13B", 13e9), ("13B", 13e9)]),
        ("250k-vocab/5b/x13Bytes/B13/v2.13B5", []),
    ],
)
def test_sizes_in_names(text, sizes):
    assert claimed_sizes(text) == sizes


def test_a_name_that_contradicts_the_parameter_count_is_warned_of():
    argv = [*BIG_RAMP, "--num-layers", "64", "--hidden-size", "8640", "--ffn-hidden-size", "34560"]
    argv += ["--num-attention-heads", "80", "--save", "runs/104B", "--load", "runs/104B"]
    (warning,) = parse_run(argv, world_size=512).warnings
    assert "104B" in warning
    assert "58B" in warning


def test_a_name_that_matches_the_parameter_count_has_no_warning():
    config = parse_run(BIG_RAMP, world_size=512).config
    assert name_warnings(config) == []
    wrong = replace(config, checkpoint=replace(config.checkpoint, save="run/1B3"))
    assert len(name_warnings(wrong)) == 1


def test_names_that_count_without_the_embedding_are_fine():
    """A 560M model of which 257M are embedding was called 350M when it trained."""
    argv = "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 --micro-batch-size 1 "
    argv += "--train-iters 5 --lr 1 --pad-vocab-size-to 250880 --save ml-350M --save-interval 5"
    assert parse_run(argv.split()).warnings == ()
