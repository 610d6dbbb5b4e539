"""Training through the command line: models, schedules, evaluation, metrics."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from support.trainer import assert_same_run, checkpoints, command, iterations, measured, records

from megatron_lite.metrics.curve import read_curve
from megatron_lite.model import gpt

pytestmark = pytest.mark.slow

RESUMED = ("--train-iters", 4, "--save-interval", 2)
MODELS = {
    "gpt-2": (),
    "rotary": ("--position-embedding-type", "rope"),
    "alibi": ("--position-embedding-type", "alibi"),
    "rmsnorm": ("--normalization", "RMSNorm"),
    "swiglu": ("--swiglu", "--ffn-hidden-size", 32),
    "grouped queries": ("--num-attention-heads", 4, "--group-query-attention", "--num-query-groups", 2),
    "untied": ("--untie-embeddings-and-output-weights",),
    "no bias": ("--disable-bias-linear",),
    "embedding norm": ("--embed-layernorm",),
    "query and key norm": ("--qk-layernorm",),
    "parallel residual": ("--parallel-residual", "--hidden-dropout", 0.1),
    "post-norm": ("--apply-residual-connection-post-layernorm",),
    "llama": ("--use-rotary-position-embeddings", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
              "--untie-embeddings-and-output-weights", "--num-attention-heads", 4, "--num-query-groups", 2,
              "--group-query-attention", "--ffn-hidden-size", 32, "--bf16", "--recompute-granularity", "full"),
    "bloom": ("--position-embedding-type", "alibi", "--embed-layernorm", "--bf16", "--hidden-dropout", 0.1),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_and_resumes(model, corpus, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    args = corpus.job(*RESUMED, *MODELS[model])
    assert command(*args, "--save", whole).code == 0
    losses = [record["losses"]["lm loss"] for record in measured(whole) if record["kind"] == "iteration"]
    assert len(losses) == 4
    assert losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert losses[-1] < losses[0]
    resumed = (*args, "--save", broken, "--load", broken)
    assert command(*resumed, "--exit-after-iters", 2).code == 0
    assert command(*resumed).code == 0
    assert_same_run(whole, broken)


@pytest.mark.parametrize("kind", ["layer", "stage"])
def test_a_compiled_model_trains_equally_and_resumes(kind, corpus, tmp_path, monkeypatch):
    """--compile without code generation, which takes a minute."""
    monkeypatch.setattr(gpt, "compile_options", lambda sharding: {"backend": "aot_eager", "fullgraph": True})
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    args = corpus.job(*RESUMED, "--num-layers", 1, "--hidden-dropout", 0.1, "--eval-iters", 0)
    assert command(*args, "--save", plain).code == 0
    resumed = (*args, "--compile", kind, "--save", compiled, "--load", compiled)
    result = command(*resumed, "--exit-after-iters", 2)
    assert result.code == 0
    assert f"compiled by {kind}" in result.out
    assert command(*resumed).code == 0
    losses = [[record["losses"]["lm loss"] for record in measured(folder)] for folder in (plain, compiled)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


SCHEDULES = {
    "constant": [1.0] * 6,
    "linear": [1.0, 0.8, 0.6, 0.4, 0.2, 0.0],
    "cosine": [1.0, 0.905, 0.655, 0.345, 0.095, 0.0],
    "inverse-square-root": [1.0, 0.816, 0.707, 0.632, 0.577, 0.535],
    "WSD": [1.0, 1.0, 1.0, 1.0, 0.5, 0.0],
}


@pytest.mark.parametrize("style", SCHEDULES)
@pytest.mark.parametrize("length", ["iters", "samples"])
def test_learning_rates(style, length, corpus, tmp_path):
    unit = 1 if length == "iters" else 4
    args = (f"--train-{length}", 7 * unit, f"--lr-warmup-{length}", 2 * unit, "--lr-decay-style", style)
    if style == "WSD":
        args += ("--lr-wsd-decay-style", "linear", f"--lr-wsd-decay-{length}", 2 * unit)
    assert command(*corpus.job(*args, "--metrics-file", tmp_path / "metrics.jsonl")).code == 0
    rates = [record["learning_rate"] for record in measured(tmp_path) if record["kind"] == "iteration"]
    assert [rate / 1e-3 for rate in rates] == pytest.approx([0.5, *SCHEDULES[style]], abs=1e-3)


@pytest.mark.parametrize(
    "args",
    [
        ("--optimizer", "adam", "--adam-beta2", 0.95),
        ("--optimizer", "sgd", "--lr", 0.1),
        ("--optimizer", "sgd", "--lr", 0.1, "--sgd-momentum", 0),
        ("--weight-decay", 0.1, "--clip-grad", 0.1),
        ("--weight-decay-incr-style", "linear", "--start-weight-decay", 0, "--end-weight-decay", 0.2),
        ("--lr-warmup-fraction", 0.5, "--lr-warmup-init", 1e-4),
        ("--step-batch-size-schedule", "0:2 128:4 384:8", "--global-batch-size", 8),
        ("--seq-length-warmup", "8:6:4"),
        ("--train-tokens", 64 * 6),
        ("--recompute-granularity", "selective"),
        ("--eod-mask-loss",),
        ("--deterministic-mode",),
    ],
    ids=lambda args: " ".join(map(str, args)),
)
def test_other_settings_train(args, corpus, tmp_path):
    result = command(*corpus.job("--train-iters", 12, *args, "--metrics-file", tmp_path / "metrics.jsonl"))
    assert result.code == 0, result.err
    losses = [record["losses"]["lm loss"] for record in measured(tmp_path) if record["kind"] == "iteration"]
    assert losses[-1] < losses[0]
    assert len(losses) == (6 if "--train-tokens" in args else 12)


def test_evaluations_continue_in_their_data(corpus, tmp_path):
    args = ("--train-iters", 6, "--eval-interval", 2, "--eval-iters", 3, "--save", tmp_path, "--save-interval", 9)
    result = command(*corpus.job(*args))
    assert result.code == 0
    found = [
        (record["iteration"], record["split"], record["samples"], record.get("at_end", False))
        for record in measured(tmp_path)
        if record["kind"] == "validation"
    ]
    assert found == [
        (2, "validation", 12, False),
        (4, "validation", 12, False),
        (6, "validation", 12, False),
        (6, "validation", 12, True),
        (6, "test", 12, True),
    ]
    last = [record["losses"]["lm loss"] for record in measured(tmp_path) if record["iteration"] == 6][1:]
    assert len(set(last)) == 3, "other samples each time"
    assert "validation loss at iteration 2 | lm loss value: " in result.out
    message = (
        "additional validation at the end of the run, on the samples after those of the validation of iteration 6;"
    )
    assert result.out.index("validation loss at iteration 6 |") < result.out.index(message)
    assert result.out.index(message) < result.out.index("validation loss at iteration 6 on validation set |")
    assert "validation loss at iteration 6 on test set | lm loss value: " in result.out


def test_no_evaluation(corpus):
    for args in (("--eval-iters", 0), ("--split", "1,0,0")):
        result = command(*corpus.job("--train-iters", 3, "--eval-interval", 1, *args))
        assert result.code == 0
        assert "loss at iteration" not in result.out


def test_skip_train_evaluates_a_checkpoint_and_changes_nothing(corpus, tmp_path):
    save = tmp_path / "run"
    assert command(*corpus.job(*RESUMED, "--save", save, "--eval-iters", 2)).code == 0
    ends = [record["losses"]["lm loss"] for record in measured(save) if record.get("at_end")]
    before = {path: path.stat().st_mtime_ns for path in save.rglob("*")}
    result = command(*corpus.job("--skip-train", "--load", save, "--eval-iters", 2))
    assert result.code == 0, result.err
    found = [float(loss) for loss in re.findall(r"lm loss value: (\S+)", result.out)]
    assert found == pytest.approx(ends, rel=1e-6)
    assert "elapsed time" not in result.out
    assert {path: path.stat().st_mtime_ns for path in save.rglob("*")} == before


def test_finetune_loads_the_weights_only(corpus, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert command(*corpus.job(*RESUMED, "--save", first)).code == 0
    result = command(*corpus.job(*RESUMED, "--save", second, "--load", first, "--finetune"))
    assert result.code == 0, result.err
    assert f"start       iteration 0, with the weights of {first}/iter_0000004" in result.out
    one, two = (next(record for record in measured(folder) if record["iteration"] == 1) for folder in (first, second))
    assert two["consumed_train_samples"] == 4
    assert two["losses"]["lm loss"] < one["losses"]["lm loss"]
    assert checkpoints(second) == ["iter_0000002", "iter_0000004"]
    assert result.out.count("successfully saved") == 2, "the last iteration is saved once"


def test_log_interval_averages_and_leaves_out_no_iteration(corpus, tmp_path):
    args = ("--train-iters", 7, "--log-interval", 3, "--metrics-file", tmp_path / "metrics.jsonl")
    result = command(*corpus.job(*args))
    lines = re.findall(r"iteration +(\d+)/ +7 \|.* lm loss: (\S+) \|", result.out)
    assert [int(number) for number, _ in lines] == [3, 6, 7]
    losses = [record["losses"]["lm loss"] for record in measured(tmp_path) if record["kind"] == "iteration"]
    assert len(losses) == 7
    means = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    assert [float(loss) for _, loss in lines] == pytest.approx(means, rel=1e-6)


def test_the_log_line_holds_megatrons_fields(corpus):
    args = ("--train-iters", 2, "--log-params-norm", "--log-num-zeros-in-grad")
    line = next(line for line in command(*corpus.job(*args)).out.splitlines() if " iteration        2/" in line)
    fields = [field.split(":")[0].strip() for field in line.split("|")[1:-1]]
    assert fields == [
        "consumed samples", "elapsed time per iteration (ms)", "throughput per GPU (TFLOP/s/GPU)", "learning rate",
        "global batch size", "lm loss", "loss scale", "grad norm", "num zeros", "params norm",
        "number of skipped iterations", "number of nan iterations", "tokens/s", "ETA",
    ]  # fmt: skip


def test_timers(corpus):
    parts = ["train-step", "forward-backward", "all-grads-sync", "optimizer"]
    inner = ["batch-generator", "forward-compute", "backward-compute"]
    for level, names in ((1, parts), (2, [*parts[:2], *inner, *parts[2:]])):
        log = ("--timing-log-level", level)
        result = command(*corpus.job("--train-iters", 3, "--eval-interval", 1, "--eval-iters", 20, *log))
        lines = [line for line in result.out.splitlines() if line.startswith("time (ms) | ")]
        assert len(lines) == 3
        fields = [dict(re.findall(r"([a-z-]+): (\d+\.\d\d)", line)) for line in lines]
        assert all(list(found) == names for found in fields)
        for found in fields:  # without the evaluations between iterations
            times = {name: float(value) for name, value in found.items()}
            assert times["train-step"] >= sum(times[name] for name in parts[1:]) - 0.05
            assert times["forward-backward"] >= sum(times.get(name, 0) for name in inner) - 0.05
    assert "time (ms)" not in command(*corpus.job("--train-iters", 3)).out


def test_tensorboard_tags(corpus, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = ("--train-iters", 6, "--eval-interval", 3, "--tensorboard-dir", tmp_path / "tb", "--log-params-norm")
    args += ("--log-num-zeros-in-grad", "--log-timers-to-tensorboard", "--log-validation-ppl-to-tensorboard")
    args += ("--log-memory-to-tensorboard", "--log-world-size-to-tensorboard", "--timing-log-level", 1)
    args += ("--save", tmp_path / "run", "--save-interval", 3)
    assert command(*corpus.job(*args)).code == 0
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    both = {"learning-rate", "batch-size", "lm loss", "loss-scale", "world-size", "grad-norm", "num-zeros"}
    both |= {"params-norm", "lm loss validation", "lm loss validation ppl", "lm loss test", "lm loss test ppl"}
    assert both | {f"{tag} vs samples" for tag in both} <= tags
    assert {"iteration-time", "throughput", "optimizer-time", "mem-allocated-bytes", "tokens-per-second"} <= tags
    points = events.Scalars("lm loss")
    losses = [record["losses"]["lm loss"] for record in measured(tmp_path / "run") if record["kind"] == "iteration"]
    assert [point.step for point in points] == iterations(tmp_path / "run")
    assert [point.value for point in points] == pytest.approx(losses)
    assert [point.step for point in events.Scalars("lm loss vs samples")] == [4, 8, 12, 16, 20, 24]


def test_tensorboard_points_of_lost_iterations_are_removed(corpus, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps(tag):
        events = EventAccumulator(str(tmp_path / "tb"), purge_orphaned_data=False)
        events.Reload()
        return [point.step for point in events.Scalars(tag)]

    save = tmp_path / "run"
    args = corpus.job("--train-iters", 8, "--save", save, "--save-interval", 3, "--tensorboard-dir", tmp_path / "tb")
    assert command(*args, "--exit-interval", 5, "--no-save-on-exit").code == 0
    assert steps("lm loss") == [1, 2, 3, 4, 5]
    # A run that starts from another run keeps the points of that run; a resume removes later points.
    branch = (*args, "--load", save, "--save", tmp_path / "branch", "--exit-interval", 4)
    assert command(*branch).code == 0
    assert steps("lm loss") == [1, 2, 3, 4, 5, 4]
    assert command(*args, "--load", save).code == 0
    assert steps("lm loss") == list(range(1, 9))
    assert steps("lm loss vs samples") == list(range(4, 33, 4))


def test_start_messages(corpus, tmp_path):
    save = tmp_path / "run"
    result = command(*corpus.job(*RESUMED, "--save", save, "--exit-after-iters", 2, "--lr-warmup-iters", 2))
    lines = [line.split(maxsplit=1) for line in result.out.splitlines()[:10]]
    said = {name: text.strip() for name, text in lines}
    assert (
        list(said) == ["model", "machine", "batch", "length", "train", "validation", "test", "start", "saves"] or said
    )
    saved = next(record for record in records(save) if record["kind"] == "start")
    assert said["model"].startswith(f"{saved['parameters']:,} parameters (")
    assert "2 layers, hidden size 16, 2 heads, vocabulary 300 (padded to 384)" in said["model"]
    assert said["machine"].endswith("1 thread), fp32")
    assert said["batch"] == "4 samples of 16 tokens an iteration (64 tokens), micro-batches of 2"
    assert said["length"].startswith("4 iterations, 16 samples, 256 tokens; learning rate 0.001 to 0, linear, 2 iter")
    assert re.fullmatch(rf"\d+ samples of {corpus.data[0]}", said["train"])
    assert said["start"] == "fresh weights, seed 1234"
    assert said["saves"].startswith(f"{save}, every 2 iterations and at the end; every number in {save}/metrics.jsonl")
    result = command(*corpus.job(*RESUMED, "--save", save, "--load", save, "--lr-warmup-iters", 2))
    assert f"  start       after iteration 2, from {save}/iter_0000002" in result.out


def test_metrics_read_as_one_run_and_draw_its_curve(corpus, tmp_path):
    save = tmp_path / "run"
    args = corpus.job("--train-iters", 9, "--save-interval", 3, "--eval-interval", 3, "--save", save, "--load", save)
    for _ in range(3):
        assert command(*args, "--exit-after-iters", 4).code == 0
    assert iterations(save) == list(range(1, 10))
    assert all(one["consumed_train_samples"] < two["consumed_train_samples"] for one, two in pairwise(
        [record for record in measured(save) if record["kind"] == "iteration"]))  # fmt: skip
    assert [point[0] for point in read_curve(save / "metrics.jsonl").validation["validation"]] == [3, 6, 9, 9]
    result = command("curve", save / "metrics.jsonl", "--svg", tmp_path / "loss.svg")
    assert result.code == 0
    assert (tmp_path / "loss.svg").read_text(encoding="utf-8").startswith("<svg")


def test_mock_data_and_null_tokenizer_need_no_files(tmp_path):
    args = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", 99, "--num-layers", 1)
    args += ("--hidden-size", 8, "--num-attention-heads", 1, "--seq-length", 8, "--micro-batch-size", 1)
    result = command("train", *args, "--train-iters", 2, "--lr", 1e-3, "--eval-iters", 1, "--num-threads", 1)
    assert result.code == 0, result.err
    assert "training is complete after 2 iterations" in result.out


def test_dry_run_explains_and_touches_nothing(corpus, tmp_path):
    result = command(*corpus.job(*RESUMED, "--save", tmp_path / "run", "--dry-run"))
    assert result.code == 0
    assert "4 iterations" in result.out
    assert not (tmp_path / "run").exists()


def test_fp8_ends_within_2_percent_of_bf16(corpus, tmp_path):
    """200 iterations, with the rounding of operands that a GPU has."""
    args = corpus.job(
        "--train-iters", 200, "--hidden-size", 32, "--ffn-hidden-size", 128, "--micro-batch-size", 2, "--bf16"
    )
    args = (*args, "--eval-iters", 0, "--lr", 3e-3, "--lr-decay-style", "constant")

    def last_loss(name, *flags):
        assert command(*args, *flags, "--metrics-file", tmp_path / name / "metrics.jsonl").code == 0
        losses = [record["losses"]["lm loss"] for record in measured(tmp_path / name)]
        return sum(losses[-20:]) / 20

    expected = last_loss("bf16")
    assert expected < 0.8 * math.log(300)
    for values, recipe in (("hybrid", "delayed"), ("hybrid", "tensorwise"), ("e4m3", "rowwise")):
        found = last_loss(recipe, "--fp8-format", values, "--fp8-recipe", recipe)
        assert found == pytest.approx(expected, rel=0.02), recipe
