"""Every ConfigError of config/ is triggered here, and a sweep over the source shows that none was forgotten."""

import ast
import sys
from pathlib import Path

import pytest
from support.job_commands import SMALL, without
from support.wrong_arguments import FROM_FLAGS
from support.wrong_deepspeed_json import FROM_JSON

import megatron_lite.config
from megatron_lite.config import command_line, files, given, vocabulary
from megatron_lite.config.arguments import parse_run
from megatron_lite.config.files import missing_files
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.vocabulary import padded_vocab_size, with_vocabulary
from megatron_lite.config.xla import device_count_errors
from megatron_lite.errors import ConfigError, ConfigErrors

FOLDER = Path(megatron_lite.config.__file__).parent
ELSEWHERE = {"record.py", "launcher.py", "selection.py"}
"""Files whose errors have a test of their own."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("circle.txt").write_text("@circle.txt")
    Path("quote.txt").write_text("--save 'x")
    Path("latin.txt").write_bytes("--save\ncafé".encode("latin-1"))
    Path("paths.txt").write_text("a b\nc d\n")
    Path("ds.json").write_text("{}")


def words_of(extra):
    """A group's inner spaces are written _, so that the rest can be split at spaces."""
    parts = extra.split(" ")
    return [part.replace("_", " ") if part[:2] in ("a:", "b:") else part for part in parts]


def error_of(argv):
    with pytest.raises(ConfigError) as caught:
        parse_run(argv, world_size=4)
    return str(caught.value)


def json_error(text):
    Path("ds.json").write_text(text, encoding="utf-8")
    return error_of([*SMALL, "--fp16", "--clip-grad", "2", "--deepspeed", "--deepspeed_config", "ds.json"])


@pytest.mark.parametrize("extra", FROM_FLAGS)
def test_flags(extra):
    assert FROM_FLAGS[extra] in error_of([*SMALL, *words_of(extra)])


@pytest.mark.parametrize("text", FROM_JSON)
def test_deepspeed_json(text):
    assert FROM_JSON[text] in json_error(text)


def test_a_command_line_starts_with_a_flag():
    assert "The command line starts with 'train', which is no flag and follows none" in error_of(["train", *SMALL])


def test_missing_required_flags():
    message = error_of([])
    for flag in ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--micro-batch-size"):
        assert flag in message


def test_all_violations_are_reported_at_once():
    argv = [*SMALL, "--micro-batch-size", "3", "--lr", "0", "--unheard-of", "--num-experts", "4"]
    with pytest.raises(ConfigErrors) as caught:
        parse_run(argv)
    assert len(caught.value.errors) == 4
    for part in ("--micro-batch-size 3", "--lr 0", "--unheard-of", "--num-experts 4"):
        assert part in str(caught.value)


def test_an_unreadable_value_is_not_followed_by_errors_that_it_causes():
    assert "expected a whole number" in error_of(
        [*SMALL, "--num-layers", "many", "--pipeline-model-parallel-size", "x2"]
    )
    assert "out of range" not in error_of([*SMALL, "--num-layers", "many"])


