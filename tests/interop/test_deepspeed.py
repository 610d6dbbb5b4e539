"""Import of DeepSpeed checkpoints: layer files, ZeRO-1 and universal; and everything that can be wrong with them."""

from __future__ import annotations

import pytest
from support.deepspeed_files import write_deepspeed
from support.megatron_files import arguments

from megatron_lite.checkpoint.stored_model import stored_model
from megatron_lite.interop.streamed_logits import streamed_logits

BLOOM = {"position_embedding": "alibi", "embed_layernorm": True}
MODELS = {"learned": {}, "bloom": BLOOM, "geglu": {"activation": "geglu", "ffn_hidden_size": 48}}


def glu(model):
    """Args as Megatron-DeepSpeed has them of a gated model."""
    return {"glu_activation": model.activation} if model.gated else {}


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_layer_files(name, tp, pp, original, imported, same, tmp_path):
    state, model, logits, tokens = original(**MODELS[name])
    write_deepspeed(tmp_path / "ds", state, model, tp, pp, args=arguments(model, tp, pp, **glu(model)))
    report, source = imported(tmp_path / "ds", tmp_path / "ck")
    same(source, state)
    assert not report.goes_on
    assert streamed_logits(stored_model(source.manifest, tmp_path).model, source, tokens).equal(logits)
