"""Every ConfigError of config/ is triggered here, and a sweep over the source shows that none was forgotten."""

import ast
import sys
from pathlib import Path

import pytest
from support.job_commands import SMALL, without

import megatron_lite.config
from megatron_lite.config import files, given, vocabulary, words
from megatron_lite.config.arguments import parse_run
from megatron_lite.config.files import missing_files
from megatron_lite.config.vocabulary import padded_vocab_size, with_vocabulary
from megatron_lite.errors import ConfigError, ConfigErrors

FOLDER = Path(megatron_lite.config.__file__).parent
ELSEWHERE = {"record.py", "launcher.py"}
"""Files whose errors have a test of their own."""

FROM_FLAGS = {
    # words and values
    "--train-itres 5": "Every flag must be known: --train-itres. Did you mean --train-iters?",
    "--no-save": "A shortened flag must have one meaning",
    "@nowhere.txt": "An argument file must be readable",
    "@quote.txt": "Close the quotes in quote.txt",
    "@latin.txt": "An argument file must be readable: @latin.txt is not UTF-8: byte 0xe9 in line 2, byte 4 of the line",
    "--data-args-path latin.txt": "--data-args-path must name a UTF-8 text file: latin.txt is not UTF-8",
    "--save x\udce9": r"Arguments are UTF-8 text: b'x\xe9'",
    "--load x\ud800": r"Arguments are UTF-8 text: 'x\ud800'",
    "--seed 4294967296": "--seed takes a number from 0 to 4,294,967,295: --seed 4294967296",
    "--seed -1": "--seed takes a number from 0 to 4,294,967,295",
    "--num-layers 1000000000": "--num-layers takes a number of at most 100,000",
    "--train-samples 1e16": "--train-samples takes a whole number of at most 1e+15",
    "--lr 1e39": "--lr takes a number of at most 1e+38",
    "--tensorboard-queue-size 0": "--tensorboard-queue-size takes a number from 1 to",
    "--ddp-bucket-size 0": "--ddp-bucket-size takes a number of elements, 1 or more",
    "@circle.txt": "Argument files must not name each other in a circle",
    "--moe-brand-new 3": "Mixture of experts is not built here",
    "--num-experts 8": "Mixture of experts is not built here",
    "--mup --mup-input-mult 10": "muP's multipliers are not built here",
    "--log-interval ten": "--log-interval takes a whole number",
    "--log-interval": "--log-interval takes one value: --log-interval with nothing after it",
    "--log-interval 1 2": "--log-interval takes one value",
    "--bf16 5": "--bf16 takes no value",
    "--bf16 True False": "--bf16 takes no value",
    "--rampup-batch-size 2 2": "--rampup-batch-size takes three values",
    "--lr nan": "--lr takes a finite number",
    "--fp16 --bf16": "Two flags must not contradict each other: --fp16 and --bf16",
    "--swiglu --squared-relu": "Two flags must not contradict each other",
    "--glu-activation gelu": "--glu-activation takes one of geglu",
    "--accept-changed weights": "--accept-changed takes some of tokenizer, data, code",
    "--input x.jsonl": "It belongs to tools/preprocess_data.py",
    # resolve.py
    "--zero-stage 3": "Optimizer state may be sharded over replicas",
    "--zero-stage 0 --use-distributed-optimizer": "ZeRO stage 0 is the optimizer without sharding",
    "--world-size 8": "--world-size must be what the launcher started",
    "--no-position-embedding --position-embedding-type absolute": "--no-position-embedding and",
    "--no-bias-gelu-fusion --openai-gelu": "--no-bias-gelu-fusion (the exact GELU) and --openai-gelu",
    "--num-virtual-stages-per-pipeline-rank 3": "Every virtual stage holds equally many layers",
    "--save-interval 0": "Checkpoints are an iteration apart at least",
    "--save-interval 5 --save-schedule 10": "--save-interval is the interval after the last range",
    "--data-args-path paths.txt --data-path x": "--data-args-path paths.txt and --data-path x",
    "--train-weighted-split-paths-path paths.txt": "names a file of one line of groups in double quotes",
    "--gas 0": "Gradients are accumulated over one step at least",
    "--gas 3": "--global-batch-size 8, 2 x 3 x 4 = 24 by --gas 3",
    "--calculate-per-token-loss --eod-mask-loss": "Every sample counts the same in the loss",
    "--step-batch-size-schedule 1B:8": "--step-batch-size-schedule takes a first pair that starts at 0",
    # structured values
    "--step-batch-size-schedule 0:2 5": "pairs, as in 0:16 2.4B:320",
    "--step-batch-size-schedule 0:2 1:4": "thresholds that differ by at least one sample",
    "--step-batch-size-schedule 0:2 0.0000001K:4": "a whole number after its suffix",
    "--save-schedule 10 20:100": "<interval>:<last iteration> pairs",
    "--skip-train-iteration-range a-b": "ranges of iterations",
    "--seq-length-warmup 5": "start:iterations[:step]",
    "--seq-length-warmup a:b": "start:iterations[:step]",
    "--split 1,2,3,4": "one to three shares",
    "--split 0,0,0": "shares that do not all vanish",
    "--valid-weighted-split-paths nonsense": '"NAME: WEIGHT START:END PATH',
    "--max-position-embeddings 1e-1": "a whole number",
    "--position-embedding-type relative": "--position-embedding-type takes one of",
    "--tokenizer-type NulTokenizer": "Did you mean --tokenizer-type NullTokenizer?",
    "--save-schedule ten": "Write --save-schedule INTERVAL:LAST …, as --save-schedule 10:100 18:1000 1500",
    "--log-interval 1.5": "Write --log-interval N, as --log-interval 100",
    "--rampup-batch-size 2 x 3": "as --rampup-batch-size 16 16 5_000_000",
    # checks/model.py
    "--num-layers 0": "--num-layers is at least 1",
    "--init-method-std -1": "--init-method-std is at least 0",
    "--hidden-size 66": "The attention heads must divide the hidden size",
    "--num-query-groups 3": "The query groups must divide the attention heads",
    "--position-embedding-type rope --rotary-percent 0.2": "Rotary positions rotate an even number of channels",
    "--position-embedding-type rope --rotary-percent 2": "--rotary-percent lies in [0, 1]",
    "--position-embedding-type rope --rotary-seq-len-interpolation-factor 0": "Positions are divided by a positive",
    "--max-position-embeddings 16": "The sequence must not be longer than the position table",
    "--hidden-dropout 1": "--hidden-dropout lies in [0, 1)",
    "--parallel-residual --apply-residual-connection-post-layernorm": "A layer's residual is either parallel or",
    "--preset gpt5": "--preset takes the name of a preset",
    "--norm-epsilon 0": "The norms' epsilon is positive",
    # checks/batch.py
    "--seq-length 0": "--seq-length is at least 1",
    "--micro-batch-size 3": "The micro-batch must divide the global batch",
    "--rampup-batch-size 2 4 100": "A ramp-up must reach the global batch in whole increments",
    "--rampup-batch-size 16 2 100": "A ramp-up must reach the global batch in whole increments",
    "--rampup-batch-size 2 0 100": "A ramp-up has a positive start and increment",
    "--rampup-batch-size 1 1 100": "The micro-batch must divide every batch of the ramp-up",
    "--step-batch-size-schedule 0:3 1M:8": "The micro-batch must divide every batch of the schedule",
    "--step-batch-size-schedule 0:2 1M:16": "The global batch is the last of --step-batch-size-schedule",
    "--step-batch-size-schedule 0:2 1M:8 --rampup-batch-size 2 2 9": "--step-batch-size-schedule stands alone",
    "--decrease-batch-size-if-needed --global-batch-size 2": "A batch that may only decrease",
    "--seq-length-warmup 64:10": "A curriculum's sequence lengths lie between 1 and --seq-length",
    "--seq-length-warmup 8:10:8 --sequence-parallel --tensor-model-parallel-size 4 --seq-length-warmup 6:10:2": (
        "must divide every sequence length under --sequence-parallel"
    ),
    "--seq-length-warmup 0:8,5:16,5:32": "A curriculum's stages begin one after the other",
    # checks/schedule.py
    "--train-samples 800": "A run's length is given in iterations or in samples",
    "--train-iters 0": "A run needs a length",
    "--lr-decay-samples 100": "The learning rate of a run measured in iterations is scheduled in iterations",
    "--train-iters 0 --train-samples 800 --lr-warmup-iters 2": "scheduled in samples",
    "--lr 0": "A run that trains has a learning rate",
    "--min-lr 1": "--min-lr lies between 0 and --lr",
    "--lr-warmup-fraction 2": "--lr-warmup-fraction lies in [0, 1]",
    "--lr-warmup-fraction 0.1 --lr-warmup-iters 5": "Warm-up is given as a fraction or as a number",
    "--lr-warmup-iters 500": "Warm-up ends before the decay does",
    "--lr-decay-style WSD": "The decay phase of WSD lies within the schedule",
    "--start-weight-decay 0.1": "A constant weight decay is --weight-decay",
    "--weight-decay-incr-style linear": "A weight decay that rises has a start and an end",
    "--adam-beta1 1": "--adam-beta1 lies in [0, 1)",
    "--min-loss-scale 0": "The loss scale starts above its positive minimum",
    "--exit-interval -1": "--exit-interval is at least 0",
    "--log-interval 0": "--log-interval is at least 1",
    "--check-weight-hash-across-dp-replicas-interval -1": "replicas-interval is at least 0",
    "--on-weight-mismatch repair": "--on-weight-mismatch repair needs weights that are compared",
    "--skip-train-iteration-range 2-5 4-9": "Skipped ranges start at 1, rise and do not overlap",
    # checks/parallel.py
    "--tensor-model-parallel-size 0": "--tensor-model-parallel-size is at least 1",
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4": "must divide the world size",
    "--tensor-model-parallel-size 4 --num-attention-heads 2 --kv-channels 16": "must divide --num-attention-heads",
    "--tensor-model-parallel-size 4 --seq-length 30 --sequence-parallel": "must divide the sequence under",
    "--pipeline-model-parallel-size 4 --num-layers 2": "Every pipeline stage holds a layer",
    "--pipeline-schedule interleaved": "The interleaved schedule needs the size of a chunk",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --pipeline-schedule 1f1b": (
        "Only the interleaved schedule has chunks of a chosen size"
    ),
    "--num-layers-per-virtual-pipeline-stage 1": "Interleaving needs a pipeline",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3 --num-layers 8": (
        "Every rank holds equally many chunks"
    ),
    "--pp-partition-method type:(": "--pp-partition-method is balanced, uniform, parameters or type:",
    "--pp-partition-method best": "--pp-partition-method is balanced, uniform, parameters or type:",
    "--decoder-first-pipeline-num-layers 1": "The ends of a pipeline can be sized",
    "--decoder-first-pipeline-num-layers 4 --pipeline-model-parallel-size 4": "The stages between the ends",
    "--checkpoint-activations --recompute-num-layers 9": "No more layers can be recomputed than there are",
    "--distributed-timeout-minutes 0": "--distributed-timeout-minutes is positive",
    # checks/data.py
    "--mock-data --data-path x": "A run's data are given in one way",
    "--global-batch-size 1000000000": "A replica runs at most 1,000,000 micro-batches in an iteration",
    "--prefetch-microbatches 1000000000": "--prefetch-microbatches is at most 1,000",
    "--data-path -1 x 2 y": "The weights of a blend are not negative",
    "--train-weighted-split-paths a:1_0:1_x b:1_0:1_x": "The training data are one group",
    "--valid-weighted-split-paths a:1_0:1_x a:1_0:1_x": "The groups of --valid-weighted-split-paths have names",
    "--tokenizer-type NullTokenizer": "A NullTokenizer needs its size",
    # checks/checkpoint.py
    "--save x": "A run that saves needs an interval",
    "--save x --save-schedule 10:100 5:50": "The ranges of --save-schedule have a positive interval",
    "--keep-last 2 --keep-phase 10:100 5:50": "The ranges of --keep-phase have a positive interval",
    "--keep-every 10": "--keep-every and --keep-phase say which checkpoints --keep-last leaves",
    "--weights-only-every 10": "Weights are saved below --save",
    "--spike-factor 0.5": "A spike is a loss above the usual one",
    "--auto-rollback 1": "--auto-rollback goes back to a checkpoint from before a spike",
    "--load x --override-lr-scheduler --use-checkpoint-lr-scheduler": "One learning-rate schedule wins",
    "--load-iteration 5": "--load-iteration needs a checkpoint",
    # DeepSpeed
    "--deepspeed_config ds.json": "A DeepSpeed JSON needs --deepspeed",
}

