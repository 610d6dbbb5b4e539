"""Export as Megatron-LM classic and DeepSpeed layer files: read again, every bit is the same."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from support.deepspeed_files import write_deepspeed
from support.interop_models import MODELS, run_config
from support.megatron_files import core_model, in_order, legacy_model, read_state

from megatron_lite.checkpoint.stored_model import stored_model
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.interop.megatron.export import MegatronExportOptions, export_megatron, plan_megatron_export
from megatron_lite.interop.megatron.naming import CORE_LOCAL, CORE_TE, DEEPSPEED, LEGACY
from megatron_lite.interop.megatron.written_arguments import problems, written_arguments
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.schedules.progress import Progress


def exported(folder, output, **options):
    return export_megatron(plan_megatron_export(str(folder), 0, MegatronExportOptions(**options)), output)


EXPORTS = {
    "gpt2": ("gpt2", {}),
    "gpt2, legacy": ("gpt2", {"naming": "legacy", "tp": 2, "pp": 2}),
    "gpt2, deepspeed": ("gpt2", {"to": "deepspeed", "tp": 2, "pp": 2}),
    "untied": ("gpt2 erf untied", {"tp": 2, "pp": 4}),
    "untied, legacy": ("gpt2 erf untied", {"pp": 2, "naming": "legacy"}),
    "zero-centered": ("gpt2 zero-centered", {"tp": 4, "naming": "transformer-engine"}),
    "bloom": ("bloom", {"to": "deepspeed", "tp": 2}),
    "bloom, classic": ("bloom", {"tp": 2, "pp": 2}),
    "llama": ("llama", {"tp": 2, "pp": 2}),
    "llama, legacy": ("llama", {"tp": 2, "naming": "legacy"}),
    "qwen2": ("qwen2", {"pp": 2}),
    "qwen3": ("qwen3", {"tp": 2, "naming": "transformer-engine"}),
    "neox": ("gpt-neox", {"tp": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_every_bit_comes_back(name, make_checkpoint, imported, same, tmp_path):
    model, options = EXPORTS[name]
    folder = make_checkpoint("ck", **MODELS[model][1])
    state = read_state(folder / "iter_0000007")
    exported(folder, tmp_path / "megatron", **options)
    _, source = imported(tmp_path / "megatron", tmp_path / "back")
    same(source, state)
    before = stored_model(read_manifest(folder / "iter_0000007"), folder).model
    after = stored_model(source.manifest, folder).model
    for field in vars(before):
        if "vocab_size" not in field and not (
            field == "max_position_embeddings" and before.position_embedding != "learned"
        ):
            assert getattr(after, field) == getattr(before, field), field


def test_the_files_are_those_of_the_description(make_checkpoint, tmp_path):
    folder = make_checkpoint("ck", make_vocab_size_divisible_by=16)  # as the description's files: no padding
    state = read_state(folder / "iter_0000007")
    model = stored_model(read_manifest(folder / "iter_0000007"), folder).model
    for naming, build in (("legacy", legacy_model), ("local", core_model)):
        exported(folder, tmp_path / naming, tp=2, pp=2, naming=naming)
        for rank in range(2):
            for stage in range(2):
                path = tmp_path / naming / "iter_0000007" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
                content = torch.load(path, weights_only=False)
                assert isinstance(content["args"], argparse.Namespace)
                assert content["checkpoint_version"] == 3.0
                assert content["args"].padded_vocab_size == 96
                found = sorted(map(described, in_order(content["model"])))
                assert found == sorted(map(described, in_order(build(state, model, rank, 2, stage, 2)))), naming
        assert (tmp_path / naming / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8") == "7"
    exported(folder, tmp_path / "ds", to="deepspeed", tp=2)
    write_deepspeed(tmp_path / "expected", state, model, 2)
    for path in (tmp_path / "expected" / "global_step7").glob("layer_*"):
        found = torch.load(tmp_path / "ds" / "global_step7" / path.name)
        expected = torch.load(path)
        assert found.keys() == expected.keys()
        assert all(described(found[name]) == described(expected[name]) for name in found), path.name
    assert (tmp_path / "ds" / "latest").read_text(encoding="utf-8") == "global_step7"


def described(tensor):
    """Shape and content."""
    return tuple(tensor.shape), tensor.flatten().tolist()


def test_dtype_and_gated_halves(make_checkpoint, imported, tmp_path):
    folder = make_checkpoint("ck", activation="geglu", ffn_hidden_size=48)
    state = read_state(folder / "iter_0000007")
    exported(folder, tmp_path / "ds", to="deepspeed", dtype=torch.bfloat16)
    found = torch.load(tmp_path / "ds" / "global_step7" / "layer_03-model_00-model_states.pt")
    gate, up = state["decoder.layers.0.mlp.fc1.weight"].bfloat16()
    assert found["mlp.dense_h_to_4h.weight"].equal(torch.cat((up, gate)))
    report, _ = imported(tmp_path / "ds", tmp_path / "back")
    assert report.config.precision.dtype == "bf16"


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        ("gpt-neox parallel", {}, "--parallel-residual"),
        ("llama", {"to": "deepspeed"}, "--normalization RMSNorm"),
        ("qwen3", {"naming": "legacy"}, "--qk-layernorm"),
        ("bloom", {"naming": "local"}, "--naming legacy"),
        ("llama biases", {}, "--disable-bias-linear"),
        ("algpt2", {}, "--share-layers all, --embedding-size 16"),
        ("algpt2", {"to": "deepspeed"}, "--share-layers all, --embedding-size 16"),
    ],
)
def test_models_that_a_format_cannot_express(model, options, text, make_checkpoint, tmp_path):
    fields = {**MODELS[model][1]}
    if model == "llama biases":
        fields["linear_bias"] = False
        text = "--activation geglu|does not support --normalization"
    folder = make_checkpoint("ck", **fields)
    with pytest.raises(CheckpointError, match=text):
        exported(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_an_export_refuses(make_checkpoint, tmp_path, monkeypatch):
    folder = make_checkpoint("ck")
    for options, text in (
        ({"tp": 3}, "--target-tensor-parallel 3"),
        ({"pp": 3}, "Cannot split 4 layers over 3 ranks .--target-pipeline-parallel 3"),
    ):
        with pytest.raises(ConfigError, match=text):
            exported(folder, tmp_path / "out", **options)
    with pytest.raises(CheckpointError, match="does not exist"):
        exported(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists already"):
        exported(folder, folder)
    from megatron_lite.interop.megatron import export

    with monkeypatch.context() as patch:
        patch.setattr(export, "gate_first", lambda model, scheme: False)
        gated = make_checkpoint("gated", activation="swiglu", ffn_hidden_size=48)
        with pytest.raises(CheckpointError, match="The export is not correct"):
            exported(gated, tmp_path / "out")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        exported(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "gated"]


def test_nan_weights(make_checkpoint, tmp_path, monkeypatch):
    from megatron_lite.interop.export import Weights

    folder, read = make_checkpoint("ck"), Weights.read
    monkeypatch.setattr(Weights, "read", lambda self, *where: read(self, *where) * float("nan"))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        exported(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def _others(value, kind):
    """Return other values of a field of the model."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value * 2 or type(value)(1)]
    return [choice for choice in get_args(kind) if choice != value] or ["all"]  # --share-layers


@pytest.mark.parametrize("scheme", [LEGACY, CORE_LOCAL, CORE_TE, DEEPSPEED], ids=lambda scheme: scheme.title)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_field_of_the_model_is_written_or_refused(name, scheme):
    """A field added to the model must reach the files, or be refused."""
    elsewhere = {"vocab_size", "scaled_init"}  # the number of rows and the tokenizer's files hold the vocabulary
    model = run_config(**MODELS[name][1]).model
    kinds = get_type_hints(type(model))

    def written(model):
        return list(problems(model, scheme)) or written_arguments(
            model, scheme, tp=1, pp=1, rows=model.padded_vocab_size, progress=Progress(), seq_length=32, dtype=None
        )

    if name == "llama" and scheme is DEEPSPEED:
        assert list(problems(model, scheme))
        return
    for field in set(vars(model)) - elsewhere:
        if field.startswith("rotary_") and model.position_embedding != "rotary" and scheme is not DEEPSPEED:
            continue
        for value in _others(getattr(model, field), kinds[field]):
            assert written(replace(model, **{field: value})) != written(model), (field, value)
