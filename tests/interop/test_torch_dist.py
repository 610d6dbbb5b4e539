"""Import of Megatron-LM torch_dist checkpoints: stacked and numbered layers, and damage."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from support.interop_models import MODELS, VOCAB
from support.megatron_dist_files import write_torch_dist
from support.megatron_files import arguments

from megatron_lite.errors import CheckpointError


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_weights(name, stacked, original, imported, same, tmp_path):
    state, model, _, _ = original(**MODELS[name][1])
    args = arguments(model, core=True, rotary_seq_len_interpolation_factor=2 if name == "llama" else None)
    write_torch_dist(tmp_path / "dist", state, model, args, stacked=stacked)
    report, source = imported(tmp_path / "dist", tmp_path / "ck", "--vocab-size", str(VOCAB))
    same(source, state)
    assert "only weights are imported" in report.notes[0]
    assert not report.goes_on


def test_damage(original, imported, tmp_path):
    state, model, _, _ = original()
    folder = write_torch_dist(tmp_path / "dist", state, model, arguments(model, core=True))

    def refused(text):
        with pytest.raises(CheckpointError, match=text):
            imported(tmp_path / "dist", tmp_path / "ck", "--vocab-size", str(VOCAB))
        assert not (tmp_path / "ck").exists()

    (data,) = folder.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    refused(r"\.distcp")
    data.unlink()
    refused(r"\.distcp: No such file")
    data.write_bytes(whole)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    refused("sharded_backend='zarr'")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = "decoder.final_layernorm.weight"
    chunks, places = metadata.state_dict_metadata[name].chunks, metadata.storage_data
    metadata.state_dict_metadata[name].chunks = []
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused("its parts have 0")
    metadata.state_dict_metadata[name].chunks = chunks
    for index, info in places.items():
        if index.fqn == name:
            info.relative_path = "../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(r"\.metadata of the checkpoint names the file \.\./secret")
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    refused("does not describe tensors")
    (folder / ".metadata").write_bytes(pickle.dumps(torch.hub.load))
    refused("torch.hub.load, which was not executed")
    (folder / ".metadata").unlink()
    refused("No such file")
