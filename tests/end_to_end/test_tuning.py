"""Finetuning through the command line: early stopping, the best checkpoint, epochs, several validation sets."""

import json
from unittest import mock

import pytest
from support.trainer import assert_same_run, checkpoints, command, iterations, measured, preprocess, records, status

from megatron_lite.lifecycle.best import BestValidation
from megatron_lite.runs.catalog import best_iteration

pytestmark = pytest.mark.slow

JOB = ("--train-iters", 20, "--eval-interval", 2, "--save-interval", 100, "--keep-last", 1, "--seed", 5)
EARLY = ("--early-stopping-patience", 2, "--save-best", "--freeze", "embedding", "--lr-factors", "layers.0=0.5")
LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 4.5, 10: 2.0}


@pytest.fixture
def scripted():
    """Replace validation losses by LOSSES."""
    observe = BestValidation.observe
    with mock.patch.object(
        BestValidation, "observe", lambda self, iteration, _: observe(self, iteration, LOSSES.get(iteration, 9.0))
    ):
        yield


def job(corpus, save, *args):
    return command(*corpus.job(*JOB, *EARLY, "--save", save, "--load", save, *args))


def test_a_run_stops_early_and_keeps_the_best_checkpoint(corpus, scripted, tmp_path):
    save = tmp_path / "run"
    result = job(corpus, save)
    assert result.code == 0, result.err
    assert "training stopped early at iteration 8: the validation loss has not improved in 2 evaluations" in result.out
    assert iterations(save) == list(range(1, 9))
    assert checkpoints(save) == ["iter_0000004", "iter_0000008"]
    assert best_iteration(save) == 4
    assert status(save)["status"] == "completed"

    again = job(corpus, save)
    assert again.code == 0
    assert "This run is complete" in again.out + again.err and "--early-stopping-patience" in again.out + again.err

    listed = command("checkpoint", "list", save)
    assert "b lowest validation loss" in listed.out and f"--load {save}/best" in listed.out.replace("\n", "")
    (tmp_path / "text.txt").write_text("abc " * 40)
    evaluated = command("evaluate", "--load", save / "best", "--text", tmp_path / "text.txt", "--device", "cpu")
    assert evaluated.code == 0 and "iter_0000004" in evaluated.err
    generated = command("generate", "--load", save / "best", "--prompt", "ab", "--max-new-tokens", 2, "--device", "cpu")
    assert generated.code == 0 and "iter_0000004" in generated.err
    tuned = command(
        *corpus.job("--train-iters", 1, "--save-interval", 1, "--save", tmp_path / "tuned"),
        *("--load", save / "best", "--finetune"),
    )
    assert tuned.code == 0 and "iter_0000004" in tuned.out

    longer = job(corpus, save, "--early-stopping-patience", 3, "--train-iters", 10, "--override-opt-param-scheduler")
    assert longer.code == 0, longer.err
    assert checkpoints(save) == ["iter_0000010"]
    assert best_iteration(save) == 10


def test_a_resumed_run_stops_at_the_same_evaluation(corpus, scripted, tmp_path):
    assert job(corpus, tmp_path / "whole").code == 0
    for _ in range(3):
        result = job(corpus, tmp_path / "parts", "--exit-after-iters", 3)
        assert result.code == 0, result.err
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert best_iteration(tmp_path / "parts") == 4


def test_without_validation_data(corpus, tmp_path):
    result = job(corpus, tmp_path / "run", "--split", "1,0,0")
    assert result.code != 0
    assert "--early-stopping-patience needs validation data, and there is none (--split 1,0,0)" in result.err


def test_epochs_of_two_datasets(corpus, tmp_path):
    save = tmp_path / "run"
    prefixes = [str(prefix) for prefix in corpus.data]
    args = corpus.job("--eval-interval", 1000, "--epochs", 2, "--rampup-batch-size", 2, 2, 10, "--save-interval", 1000)
    args = [
        *args,
        "--lr-warmup-iters",
        3,
        "--save",
        save,
        "--load",
        save,
        "--data-path",
        *prefixes,
        "--split",
        "6,94,0",
    ]
    result = command(*args)
    assert result.code == 0, result.err
    start = next(record for record in records(save) if record["kind"] == "start")
    config = start["config"]
    samples = config["training"]["train_samples"] // 2
    assert config["lr"]["warmup_samples"] == 6
    last = [record for record in measured(save) if record["kind"] == "iteration"][-1]
    assert 0 <= 2 * samples - last["consumed_train_samples"] < 4
    explained = command("explain", *args[1:])
    assert f"{last['iteration']:,} iterations" in explained.out
    again = command(*args)
    assert "give a larger --epochs" in again.out + again.err
    longer = command(*args, "--epochs", 3, "--override-opt-param-scheduler")
    assert longer.code == 0, longer.err
    last = [record for record in measured(save) if record["kind"] == "iteration"][-1]
    assert 0 <= 3 * samples - last["consumed_train_samples"] < 4


def test_validation_sets_are_averaged(corpus, tmp_path):
    save, (one, two) = tmp_path / "run", corpus.data
    args = corpus.job("--train-iters", 2, "--eval-interval", 2, "--save-interval", 2, "--save", save)
    groups = ("--train-data-path", one, "--valid-weighted-split-paths", f"a: 1 0:1 {one}", f"b: 1 0:1 {two}")
    result = command(*[word for word in args if word not in ("--data-path", one)], *groups)
    assert result.code == 0, result.err
    found = [record for record in measured(save) if record["kind"] == "validation" and not record.get("at_end")]
    losses = {record["name"]: record["losses"]["lm loss"] for record in found}
    assert losses["average"] == pytest.approx((losses["a"] + losses["b"]) / 2)


def test_loss_on_answers_resumes_exactly(corpus, tmp_path):
    """Pairs are preprocessed, packed, and trained on; the warning counts the answers that packing cut."""
    words = ["ab", "cde", "fgh", "ij"]
    pairs = [{"prompt": " ".join(words[: i % 4]), "completion": " ".join(words * (i % 3 + 1))} for i in range(1, 90)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    made = preprocess(tmp_path / "pairs.jsonl", tmp_path / "p", corpus.tokenizer, "--input-format", "prompt-completion")
    assert made.code == 0, made.err
    packed = tmp_path / "packed"
    made = command("data", "pack", f"{tmp_path}/p_completion_document", packed, "--seq-length", 16)
    assert made.code == 0 and "--answer-loss" in made.out, made.err
    cut = int(made.out.partition("cut ")[2].split()[0])
    args = corpus.job("--train-iters", 6, "--save-interval", 100, "--answer-loss", "--freeze", "mlp", data=packed)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = command(*args, "--save", whole, "--load", whole)
    assert result.code == 0, result.err
    assert f"in sequences of 16 tokens cut {cut} of " in result.out
    for _ in range(2):
        assert command(*args, "--save", parts, "--load", parts, "--exit-after-iters", 3).code == 0
    assert_same_run(whole, parts)
    refused = command(*args, "--data-path", corpus.data[0], "--save", tmp_path / "no")
    assert refused.code == 1 and "does not mark its answers" in refused.err
