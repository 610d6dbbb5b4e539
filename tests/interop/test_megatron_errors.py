"""What is refused of Megatron-LM and DeepSpeed checkpoints: each by file, tensor or flag, and nothing is left."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch
from support.deepspeed_files import write_deepspeed, write_universal
from support.interop_models import MODELS, VOCAB
from support.megatron_dist_files import write_torch_dist
from support.megatron_files import arguments, write_classic

from megatron_lite.checkpoint.stored_model import stored_model
from megatron_lite.errors import CheckpointError, ConfigError, ConfigErrors
from megatron_lite.interop.streamed_logits import streamed_logits
from megatron_lite.rectangle import Rectangle

SIZE = ("--vocab-size", str(VOCAB))
FLAGS = (*SIZE, "--num-attention-heads", "4", "--activation", "gelu_tanh", "--position-embedding-type", "absolute")


def edited(change):
    """An `edit` for one rank of several: called with the content of tp rank 1 of the first stage."""
    return lambda content, rank, stage: change(content) if (rank, stage) == (1, 0) else None


def test_a_public_file_without_args(original, imported, same, refused, tmp_path):
    """Version 0, pre-zip, no args: the model's own flags say what the file does not."""
    state, model, logits, tokens = original()
    write_classic(tmp_path / "m", state, model, version=0, as_zip=False, old_names=True, name="release")
    for left_out, asked in (
        ("--num-attention-heads", "--num-attention-heads N"),
        ("--activation", "--activation gelu_tanh"),
        ("--vocab-size", "--vocab-size N"),
    ):
        at = FLAGS.index(left_out)
        refused(tmp_path / "m", f"does not state.*Add {asked}", *FLAGS[:at], *FLAGS[at + 2 :])
    report, source = imported(tmp_path / "m", tmp_path / "ck", *FLAGS)
    same(source, state)
    assert any("epsilon" in note for note in report.notes)
    assert streamed_logits(stored_model(source.manifest, tmp_path).model, source, tokens).equal(logits)
    for flags, text in (
        (("--num-layers", "5"), "num_layers has two different values: 5 by --num-layers 5, and 4 by the tensors"),
        (("--hidden-size", "64"), "hidden_size has two different values: 64"),
        (("--position-embedding-type", "rope"), "position_embedding has two different values: 'rotary'"),
        (("--untie-embeddings-and-output-weights",), "tied_embeddings has two different values: False"),
        (("--ffn-hidden-size", "99"), "ffn_hidden_size has two different values: 99"),
        (("--vocab-size", "4000"), r"4,000 tokens \(--vocab-size 4000\), more than the 96 rows"),
    ):
        kept = [word for word in FLAGS if flags[0] not in FLAGS or word not in FLAGS[FLAGS.index(flags[0]) :][:2]]
        refused(tmp_path / "m", text, *kept, *flags)


def test_flags_that_contradict_the_args(original, refused, tmp_path):
    state, model, _, _ = original()
    write_classic(tmp_path / "m", state, model, args=arguments(model, vocab_size=77, tokenizer_type="NullTokenizer"))
    refused(tmp_path / "m", "vocab_size has two different values: 96 by --vocab-size 96, and 78", *SIZE)
    args = arguments(model)
    shutil.rmtree(tmp_path / "m")
    write_classic(tmp_path / "m", state, model, args=args)
    for flags, text in (
        (
            ("--num-attention-heads", "8"),
            "num_attention_heads has two different values: 8 by --num-attention-heads 8, and 4 by args",
        ),
        (
            ("--no-bias-gelu-fusion",),
            "activation has two different values: 'gelu' by --no-bias-gelu-fusion, and 'gelu_tanh' by args.bias_gelu",
        ),
        (("--norm-epsilon", "1e-6"), "norm_epsilon has two different values: 1e-06"),
        (("--embed-layernorm",), "embed_layernorm has two different values: True"),
    ):
        refused(tmp_path / "m", text, *SIZE, *flags)
    refused(tmp_path / "m", "--checkpoint-version 2 differs from checkpoint_version 3.0", *SIZE, checkpoint_version=2.0)
    refused(tmp_path / "m", "takes flags of the model", *SIZE, "--lr", "1", error=ConfigError)
    refused(tmp_path / "m", "", "--no-such-flag", "--multi-latent-attention", error=(ConfigError, ConfigErrors))
    refused(tmp_path / "m", "contradict each other", *SIZE, "--tokenizer-vocab-size", "95", error=ConfigError)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"), [("num_experts", 8), ("window_size", (128, 0)), ("position_embedding_type", "yarn")]
)
def test_args_that_change_the_function_are_refused_by_name(name, value, original, refused, tmp_path):
    """Every other one: test_judgement.py."""
    state, model, _, _ = original()
    args = arguments(model, core=True, **{name: value})
    write_classic(tmp_path / "m", state, model, naming="core", args=args)
    refused(tmp_path / "m", f"has {name}=", *SIZE)


