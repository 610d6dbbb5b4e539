"""Tests of upscale: map of layers, exact copies, preserved function, residual scale, no partial output."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.interop_models import VOCAB, run_config

from megatron_lite.checkpoint import writing
from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.names import EMA_PREFIX, MAIN_PREFIX
from megatron_lite.checkpoint.reading import CheckpointReader
from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.checkpoint.upscaling import UpscaleOptions, added_layers, source_layers, upscale
from megatron_lite.checkpoint.verify import verify_checkpoint
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.cli.main import main
from megatron_lite.cli.upscale import run
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.config.parameters import parameter_shapes
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.interop.streamed_logits import streamed_logits
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.runs.comparison import config_as_json
from megatron_lite.runs.manifest import Provenance, read_manifest
from megatron_lite.schedules.progress import Progress

MOMENTS = ("optimizer.exp_avg.", "optimizer.exp_avg_sq.")
PROJECTIONS = ("self_attention.proj", "mlp.fc2")


@pytest.fixture(scope="module")
def make(kit, tmp_path_factory):
    """Save a random model of three layers with fp32 main parameters and moments; return its path."""

    def save(*, optimizer=True, average=False, **fields):
        config = run_config("bf16", **{"num_layers": 3, "position_embedding": "alibi", **fields})
        config = replace(config, optimizer=OptimizerConfig(ema_decay=0.99 if average else 0.0))
        draw, tensors = torch.Generator().manual_seed(1), {}
        for name, shape in parameter_shapes(config.model).items():
            main = torch.randn(shape, generator=draw) * 0.2
            tensors |= {name: main.bfloat16(), MAIN_PREFIX + name: main}
            tensors |= {kind + name: torch.rand(shape, generator=draw) for kind in MOMENTS if optimizer}
            if average:
                tensors[EMA_PREFIX + name] = main * 0.5
        scalars = {"progress": Progress(iteration=7, consumed_train_samples=28).to_dict(), "engine": {"step": 5}}
        prints = {"tokenizer": "sha256:a", "data source 1": "sha256:b"}
        request = SaveRequest(tmp_path_factory.mktemp("run"), 7, scalars, Provenance(config_as_json(config), prints))
        return save_checkpoint(request, kit.held(tensors), kit.world).path

    return save


@pytest.fixture(scope="module")
def path(make):
    return make()


def grown(path, output, layers=5, **options):
    return upscale(path, output, UpscaleOptions(num_layers=layers, **options)).save.path


def values(path):
    """Return all tensors of a checkpoint by name."""
    reader = CheckpointReader(path)
    plain = {name: torch.empty(info.shape, dtype=getattr(torch, info.dtype)) for name, info in reader.tensors.items()}
    held = [GlobalTensor(n, tuple(x.shape), x.dtype, [Piece((0,) * x.dim(), x)]) for n, x in plain.items()]
    reader.plan([(tensor, tensor.name) for tensor in held]).read()
    return plain


def logits(path):
    config = read_manifest(path).provenance.config["model"]
    tokens = torch.arange(24).view(2, 12) % VOCAB
    model = run_config(**{**config, "padded_vocab_size": 0}).model
    return streamed_logits(model, CheckpointReader(path), tokens)


def test_the_maps_of_the_original():
    assert source_layers(18, 24, "interleave") == (
        *(0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 12, 13, 14, 15, 15, 16, 17),
    )
    assert source_layers(24, 36, "interleave")[:7] == (0, 0, 1, 2, 2, 3, 4)
    assert source_layers(18, 24, "stack") == (*range(18), *range(6))


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["interleave", "stack"]))
def test_layers_without_the_added_ones_are_the_given_ones(layers, more, order):
    sources = source_layers(layers, layers + more, order)
    added = added_layers(sources)
    assert [source for number, source in enumerate(sources) if number not in added] == list(range(layers))
    assert len(added) == more


@pytest.mark.parametrize("order", ["interleave", "stack"])
@pytest.mark.parametrize("carry", [False, True])
def test_every_tensor_is_that_of_its_source(path, tmp_path, order, carry):
    new = grown(path, tmp_path / "new", order=order, carry_optimizer=carry)
    verify_checkpoint(new)
    before, after = values(path), values(new)
    expected = {}
    for name in before:
        if not carry and name.startswith(MOMENTS):
            continue
        head, separator, rest = name.partition("decoder.layers.")
        number, _, tail = rest.partition(".")
        for new_number, source in enumerate(source_layers(3, 5, order)):
            if not separator:
                expected[name] = name
            elif source == int(number):
                expected[f"{head}{separator}{new_number}.{tail}"] = name
    assert after.keys() == expected.keys()
    assert {MAIN_PREFIX + "decoder.layers.4.mlp.fc1.weight", "decoder.layers.4.mlp.fc1.weight"} <= after.keys()
    for name, source in expected.items():
        assert after[name].dtype == before[source].dtype
        assert after[name].equal(before[source]), name


@pytest.mark.parametrize(
    ("share", "layers", "copies"),
    [
        ("all", 6, {"mlp": {0: 0}, "self_attention": {0: 0}}),
        ("2", 6, {"mlp": {0: 0, 3: 2}, "self_attention": {0: 0, 3: 2}}),
        ("mlp", 5, {"mlp": {0: 0}, "self_attention": {0: 0, 1: 0, 2: 1, 3: 2, 4: 3}}),
    ],
)
def test_shared_parameters_stay_shared(make, tmp_path, share, layers, copies):
    path = make(share_layers=share, num_layers=4)
    new = grown(path, tmp_path / "new", layers)
    before, after = values(path), values(new)
    shape = parameter_shapes(run_config(num_layers=layers, share_layers=share, position_embedding="alibi").model)
    assert {name: tuple(x.shape) for name, x in after.items() if not name.startswith("optimizer")} == shape
    for part, tail in (("mlp", "fc1.weight"), ("self_attention", "qkv.bias")):
        stored = {number for number in range(layers) if f"decoder.layers.{number}.{part}.{tail}" in after}
        assert stored == copies[part].keys()
        for number, source in copies[part].items():
            assert after[f"decoder.layers.{number}.{part}.{tail}"].equal(
                before[f"decoder.layers.{source}.{part}.{tail}"]
            )


@pytest.mark.slow
@pytest.mark.parametrize("order", ["interleave", "stack"])
@pytest.mark.parametrize("fields", [{}, {"parallel_residual": True, "position_embedding": "rotary"}])
def test_preserve_function_keeps_the_logits(make, tmp_path, order, fields):
    path = make(**fields)
    kept = logits(grown(path, tmp_path / "kept", order=order, preserve_function=True))
    wanted = logits(path)
    assert (kept - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    changed = logits(grown(path, tmp_path / "changed", order=order))
    assert (changed - wanted).abs().max() > 1e-2 * wanted.abs().max()


def test_preserve_function_sets_only_output_projections_of_added_layers_to_zero(path, tmp_path):
    new = grown(path, tmp_path / "new", order="stack", preserve_function=True, carry_optimizer=True)
    for name, value in values(new).items():
        zero = ".layers.3." in name or ".layers.4." in name
        zero = zero and any(part in name for part in PROJECTIONS) and not name.startswith(MOMENTS)
        assert bool((value == 0).all()) == zero, name


@pytest.mark.slow
def test_the_moving_average_can_be_copied_or_carried(make, path, tmp_path):
    averaged = make(average=True)
    before = values(averaged)
    after = values(grown(averaged, tmp_path / "averaged", averaged=True, preserve_function=True))
    for name, source in (("decoder.layers.4.mlp.fc1.weight", 2), ("decoder.final_norm.weight", None)):
        main = before[EMA_PREFIX + name.replace("layers.4", f"layers.{source}")]
        assert after[MAIN_PREFIX + name].equal(main) and after[name].equal(main.bfloat16())
    assert not any(name.startswith(EMA_PREFIX) for name in after)
    after = values(grown(averaged, tmp_path / "carried", order="stack", preserve_function=True, carry_optimizer=True))
    assert after[EMA_PREFIX + "decoder.layers.3.mlp.fc1.bias"].equal(
        before[EMA_PREFIX + "decoder.layers.0.mlp.fc1.bias"]
    )
    assert not after[EMA_PREFIX + "decoder.layers.3.mlp.fc2.bias"].any()
    with pytest.raises(CheckpointError, match=r"has no moving average.*Remove --ema"):
        grown(path, tmp_path / "none", averaged=True)


def test_scale_residual_multiplies_the_output_projections(path, tmp_path):
    new = grown(path, tmp_path / "new", scale_residual=True, carry_optimizer=True)
    factor, before, after = math.sqrt(3 / 5), values(path), values(new)
    for name, part in (("weight", PROJECTIONS[0]), ("bias", PROJECTIONS[1])):
        saved, copy = (f"decoder.layers.{layer}.{part}.{name}" for layer in (2, 4))
        main = (before[MAIN_PREFIX + saved].double() * factor).float()
        assert after[MAIN_PREFIX + copy].equal(main)
        assert after[copy].equal(main.bfloat16())
        assert after[MOMENTS[0] + copy].equal(before[MOMENTS[0] + saved])
    assert after["decoder.layers.4.mlp.fc1.weight"].equal(before["decoder.layers.2.mlp.fc1.weight"])


@pytest.mark.parametrize("carry", [False, True])
def test_the_new_run_starts_at_iteration_0(path, tmp_path, carry):
    manifest = read_manifest(grown(path, tmp_path / "new", carry_optimizer=carry))
    assert manifest.iteration == 0
    assert manifest.scalars == {"progress": Progress().to_dict()} | ({"engine": {"step": 5}} if carry else {})
    config = manifest.provenance.config
    assert config.keys() - {"optimizer"} == {"model", "tokenizer", "precision", "batch"}, "no schedule and no data"
    assert config["model"]["num_layers"] == 5
    assert manifest.provenance.fingerprints == {
        "tokenizer": "sha256:a",
        "upscaled from": f"{path}, layers 0 0 1 1 2",
    }


def test_the_command_prints_factors_and_the_map(path, tmp_path, capsys):
    assert run([str(path), "--layers", "4", "--output", str(tmp_path / "new"), "--preserve-function"]) == 0
    out = capsys.readouterr().out
    assert "layers      3 -> 4 (x 1.33)" in out
    counts = [
        sum(
            math.prod(shape)
            for shape in parameter_shapes(run_config(num_layers=n, position_embedding="alibi").model).values()
        )
        for n in (3, 4)
    ]
    assert f"parameters  {counts[0]:,} -> {counts[1]:,} (x {counts[1] / counts[0]:.3g})" in out
    assert "copies of   0 0* 1 2" in out
    assert f"--load {tmp_path / 'new'} --finetune --save" in out and "--num-layers 4" in out
    assert run([str(path), "--layers", "4", "--output", str(tmp_path / "carry"), "--optimizer", "carry"]) == 0
    assert "--finetune" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_printed_command_has_the_flags_of_the_carried_state(make, tmp_path, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    carry = ("--optimizer", "carry", "--ema")
    assert run([str(make(average=True)), "--layers", "4", "--output", str(first), *carry]) == 0
    assert run([str(first), "--layers", "5", "--output", str(again), *carry]) == 0
    assert capsys.readouterr().out.count("--ema-decay 0.99") == 2
    assert run([str(first), "--layers", "5", "--output", str(tmp_path / "fresh"), "--ema"]) == 0
    assert "--ema-decay" not in capsys.readouterr().out


def test_a_checkpoint_without_optimizer_state_is_loaded_with_finetune(kit, path, tmp_path):
    new = grown(path, tmp_path / "new")
    held = kit.held({"optimizer.exp_avg.decoder.final_norm.weight": torch.zeros(32)})
    with pytest.raises(CheckpointError, match=r"has no optimizer state\. Add --finetune .* or --no-load-optim"):
        load_checkpoint(new, held, kit.world)


def test_an_output_with_a_checkpoint_is_refused(path, tmp_path, capsys):
    arguments = ["upscale", str(path), "--layers", "4", "--output", str(tmp_path / "new")]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert "contains a checkpoint of iteration 0 already. Give --output a new folder" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="contains a checkpoint of iteration 7 already"):
        grown(path, path.parent)
    with pytest.raises(CheckpointError, match="has the name of a single checkpoint"):
        grown(path, tmp_path / "iter_0000003")


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({"layers": 3}, {}, r"--layers 3 is not more than the 3 layers of .* Give --layers 4 or more, for example"),
        (
            {"preserve_function": True, "scale_residual": True},
            {},
            "contradict each other.*Remove --scale-residual to keep",
        ),
        ({"preserve_function": True}, {"residual_post_layernorm": True}, "residual after the norm.*Remove --preserve"),
        ({"preserve_function": True}, {"share_layers": "mlp"}, "share-layers mlp.*Remove --preserve-function"),
        ({"layers": 7}, {"share_layers": "2", "num_layers": 4}, "into the 2 groups.*Use --layers 6 or 8"),
        ({"layers": 8, "order": "stack"}, {"share_layers": "2", "num_layers": 4}, "Use --order interleave"),
    ],
)
def test_contradicting_options_are_refused(make, tmp_path, options, fields, message):
    with pytest.raises(ConfigError, match=message):
        grown(make(**fields), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_missing_optimizer_cannot_be_carried(make, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no optimizer state\. Remove --optimizer carry"):
        grown(make(optimizer=False), tmp_path / "new", carry_optimizer=True)


@pytest.mark.parametrize("number", [1, 40])
def test_an_interruption_leaves_nothing(path, tmp_path, monkeypatch, number):
    class Interrupted(io.FileIO):
        def write(self, data):
            nonlocal number
            number -= 1
            if not number:
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr(writing, "FileIO", Interrupted)
    monkeypatch.setattr(writing, "_BUFFER", 1)
    assert main(["upscale", str(path), "--layers", "5", "--output", str(tmp_path / "new")]) == 130
    assert not (tmp_path / "new").exists()
