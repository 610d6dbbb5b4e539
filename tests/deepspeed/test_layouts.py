"""Every ZeRO stage of the DeepSpeed engine trains the model that the native engine trains."""

import pytest
from support.deepspeed_cells import OFFLOAD, OFFLOAD_ALL, ZeroCell
from support.layout_matrix import LIMITS, SP, deviation, put_together, run_cell, within

CELLS = [
    ZeroCell(dp=2, stage=0),
    ZeroCell(dp=2, stage=1),
    ZeroCell(dp=2, stage=2, model="llama"),
    ZeroCell(dp=2, stage=3, model="llama"),
    ZeroCell(dp=2, stage=3, model="albert", zero=(("stage3_param_persistence_threshold", 0),)),
    ZeroCell(dp=2, stage=2, zero=OFFLOAD),
    ZeroCell(dp=2, stage=3, zero=OFFLOAD_ALL, recompute="full"),
    ZeroCell(tp=2, dp=2, stage=3, model="llama", **SP),
    ZeroCell(tp=2, dp=2, stage=2, dropout="hidden"),
    ZeroCell(tp=2, dp=2, stage=1, optimizer="sgd"),
    ZeroCell(tp=2, stage=0, model="bloom"),
    ZeroCell(dp=4, stage=3, documents=True),
    ZeroCell(dp=2, stage=1, dtype="bf16"),
    ZeroCell(dp=2, stage=2, dtype="bf16", zero=OFFLOAD),
    ZeroCell(dp=2, stage=3, dtype="bf16"),
    ZeroCell(dp=2, stage=2, dtype="fp16"),
    ZeroCell(dp=2, stage=3, dtype="fp16"),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_deepspeed_trains_the_same_model(on_ranks, cell):
    ours = put_together(on_ranks(cell.world, run_cell, cell, timeout=90))
    reference = put_together(on_ranks(cell.reference().world, run_cell, cell.reference()))
    found = deviation(ours, reference)
    assert within(found, LIMITS["fp32" if cell.dtype == "fp32" else "bf16"]), found
