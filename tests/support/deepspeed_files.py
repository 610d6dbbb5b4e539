"""DeepSpeed's files, written from the description of their formats: layer files, ZeRO-1, universal."""

from collections import OrderedDict

import torch
from support.megatron_files import LEGACY, adam_states, layer_tensors, legacy_model, padded_rows, stage_layers


def deepspeed_layers(state, model, tp, gate_first=False):
    """{(number of the file, tp rank): content} of the pipeline's layer files."""
    files = {}
    for rank in range(tp):
        first = legacy_model(state, model, rank, tp, 0, 2)["language_model"]["embedding"]
        files[1, rank] = OrderedDict(
            (f"{module}.{name}", tensor) for module, named in first.items() for name, tensor in named.items()
        )
        for number in range(model.num_layers):
            files[number + 3, rank] = OrderedDict(
                layer_tensors(state, number, LEGACY, rank, tp, model, gate_first=gate_first)
            )
        files[model.num_layers + 4, rank] = OrderedDict(
            (suffix, state[f"decoder.final_norm.{suffix}"].clone()) for suffix in ("weight", "bias")
        )
    return files


def stage_parameters(files, model, rank, stage, pp):
    """Parameters of a pipeline stage in DeepSpeed's names; the tied embedding is on the first and on the last stage."""
    found = OrderedDict()
    if stage in (0, pp - 1):
        found.update((f"tied_modules.embed.{name}", tensor) for name, tensor in files[1, rank].items())
    for number in stage_layers(model.num_layers, pp, 1, stage, 0):
        found.update((f"{number + 3}.{name}", tensor) for name, tensor in files[number + 3, rank].items())
    if stage == pp - 1:
        last = model.num_layers + 4
        found.update((f"{last}.{name}", tensor) for name, tensor in files[last, rank].items())
    return found


def zero_files(kinds, groups, model, rank, stage, pp, dp, step, prefix, scaler):
    """(name, content) of the optimizer files of one model-parallel rank."""
    flats = {}
    for kind in kinds if dp else ():
        named = stage_parameters(kinds[kind], model, rank, stage, pp)
        for number, group in enumerate(groups):
            flat = torch.cat([named[name].reshape(-1).float() for name in group])
            padding = -flat.numel() % (2 * dp)
            padded = torch.cat((flat, torch.zeros(padding)))
            flats[kind, number] = ([part.clone() for part in padded.chunk(dp)], padding)
    for replica in range(dp):
        parts = {key: parts[replica] for key, (parts, _) in flats.items()}
        mains = [parts["main_param", number] for number in range(2)]
        if not prefix and replica == dp - 1:  # stage 1 saves without padding, bf16 with it
            mains = [main[: main.numel() - flats["main_param", number][1]] for number, main in enumerate(mains)]
        moments = {
            number: {"step": step, **{kind: parts[kind, number] for kind in ("exp_avg", "exp_avg_sq")}}
            for number in range(2)
        }
        zero = {
            "base_optimizer_state": {"state": moments, "param_groups": [{"params": [0]}, {"params": [1]}]},
            "single_partition_of_fp32_groups": mains,
            "partition_count": dp,
            "zero_stage": 1,
            "loss_scaler": scaler,
        }
        yield f"{prefix}zero_pp_rank_{replica}_mp_rank_{{mp:02d}}_optim_states.pt", {"optimizer_state_dict": zero}


def write_deepspeed(
    root, state, model, tp=1, pp=1, *, dp=0, step=7, args=None, prefix="", iteration=7, scaler=None,
    edit=lambda name, content: None,
):  # fmt: skip
    """Write layer files, mp_rank files and, if dp is given, ZeRO-1 files. Returns global_stepN."""
    folder = root / f"global_step{iteration}"
    folder.mkdir(parents=True)
    (root / "latest").write_text(folder.name, encoding="utf-8")
    files = deepspeed_layers(state, model, tp)

    def save(name, content):
        edit(name, content)
        torch.save(content, folder / name)

    for (number, rank), content in files.items():
        save(f"layer_{number:02d}-model_{rank:02d}-model_states.pt", content)
    kinds = {kind: deepspeed_layers(named, model, tp) for kind, named in adam_states(state).items()}
    kinds.setdefault("main_param", files)
    for stage in range(pp):
        for rank in range(tp):
            mp = stage * tp + rank
            named = stage_parameters(files, model, rank, stage, pp)
            groups = [
                OrderedDict((name, t.shape) for name, t in named.items() if (t.dim() > 1) is matrices)
                for matrices in (True, False)
            ]
            content = {
                "module": None, "iteration": iteration, "checkpoint_version": 3.0, "global_steps": iteration,
                "skipped_steps": 0, "dp_world_size": max(dp, 1), "mp_world_size": tp * pp, "param_shapes": groups,
                "lr_scheduler": {"max_lr": 1e-3, "num_steps": step * 4},
                "checkpoint_info": {"padded_vocab_size": padded_rows(model, tp),
                                    "original_vocab_size": model.vocab_size},
            }  # fmt: skip
            if args is not None:
                content["args"] = args
            save(f"mp_rank_{mp:02d}_model_states.pt", content)
            for name, zero in zero_files(kinds, groups, model, rank, stage, pp, dp, step, prefix, scaler):
                save(name.format(mp=mp), zero)
    return folder


def write_universal(root, state, model, args=None, step=7):
    """Write a universal checkpoint: one folder for each parameter."""
    folder = root / f"global_step{step}_universal"
    (root / "latest_universal").parent.mkdir(parents=True, exist_ok=True)
    (root / "latest_universal").write_text(folder.name, encoding="utf-8")
    kinds = {"fp32": {name: tensor for name, tensor in state.items() if not name.startswith("optimizer.")}}
    kinds |= {kind: named for kind, named in adam_states(state).items() if kind != "main_param"}
    for kind, named in kinds.items():
        for name, tensor in stage_parameters(deepspeed_layers(named, model, 1), model, 0, 0, 1).items():
            place = folder / "zero" / name
            place.mkdir(parents=True, exist_ok=True)
            content = {"param": tensor.float(), "cat_dim": 0}
            if name.endswith("word_embeddings.weight"):
                content["param"] = tensor[: model.vocab_size].float()
                content["vocab_divisibility_padding_tensor"] = torch.zeros(model.hidden_size)
            torch.save(content, place / f"{kind}.pt")
    content = {"iteration": step, "global_steps": step, "skipped_steps": 0, "args": args}
    content["checkpoint_info"] = {"original_vocab_size": model.vocab_size}
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    return folder
