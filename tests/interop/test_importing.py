"""Import of Hugging Face folders as people have them: both generations of configs, keys, files; and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.interop_models import VOCAB

from megatron_lite.checkpoint.reading import compare_checkpoints
from megatron_lite.checkpoint.verify import verify_checkpoint
from megatron_lite.config.arguments import parse_run, to_argv
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.interop.huggingface import open_model
from megatron_lite.interop.importing import ImportOptions, find_source, import_checkpoint
from megatron_lite.runs.foreign import Kind
from megatron_lite.runs.manifest import read_manifest


def imported(folder, output, **options):
    return import_checkpoint(folder, output, ImportOptions(**options))


@pytest.fixture
def changed(tmp_path):
    """Copies a folder and changes its config and its tensors; a name or key that becomes None goes."""
    count = iter(range(100))

    def change(folder, tensors=None, **config):
        copy = tmp_path / f"changed-{next(count)}"
        shutil.copytree(folder, copy)
        path = copy / "config.json"
        content = {**json.loads(path.read_text(encoding="utf-8")), **config}
        path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))
        if tensors is not None:
            save_file(tensors(load_file(copy / "model.safetensors")), copy / "model.safetensors", {"format": "pt"})
        return copy

    return change


@pytest.fixture
def gpt2_folder(make_folder, gpt2):
    return make_folder("gpt2", n_positions=64, **gpt2)


@pytest.fixture
def llama_folder(make_folder, small):
    return make_folder("llama", num_key_value_heads=2, **small)


FOLDERS = {
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral with its window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 64}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-neox sequential": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_fast"}),
    "llama tied, biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_transformers(name, dtype, make_folder, small, tmp_path):
    if dtype == "bfloat16" and not name.startswith(("qwen3", "gpt-neox seq")):
        pytest.skip("two stand for all")
    model_type, fields = FOLDERS[name]
    report = imported(make_folder(model_type, dtype, **small, **fields), tmp_path / "ck")
    assert report.verification.largest < 1e-5
    manifest = verify_checkpoint(tmp_path / "ck" / "iter_0000000")
    assert {tensor.dtype for tensor in manifest.tensors.values()} == {dtype}
    assert report.config.precision.dtype == {"float32": "fp32", "bfloat16": "bf16"}[dtype]


def test_post_norm_bloom(make_folder, gpt2, tmp_path):
    fields = {name: value for name, value in gpt2.items() if name != "n_embd"}
    folder = make_folder("bloom", hidden_size=32, apply_residual_connection_post_layernorm=True, **fields)
    assert imported(folder, tmp_path / "ck").verification.largest < 1e-5


def test_config_of_transformers_4(make_folder, changed, small, tmp_path):
    folder = make_folder(
        "llama",
        num_key_value_heads=2,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0},
        **small,
    )
    old = changed(
        folder,
        rope_parameters="absent",
        dtype="absent",
        torch_dtype="float32",
        rope_theta=700.0,
        rope_scaling={"type": "linear", "factor": 2.0},
        pretraining_tp=1,
        _name_or_path="somewhere",
        task_specific_params=None,
    )
    assert imported(old, tmp_path / "old").verification.largest < 1e-5
    neox = make_folder("gpt_neox", rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 70.0}, **small)
    old = changed(neox, rope_parameters="absent", rotary_pct=0.5, rotary_emb_base=70.0, rope_scaling=None)
    assert imported(old, tmp_path / "neox").verification.largest < 1e-5


def test_keys_of_the_hub(gpt2_folder, changed, tmp_path):
    """GPT-2 on the hub: no prefix, the mask as a buffer, old names in the config."""

    def strip(tensors):
        stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return stripped | {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}

    folder = changed(
        gpt2_folder, strip, architectures=["GPT2LMHeadModel"], n_ctx=64, n_inner="absent", summary_type="cls_index"
    )
    imported(gpt2_folder, tmp_path / "plain", verify=False)
    imported(folder, tmp_path / "ck", verify=False)
    both = [tmp_path / name / "iter_0000000" for name in ("plain", "ck")]
    assert all(difference.equal for difference in compare_checkpoints(*both))


@pytest.mark.parametrize("sharded", [False, True])
def test_pickles(sharded, gpt2_folder, changed, tmp_path):
    folder = changed(gpt2_folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if sharded:
        names = sorted(tensors)
        files = {name: f"pytorch_model-0000{1 + (number > 5)}-of-00002.bin" for number, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files, "metadata": {}}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    assert imported(folder, tmp_path / "ck").verification.largest < 1e-5


def test_it_can_be_trained_on(corpus, make_folder, gpt2, tmp_path):
    from support.trainer import command

    folder = tmp_path / "model"
    shutil.copytree(make_folder("gpt2", n_positions=64, **{**gpt2, "vocab_size": 320}), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(corpus.tokenizer / name, folder)
    report = imported(folder, tmp_path / "ck")
    assert "320" not in str(report.notes[0]).partition(" tokens")[0]
    assert "20 rows" in report.notes[0]
    assert report.config.model.vocab_size == 300
    shutil.rmtree(folder)  # the tokenizer's files were copied
    words = to_argv(report.config)
    again = parse_run([*words, "--train-iters", "1", "--lr", "1"]).config
    assert again.model == report.config.model
    trained = command(
        *("train", *words, "--load", tmp_path / "ck", "--finetune", "--data-path", corpus.data[0]),
        *(
            "--train-iters",
            2,
            "--lr",
            1e-3,
            "--save",
            tmp_path / "run",
            "--save-interval",
            2,
            "--eval-iters",
            1,
            "--device",
            "cpu",
        ),
    )
    assert trained.code == 0, trained.err
    assert "successfully loaded checkpoint" in trained.out
    generated = command("generate", "--load", tmp_path / "ck", "--prompt", "abc", "--max-new-tokens", 3)
    assert generated.code == 0
    assert generated.out.startswith("abc")
    (tmp_path / "text").write_text("abcd efgh " * 20, encoding="utf-8")
    evaluated = command("evaluate", "--load", tmp_path / "ck", "--text", tmp_path / "text")
    assert evaluated.code == 0


def test_a_rotary_checkpoint_loads_whatever_max_position_embeddings_says(llama_folder, corpus, tmp_path):
    from megatron_lite.runs.comparison import check_model, config_as_json

    report = imported(llama_folder, tmp_path / "ck", verify=False)
    saved = read_manifest(tmp_path / "ck" / "iter_0000000").provenance.config
    current = config_as_json(report.config)
    check_model(saved, {**current, "model": {**current["model"], "max_position_embeddings": 0}})
    with pytest.raises(CheckpointError, match="--rotary-base"):
        check_model(saved, {**current, "model": {**current["model"], "rotary_base": 1.0}})


REFUSED = {
    "inverse layer scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "unscaled attention": ("gpt2", {"scale_attn_weights": False}),
    "upcast attention": ("gpt2", {"reorder_and_upcast_attn": True}),
    "gpt-2 activation": ("gpt2", {"activation_function": "silu"}),
    "cross attention": ("gpt2", {"add_cross_attention": True}),
    "n_ctx": ("gpt2", {"n_ctx": 32}),
    "quantization": ("llama", {"quantization_config": {"bits": 4}}),
    "code": ("llama", {"auto_map": {"AutoModel": "model.Model"}}),
    "llama 3's scaling": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None}),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}}),
    "partial rotation": ("llama", {"partial_rotary_factor": 0.5}),
    "attention biases alone": ("llama", {"attention_bias": True}),
    "mlp biases alone": ("llama", {"mlp_bias": True}),
    "activation": ("llama", {"hidden_act": "gelu_new"}),
    "unknown key": ("llama", {"attention_sinks": 4}),
    "two spellings": ("llama", {"rope_theta": 5.0}),
    "negative size": ("llama", {"num_hidden_layers": -1}),
    "multimodal positions": ("llama", {"use_mrope": True}),
    "interleaved": ("llama", {"rope_interleaved": True}),
    "pruned": ("llama", {"pruned_heads": {"0": [1]}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_change_the_function_are_refused_by_name(name, gpt2_folder, llama_folder, changed):
    kind, fields = REFUSED[name]
    folder = changed({"gpt2": gpt2_folder, "llama": llama_folder}[kind], **fields)
    with pytest.raises(CheckpointError) as caught:
        open_model(folder)
    assert next(iter(fields)) in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "fields", "named"),
    [
        ("mistral", {"sliding_window": 16}, "sliding_window=16"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias"),
    ],
)
def test_settings_of_other_classes(model_type, fields, named, make_folder, small, changed):
    base = {"num_key_value_heads": 2} if model_type != "gpt_neox" else {}
    with pytest.raises(CheckpointError, match=named):
        open_model(changed(make_folder(model_type, **small, **base), **fields))


def test_a_window_that_no_sequence_reaches_is_accepted(make_folder, small, changed, tmp_path):
    folder = changed(make_folder("mistral", num_key_value_heads=2, **small), sliding_window=16)
    report = imported(folder, tmp_path / "ck", seq_length=16)
    assert report.config.batch.seq_length == 16
    assert report.verification.largest < 1e-5


def test_a_sequence_longer_than_the_position_table(gpt2_folder):
    with pytest.raises(CheckpointError, match="--seq-length 65"):
        open_model(gpt2_folder, seq_length=65)


def test_unknown_keys_can_be_allowed(llama_folder, changed):
    folder = changed(llama_folder, house_style="blue")
    assert open_model(folder, ignored_keys=["house_style"]).model.num_layers == 2


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"model_type": "falcon"}, "model_type='falcon'"),
        ({"model_type": "absent"}, "has no model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "qwen2"}, "contradicts itself"),
        ({"hidden_size": "absent"}, "does not state hidden_size"),
    ],
)
def test_unknown_architectures(fields, found, llama_folder, changed):
    with pytest.raises(CheckpointError) as caught:
        open_model(changed(llama_folder, **fields))
    assert found in str(caught.value)


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def test_tensors_that_do_not_fit(llama_folder, gpt2_folder, changed, tmp_path):
    norm = "model.layers.1.input_layernorm.weight"
    cases = {
        f"does not contain {norm}": without(norm),
        r"model does not have: score\.weight": lambda tensors: tensors | {"score.weight": torch.ones(2, 32)},
        r"has the shape 33, but the config requires 32": lambda tensors: tensors | {norm: torch.ones(33)},
        "the dtype int32": lambda tensors: tensors | {norm: torch.ones(32, dtype=torch.int32)},
    }
    for text, change in cases.items():
        with pytest.raises(CheckpointError, match=text):
            imported(changed(llama_folder, change), tmp_path / "ck")
    nan = changed(llama_folder, lambda tensors: tensors | {norm: torch.full((32,), float("inf"))})
    with pytest.raises(CheckpointError, match=f"{norm} in .* contains 32 NaN or infinite"):
        imported(nan, tmp_path / "ck")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("ck")] == []


def test_a_tied_head_must_be_the_embedding(gpt2_folder, changed, tmp_path):
    def copied(tensors):
        return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}

    def other(tensors):
        return tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}

    assert imported(changed(gpt2_folder, copied), tmp_path / "ck").verification.largest < 1e-5
    with pytest.raises(CheckpointError, match=r"transformer\.wte\.weight differ"):
        open_model(changed(gpt2_folder, other))
    with pytest.raises(CheckpointError, match=r"does not contain lm_head\.weight"):
        open_model(changed(gpt2_folder, tie_word_embeddings=False))


def test_a_tokenizer_larger_than_the_vocabulary(corpus, gpt2_folder, changed):
    folder = changed(gpt2_folder)
    shutil.copy(corpus.tokenizer / "tokenizer.json", folder)
    with pytest.raises(CheckpointError, match=f"has 300 tokens, more than the model's vocabulary .vocab_size={VOCAB}"):
        open_model(folder)


def test_sources(tmp_path, make_checkpoint, gpt2_folder):
    with pytest.raises(CheckpointError, match="is not an existing folder"):
        find_source(tmp_path / "nowhere", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="contains no checkpoint of a known format"):
        find_source(tmp_path / "empty", None)
    with pytest.raises(CheckpointError, match="Give --load"):
        find_source(make_checkpoint(), None)
    with pytest.raises(CheckpointError, match="--from deepspeed is given, but"):
        find_source(gpt2_folder, Kind.DEEPSPEED)
    assert find_source(gpt2_folder, Kind.HUGGING_FACE).folder == gpt2_folder


def test_logits_that_differ_leave_nothing(make_folder, gpt2, tmp_path, monkeypatch):
    gpt2_folder = make_folder("gpt2", n_positions=64, initializer_range=0.3, **gpt2)
    from megatron_lite.interop.architectures import gpt2 as module

    monkeypatch.setattr(module, "ACTIVATIONS", {**module.ACTIVATIONS, "gelu_new": "gelu"})
    with pytest.raises(CheckpointError, match="The logits in transformers differ by up to"):
        imported(gpt2_folder, tmp_path / "ck")
    assert list(tmp_path.iterdir()) == []


def test_output_exists_and_no_room(gpt2_folder, tmp_path, monkeypatch):
    imported(gpt2_folder, tmp_path / "ck", verify=False)
    with pytest.raises(CheckpointError, match="exists already"):
        imported(gpt2_folder, tmp_path / "ck", verify=False)
    from megatron_lite.checkpoint import writing

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        imported(gpt2_folder, tmp_path / "other", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck"]


def test_transformers_is_needed_to_compare_only(gpt2_folder, tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '.*\[hf\]'"):
        imported(gpt2_folder, tmp_path / "ck")
    imported(gpt2_folder, tmp_path / "ck", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]
