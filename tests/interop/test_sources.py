"""Foreign weight files: indices that lie, shards that are missing or damaged, and pickles that would do harm."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_lite.errors import CheckpointError
from megatron_lite.interop.sources import open_hugging_face, read_json
from megatron_lite.interop.unpickling import Stub, read_torch_file
from megatron_lite.rectangle import Rectangle

BOTH_FORMATS = pytest.mark.parametrize("as_zip", [True, False])


def write(path, content, as_zip=True):
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    return path


@BOTH_FORMATS
def test_tensors_and_plain_values(tmp_path, as_zip):
    whole = torch.randn(5, 7)
    layer = torch.nn.Linear(4, 3).bfloat16()
    content = {
        "whole": whole,
        "transposed": whole.t(),
        "part": whole[1:3, 2:],
        "same storage": whole[4],
        "half": torch.randn(3).half(),
        "ids": torch.arange(3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
        "parameter": layer.weight,
        "nested": {"state": layer.state_dict(), "list": [1, 2.5, None, "text", b"bytes", (1, 2), {3}]},
        "ordered": OrderedDict(a=1),
        "args": argparse.Namespace(lr=1e-3, dtype=torch.float32, shape=whole.shape),
    }
    found = read_torch_file(write(tmp_path / "file.pt", content, as_zip))
    for name, tensor in content.items():
        if isinstance(tensor, torch.Tensor):
            assert found[name].equal(tensor), name
            assert found[name].stride() == tensor.stride()
            assert found[name].dtype == tensor.dtype
    assert found["nested"]["state"]["bias"].equal(layer.bias)
    assert found["nested"]["list"] == content["nested"]["list"]
    assert found["ordered"] == {"a": 1}
    assert vars(found["args"]) == {"lr": 1e-3, "dtype": torch.float32, "shape": (5, 7)}


@pytest.mark.parametrize("padding", range(8))
def test_legacy_files_of_any_alignment(tmp_path, padding):
    """The bytes of a storage lie behind pickles, whose lengths decide how they are aligned."""
    content = {"name" + "x" * padding: torch.randn(9, dtype=torch.float64), "half": torch.randn(3).half()}
    found = read_torch_file(write(tmp_path / "file.pt", content, as_zip=False))
    assert all(found[name].equal(tensor) for name, tensor in content.items())


def test_a_change_does_not_reach_the_file(tmp_path):
    path = write(tmp_path / "file.pt", {"a": torch.ones(4)})
    read_torch_file(path)["a"].zero_()
    assert read_torch_file(path)["a"].sum() == 4


def foreign_object(monkeypatch, module_name, name):
    """An object that a pickle names as `module_name.name`; take the modules away with monkeypatch.undo()."""
    import sys
    import types

    made = type(name, (), {"__module__": module_name, "__reduce__": lambda self: (made, (5,))})
    module = types.ModuleType(module_name)
    setattr(module, name, made)
    parts = module_name.split(".")
    for length in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:length]), module)
    return made()


@BOTH_FORMATS
def test_harmless_classes_become_stubs(tmp_path, as_zip, monkeypatch):
    backend = foreign_object(monkeypatch, "megatron.core.transformer.enums", "AttnBackend")
    content = {"rng": np.random.RandomState(1).get_state(), "backend": backend, "path": Path("x")}
    path = write(tmp_path / "file.pt", content, as_zip)
    monkeypatch.undo()
    found = read_torch_file(path)
    assert isinstance(found["rng"][1], Stub)
    assert found["backend"].name == "megatron.core.transformer.enums.AttnBackend"
    assert found["backend"].args == (5,)


@BOTH_FORMATS
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("megatron.core.transformer.enums", "Attn"),
        ("megatron.core.transformer.enums.deeper", "AttnBackend"),
        ("megatron", "AttnBackend"),
        ("deepspeed.utils", "fragment_address"),
        ("transformer_engine.common.recipe", "DelayedScaling"),
        ("transformers.trainer", "Trainer"),
        ("apex.amp", "AmpState"),
        ("numpy.random", "RandomState"),
    ],
)
def test_names_are_allowed_one_by_one(module, name, as_zip, tmp_path, monkeypatch):
    """A package of Megatron-LM or DeepSpeed is no reason to allow its other names."""
    path = write(tmp_path / "file.pt", {"a": foreign_object(monkeypatch, module, name)}, as_zip)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=rf"file\.pt names {module}\.{name}, which was not executed"):
        read_torch_file(path)


def test_tensors_that_are_not_needed_are_not_read(tmp_path, monkeypatch):
    """Storages of legacy files that cannot be mapped cost memory: those of the optimizer alone are left out."""
    from megatron_lite.interop import unpickling

    shared = torch.randn(7, dtype=torch.float64)
    optimizer = {"state": [{"exp_avg": torch.randn(5)}], "fp32": (torch.ones(3), shared), "step": 3}
    content = {"model": {"a": torch.randn(4), "b": shared[2:]}, "optimizer": optimizer, "args": argparse.Namespace(x=1)}
    path = write(tmp_path / "file.pt", content, as_zip=False)
    sizes, inner = [], unpickling._legacy_bytes
    monkeypatch.setattr(unpickling, "_legacy_bytes", lambda *args: sizes.append(args[3]) or inner(*args))
    found = read_torch_file(path, without=("optimizer",))
    assert sorted(sizes) == [4 * 4, 7 * 8]
    assert found["model"]["a"].equal(content["model"]["a"])
    assert found["model"]["b"].equal(shared[2:])
    left_out = found["optimizer"]["state"][0]["exp_avg"]
    assert left_out.is_meta
    assert left_out.shape == (5,)
    assert found["optimizer"]["step"] == 3
    sizes.clear()
    assert read_torch_file(path)["optimizer"]["state"][0]["exp_avg"].equal(optimizer["state"][0]["exp_avg"])
    assert len(sizes) == 4


class Touch:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def harmful(marker):
    """Ways to touch a file that have been tried on loaders of weights."""
    import builtins
    import importlib
    import runpy
    import subprocess

    text = f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": Touch(os.system, f"touch {marker}"),
        "subprocess.Popen": Touch(subprocess.Popen, ["touch", str(marker)]),
        "builtins.eval": Touch(builtins.eval, text),
        "builtins.exec": Touch(builtins.exec, text),
        "builtins.getattr": Touch(getattr, "text", "upper"),
        "importlib.import_module": Touch(importlib.import_module, "antigravity"),
        "runpy._run_code": Touch(runpy._run_code, text, {}),
        "numpy.": Touch(np.testing.rundocs, str(marker)),
        "torch.": Touch(torch.hub.load, str(marker), "x"),
        "io.open": Touch(open, str(marker), "w"),
        "torch.storage._load_from_bytes": Touch(torch.storage._load_from_bytes, b""),
    }


@BOTH_FORMATS
@pytest.mark.parametrize("name", harmful("/nowhere"))
def test_a_malicious_pickle_executes_nothing_and_is_named(name, as_zip, tmp_path):
    marker = tmp_path / "marker"
    folder = tmp_path / "model"
    folder.mkdir()
    content = {"weight": torch.ones(2), "evil": harmful(marker)[name]}
    write(folder / "pytorch_model.bin", content, as_zip)
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin names .*{name}") as caught:
        open_hugging_face(folder)
    assert "not executed" in str(caught.value)
    assert not marker.exists()


def test_a_pickle_that_reaches_beyond_its_storage(tmp_path):
    from megatron_lite.interop.unpickling import _rebuild_tensor, _Storage

    storage = _Storage("0", torch.zeros(16, dtype=torch.uint8), torch.float32)
    assert _rebuild_tensor(storage, 0, (2, 2), (2, 1)).shape == (2, 2)
    for offset, size, stride in ((1, (2, 2), (2, 1)), (0, (2, 2), (4, 1)), (-1, (1,), (1,)), (0, (2,), (-1,))):
        with pytest.raises(pickle.UnpicklingError, match="beyond its storage"):
            _rebuild_tensor(storage, offset, size, stride)


@BOTH_FORMATS
def test_damaged_pickles(tmp_path, as_zip):
    path = write(tmp_path / "pytorch_model.bin", {"a": torch.randn(100)}, as_zip)
    whole = path.read_bytes()
    for data in (b"", b"not a pickle", whole[: len(whole) // 2], whole[:-40]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            read_torch_file(path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_torch_file(tmp_path / "nothing.bin")
    for content, found in (([1], "a list"), ({"a": torch.ones(1), "epoch": 3}, "'epoch', a int")):
        write(path, content, as_zip)
        with pytest.raises(CheckpointError, match=found):
            open_hugging_face(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in files.items():
        save_file({name: torch.full((3, 4), float(ord(name)))}, tmp_path / file)

    def index(**changes):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**files, **changes}}))
        return tmp_path

    return index


def test_sharded_files_are_read_by_rectangles(sharded):
    source = open_hugging_face(sharded())
    assert {name: info.shape for name, info in source.tensors.items()} == {"a": (3, 4), "b": (3, 4)}
    assert source.read("b", Rectangle((1, 2), (2, 1))).equal(torch.full((2, 1), 98.0))


@pytest.mark.parametrize(
    "outside", ["/etc/passwd", "../model.safetensors", "sub/model.safetensors", "..", "", "a/../../b.safetensors"]
)
def test_an_index_that_points_outside(outside, sharded):
    with pytest.raises(CheckpointError, match="not in the model's folder"):
        open_hugging_face(sharded(b=outside))


def test_a_shard_is_missing_damaged_or_of_another_model(sharded):
    folder = sharded()
    second = folder / "model-00002-of-00002.safetensors"
    data = second.read_bytes()
    for content in (data[:-5], b"\xff" * 100, b""):
        second.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
            open_hugging_face(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_hugging_face(folder)
    second.write_bytes(data)
    with pytest.raises(CheckpointError, match="lists the tensor c in"):
        open_hugging_face(sharded(c="model-00001-of-00002.safetensors"))
    save_file({"b": torch.ones(1), "z": torch.ones(1)}, second)
    with pytest.raises(CheckpointError, match="contains the tensor z, which the index does not list"):
        open_hugging_face(sharded())


def test_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="there is none of"):
        open_hugging_face(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        open_hugging_face(tmp_path)
    for text in ("[]", "{", ""):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"is not a JSON object|config.json is empty"):
            read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="No such file"):
        read_json(tmp_path / "other.json")