def test_the_embedding_norm_has_an_epsilon_of_its_own(original, refused, tmp_path):
    state, model, _, _ = original(position_embedding="alibi", embed_layernorm=True, norm_epsilon=1e-6)
    write_deepspeed(tmp_path / "ds", state, model, args=arguments(model))
    refused(tmp_path / "ds", "layernorm_epsilon=1e-06: the norm after the embedding has 1e-05")


def test_args_as_they_are_met(original, imported, same, tmp_path, monkeypatch):
    """One query group of plain attention, an enum for positions, norm_epsilon, _extra_state as bytes."""
    import io
    import sys
    import types

    module = types.ModuleType("megatron.enums")
    monkeypatch.setitem(sys.modules, "megatron", module)
    monkeypatch.setitem(sys.modules, "megatron.enums", module)

    class PositionEmbeddingType:
        def __init__(self, value):
            self.value = value

        def __reduce__(self):
            return PositionEmbeddingType, (self.value,)

    PositionEmbeddingType.__module__, PositionEmbeddingType.__qualname__ = "megatron.enums", "PositionEmbeddingType"
    module.PositionEmbeddingType = PositionEmbeddingType
    state, model, _, _ = original()

    def edit(content, rank, stage):
        content["model"]["decoder.layers.1.mlp.linear_fc1._extra_state"] = io.BytesIO(b"fp8")
        content["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(3, dtype=torch.uint8)

    args = arguments(
        model, core=True, layernorm_epsilon="absent", norm_epsilon=1e-5, ffn_hidden_size=None,
        position_embedding_type=PositionEmbeddingType(2),
    )  # fmt: skip
    write_classic(tmp_path / "m", state, model, naming="fused", args=args, edit=edit)
    monkeypatch.undo()
    _, source = imported(tmp_path / "m", tmp_path / "ck", *SIZE)
    same(source, state)


def test_missing_and_mixed_files(original, refused, tmp_path):
    state, model, _, _ = original()
    folder = write_classic(tmp_path / "m", state, model, 2, 2, args=arguments(model, 2, 2))
    lost = folder / "mp_rank_01_001"
    lost.rename(folder / "aside")
    refused(tmp_path / "m", r"mp_rank_01_001/model_optim_rng\.pt is missing", *SIZE)
    lost.mkdir()
    refused(tmp_path / "m", r"mp_rank_01_001 does not contain model_optim_rng\.pt", *SIZE)
    (lost / "model_optim_rng.pt").write_bytes(b"not a pickle")
    refused(tmp_path / "m", r"mp_rank_01_001/model_optim_rng\.pt", *SIZE)
    torch.save([1], lost / "model_optim_rng.pt")
    refused(tmp_path / "m", "contains a Python list", *SIZE)
    torch.save({"iteration": 8}, lost / "model_optim_rng.pt")
    refused(tmp_path / "m", "iteration is 7 .* 8 in", *SIZE)
    torch.save({"iteration": 7, "checkpoint_version": 3.0, "args": 1}, lost / "model_optim_rng.pt")
    refused(tmp_path / "m", "contains no model, but", *SIZE)
    shutil.copytree(folder / "mp_rank_01_000", folder / "mp_rank_01_001_002")
    refused(tmp_path / "m", "expert-parallel", *SIZE)


def drop(name):
    def change(content):
        del content["model"]["language_model"]["encoder"][name]

    return change


def swap(name, tensor):
    def change(content):
        content["model"]["language_model"]["encoder"][name] = tensor

    return change


DENSE = "layers.1.self_attention.dense"
BROKEN = {
    "missing": (
        drop(f"{DENSE}.weight"),
        rf"mp_rank_00/\S+ has the tensor \S+{DENSE}.weight, and \S+mp_rank_01/\S+ lacks it",
    ),
    "shape": (swap(f"{DENSE}.weight", torch.ones(32, 15)), r"is 32 x 16 .*32 x 15 .* in .*mp_rank_01"),
    "dtype": (swap(f"{DENSE}.weight", torch.ones(32, 16).half()), r"\(float32\) in .*\(float16\) in"),
    "nan": (swap(f"{DENSE}.weight", torch.full((32, 16), float("nan"))), "contains 512 NaN or infinite"),
    "version": (lambda content: content.update(checkpoint_version=2.0), "checkpoint_version is 3.0 .* 2.0"),
    "layers": (drop("layers.3.mlp.dense_4h_to_h.bias"), r"layers\.3\.mlp\.dense_4h_to_h\.bias"),
    "a stranger": (swap("adapter", 5), "adapter .* of the Python type int"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_parts(name, original, refused, tmp_path):
    state, model, _, _ = original()
    change, text = BROKEN[name]
    write_classic(tmp_path / "m", state, model, 2, args=arguments(model, 2), edit=edited(change))
    refused(tmp_path / "m", text, *SIZE)


@pytest.mark.parametrize("version", [4.0, 0.5, "three"])
def test_unknown_versions(version, original, refused, tmp_path):
    state, model, _, _ = original()
    edit = lambda content, rank, stage: content.update(checkpoint_version=version)  # noqa: E731
    write_classic(tmp_path / "m", state, model, args=arguments(model), edit=edit)
    refused(tmp_path / "m", f"has the unknown checkpoint_version {version!r}", *SIZE)


def test_versions_that_do_not_go_with_the_names(original, refused, tmp_path):
    state, model, _, _ = original(num_query_groups=2, position_embedding="rotary", ffn_hidden_size=48)
    write_classic(tmp_path / "m", state, model, version=1.0, naming="core", args=arguments(model, core=True))
    refused(tmp_path / "m", "has the tensor names of megatron-core, but checkpoint_version 1", *SIZE)
    shutil.rmtree(tmp_path / "m")
    write_classic(
        tmp_path / "m",
        state,
        model,
        version=3.0,
        args=arguments(model, core=True),
        edit=lambda c, *_: c.update(checkpoint_version=1.0),
    )
    refused(tmp_path / "m", "Grouped-query attention exists in checkpoints of version 3.0 only", *SIZE)


def test_tied_copies(original, imported, same, refused, tmp_path):
    """A table of the head on the last stage does not mean that it is untied."""
    state, model, _, _ = original()

    def other(content, rank, stage):
        if stage == 1:
            content["model"]["output_layer.weight"] += 1

    args = arguments(model, 1, 2, core=True)
    write_classic(tmp_path / "m", state, model, pp=2, naming="core", args=args, edit=other)
    refused(tmp_path / "m", "but the output layer in", *SIZE)
    shutil.rmtree(tmp_path / "m")
    write_classic(tmp_path / "m", state, model, pp=2, naming="core")
    _, source = imported(tmp_path / "m", tmp_path / "tied", *FLAGS)
    same(source, state)
    shutil.rmtree(tmp_path / "m")
    write_classic(tmp_path / "m", state, model, pp=2, naming="core", edit=other)
    _, source = imported(tmp_path / "m", tmp_path / "untied", *FLAGS)
    assert "output_layer.weight" in source.tensors


def test_replicated_tensors_that_have_drifted(original, imported, refused, tmp_path):
    state, model, _, _ = original()
    name = "layers.2.input_layernorm.weight"
    moved = state["decoder.layers.2.input_norm.weight"] + 0.5
    write_classic(tmp_path / "m", state, model, 2, args=arguments(model, 2), edit=edited(swap(name, moved)))
    refused(tmp_path / "m", f"weights that they should share .1 tensors.*{name} by 0.5.*--replicated average", *SIZE)
    for how, shift in (("average", 0.25), ("first", 0.0)):
        report, source = imported(tmp_path / "m", tmp_path / how, *SIZE, replicated=how)
        found = source.read("decoder.layers.2.input_norm.weight", Rectangle.full((32,)))
        assert found.allclose(state["decoder.layers.2.input_norm.weight"] + shift)
        assert "differ in weights that they should share" in report.notes[-1]


def test_deepspeed_files(original, refused, imported, tmp_path):
    state, model, _, _ = original()
    for kind in ("exp_avg", "exp_avg_sq"):
        state |= {f"optimizer.{kind}.{n}": t.clone() for n, t in list(state.items()) if "optimizer" not in n}
    folder = write_deepspeed(tmp_path / "ds", state, model, 2, 2, dp=2, args=arguments(model, 2, 2))

    def without(name, text, **options):
        (folder / name).rename(tmp_path / "aside")
        refused(tmp_path / "ds", text, **options)
        (tmp_path / "aside").rename(folder / name)

    for name in ("layer_01-model_01", "layer_04-model_00", "layer_06-model_01", "layer_08-model_00"):
        without(f"{name}-model_states.pt", f"{name}-model_states.pt is missing")
    name = "zero_pp_rank_1_mp_rank_03_optim_states.pt"
    without(name, f"{name} is missing .the checkpoint has 2 data-parallel and 4 model-parallel")
    without("mp_rank_02_model_states.pt", "mp_rank_02_model_states.pt is missing")
    shutil.copyfile(folder / "layer_08-model_00-model_states.pt", folder / "layer_07-model_00-model_states.pt")
    refused(tmp_path / "ds", "layer_07-model_00-model_states.pt does not belong to a model with 4 layers")
    (folder / "layer_07-model_00-model_states.pt").unlink()
    content = torch.load(folder / name, weights_only=False)
    content["optimizer_state_dict"]["zero_stage"] = 3
    torch.save(content, folder / name)
    refused(tmp_path / "ds", "ZeRO stage 3.*--weights-only")
    assert not imported(tmp_path / "ds", tmp_path / "ck", weights_only=True)[0].goes_on


@pytest.mark.parametrize("kind", ["classic", "deepspeed", "zero", "universal", "dist"])
def test_a_malicious_pickle_executes_nothing_and_is_named(kind, original, refused, tmp_path):
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return subprocess.Popen, (["touch", str(marker)],)

    state, model, _, _ = original()
    for moment in ("exp_avg", "exp_avg_sq"):
        state |= {f"optimizer.{moment}.{n}": t.clone() for n, t in list(state.items()) if "optimizer" not in n}
    args = arguments(model, core=kind == "dist")
    root = tmp_path / "m"
    files = {
        "classic": "mp_rank_00/model_optim_rng.pt",
        "deepspeed": "layer_04-model_00-model_states.pt",
        "zero": "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "universal": "zero/4.mlp.dense_4h_to_h.bias/fp32.pt",
        "dist": "common.pt",
    }
    if kind == "classic":
        folder = write_classic(root, state, model, args=args)
    elif kind == "universal":
        folder = write_universal(root, state, model, args)
    elif kind == "dist":
        folder = write_torch_dist(root, {n: t for n, t in state.items() if "optimizer" not in n}, model, args)
    else:
        folder = write_deepspeed(root, state, model, dp=1, args=args)
    torch.save({"a": torch.ones(1), "b": Evil()}, folder / files[kind])
    refused(root, r"names subprocess\.Popen, which was not executed", *SIZE)
    assert not marker.exists()


def test_disk_full_and_output_exists(original, imported, tmp_path, monkeypatch):
    from megatron_lite.checkpoint import writing

    state, model, _, _ = original()
    write_classic(tmp_path / "m", state, model, args=arguments(model))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        imported(tmp_path / "m", tmp_path / "there", *SIZE)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        imported(tmp_path / "m", tmp_path / "ck", *SIZE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "original", "there"]


def test_models_that_are_not_for_this_format(original, refused, tmp_path):
    state, model, _, _ = original(**MODELS["bloom"][1])
    write_classic(tmp_path / "m", state, model, args=arguments(model, embed_layernorm=False))
    refused(tmp_path / "m", "embed_layernorm has two different values: False by args.embed_layernorm", *SIZE)
