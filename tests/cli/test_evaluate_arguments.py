"""Arguments of `evaluate`: flags without an effect on the given inputs."""

from __future__ import annotations

import pytest

from megatron_lite.cli import evaluate
from megatron_lite.cli.evaluate_arguments import evaluate_parser, flags_without_effect

GIVEN = ("--load", "run")


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (("--lambada", "f", "--stride", "8"), {"--stride": ["--lambada"]}),
        (("--lambada", "f", "--text", "t", "--tasks", "x", "--stride", "8"), {"--stride": ["--lambada", "--tasks"]}),
        (("--data-path", "d", "--prepend-bos", "--limit", "3"), {"--prepend-bos": ["--data-path"]}),
        (("--text", "t", "--limit", "3", "--num-fewshot", "0"), {"--limit": ["--text"], "--num-fewshot": ["--text"]}),
        (("--text", "t", "--include-path", "p"), {"--include-path": ["--text"]}),
        (("--text", "t", "--documents", "d", "--stride", "8", "--prepend-bos"), {}),
        (("--tasks", "x", "--num-fewshot", "0", "--include-path", "p", "--limit", "3", "--prepend-bos"), {}),
    ],
)
def test_flags_without_effect(args, found):
    assert flags_without_effect(evaluate_parser().parse_args([*GIVEN, *args])) == found


def test_context_parallelism_of_training_is_refused(capsys):
    with pytest.raises(SystemExit):
        evaluate_parser().parse_args([*GIVEN, "--context-parallel-size", "2"])
    assert "only training has context parallelism; the checkpoint can be read without it" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "kind"), [("gpu", "cuda"), ("rocm", "cuda"), ("XPU", "xpu"), ("cpu", "cpu")])
def test_the_spellings_of_devices_are_those_of_training(word, kind):
    assert evaluate_parser().parse_args([*GIVEN, "--device", word]).device == kind


@pytest.mark.parametrize(
    ("word", "message"),
    [("mps", "only training runs on mps"), ("tpu", "only training runs on xla"), ("gpus", "unknown device 'gpus'")],
)
def test_other_devices_are_refused(capsys, word, message):
    with pytest.raises(SystemExit):
        evaluate_parser().parse_args([*GIVEN, "--device", word])
    assert message in capsys.readouterr().err


def test_a_flag_without_any_effect_is_refused(capsys):
    with pytest.raises(SystemExit):
        evaluate.run([*GIVEN, "--lambada", "f", "--stride", "8"])
    assert "--stride has no effect on --lambada: remove it" in capsys.readouterr().err