FROM_JSON = {
    '{"a": 1_000}': "--deepspeed_config must name a JSON file",
    "[]": "--deepspeed_config must hold a JSON object",
    '{"optimizer": {"type": "Adam"}}': "The native engine does not have every feature of DeepSpeed",
    '{"gradient_cliping": 1.0}': "must be known: gradient_cliping. Did you mean gradient_clipping?",
    '{"fp16": {"enabled": true, "hystereses": 2}}': "must be known: fp16.hystereses. Did you mean fp16.hysteresis?",
    '{"fp16": true}': "fp16 in the DeepSpeed JSON is an object",
    '{"gradient_clipping": "1"}': "gradient_clipping in the DeepSpeed JSON is a number of at most 1e+15",
    '{"gradient_clipping": NaN}': "gradient_clipping in the DeepSpeed JSON is a number",
    '{"gradient_clipping": 1e999}': "gradient_clipping in the DeepSpeed JSON is a number",
    '{"fp16": {"enabled": true, "hysteresis": 1.5}}': "fp16.hysteresis in the DeepSpeed JSON is a whole number",
    '{"fp16": {"enabled": true, "initial_scale_power": 999}}': "initial_scale_power in the DeepSpeed JSON is at most",
    "[" * 5000: "--deepspeed_config must name a JSON file",
    '{"fp16": {"enabled": true}, "bf16": {"enabled": true}}': "A run has one precision",
    '{"bf16": {"enabled": true}}': "must not contradict each other: --fp16 and bf16.enabled true",
    '{"fp16": {"enabled": false}}': "must not contradict each other: --fp16 and fp16.enabled false",
    '{"gradient_clipping": 0.5}': "--clip-grad 2 and gradient_clipping 0.5",
    '{"train_micro_batch_size_per_gpu": 4}': "--micro-batch-size 2 and train_micro_batch_size_per_gpu 4",
    '{"zero_optimization": {"stage": 2}}': "Optimizer state may be sharded over replicas",
    '{"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}': "Nothing is offloaded to the CPU",
    '{"curriculum_learning": {"enabled": true, "curriculum_type": "vocab"}}': "The curriculum is by sequence length",
    '{"curriculum_learning": {"enabled": true, "max_difficulty": 64, "min_difficulty": 8, "schedule_config": '
    '{"total_curriculum_step": 10}}}': "--seq-length 32 and curriculum_learning.max_difficulty 64",
    '{"curriculum_learning": {"enabled": true, "schedule_type": "fixed_discrete", "schedule_config": '
    '{"difficulty": [8], "max_step": [5]}}}': "fixed_discrete has one difficulty more than max_step",
}


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
    Path("ds.json").write_text(text)
    return error_of([*SMALL, "--fp16", "--clip-grad", "2", "--deepspeed", "--deepspeed_config", "ds.json"])