def missing_file_errors():
    def missing(*extra):
        return [str(error) for error in missing_files(parse_run([*SMALL, *extra]).config)]

    Path("x.bin").touch()
    assert "No training data are given" in missing()[-1]
    (tokenizer, data) = missing("--data-path", "x")
    for usual in ("--tokenizer-type HuggingFaceTokenizer", "--vocab-file", "--merge-file", "--vocab-size N"):
        assert usual in tokenizer
    assert 'The dataset "x" (--data-path) does not exist' in data
    assert 'there is no "x.idx"' in data
    assert (
        "--data-path has the number 0.3 where the path of a dataset is expected"
        in missing("--data-path", "0.7", "x", "0.3")[-1]
    )
    assert "--vocab-file v.json does not exist" in missing("--vocab-file", "v.json")[0]
    assert "--merge-file" in missing("--vocab-file", "v.json")[1]
    model = missing("--mock-data", "--tokenizer-model", "x.model")
    assert "without --tokenizer-type. Add --tokenizer-type SentencePieceTokenizer" in model[0]
    hugging_face = missing("--mock-data", "--tokenizer-type", "PretrainedFromHF", "--tokenizer-model", "absent")
    assert "--tokenizer-model" in hugging_face[0]
    nameless = missing("--mock-data", "--tokenizer-type", "SentencePieceTokenizer")
    assert "--tokenizer-type SentencePieceTokenizer is given without --tokenizer-model" in nameless[0]
    null = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "9")
    assert missing(*null) == []
    assert "--load absent does not exist" in missing(*null, "--load", "absent", "--exit-on-missing-checkpoint")[0]
    parsed = parse_run([*SMALL, "--train-weighted-split-paths-path", "absent.txt"])
    assert "--train-weighted-split-paths-path absent.txt: No such file" in str(parsed.missing[0])
    parsed = parse_run([*SMALL, "--deepspeed", "--deepspeed_config", "absent.json"])
    assert "--deepspeed_config absent.json: No such file" in str(parsed.missing[0])


def test_missing_files_are_errors_that_name_the_flag():
    missing_file_errors()


def vocabulary_errors():
    with pytest.raises(ConfigError, match="--pad-vocab-size-to 64 is smaller than the tokenizer's vocabulary of 100"):
        padded_vocab_size(100, 128, 1, 64)
    with pytest.raises(ConfigError, match="Cannot split --pad-vocab-size-to 102 over 4"):
        padded_vocab_size(100, 128, 4, 102)
    with pytest.raises(ConfigError, match="--tokenizer-vocab-size 90 differs from the tokenizer's 100 tokens"):
        with_vocabulary(parse_run([*SMALL, "--tokenizer-vocab-size", "90"]).config, 100)


def test_vocabulary_mismatch_errors():
    vocabulary_errors()


def xla_device_errors():
    (error,) = device_count_errors(ParallelConfig(world_size=6), 8, 1, "CPU")
    assert "--world-size 6 is not the number of XLA devices: 8 (CPU)" in str(error)
    assert error.fix == "Give --world-size 8, or set CPU_NUM_DEVICES=6"
    (error,) = device_count_errors(ParallelConfig(world_size=8), 8, 3, "TPU")
    assert "Cannot divide 8 data-parallel replicas of 1 device (--tensor-model-parallel-size 1) evenly" in str(error)


def test_xla_device_errors():
    xla_device_errors()


def sites():
    """Lines of every ConfigError(...) and given.refuse(...) in config/, as (file, first line, last line)."""
    found = set()
    for path in FOLDER.rglob("*.py"):
        if path.name in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in ("ConfigError", "refuse", "refuse_both", "refusal"):
                    found.add((str(path), node.lineno, node.end_lineno))
    return found


def test_no_config_error_is_without_a_test(monkeypatch):
    raised = set()

    def recorded(init):
        def record(*args, **kwargs):
            frame = sys._getframe(1)
            while frame is not None and str(FOLDER) in frame.f_code.co_filename:
                raised.add((frame.f_code.co_filename, frame.f_lineno))
                frame = frame.f_back
            init(*args, **kwargs)

        return record

    monkeypatch.setattr(ConfigError, "__init__", recorded(ConfigError.__init__))
    for extra in FROM_FLAGS:
        error_of([*SMALL, *words_of(extra)])
    for text in FROM_JSON:
        json_error(text)
    error_of(["train", *SMALL])
    error_of([])
    missing_file_errors()
    vocabulary_errors()
    xla_device_errors()
    forgotten = [
        f"{Path(path).relative_to(FOLDER)}:{first}"
        for path, first, last in sites()
        if not any(file == path and first <= line <= last for file, line in raised)
    ]
    assert not sorted(forgotten)
    assert all(module.__file__ in {path for path, _ in raised} for module in (files, given, vocabulary, command_line))


