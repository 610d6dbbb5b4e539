"""Imported checkpoints on real ranks: source and load of different layouts, the logits of the original model."""

from __future__ import annotations

import pytest
import torch
from support.deepspeed_files import write_deepspeed
from support.interop_models import MODELS, VOCAB, logits_on_rank
from support.megatron_files import arguments, write_classic

from megatron_lite.config.parallel import ParallelConfig

pytestmark = pytest.mark.slow

CLASSIC = {
    "version 0, tp 4": ({"tp": 4, "version": 0}, (2, 2)),
    "version 3, core, tp 2, interleaved": ({"tp": 2, "pp": 2, "chunks": 2, "naming": "core"}, (4, 1)),
    "version 2, pp 4": ({"pp": 4, "version": 2.0}, (2, 2)),
}
DEEPSPEED = {"gpt2": (2, 2), "bloom": (4, 1), "gpt2 on four stages": (1, 4)}


@pytest.fixture
def has_logits(on_ranks):
    """Asserts that a checkpoint has some logits on tp x pp gloo ranks."""

    def check(load, layout, tokens, logits):
        tp, pp = layout
        found = on_ranks(tp * pp, logits_on_rank, ParallelConfig(tp=tp, pp=pp, world_size=tp * pp), load, tokens)
        last = [part for part in found if part is not None]
        assert len(last) == tp
        for part in last:
            torch.testing.assert_close(part, logits, rtol=0, atol=1e-5)

    return check


@pytest.mark.parametrize("name", CLASSIC)
def test_megatron_classic(name, original, imported, has_logits, tmp_path):
    source, layout = CLASSIC[name]
    state, model, logits, tokens = original()
    args = arguments(model, source.get("tp", 1), source.get("pp", 1), source.get("naming") == "core")
    write_classic(tmp_path / "megatron", state, model, args=args, **source)
    imported(tmp_path / "megatron", tmp_path / "ck", "--vocab-size", str(VOCAB))
    has_logits(tmp_path / "ck", layout, tokens, logits)


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed(name, original, imported, has_logits, tmp_path):
    """From tp 2, pp 2, with and without the norm after the embedding."""
    state, model, logits, tokens = original(**MODELS[name.split()[0]][1])
    write_deepspeed(tmp_path / "ds", state, model, 2, 2, args=arguments(model, 2, 2))
    imported(tmp_path / "ds", tmp_path / "ck")
    has_logits(tmp_path / "ck", DEEPSPEED[name], tokens, logits)
