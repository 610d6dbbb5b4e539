"""Export of every architecture from every layout: transformers computes the same, and a failure leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.interop_models import MODELS, VOCAB, run_config

from megatron_lite.checkpoint.reading import CheckpointReader, compare_checkpoints
from megatron_lite.checkpoint.sources import TensorInfo
from megatron_lite.config.parameters import parameter_shapes
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.generation.generate import generate
from megatron_lite.generation.requests import Context, Request
from megatron_lite.generation.restore import restore_model
from megatron_lite.generation.sampling import Sampling
from megatron_lite.interop import transformers_logits
from megatron_lite.interop.architectures.registry import architecture_for
from megatron_lite.interop.architectures.rope import write_rope
from megatron_lite.interop.export import ExportOptions, export_checkpoint, plan_export
from megatron_lite.interop.importing import ImportOptions, import_checkpoint
from megatron_lite.interop.streamed_logits import streamed_logits
from megatron_lite.runs.manifest import Provenance, encode_manifest, read_manifest

NO_CHECK = ExportOptions(verify=False)


def export(load, output, **options):
    return export_checkpoint(plan_export(str(load), 0, ExportOptions(**options)), output)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_export_import_export(name, make_checkpoint, tmp_path, transformers):
    architecture, fields = MODELS[name]
    load = make_checkpoint(**fields)
    report = export(load, tmp_path / "out")
    assert report.verification.largest < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["architectures"] == [architecture]
    generated_alike(load, tmp_path / "out", transformers)
    back = import_checkpoint(tmp_path / "out", tmp_path / "back", ImportOptions())
    assert back.verification.largest < 1e-5
    export(tmp_path / "back", tmp_path / "again", verify=False)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")
    if not fields.get("zero_centered_norm"):
        differences = list(compare_checkpoints(load / "iter_0000007", tmp_path / "back" / "iter_0000000"))
        assert len(differences) == len(parameter_shapes(run_config(**fields).model))
        assert all(difference.equal for difference in differences)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_is_exported_as_the_same_bytes(name, make_checkpoint, tmp_path):
    """Those of the checkpoint of one rank, whose logits, import and export test_export_import_export compares."""
    fields = MODELS[name][1]
    whole = make_checkpoint("whole", **fields)
    export(whole, tmp_path / "exported", verify=False)
    for tp, pp in ((2, 1), (1, 2), (2, 2)):
        layout = f"tp {tp}, pp {pp}"
        load = make_checkpoint(layout, tp=tp, pp=pp, **fields)
        differences = list(compare_checkpoints(whole / "iter_0000007", load / "iter_0000007"))
        assert len(differences) == len(parameter_shapes(run_config(**fields).model))
        assert all(difference.equal for difference in differences), layout
        export(load, tmp_path / f"exported of {layout}", verify=False)
        assert bytes_of(tmp_path / "exported") == bytes_of(tmp_path / f"exported of {layout}"), layout


def generated_alike(load, folder, transformers):
    """50 tokens, each the likeliest."""
    model, problem = transformers_logits.load(folder)
    assert not problem
    prompt = [5, 17, 3]
    theirs = model.generate(
        torch.tensor([prompt]), do_sample=False, min_new_tokens=50, max_new_tokens=50, pad_token_id=0
    )
    restored = restore_model(str(load), 0, RuntimeConfig(device="cpu"))
    request = Request(prompt=prompt, max_new_tokens=50, sampling=Sampling(temperature=0.0))
    ((_, ours),) = generate(restored.stage, [request], context=Context(64))
    assert ours.tokens == theirs[0, 3:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2 zero-centered", "llama"])
def test_half_precision_is_compared_to_fp32_rounding(name, dtype, make_checkpoint, tmp_path):
    load = make_checkpoint(dtype=dtype, **MODELS[name][1])
    report = export(load, tmp_path / "out")
    assert report.verification.largest < 1e-5
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16 if dtype == "bf16" else torch.float16}
    import_checkpoint(tmp_path / "out", tmp_path / "back", ImportOptions())
    export(tmp_path / "back", tmp_path / "again", verify=False)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")


def test_dtype_and_shards(make_checkpoint, tmp_path):
    load = make_checkpoint()
    export(load, tmp_path / "whole", verify=False)
    report = export(load, tmp_path / "out", dtype=torch.bfloat16, max_shard_size=20_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(path.stat().st_size < 24_000 for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == set(shards)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / "out" / file)[name].equal(whole[name].bfloat16())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes // 2 for tensor in whole.values())
    assert "model.safetensors.index.json" in report.files
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_one_tensor_is_in_memory_at_a_time(make_checkpoint, tmp_path, monkeypatch):
    """Tiles are read and written one by one; only a tensor that is rearranged is held, and only one."""
    from megatron_lite.checkpoint import tiles

    monkeypatch.setattr(tiles, "MIN_TILE", 512)
    monkeypatch.setattr(tiles, "MAX_TILE", 2048)
    load = make_checkpoint()
    sizes = []
    inner = CheckpointReader.read

    def read(*args):
        tensor = inner(*args)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(CheckpointReader, "read", read)
    plan = plan_export(str(load), 0, NO_CHECK)
    export_checkpoint(plan, tmp_path / "out")
    largest = max(4 * 32 * 128, 4 * 96 * 32)  # fc1, qkv
    assert max(sizes) <= largest
    # Each weight is read once, the tied table too.
    assert sum(sizes) == sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


def test_main_parameters_are_the_weights_in_fp32(make_checkpoint, tmp_path):
    load = make_checkpoint(dtype="bf16")
    path = load / "iter_0000007"
    manifest = read_manifest(path)
    # As a bf16 run leaves it: the fp32 values beside their roundings.
    from megatron_lite.checkpoint.rewriting import write_source
    from megatron_lite.checkpoint.writing import SaveRequest

    source = CheckpointReader(path)

    class WithMain:
        tensors = source.tensors | {
            f"optimizer.main_param.{name}": TensorInfo(info.shape, "float32") for name, info in source.tensors.items()
        }

        def read(self, name, rectangle):
            if name in source.tensors:
                return source.read(name, rectangle)
            return source.read(name.removeprefix("optimizer.main_param."), rectangle).float() + 2**-12

    request = SaveRequest(tmp_path / "run", 9, manifest.scalars, manifest.provenance)
    write_source(request, WithMain())
    export(tmp_path / "run", tmp_path / "wide", dtype=torch.float32)
    export(tmp_path / "run", tmp_path / "narrow")
    norm = "transformer.ln_f.weight"
    wide = load_file(tmp_path / "wide" / "model.safetensors")[norm]
    narrow = load_file(tmp_path / "narrow" / "model.safetensors")[norm]
    assert narrow.dtype == torch.bfloat16
    assert wide.equal(narrow.float() + 2**-12)


PROPERTIES = {
    "no positions": ({"position_embedding": "none"}, "none positions"),
    "alibi without its norm": ({"position_embedding": "alibi"}, "missing --embed-layernorm"),
    "grouped queries with learned positions": ({"num_query_groups": 2}, "--num-query-groups"),
    "interleaved": ({"position_embedding": "rotary", "rotary_interleaved": True}, "--rotary-interleaved"),
    "post-norm": ({"residual_post_layernorm": True}, "--apply-residual-connection-post-layernorm"),
    "parallel gpt-2": ({"parallel_residual": True}, "--parallel-residual"),
    "kv channels": ({"head_dim": 16}, "--kv-channels"),
    "query norms": ({"qk_layernorm": True}, "--qk-layernorm"),
    "partial llama": ({**MODELS["llama"][1], "rotary_percent": 0.5}, "--rotary-percent 0.5"),
    "lonely qkv bias": ({**MODELS["llama"][1], "linear_bias": True}, "--disable-qkv-bias"),
    "gated gpt-2": ({"activation": "swiglu"}, "--activation swiglu"),
    "shared layers of a llama": ({**MODELS["llama"][1], "share_layers": "all"}, "--share-layers all"),
    "narrow embedding with alibi": (
        {**MODELS["bloom"][1], "embedding_size": 16},
        "fails only on --embedding-size 16",
    ),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_property_at_fault_is_named(name):
    fields, named = PROPERTIES[name]
    with pytest.raises(ConfigError, match="No class of transformers computes") as caught:
        architecture_for(run_config(**fields).model)
    assert named in str(caught.value)


def test_every_property_matters_somewhere():
    """Each field of the model is written, refused, or does not change a trained model's function."""
    passive = {"make_vocab_size_divisible_by", "padded_vocab_size", "scaled_init", "fp32_residual", "hidden_dropout"}
    others = {
        "rotary_interleaved": True,
        "position_embedding": "none",
        "qk_layernorm": True,
        "normalization": "RMSNorm",
    }
    for name, (_, fields) in MODELS.items():
        model = run_config(**fields).model
        if model.position_embedding != "rotary":
            passive_here = passive | {"rotary_base", "rotary_percent", "rotary_interleaved", "rotary_scaling"}
        else:
            passive_here = passive
        architecture = architecture_for(model)
        before = architecture.write_config(model, 64), [*map(repr, architecture.entries(model))], model.vocab_size
        for field, value in vars(model).items():
            if field in passive_here or field in others:
                continue
            changed = replace(model, **{field: _another(value)})
            after = architecture.write_config(changed, 64) if not list(architecture.problems(changed)) else "refused"
            both = (after, [*map(repr, architecture.entries(changed))], changed.vocab_size)
            assert both != before or field in ("tied_embeddings", "vocab_size", "max_position_embeddings"), (
                name,
                field,
            )


