"""Replica comparison and repair on gloo ranks: one flipped bit is found, named and repaired."""

from copy import copy
from dataclasses import replace

import pytest
import torch
from support.layout_matrix import Cell, iterate, mesh_of

from megatron_lite.config.parameters import WORD_EMBEDDINGS
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine
from megatron_lite.train.replica_check import equalize_initial_weights

pytestmark = pytest.mark.slow

SP, ZERO1 = {"sequence_parallel": True}, {"zero1": True}
NORM = "decoder.layers.1.input_norm.weight"
FC1 = "decoder.layers.3.mlp.fc1.weight"
LAYOUTS = [
    Cell(dp=2),
    Cell(dp=2, dtype="bf16"),
    Cell(dp=2, dtype="fp16", **ZERO1),
    Cell(dp=2, **ZERO1, bucket_megabytes=0),
    Cell(tp=2),
    Cell(tp=2, **SP, model="llama", dtype="bf16"),
    Cell(pp=2),
    Cell(pp=2, schedule="zb-v", dtype="bf16"),
    Cell(dp=4, **ZERO1, dtype="bf16"),
    Cell(tp=2, dp=2, **SP, **ZERO1),
    Cell(tp=2, pp=2, **SP, schedule="zb-h1"),
    Cell(pp=2, dp=2, **ZERO1, dtype="bf16"),
    Cell(pp=2, dp=2, model="albert", schedule="zb-v", **ZERO1, dtype="bf16"),
]
REPLICATED = [
    # layout, corrupted rank, parameter, its tp coordinate, the ranks that hold it
    (Cell(dp=2), 1, FC1, 0, [0, 1]),
    (Cell(dp=2, dtype="bf16"), 1, NORM, None, [0, 1]),
    (Cell(dp=2, **ZERO1), 1, FC1, 0, [0, 1]),
    (Cell(dp=4, **ZERO1, dtype="bf16"), 0, FC1, 0, [0, 1, 2, 3]),
    (Cell(tp=2, **SP), 1, NORM, None, [0, 1]),
    (Cell(tp=2, dp=2, **SP, **ZERO1), 3, NORM, None, [0, 1, 2, 3]),
    (Cell(tp=2, dp=2, **SP, **ZERO1), 0, NORM, None, [0, 1, 2, 3]),
    (Cell(tp=2, cp=2, **SP, **ZERO1), 3, NORM, None, [0, 1, 2, 3]),
    (Cell(pp=2), 1, WORD_EMBEDDINGS, 0, [0, 1]),
    (Cell(pp=2, dp=2, **ZERO1, dtype="bf16"), 3, WORD_EMBEDDINGS, 0, [0, 1, 2, 3]),
    (Cell(pp=2, model="albert"), 1, "decoder.layers.0.mlp.fc1.weight", 0, [0, 1]),
]


def parameter(engine, name):
    return next((p for p in engine.buffers.parameters if p.name == name), None)


def flip(tensor, element=5, bit=3):
    bits = tensor.view(-1).view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    bits[element] ^= 1 << bit


def checked_run(backend, cell, iterations):
    """Mismatches after each iteration, and the final tensors' bytes."""
    config, mesh = cell.config(), mesh_of(backend, cell.tp, cell.pp, cell.cp)
    engine, progress, found = build_engine(config, mesh), Progress(), []
    for _ in range(iterations):
        progress = iterate(config, mesh, engine, progress, 1)[2]
        found.append(engine.compare_replicas())
    return found, contents(engine)


def contents(engine):
    return [
        (t.name, p.offset, p.tensor.detach().float().numpy().tobytes())
        for t in engine.state_tensors()
        for p in t.pieces
    ]


@pytest.mark.parametrize("cell", LAYOUTS, ids=str)
def test_a_clean_run_has_equal_replicas(cell, on_ranks):
    for found, _ in on_ranks(cell.world, checked_run, cell, 3):
        assert found == [[], [], []]


