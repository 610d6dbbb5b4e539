"""Import of Megatron-LM classic checkpoints: versions, names, layouts, and everything that can be wrong with them."""

from __future__ import annotations

import pytest
from support.interop_models import VOCAB
from support.megatron_files import arguments, write_classic

from megatron_lite.checkpoint.stored_model import stored_model
from megatron_lite.interop.streamed_logits import streamed_logits

LLAMA = {
    "position_embedding": "rotary",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "linear_bias": False,
    "qkv_bias": False,
    "tied_embeddings": False,
    "ffn_hidden_size": 48,
    "num_query_groups": 2,
    "qk_layernorm": True,
    "rotary_base": 5000.0,
}


LAYOUTS = {
    "version 0, tp 2": {"tp": 2, "version": 0, "old_names": True},
    "version 0, pre-zip": {"version": 0, "as_zip": False, "old_names": True},
    "version 1, tp 2": {"tp": 2, "version": 1.0},
    "version 2, pp 2": {"pp": 2, "version": 2.0},
    "version 3, tp 2, pp 2": {"tp": 2, "pp": 2},
    "interleaved": {"pp": 2, "chunks": 2},
    "core": {"tp": 2, "pp": 2, "naming": "core"},
    "core, interleaved": {"tp": 2, "pp": 2, "chunks": 2, "naming": "core"},
    "transformer engine": {"pp": 2, "naming": "fused"},
    "release": {"tp": 2, "name": "release"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_version_and_layout(name, original, imported, same, tmp_path):
    state, model, logits, tokens = original()
    layout = LAYOUTS[name]
    core = layout.get("naming", "legacy") != "legacy"
    args = arguments(model, layout.get("tp", 1), layout.get("pp", 1), core)
    write_classic(tmp_path / "megatron", state, model, args=args, **layout)
    _, source = imported(tmp_path / "megatron", tmp_path / "ck", "--vocab-size", str(VOCAB))
    same(source, state)
    found = stored_model(source.manifest, tmp_path).model
    assert found.vocab_size == VOCAB
    assert streamed_logits(found, source, tokens).equal(logits)


@pytest.mark.parametrize("naming", ["core", "fused"])
def test_llama_like_models(naming, original, imported, same, tmp_path):
    state, model, logits, tokens = original(**LLAMA)
    write_classic(tmp_path / "m", state, model, 2, 2, naming=naming, args=arguments(model, 2, 2, core=True))
    _, source = imported(tmp_path / "m", tmp_path / "ck", "--vocab-size", str(VOCAB))
    same(source, state)
    assert streamed_logits(stored_model(source.manifest, tmp_path).model, source, tokens).equal(logits)
