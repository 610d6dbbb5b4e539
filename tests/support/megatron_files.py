"""Megatron-LM's and DeepSpeed's files, written from the description of their formats: not by the exporter.

`state` is a model's global tensors under our names; everything else here is spelled out anew.
"""

import argparse
from collections import OrderedDict

import torch

from megatron_lite.checkpoint.reading import CheckpointReader

LEGACY = (
    ("input_layernorm", "input_norm", None),
    ("self_attention.query_key_value", "self_attention.qkv", "qkv"),
    ("self_attention.dense", "self_attention.proj", "row"),
    ("post_attention_layernorm", "pre_mlp_norm", None),
    ("mlp.dense_h_to_4h", "mlp.fc1", "fc1"),
    ("mlp.dense_4h_to_h", "mlp.fc2", "row"),
)
# In the order in which megatron-core registers modules: the projection comes before the QKV matrix.
CORE = (
    ("input_layernorm", "input_norm", None),
    ("self_attention.linear_proj", "self_attention.proj", "row"),
    ("self_attention.linear_qkv", "self_attention.qkv", "qkv"),
    ("self_attention.q_layernorm", "self_attention.q_norm", None),
    ("self_attention.k_layernorm", "self_attention.k_norm", None),
    ("pre_mlp_layernorm", "pre_mlp_norm", None),
    ("mlp.linear_fc1", "mlp.fc1", "fc1"),
    ("mlp.linear_fc2", "mlp.fc2", "row"),
)
FUSED = {"input_layernorm": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm_"}


def read_state(path):
    """All tensors of a checkpoint of ours."""
    source = CheckpointReader(path)
    return {name: source.read(name, info.full).clone() for name, info in source.tensors.items()}


def padded_rows(model, tp, divisible_by=16):
    return -(-model.vocab_size // (divisible_by * tp)) * divisible_by * tp


def pad(table, rows):
    """Rows past the vocabulary take part in Megatron's training: they are not zero."""
    return torch.cat((table, torch.full((rows - table.shape[0], table.shape[1]), 0.125, dtype=table.dtype)))


def part(tensor, kind, rank, tp, model, version=3.0, gate_first=True):
    """One tensor-parallel rank's part."""
    if kind is None or (kind == "row" and tensor.dim() == 1):
        return tensor.clone()
    if kind == "row":
        return tensor.chunk(tp, 1)[rank].clone()
    if kind == "fc1" and model.gated:
        gate, up = (half.chunk(tp, 0)[rank] for half in tensor)
        return torch.cat((gate, up) if gate_first else (up, gate))
    rows = tensor.chunk(tp, 0)[rank]
    if kind == "qkv" and version < 2:
        heads = rows.view(model.num_attention_heads // tp, 3, model.head_dim, *rows.shape[1:])
        order = (1, 0, 2) if version == 0 else (0, 2, 1)
        rows = heads.permute(*order, *range(3, heads.dim())).reshape(rows.shape)
    return rows.clone()


def layer_tensors(state, number, names, rank, tp, model, **options):
    """(their name without the layer, part) of one layer, in order."""
    fused = options.pop("fused", False)
    found = []
    for theirs, ours, kind in names:
        for suffix in ("weight", "bias"):
            tensor = state.get(f"decoder.layers.{number}.{ours}.{suffix}")
            if tensor is not None:
                prefix = FUSED.get(theirs, theirs + ".") if fused else theirs + "."
                found.append((prefix + suffix, part(tensor, kind, rank, tp, model, **options)))
    return found


def stage_layers(layers, pp, chunks, stage, chunk):
    """Global numbers of the layers of a chunk: chunk 0 of all stages first."""
    size = layers // (pp * chunks)
    first = chunk * layers // chunks + stage * size
    return range(first, first + size)


def outside(state, model, tp, rank):
    rows = padded_rows(model, tp)
    found = {"words": pad(state["embedding.word_embeddings.weight"], rows).chunk(tp, 0)[rank].clone()}
    if "output_layer.weight" in state:
        found["head"] = pad(state["output_layer.weight"], rows).chunk(tp, 0)[rank].clone()
    return found


def legacy_model(state, model, rank, tp, stage, pp, chunk=0, chunks=1, version=3.0, old_names=False, gate_first=True):
    first, last = stage == 0 and chunk == 0, stage == pp - 1 and chunk == chunks - 1
    table = outside(state, model, tp, rank)
    language, content = {}, {}
    content["language_model"] = language
    if first:
        language["embedding"] = {"word_embeddings": OrderedDict(weight=table["words"])}
        if "embedding.norm.weight" in state:
            for suffix in ("weight", "bias"):
                language["embedding"]["word_embeddings"][f"norm.{suffix}"] = state[f"embedding.norm.{suffix}"].clone()
        if "embedding.position_embeddings.weight" in state:
            positions = state["embedding.position_embeddings.weight"].clone()
            language["embedding"]["position_embeddings"] = OrderedDict(weight=positions)
    encoder = OrderedDict()
    for local, number in enumerate(stage_layers(model.num_layers, pp, chunks, stage, chunk)):
        options = {"version": version, "gate_first": gate_first}
        for name, tensor in layer_tensors(state, number, LEGACY, rank, tp, model, **options):
            spelled = name.replace("self_attention.", "attention.") if old_names else name
            encoder[f"layers.{local}.{spelled}"] = tensor
    if last:
        for suffix in ("weight", "bias"):
            if f"decoder.final_norm.{suffix}" in state:
                encoder[f"final_layernorm.{suffix}"] = state[f"decoder.final_norm.{suffix}"].clone()
    language["transformer" if old_names else "encoder"] = encoder
    if last and "head" in table:
        language["output_layer"] = OrderedDict(weight=table["head"])
    elif last and not first:
        content["word_embeddings_for_head"] = OrderedDict(weight=table["words"].clone())
    return content


def core_model(state, model, rank, tp, stage, pp, chunk=0, chunks=1, fused=False):
    first, last = stage == 0 and chunk == 0, stage == pp - 1 and chunk == chunks - 1
    table = outside(state, model, tp, rank)
    content = OrderedDict()
    if first:
        content["embedding.word_embeddings.weight"] = table["words"]
        if "embedding.position_embeddings.weight" in state:
            content["embedding.position_embeddings.weight"] = state["embedding.position_embeddings.weight"].clone()
    for local, number in enumerate(stage_layers(model.num_layers, pp, chunks, stage, chunk)):
        for name, tensor in layer_tensors(state, number, CORE, rank, tp, model, fused=fused):
            content[f"decoder.layers.{local}.{name}"] = tensor
        content[f"decoder.layers.{local}.self_attention.core_attention._extra_state"] = None
    if last:
        for suffix in ("weight", "bias"):
            if f"decoder.final_norm.{suffix}" in state:
                content[f"decoder.final_layernorm.{suffix}"] = state[f"decoder.final_norm.{suffix}"].clone()
        content["output_layer._extra_state"] = None
        if "head" in table:
            content["output_layer.weight"] = table["head"]
        elif not first:
            content["output_layer.weight"] = table["words"].clone()
    return content


def arguments(model, tp=1, pp=1, core=False, **changes):
    """Args as Megatron has them, as far as the model goes."""
    values = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "seq_length": 32,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "padded_vocab_size": padded_rows(model, tp),
        "layernorm_epsilon": model.norm_epsilon,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "init_method_std": model.init_std,
        "bias_gelu_fusion": model.activation == "gelu_tanh",
        "apply_residual_connection_post_layernorm": False,
        "params_dtype": torch.float32,
        "lr": 1e-3,
        "global_batch_size": 4,
        "consumed_train_samples": 28,
        "consumed_valid_samples": 0,
    }
    if core:
        grouped = model.num_query_groups != model.num_attention_heads
        values |= {
            "normalization": model.normalization,
            "position_embedding_type": {"learned": "learned_absolute", "rotary": "rope"}[model.position_embedding],
            "rotary_base": int(model.rotary_base),
            "rotary_percent": model.rotary_percent,
            "rotary_interleaved": False,
            "swiglu": model.activation == "swiglu",
            "add_bias_linear": model.linear_bias,
            "add_qkv_bias": model.qkv_bias and not model.linear_bias,
            "group_query_attention": grouped,
            "num_query_groups": model.num_query_groups if grouped else 1,
            "untie_embeddings_and_output_weights": not model.tied_embeddings,
            "qk_layernorm": model.qk_layernorm,
            "num_experts": None,
            "multi_latent_attention": False,
        }
    else:
        values |= {"embed_layernorm": model.embed_layernorm}
        values["position_embedding_type"] = {"learned": "absolute", "alibi": "alibi"}.get(model.position_embedding)
    return argparse.Namespace(**{key: value for key, value in (values | changes).items() if value != "absent"})


def write_classic(
    root, state, model, tp=1, pp=1, *, naming="legacy", version=3.0, chunks=1, old_names=False, as_zip=True,
    iteration=7, name=None, args=None, edit=lambda content, rank, stage: None, gate_first=True,
):  # fmt: skip
    """Write a classic checkpoint; `edit` changes a rank's content before it is saved. Returns its folder."""
    folder = root / (name or f"iter_{iteration:07d}")
    for stage in range(pp):
        for rank in range(tp):
            content = {"iteration": iteration, "tokens": 0}
            if version:
                content["checkpoint_version"] = version
            if args is not None:
                content["args"] = args
            for chunk in range(chunks):
                place = (state, model, rank, tp, stage, pp, chunk, chunks)
                made = (
                    legacy_model(*place, version, old_names, gate_first)
                    if naming == "legacy"
                    else core_model(*place, fused=naming == "fused")
                )
                content["model" if chunks == 1 else f"model{chunk}"] = made
            edit(content, rank, stage)
            path = folder / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            path.mkdir(parents=True)
            torch.save(content, path / "model_optim_rng.pt", _use_new_zipfile_serialization=as_zip)
    (root / "latest_checkpointed_iteration.txt").write_text(name or str(iteration), encoding="utf-8")
    return folder


def in_order(content):
    """Tensors of a nested state dict in the order in which their parameters were registered."""
    found = []
    for value in content.values():
        if isinstance(value, dict):
            found += in_order(value)
        elif value is not None:
            found.append(value)
    return found


def adam_states(state):
    """Tensors of main parameters and moments, each under the parameters' names."""
    found = {}
    for kind in ("main_param", "exp_avg", "exp_avg_sq"):
        prefix = f"optimizer.{kind}."
        named = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if named:
            found[kind] = named
    return found


def adam_content(kinds, step, scaler=None, apex=False, vectors_first=False):
    """`optimizer` of a classic file: `kinds` has each kind's tensors of one rank in the order of registration."""
    indices = range(len(kinds["exp_avg"]))
    groups = [
        [i for i in indices if kinds["exp_avg"][i].dim() > 1],
        [i for i in indices if kinds["exp_avg"][i].dim() == 1],
    ]
    if vectors_first:
        groups.reverse()
    state, param_groups, number = {}, [], 0
    for members in groups:
        param_groups.append({"params": [], "lr": 1e-3, **({"step": step} if apex else {})})
        for i in members:
            state[number] = {kind: kinds[kind][i] for kind in ("exp_avg", "exp_avg_sq")}
            if not apex:
                state[number]["step"] = torch.tensor(float(step))
            param_groups[-1]["params"].append(number)
            number += 1
    inner = {"state": state, "param_groups": param_groups}
    if "main_param" not in kinds:
        return inner
    mains = [[kinds["main_param"][i] for i in members] for members in groups]
    return {"optimizer": inner, "grad_scaler": scaler or {}, "fp32_from_fp16_params": mains}


def with_adam(state, model, tp, pp, step, naming="legacy", version=3.0, distributed=None, **options):
    """An `edit` of write_classic that adds the optimizer's state."""
    kinds = adam_states(state)

    def edit(content, rank, stage):
        more = {"version": version} if naming == "legacy" else {}
        build = legacy_model if naming == "legacy" else core_model
        tensors = {kind: in_order(build(named, model, rank, tp, stage, pp, **more)) for kind, named in kinds.items()}
        content["optimizer"] = adam_content(tensors, step, **options)
        content["opt_param_scheduler"] = {"max_lr": 1e-3, "num_steps": step * 4}
        if distributed is not None:
            content["optimizer"]["optimizer"].pop("state")
            for group in content["optimizer"]["optimizer"]["param_groups"]:
                group["step"] = step
            spelled = {"main_param": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
            buffer = {
                spelled[kind]: torch.cat([tensor.reshape(-1) for tensor in reversed(found)])
                for kind, found in tensors.items()
            }
            buffer["numel_unpadded"] = buffer["param"].numel()
            distributed[rank, stage] = {
                "buckets_coalesced": True,
                0: {(torch.bfloat16, torch.float32): buffer},
            }

    return edit
