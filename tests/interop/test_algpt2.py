"""ALGPT2's modeling file: what an import refuses, batches with padding, training."""

import json

import pytest
import torch
from support.interop_models import MODELS, VOCAB, run_config

from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.interop import transformers_logits
from megatron_lite.interop.architectures.registry import architecture_for
from megatron_lite.interop.export import ExportOptions, export_checkpoint, plan_export
from megatron_lite.interop.huggingface import open_model
from megatron_lite.interop.modeling_files import FOLDER

MODELING = "modeling_algpt2.py"


@pytest.fixture
def exported(make_checkpoint, tmp_path):
    load = make_checkpoint(**MODELS["algpt2"][1])
    return export_checkpoint(plan_export(str(load), 0, ExportOptions(verify=False)), tmp_path / "out").path


def test_code_of_a_folder_is_executed_only_unchanged(exported, tmp_path):
    assert (exported / MODELING).read_bytes() == (FOLDER / MODELING).read_bytes()
    (exported / MODELING).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=rf"{MODELING} is not the modeling file of this version.*copy .*{MODELING}"
    ):
        open_model(exported)
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers_logits.load(exported)
    (exported / MODELING).unlink()
    with pytest.raises(CheckpointError, match=f"{MODELING} is missing"):
        open_model(exported)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("share_layers", "3", "does not divide n_layer=4"),
        ("share_layers", "ffn", "expected all, attention, mlp, or a number of groups"),
        ("embedding_size", 32, "it must be 0, or below n_embd=32"),
        ("embedding_size", "16", "it must be 0"),
        ("auto_map", {"AutoModel": "other.Model"}, ""),
    ],
)
def test_settings(key, value, text, exported):
    path = exported / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    if not text:  # it names the class that is executed, which is known
        assert open_model(exported).model.embedding_size == 16
        return
    with pytest.raises(CheckpointError, match=f"config.json has {key}={value!r}.*{text}"):
        open_model(exported)


def test_padding_changes_nothing(exported, transformers):
    model, problem = transformers_logits.load(exported)
    assert not problem
    prompts = [[5, 17, 3], [9, 2, 4, 61, 7]]
    alone = [model(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    padded = torch.tensor([[0, 0, *prompts[0]], prompts[1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-5)
    both = model.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0)
    for prompt, row in zip(prompts, both, strict=True):
        one = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8, pad_token_id=0)
        assert row[-8:].tolist() == one[0, len(prompt) :].tolist()


def test_labels_give_the_loss_and_every_parameter_a_gradient(exported, transformers):
    model, _ = transformers_logits.load(exported)
    tokens = torch.arange(20).view(2, 10) % VOCAB
    output = model.train()(input_ids=tokens, labels=tokens)
    output.loss.backward()
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert all(param.grad is not None for param in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    fresh = transformers.AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    assert fresh.transformer.h["0"]["mlp"].c_proj.weight.std() < 0.9 * fresh.transformer.h["0"]["mlp"].c_fc.weight.std()


def test_a_class_that_was_asked_for_and_cannot_share():
    with pytest.raises(ConfigError, match=r"because of --share-layers all.*Use --architecture ALGPT2LMHeadModel"):
        architecture_for(run_config(share_layers="all").model, "GPT2LMHeadModel")
