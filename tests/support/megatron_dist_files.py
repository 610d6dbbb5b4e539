"""Megatron-LM's torch_dist files, written by torch.distributed.checkpoint from the description of the format."""

import json
import pickle

import torch
import torch.distributed.checkpoint as dcp
from support.megatron_files import CORE, FUSED, pad, padded_rows
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType


def write_torch_dist(root, state, model, args=None, iteration=7, stacked=True):
    """Write a checkpoint whose layers are stacked, or numbered. Returns its folder."""
    folder = root / f"iter_{iteration:07d}"
    tensors = {
        f"embedding.{name}": state[f"embedding.{name}"].clone()
        for name in ("word_embeddings.weight", "position_embeddings.weight")
        if f"embedding.{name}" in state
    }
    rows = padded_rows(model, 1)
    tensors["embedding.word_embeddings.weight"] = pad(tensors["embedding.word_embeddings.weight"], rows)
    if "output_layer.weight" in state:
        tensors["output_layer.weight"] = pad(state["output_layer.weight"], rows)
    for theirs, ours, _ in CORE:
        for suffix in ("weight", "bias"):
            layers = [state.get(f"decoder.layers.{n}.{ours}.{suffix}") for n in range(model.num_layers)]
            if layers[0] is None:
                continue
            if theirs == "mlp.linear_fc1" and model.gated:
                layers = [layer.flatten(0, 1) for layer in layers]
            name = FUSED.get(theirs, theirs + ".") + suffix
            if stacked:
                tensors[f"decoder.layers.{name}"] = torch.stack(layers)
            else:
                tensors |= {f"decoder.layers.{n}.{name}": layer.clone() for n, layer in enumerate(layers)}
    for suffix in ("weight", "bias"):
        if f"decoder.final_norm.{suffix}" in state:
            tensors[f"decoder.final_layernorm.{suffix}"] = state[f"decoder.final_norm.{suffix}"].clone()
    content = {**tensors, "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(4)}
    content["decoder.layers.self_attention.core_attention._extra_state/shard_0_4"] = b"bytes"
    folder.mkdir(parents=True)
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    # megatron-core keeps every rank's save plan in .metadata (seen in files of 0.16.1).
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn.endswith("weight"))
    entry = metadata.state_dict_metadata[index.fqn]
    data = TensorWriteData(entry.chunks[0], entry.properties, entry.size)
    metadata.all_local_plans = [SavePlan([WriteItem(index, WriteItemType.SHARD, tensor_data=data)])]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    common = {"iteration": iteration, "checkpoint_version": 3.0, "args": args}
    torch.save(common, folder / "common.pt")
    metadata = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration), encoding="utf-8")
    return folder