def corrupted_run(backend, cell, corrupt, name, repair):
    """Flips a bit of one rank's parameter after 3 iterations; returns what is found before and after a repair."""
    config, mesh = cell.config(), mesh_of(backend, cell.tp, cell.pp, cell.cp)
    engine = build_engine(config, mesh)
    progress = iterate(config, mesh, engine, Progress(), 3)[2]
    engine.buffers.finish_gather()
    if backend.rank == corrupt:
        own = parameter(engine, name)
        flip(own.param.data)
        # Under ZeRO-1, data-parallel replicas share no state.
        for state in engine._optimizer.states_of(own) if not engine.buffers.sharded or cell.tp * cell.pp > 1 else []:
            flip(state, element=0)
    found = engine.compare_replicas()
    left = None
    if repair:
        engine.repair_replicas(found)
        left = engine.compare_replicas()
        iterate(config, mesh, engine, progress, 2)
    return [(m.name, m.tp, sorted(m.hashes), m.differing) for m in found], left, contents(engine)


@pytest.mark.parametrize(("cell", "corrupt", "name", "tp", "holders"), REPLICATED, ids=str)
def test_a_flipped_bit_is_found_and_named(cell, corrupt, name, tp, holders, on_ranks):
    for found, _, _ in on_ranks(cell.world, corrupted_run, cell, corrupt, name, False):
        assert found == [(name, tp, holders, [corrupt])]


@pytest.mark.parametrize(("cell", "corrupt", "name", "tp", "holders"), REPLICATED, ids=str)
def test_a_repaired_run_equals_a_clean_one(cell, corrupt, name, tp, holders, on_ranks):
    clean = on_ranks(cell.world, checked_run, cell, 5)
    repaired = on_ranks(cell.world, corrupted_run, cell, corrupt, name, True)
    for (_, expected), (_, left, found) in zip(clean, repaired, strict=True):
        assert left == []
        assert found == expected


def nan_run(backend):
    cell = Cell(dp=2)
    engine = build_engine(cell.config(), mesh_of(backend, 1, 1))
    flat = parameter(engine, FC1).param.data.view(-1)
    flat[3] = float("nan")
    same = engine.compare_replicas()
    if backend.rank == 1:
        flip(flat, element=3)
    assert flat[3].isnan()
    return same, [mismatch.name for mismatch in engine.compare_replicas()]


def test_nans_are_compared_by_their_bits(on_ranks):
    assert on_ranks(2, nan_run) == [([], [FC1])] * 2


def test_checks_change_nothing(on_ranks):
    cell = Cell(tp=2, dp=2, **SP, **ZERO1)
    checked = on_ranks(4, checked_run, cell, 4)
    plain = on_ranks(4, unchecked_run, cell, 4)
    assert [found for _, found in checked] == plain


def unchecked_run(backend, cell, iterations):
    config, mesh = cell.config(), mesh_of(backend, cell.tp, cell.pp, cell.cp)
    engine = build_engine(config, mesh)
    iterate(config, mesh, engine, Progress(), iterations)
    return contents(engine)


class _Messages:
    def __init__(self):
        self.texts = []

    def message(self, text):
        self.texts.append(text)


def start_on_unequal_cards(backend, cell):
    """Build an engine on devices that draw different numbers, then equalize; messages, mismatches, and the weights."""
    unequal = copy(backend)
    unequal.generator = lambda seed: backend.generator(seed + backend.rank)
    mesh = mesh_of(backend, cell.tp, cell.pp, cell.cp)
    engine = build_engine(cell.config(), replace(mesh, backend=unequal))
    before, reporter = len(engine.compare_replicas()), _Messages()
    equalize_initial_weights(engine, backend, reporter)
    equalize_initial_weights(engine, backend, reporter)
    return before, reporter.texts, engine.compare_replicas()


@pytest.mark.parametrize("cell", [Cell(dp=2, **ZERO1, dtype="bf16"), Cell(pp=2)], ids=str)
def test_replicas_on_unequal_cards_start_with_the_same_weights(cell, on_ranks):
    for before, texts, left in on_ranks(2, start_on_unequal_cards, cell):
        assert before > 0 and left == []
        (text,) = texts
        assert text.startswith(f"WARNING: {before} initial weights differed between ranks")