@pytest.mark.parametrize("extra", FROM_FLAGS)
def test_flags(extra):
    assert FROM_FLAGS[extra] in error_of([*SMALL, *words_of(extra)])


@pytest.mark.parametrize("text", FROM_JSON)
def test_deepspeed_json(text):
    assert FROM_JSON[text] in json_error(text)


def test_a_command_line_starts_with_a_flag():
    assert "A command line starts with a flag" in error_of(["train", *SMALL])


def test_a_run_needs_its_shape():
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
    assert "takes a whole number" in error_of([*SMALL, "--num-layers", "many", "--pipeline-model-parallel-size", "x2"])
    assert "is at least" not in error_of([*SMALL, "--num-layers", "many"])


def missing_file_errors():
    def missing(*extra):
        return [str(error) for error in missing_files(parse_run([*SMALL, *extra]).config)]

    Path("x.bin").touch()
    assert "A run needs data" in missing()[-1]
    (tokenizer, data) = missing("--data-path", "x")
    for usual in ("--tokenizer-type HuggingFaceTokenizer", "--vocab-file", "--merge-file", "--vocab-size N"):
        assert usual in tokenizer
    assert "--data-path must name a dataset" in data
    assert "x: no .idx" in data
    assert "--vocab-file must name a file that exists: v.json" in missing("--vocab-file", "v.json")[0]
    assert "--merge-file" in missing("--vocab-file", "v.json")[1]
    model = missing("--mock-data", "--tokenizer-model", "x.model")
    assert "without --tokenizer-type. Add --tokenizer-type SentencePieceTokenizer" in model[0]
    hugging_face = missing("--mock-data", "--tokenizer-type", "PretrainedFromHF", "--tokenizer-model", "absent")
    assert "--tokenizer-model" in hugging_face[0]
    null = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "9")
    assert missing(*null) == []
    assert "--load must name a folder" in missing(*null, "--load", "absent", "--exit-on-missing-checkpoint")[0]
    parsed = parse_run([*SMALL, "--train-weighted-split-paths-path", "absent.txt"])
    assert "--train-weighted-split-paths-path must name a readable file: absent.txt" in str(parsed.missing[0])
    parsed = parse_run([*SMALL, "--deepspeed", "--deepspeed_config", "absent.json"])
    assert "--deepspeed_config must name a readable file: absent.json" in str(parsed.missing[0])