def _another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 or 8
    other = {"": "all", "all": "2", "attention": "mlp", "learned": "none", "rotary": "none", "alibi": "none"}
    return (other | {"LayerNorm": "RMSNorm", "RMSNorm": "LayerNorm"}).get(
        value, "squared_relu" if value != "squared_relu" else "relu"
    )


def test_an_architecture_can_be_asked_for(make_checkpoint, tmp_path):
    load = make_checkpoint(**MODELS["llama"][1])
    with pytest.raises(
        ConfigError,
        match=r"Qwen2ForCausalLM does not compute this model, because of missing --add-qkv-bias.*--architecture Llama",
    ):
        plan_export(str(load), 0, ExportOptions(architecture="Qwen2ForCausalLM"))
    with pytest.raises(ConfigError, match="--architecture Falcon"):
        plan_export(str(load), 0, ExportOptions(architecture="Falcon"))
    assert export(load, tmp_path / "out", architecture="LlamaForCausalLM").verification.largest < 1e-5


def test_both_generations_of_transformers_read_the_rotary_settings():
    model = run_config(position_embedding="rotary", rotary_base=500.0, rotary_scaling=4.0).model
    written = write_rope(model)
    assert written["rope_parameters"] == {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}
    assert written["rope_theta"] == 500.0
    assert written["rope_scaling"]["factor"] == 4.0


