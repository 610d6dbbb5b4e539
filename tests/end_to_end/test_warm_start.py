"""examples/warm_start/grow.py, and training from a grown checkpoint with its optimizer's state."""

import importlib.util
import json
from pathlib import Path

import pytest
from support.checkpoints import read_tensor
from support.trainer import command, iterations, records

from megatron_lite.runs.manifest import read_manifest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_example_runs_the_chain(tmp_path, capfd):
    spec = importlib.util.spec_from_file_location("grow", ROOT / "examples" / "warm_start" / "grow.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder = tmp_path / "chain"
    example.grow(folder, iterations=2, megabytes=0.1)
    out = capfd.readouterr().out
    assert "layers      3 -> 4 (x 1.33)" in out and "copies of   0 0 1 2 2 3" in out
    assert out.count("perplexity") == 3
    for name, layers in (("580m", 3), ("760m", 4), ("1.1b", 6)):
        manifest = read_manifest(folder / name / "iter_0000002")
        assert manifest.provenance.config["model"]["num_layers"] == layers
        assert iterations(folder / name) == [1, 2], "data and schedule from the start"


def test_a_carried_optimizer_continues_and_progress_does_not(corpus, tmp_path):
    first, more = tmp_path / "first", tmp_path / "more"
    trained = command(*corpus.job("--train-iters", 3, "--save", first, "--save-interval", 3, "--bf16"))
    assert trained.code == 0, trained
    assert command("upscale", first, "--layers", 3, "--output", tmp_path / "grown", "--optimizer", "carry").code == 0
    job = corpus.job("--train-iters", 2, "--save-interval", 2, "--bf16", "--num-layers", 3)
    trained = command(*job, "--load", tmp_path / "grown", "--save", more)
    assert trained.code == 0, trained
    assert [record["iteration"] for record in records(more) if record["kind"] == "iteration"] == [1, 2]
    assert read_manifest(more / "iter_0000002").scalars["engine"]["step"] == 5
    # Without the optimizer's state, the message says how to load it.
    assert command("upscale", first, "--layers", 3, "--output", tmp_path / "fresh").code == 0
    refused = command(*job, "--load", tmp_path / "fresh", "--save", tmp_path / "none")
    assert refused.code == 1 and "--no-load-optim" in refused.err
    exported = command("export", more, "--output", tmp_path / "exported", "--no-verify")
    assert exported.code == 0, exported
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["n_layer"] == 3
    moments = "optimizer.exp_avg.decoder.layers.1.mlp.fc1.weight"
    assert read_tensor(tmp_path / "grown" / "iter_0000000", moments).equal(
        read_tensor(first / "iter_0000003", moments.replace("layers.1", "layers.0"))
    )