def test_the_sweep_sees_the_rules():
    assert len({path for path, _, _ in sites()}) > 10
    assert len(sites()) > 80


@pytest.mark.parametrize("misspelled", ["--hiden-size", "--num-layer"])
def test_a_misspelled_required_flag_is_not_also_reported_as_missing(misspelled):
    argv = [*without(SMALL, "--hidden-size", "--num-layers"), misspelled, "64"]
    with pytest.raises(ConfigError) as caught:
        parse_run(argv)
    assert misspelled in str(caught.value) and "shape of the model" not in str(caught.value)


SUGGESTIONS = {
    "--micro-batch-size 3": "--micro-batch-size 1, 2, 4 or 8, or --global-batch-size 6 or 9",
    "--global-batch-size 4096 --micro-batch-size 3": "64, 128 or another divisor of 4096",
    "--hidden-size 66": "Use --hidden-size 64 or 68",
    "--num-query-groups 3": "Use --num-query-groups 1, 2 or 4",
    "--tensor-model-parallel-size 4 --num-attention-heads 2 --kv-channels 16": "parallel-size 1 or 2, or",
    "--tensor-model-parallel-size 4 --seq-length 30 --sequence-parallel": "Use --seq-length 28 or 32, or remove",
    "--pipeline-model-parallel-size 4 --num-layers 2": "Use --pipeline-model-parallel-size 2 or less",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3 --num-layers 8": "stage 1, 2 or 4",
    "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 3 --num-layers 6": "layers 12, or --pi",
    "--pipeline-schedule interleaved": "Use --pipeline-schedule 1f1b: a pipeline of one stage",
    "--pipeline-schedule interleaved --pipeline-model-parallel-size 2 --num-layers 8": "stage N with N = 1, 2 or 4",
    "--pipeline-schedule interleaved --pipeline-model-parallel-size 4 --num-layers 6": "use --num-layers 4 or 8 and",
    "--decoder-first-pipeline-num-layers 4 --pipeline-model-parallel-size 4": "Give "
    "--decoder-first-pipeline-num-layers at most 1 layer",
    "--min-lr 1": "Give --min-lr a number from 0 to 0.001, or raise --lr",
    "--lr-decay-samples 100": "Use --lr-decay-iters instead",
    "--train-iters 0 --train-samples 800 --lr-warmup-iters 2": "Use --lr-warmup-samples instead",
    "--lr-warmup-iters 500": "Use --lr-warmup-iters 100 or less",
}


@pytest.mark.parametrize("extra", SUGGESTIONS)
def test_a_fix_computes_what_would_fit(extra):
    assert SUGGESTIONS[extra] in error_of([*SMALL, *extra.split()])


def test_flags_in_errors_are_those_of_the_command_line():
    """Aliases and entries of the DeepSpeed JSON are named as given, and values that were not given as defaults."""
    alias = error_of([*SMALL, "--model-parallel-size", "3"])
    assert "(--model-parallel-size 3). Use --model-parallel-size 1, 2 or 4" in alias
    assert "--pipeline-model-parallel-size 1 by default" in alias
    preset = error_of([*SMALL, "--preset", "gpt2-124m", "--micro-batch-size", "3"])
    assert "--micro-batch-size 3" in preset and "of --preset" not in preset
    preset = error_of([*without(SMALL, "--num-attention-heads"), "--preset", "gpt2-124m"])
    assert "--num-attention-heads 12 of --preset gpt2-124m" in preset
    text = '{"train_micro_batch_size_per_gpu": 3}'
    Path("ds.json").write_text(text, encoding="utf-8")
    config = ["--deepspeed", "--deepspeed_config", "ds.json"]
    message = error_of([*without(SMALL, "--micro-batch-size"), *config])
    assert "train_micro_batch_size_per_gpu 3 in the DeepSpeed JSON). Use train_micro_batch_size_per_gpu 1, 2" in message
