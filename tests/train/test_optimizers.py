"""Every optimizer trains the same model in every layout, and resumes exactly, also in another layout."""

from dataclasses import replace

import pytest
from support.layout_matrix import LIMITS, SP, ZERO1, Cell, Deviation, deviation, put_together, run_cell, within
from support.resume import check

pytestmark = pytest.mark.slow

LLAMA = Cell(tp=2, dp=2, layers=2, model="llama", **ZERO1, bucket_megabytes=0)
LAYOUTS = {
    "adafactor": (Cell(tp=2, layers=2, **SP), Cell(dp=2, layers=2, **ZERO1), Cell(pp=2, layers=2), LLAMA),
    "lion": (LLAMA,),
    "muon": (Cell(tp=2, layers=2, **SP), LLAMA),
    "adamw8bit": (Cell(pp=2, layers=2), LLAMA),
}
# Lion moves an element of a small gradient by a whole step, Muon computes in bf16, and blocks of 8-bit moments depend
# on the layout: rounding errors of gradients become as large as these.
BOUNDS = {
    "adafactor": LIMITS["fp32"],
    "lion": Deviation(1e-3, 1e-2, 1e-3, 5e-2),
    "muon": Deviation(1e-3, 1e-2, 1e-3, 1e-2),
    "adamw8bit": Deviation(1e-3, 1e-2, 1e-3, 2e-2),
}


@pytest.mark.parametrize("optimizer", LAYOUTS)
def test_a_layout_trains_the_same_model(optimizer, on_ranks):
    references = {}
    for layout in LAYOUTS[optimizer]:
        cell = replace(layout, optimizer=optimizer, ema=0.9)
        alone = cell.reference()
        if alone not in references:
            references[alone] = put_together(on_ranks(1, run_cell, alone))
        found = deviation(put_together(on_ranks(cell.world, run_cell, cell)), references[alone])
        assert within(found, BOUNDS[optimizer]), (str(cell), found)


@pytest.mark.parametrize("optimizer", BOUNDS)
def test_any_layout_resumes(optimizer, on_ranks, tmp_path):
    alone = Cell(layers=2, optimizer=optimizer, ema=0.9)
    writer = replace(alone, tp=2, dp=2, **ZERO1)
    # Blocks of 8-bit moments are others in another layout.
    readers = [writer] if optimizer == "adamw8bit" else [writer, alone]
    readers += [replace(alone, pp=2)] if optimizer == "adafactor" else []
    check(writer, readers, on_ranks, tmp_path)
