"""A run with another optimizer and a moving average of its weights: trained, resumed, evaluated and exported."""

import json

import pytest
from safetensors.torch import load_file
from support.trainer import assert_same_run, command, measured

pytestmark = pytest.mark.slow

ARGS = ("--optimizer", "muon", "--ema-decay", 0.9, "--bf16", "--train-iters", 6, "--eval-interval", 3)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trained = command(*corpus.job(*ARGS, "--save", folder, "--save-interval", 3))
    assert trained.code == 0, trained
    assert "Megatron's defaults differ" in trained.err
    return folder


def validations(folder):
    return {
        (record["iteration"], record["split"], record.get("name", "")): record["losses"]["lm loss"]
        for record in measured(folder)
        if record["kind"] == "validation"
    }


def test_weights_and_average_are_evaluated_on_the_same_samples(run):
    found = validations(run)
    assert {key[2] for key in found} == {"", "EMA"}
    for (iteration, split, name), loss in found.items():
        other = found[iteration, split, "" if name else "EMA"]
        assert loss != other and loss == pytest.approx(other, rel=0.05)


def test_a_resume_is_exact(run, corpus, tmp_path):
    folder = tmp_path / "resumed"
    job = corpus.job(*ARGS, "--save", folder, "--load", folder, "--save-interval", 3)
    assert command(*job, "--exit-interval", 3).code == 0
    assert command(*job).code == 0
    assert_same_run(run, folder)


def test_average_in_evaluate_generate_and_export(run, corpus, tmp_path):
    text = tmp_path / "held-out.txt"
    text.write_text("abc def " * 20)
    losses = []
    for extra in ((), ("--ema",)):
        result = command("evaluate", "--load", run, "--device", "cpu", "--text", text, "--json", *extra)
        assert result.code == 0 and ("moving average" in result.err) is bool(extra), result
        losses.append(json.loads(result.out)["results"][0]["loss"])
    assert losses[0] != losses[1]
    words = ("--load", run, "--device", "cpu", "--prompt", "abc", "--greedy", "--max-new-tokens", 2, "--ema")
    assert command("generate", *words).code == 0
    for extra, name in (((), "weights"), (("--ema",), "average")):
        made = command("export", run, "--output", tmp_path / name, "--no-card", "--no-verify", *extra)
        assert made.code == 0, made
    weights, average = (load_file(tmp_path / name / "model.safetensors") for name in ("weights", "average"))
    assert {name: tensor.dtype for name, tensor in average.items()} == {n: t.dtype for n, t in weights.items()}
    assert any((average[name] != tensor).any() for name, tensor in weights.items())


def test_average_and_optimizer_must_match_the_checkpoint(run, corpus, tmp_path):
    without = corpus.job("--optimizer", "muon", "--bf16", "--train-iters", 7, "--load", run, "--override-lr-scheduler")
    refused = command(*without)
    assert refused.code == 1 and "Add the --ema-decay with which it was saved" in refused.err
    other = corpus.job("--bf16", "--train-iters", 7, "--load", run, "--ema-decay", 0.9, "--override-lr-scheduler")
    refused = command(*other)
    assert refused.code == 1 and "--optimizer muon" in refused.err and "--no-load-optim" in refused.err
    plain = tmp_path / "plain"
    assert command(*corpus.job("--train-iters", 1, "--save", plain, "--save-interval", 1)).code == 0
    refused = command("generate", "--load", plain, "--device", "cpu", "--prompt", "a", "--ema")
    assert refused.code == 1 and "has no moving average of the weights" in refused.err
    begun = corpus.job("--train-iters", 2, "--load", plain, "--ema-decay", 0.9, "--override-lr-scheduler")
    assert command(*begun).code == 0
