"""Tests of saves and loads on one rank: bits, names, shapes, dtypes, bytes on disk."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.runs.manifest import CorruptCheckpointError, Provenance, read_manifest


def test_loaded_tensors_equal_saved_ones_bit_for_bit(kit, tmp_path):
    tensors = kit.tensors()
    tensors["decoder.final_norm.bias"][:3] = torch.tensor([float("nan"), -0.0, 1e-45])
    scalars = {"progress": {"iteration": 7}, "scale": 0.1, "big": 2**53 + 1, "none": None}
    report = save_checkpoint(
        SaveRequest(tmp_path / "new" / "folder", 7, scalars, Provenance()), kit.held(tensors), kit.world
    )
    loaded = kit.zeros_like(tensors)
    assert load_checkpoint(report.path, kit.held(loaded), kit.world) == scalars
    for name, tensor in tensors.items():
        assert tensor.view(torch.int32).equal(loaded[name].view(torch.int32)), name
    assert report.path == tmp_path / "new" / "folder" / "iter_0000007"
    assert sorted(entry.name for entry in report.path.parent.iterdir()) == [
        "iter_0000007",
        "latest_checkpointed_iteration.txt",
    ]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_a_checkpoint_without_this_package(kit, tmp_path):
    tensors = kit.tensors()
    path = kit.save(tmp_path, 1, tensors).path
    state = kit.zeros_like(tensors)
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_a_view_is_saved_without_the_rest_of_its_storage(kit, tmp_path):
    storage = torch.randn(1000, 1000)
    rows, transposed = storage[10:60], storage[:100, :70].t()
    report = kit.save(tmp_path, 1, {"rows": rows, "transposed": transposed})
    needed = rows.nbytes + transposed.nbytes
    assert report.size == pytest.approx(needed, rel=0.05)
    assert report.size == sum(file.stat().st_size for file in report.path.iterdir() if file.name != "manifest.json")
    loaded = {"rows": torch.zeros(50, 1000), "transposed": torch.zeros(70, 100)}
    load_checkpoint(report.path, kit.held(loaded), kit.world)
    assert loaded["rows"].equal(rows)
    assert loaded["transposed"].equal(transposed)


def test_size_on_disk_is_within_two_percent_of_the_elements(kit, tmp_path):
    tensors = {f"decoder.layers.{n}.mlp.fc1.weight": torch.randn(256, 256) for n in range(4)}
    state = {f"optimizer.{kind}.{name}": x for kind in ("exp_avg", "exp_avg_sq") for name, x in tensors.items()}
    report = kit.save(tmp_path, 1, {**tensors, **state})
    assert report.size == pytest.approx(12 * 4 * 256 * 256, rel=0.02)


def test_pieces_are_filled_through_views_that_require_gradients(kit, tmp_path):
    path = kit.save(tmp_path, 1, {"w": torch.arange(12.0).reshape(3, 4)}).path
    parameter = torch.nn.Parameter(torch.zeros(2, 4))
    load_checkpoint(path, [GlobalTensor("w", (3, 4), torch.float32, [Piece((1, 0), parameter)])], kit.world)
    assert parameter.detach().equal(torch.arange(4.0, 12.0).reshape(2, 4))
    assert parameter.requires_grad


def test_a_tensor_held_twice_is_filled_twice(kit, tmp_path):
    table = torch.randn(6, 4)
    path = kit.save(tmp_path, 1, {"w": table}).path
    first, copy = torch.zeros(6, 4), torch.zeros(6, 4)
    load_checkpoint(path, [*kit.held({"w": first}), *kit.held({"w": copy})], kit.world)
    assert first.equal(table)
    assert copy.equal(table)


def cuts(shape: tuple[int, ...], draw: st.DrawFn) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Rectangles (offset, size) that cover the shape: one of them is cut again and again."""
    rectangles = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        number = draw(st.integers(0, len(rectangles) - 1))
        dim = draw(st.integers(0, len(shape) - 1))
        offset, size = rectangles[number]
        if size[dim] < 2:
            continue
        at = draw(st.integers(1, size[dim] - 1))
        rectangles[number] = (offset, (*size[:dim], at, *size[dim + 1 :]))
        second = (*offset[:dim], offset[dim] + at, *offset[dim + 1 :])
        rectangles.append((second, (*size[:dim], size[dim] - at, *size[dim + 1 :])))
    return rectangles