def test_a_wrong_conversion_is_found_and_leaves_nothing(make_checkpoint, tmp_path, monkeypatch):
    """The check of the check: other activations, swapped norms and another base are far above the tolerance."""
    from megatron_lite.interop.architectures.gpt2 import GPT2

    load = make_checkpoint()
    right = GPT2.write_config
    monkeypatch.setattr(GPT2, "write_config", lambda *args: {**right(*args), "activation_function": "gelu"})
    with pytest.raises(CheckpointError, match="The logits in transformers differ by up to") as caught:
        export(load, tmp_path / "out")
    assert "--tolerance" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


def test_a_tensor_that_transformers_does_not_know_is_found(make_checkpoint, tmp_path, monkeypatch):
    from megatron_lite.interop.architectures.gpt2 import GPT2

    load = make_checkpoint()
    right = GPT2.write_config
    monkeypatch.setattr(GPT2, "write_config", lambda *args: {**right(*args), "n_layer": 5})
    with pytest.raises(CheckpointError, match=r"missing keys: transformer\.h\.4"):
        export(load, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_exists(make_checkpoint, tmp_path):
    load = make_checkpoint()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("dear")
    with pytest.raises(CheckpointError, match=r"exists already and is not empty\. Give --output a new or empty folder"):
        export(load, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == {"mine.txt": b"dear"}
    (tmp_path / "empty").mkdir()
    assert export(load, tmp_path / "empty").path == tmp_path / "empty"


def test_not_finite(make_checkpoint, tmp_path):
    load = make_checkpoint()
    from megatron_lite.checkpoint.rewriting import write_source
    from megatron_lite.checkpoint.writing import SaveRequest

    source = CheckpointReader(load / "iter_0000007")
    bad = "decoder.layers.1.mlp.fc2.weight"

    class WithNaN:
        tensors = source.tensors

        def read(self, name, rectangle):
            tensor = source.read(name, rectangle)
            return tensor.fill_(float("nan")) if name == bad else tensor

    manifest = source.manifest
    write_source(SaveRequest(tmp_path / "bad", 7, manifest.scalars, manifest.provenance), WithNaN())
    with pytest.raises(CheckpointError, match=f"{bad} in .* contains 4,096 NaN or infinite values"):
        export(tmp_path / "bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_room(make_checkpoint, tmp_path, monkeypatch):
    load = make_checkpoint()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    with pytest.raises(CheckpointError, match=r"out: it needs .* and 0\.977 KiB are free"):
        export(load, tmp_path / "out")
    monkeypatch.undo()
    from megatron_lite.interop import safetensors_writer

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_writer.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        export_checkpoint(plan_export(str(load), 0, NO_CHECK), tmp_path / "out")
    assert "The unfinished output was deleted" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []


def test_what_a_killed_export_left_goes(make_checkpoint, tmp_path):
    import os

    load = make_checkpoint()
    stale = tmp_path / f"out.partial-{os.uname().nodename}-999999999"
    stale.mkdir()
    other = tmp_path / f"out.partial-{os.uname().nodename}-{os.getppid()}"
    other.mkdir()
    export_checkpoint(plan_export(str(load), 0, NO_CHECK), tmp_path / "out")
    assert not stale.exists()
    assert other.exists()


def test_nothing_to_export(tmp_path, make_checkpoint):
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        plan_export(str(tmp_path / "none"), 0, ExportOptions())
    with pytest.raises(CheckpointError, match="does not exist"):
        plan_export(str(tmp_path / "nowhere"), 0, ExportOptions())


def test_a_checkpoint_without_a_weight(make_checkpoint, tmp_path):
    load = make_checkpoint()
    path = load / "iter_0000007" / "manifest.json"
    manifest = read_manifest(path.parent)
    config = {**manifest.provenance.config, "model": {**manifest.provenance.config["model"], "num_layers": 5}}
    path.write_bytes(encode_manifest(replace(manifest, provenance=Provenance(config))))
    with pytest.raises(CheckpointError, match=r"does not contain the weight decoder\.layers\.4"):
        plan_export(str(load), 0, ExportOptions())


def test_transformers_is_an_extra(make_checkpoint, monkeypatch):
    import importlib.util

    load = make_checkpoint()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '.*\[hf\]'"):
        plan_export(str(load), 0, ExportOptions())
    plan_export(str(load), 0, NO_CHECK)


@pytest.mark.parametrize("layers", [1, 4])
def test_streamed_logits_are_the_models(layers, make_checkpoint):
    load = make_checkpoint(**{**MODELS["qwen3"][1], "num_layers": layers, "tied_embeddings": layers == 1})
    restored = restore_model(str(load), 0, RuntimeConfig(device="cpu"))
    tokens = torch.randint(0, VOCAB, (2, 40))
    from megatron_lite.model.batch import MicroBatch

    with torch.no_grad():
        logits = restored.stage.eval().logits(None, MicroBatch(tokens=tokens, labels=tokens))
    whole = logits[..., :VOCAB].transpose(0, 1)
    streamed = streamed_logits(restored.config.model, CheckpointReader(load / "iter_0000007"), tokens)
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-6)