def test_missing_files_are_errors_that_name_the_flag():
    missing_file_errors()


def vocabulary_errors():
    with pytest.raises(ConfigError, match="must hold the tokenizer's"):
        padded_vocab_size(100, 128, 1, 64)
    with pytest.raises(ConfigError, match="divisible by the tensor-parallel size"):
        padded_vocab_size(100, 128, 4, 102)
    with pytest.raises(ConfigError, match="the size that the command line says"):
        with_vocabulary(parse_run([*SMALL, "--tokenizer-vocab-size", "90"]).config, 100)


def test_a_vocabulary_that_does_not_fit():
    vocabulary_errors()


def sites():
    """Lines of every ConfigError(...) and given.refuse(...) in config/, as (file, first line, last line)."""
    found = set()
    for path in FOLDER.rglob("*.py"):
        if path.name in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in ("ConfigError", "refuse", "refusal"):
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
    forgotten = [
        f"{Path(path).relative_to(FOLDER)}:{first}"
        for path, first, last in sites()
        if not any(file == path and first <= line <= last for file, line in raised)
    ]
    assert not sorted(forgotten)
    assert all(module.__file__ in {path for path, _ in raised} for module in (files, given, vocabulary, words))


def test_the_sweep_sees_the_rules():
    assert len({path for path, _, _ in sites()}) > 10
    assert len(sites()) > 80