def cut(name: str, tensor: torch.Tensor, rectangles: list) -> GlobalTensor:
    def part(offset, size):
        return tensor[tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))]

    return GlobalTensor(name, tuple(tensor.shape), tensor.dtype, [Piece(o, part(o, s)) for o, s in rectangles])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_partition_loads_any_other(kit, tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    tensor, loaded = torch.randn(shape), torch.zeros(shape)
    saved = cut("w", tensor, cuts(shape, data.draw))
    path = save_checkpoint(SaveRequest(tmp_path_factory.mktemp("cut"), 1, {}, Provenance()), [saved], kit.world).path
    load_checkpoint(path, [cut("w", loaded, cuts(shape, data.draw))], kit.world)
    assert loaded.equal(tensor)


def test_a_missing_tensor_is_named_with_the_nearest_name(kit, tmp_path):
    path = kit.save(tmp_path, 1).path
    wanted = {**kit.tensors(), "decoder.final_norm.weight": torch.full((8,), 5.0)}
    with pytest.raises(
        CheckpointError, match=r'tensor "decoder\.final_norm\.weight", .*; the nearest name is "decoder.final_norm'
    ):
        load_checkpoint(path, kit.held(wanted), kit.world)
    # Nothing is touched unless everything fits.
    assert wanted["decoder.final_norm.weight"].eq(5.0).all()
    assert wanted["optimizer.step"].equal(kit.tensors()["optimizer.step"])


def test_an_extra_tensor_is_named(kit, tmp_path):
    tensors = kit.tensors()
    path = kit.save(tmp_path, 1, tensors).path
    fewer = kit.zeros_like(tensors)
    del fewer["decoder.final_norm.bias"]
    with pytest.raises(CheckpointError, match=r"tensors that this run does not have: decoder\.final_norm\.bias"):
        load_checkpoint(path, kit.held(fewer), kit.world)
    assert fewer["optimizer.step"] == 0


def test_a_wrong_shape_is_reported_with_both_shapes(kit, tmp_path):
    path = kit.save(tmp_path, 1, {"w": torch.zeros(4, 8)}).path
    with pytest.raises(CheckpointError, match=r"the shape 4 x 9 in this run and 4 x 8 in"):
        load_checkpoint(path, kit.held({"w": torch.zeros(4, 9)}), kit.world)


def test_floats_are_not_converted_to_integers(kit, tmp_path):
    path = kit.save(tmp_path, 1, {"w": torch.zeros(4)}).path
    with pytest.raises(CheckpointError, match="has the dtype int64 in this run and float32"):
        load_checkpoint(path, kit.held({"w": torch.zeros(4, dtype=torch.int64)}), kit.world)


def test_the_optimizer_can_be_left_out(kit, tmp_path):
    tensors = kit.tensors()
    path = kit.save(tmp_path, 1, tensors).path
    loaded = kit.zeros_like(tensors)
    load_checkpoint(path, kit.held(loaded), kit.world, weights_only=True)
    for name, tensor in loaded.items():
        assert tensor.equal(torch.zeros_like(tensor) if name.startswith("optimizer.") else tensors[name])


def test_main_parameters_are_loaded_where_they_are_more_precise(kit, tmp_path):
    main = torch.randn(64)
    weight = main.bfloat16()
    mixed = kit.save(tmp_path, 1, {"w": weight, "optimizer.main_param.w": main}).path
    full = kit.save(tmp_path, 2, {"w": main}).path

    into_fp32 = {"w": torch.zeros(64)}
    load_checkpoint(mixed, kit.held(into_fp32), kit.world)
    assert into_fp32["w"].equal(main)

    into_bf16 = {"w": torch.zeros(64, dtype=torch.bfloat16), "optimizer.main_param.w": torch.zeros(64)}
    for path in (full, mixed):
        load_checkpoint(path, kit.held(into_bf16), kit.world, weights_only=True)
        assert into_bf16["w"].equal(weight)
        assert into_bf16["optimizer.main_param.w"].equal(main)

    fp16_without_main = {"w": torch.zeros(64, dtype=torch.float16)}
    load_checkpoint(full, kit.held(fp16_without_main), kit.world)
    assert fp16_without_main["w"].equal(main.half())


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_damaged_file_is_named_and_no_wrong_value_is_loaded(kit, tmp_path, name, damage):
    saved = kit.tensors(1)
    path = kit.save(tmp_path, 1, saved).path
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    loaded = kit.zeros_like(kit.tensors())
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        load_checkpoint(path, kit.held(loaded), kit.world)
    assert isinstance(caught.value, CorruptCheckpointError) or (name, damage) == ("manifest.json", "remove")
    if name == "__0_0.distcp":
        assert not all(loaded[name].equal(tensor) for name, tensor in saved.items())
    assert all((tensor.eq(0) | tensor.eq(saved[name])).all() for name, tensor in loaded.items())


def test_a_tensor_without_writer_fails_the_save(kit, tmp_path):
    tensor = GlobalTensor("w", (4,), torch.float32, [Piece((0,), torch.zeros(4))], write=False)
    with pytest.raises(CheckpointError, match='"w": ranks hold it, but none writes it'):
        save_checkpoint(SaveRequest(tmp_path, 1, {}, Provenance()), [tensor], kit.world)
    assert list(tmp_path.iterdir()) == []


def test_a_hole_or_an_overlap_fails_the_save(kit, tmp_path):
    def pieces(*ranges):
        return [GlobalTensor("w", (4,), torch.float32, [Piece((a,), torch.zeros(b - a)) for a, b in ranges])]

    with pytest.raises(CheckpointError, match='"w": 3 of 4 elements were written'):
        save_checkpoint(SaveRequest(tmp_path, 1, {}, Provenance()), pieces((0, 1), (2, 4)), kit.world)
    with pytest.raises(CheckpointError, match='"w": shards overlap at'):
        save_checkpoint(SaveRequest(tmp_path, 1, {}, Provenance()), pieces((0, 3), (2, 3)), kit.world)
    with pytest.raises(CheckpointError, match='"w": a piece lies outside'):
        save_checkpoint(SaveRequest(tmp_path, 1, {}, Provenance()), pieces((0, 5)), kit.world)


def test_scalars_that_are_not_json_fail_the_save(kit, tmp_path):
    with pytest.raises(CheckpointError, match=r"scalars.x is of type object"):
        save_checkpoint(SaveRequest(tmp_path, 1, {"x": object()}, Provenance()), kit.held(kit.tensors()), kit.world)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_holds_config_and_versions(kit, tmp_path):
    provenance = Provenance({"model": {"num_layers": 2}}, {"tokenizer": "ab12"}, ((10, 20),))
    path = save_checkpoint(SaveRequest(tmp_path, 5, {"a": 1}, provenance), kit.held(kit.tensors()), kit.world).path
    manifest = read_manifest(path)
    assert manifest.iteration == 5
    assert manifest.provenance == provenance
    assert manifest.scalars == {"a": 1}
    assert manifest.tensors["embedding.word_embeddings.weight"].shape == (101, 8)
    assert manifest.writer["world_size"] == 1