@pytest.mark.parametrize("misspelled", ["--hiden-size", "--num-layer"])
def test_what_a_misspelled_flag_means_is_not_called_missing_too(misspelled):
    argv = [*without(SMALL, "--hidden-size", "--num-layers"), misspelled, "64"]
    with pytest.raises(ConfigError) as caught:
        parse_run(argv)
    assert misspelled in str(caught.value) and "shape of its model" not in str(caught.value)


SUGGESTIONS = {
    "--micro-batch-size 3": "--micro-batch-size 1, 2, 4 or 8, or --global-batch-size 6 or 9",
    "--global-batch-size 4096 --micro-batch-size 3": "64, 128 or another divisor of 4096",
    "--hidden-size 66": "Give --hidden-size 64 or 68",
    "--num-query-groups 3": "Give --num-query-groups 1, 2 or 4",
    "--tensor-model-parallel-size 4 --num-attention-heads 2 --kv-channels 16": "parallel-size 1 or 2, or",
    "--tensor-model-parallel-size 4 --seq-length 30 --sequence-parallel": "Give --seq-length 28 or 32, or leave",
    "--pipeline-model-parallel-size 4 --num-layers 2": "Give --pipeline-model-parallel-size 2 or less",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3 --num-layers 8": "stage 1, 2 or 4",
    "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 3 --num-layers 6": "--num-layers 4 or 8",
    "--decoder-first-pipeline-num-layers 4 --pipeline-model-parallel-size 4": "Give the ends at most 1 layers in all",
    "--min-lr 1": "Give --min-lr a number from 0 to 0.001, or raise --lr",
    "--lr-decay-samples 100": "Give --lr-decay-iters instead",
    "--train-iters 0 --train-samples 800 --lr-warmup-iters 2": "Give --lr-warmup-samples instead",
    "--lr-warmup-iters 500": "Give --lr-warmup-iters 100 or less",
}


@pytest.mark.parametrize("extra", SUGGESTIONS)
def test_a_fix_computes_what_would_fit(extra):
    assert SUGGESTIONS[extra] in error_of([*SMALL, *extra.split()])
