"""Peak memory of conversions, in a process that does nothing else: takes a folder to work in, prints JSON."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from support.deepspeed_files import write_deepspeed
from support.megatron_files import arguments, write_classic

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parameters import parameter_shapes
from megatron_lite.interop.importing import ImportOptions, import_checkpoint
from megatron_lite.interop.megatron.export import MegatronExportOptions, export_megatron, plan_megatron_export
from megatron_lite.interop.megatron.opening import MegatronOptions

LARGE = ModelConfig(num_layers=4, hidden_size=768, num_attention_heads=12, max_position_embeddings=64, vocab_size=8192)
SMALL = replace(LARGE, hidden_size=24, ffn_hidden_size=24, head_dim=2)
FORMATS = {
    "classic": {},
    "version 0": {"version": 0, "tp": 2},
    "pre-zip": {"version": 0, "as_zip": False},
    "deepspeed": None,
}


def status(name):
    (line,) = [
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(name)
    ]
    return int(line.split()[1]) << 10


def growth(work, *args):
    """Bytes by which resident memory, pages of mapped files included, grows at most while some work is done."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    work(*args)
    return status("VmHWM") - before


def run_import(source, output):
    import_checkpoint(source, output, ImportOptions(megatron=MegatronOptions(flags=("--vocab-size", "8192"))))


def run_export(source, output):
    export_megatron(plan_megatron_export(str(source), 0, MegatronExportOptions()), output)


def write(folder, kind, model):
    """Write a checkpoint of a kind; returns the bytes of its weights."""
    state = {name: torch.full(shape, 0.5) for name, shape in parameter_shapes(model).items()}
    layout = FORMATS[kind]
    if layout is None:
        write_deepspeed(folder, state, model, 2, args=arguments(model, 2))
    else:
        write_classic(folder, state, model, args=arguments(model, layout.get("tp", 1)), **layout)
    return sum(tensor.nbytes for tensor in state.values())


def main(root):
    torch.set_num_threads(1)
    found = {}
    # The first conversion of all loads libraries, which is no part of it.
    for model in (SMALL, LARGE):
        for kind in FORMATS:
            folder = root / "model"
            size = write(folder, kind, model)
            found[f"import {kind}"] = growth(run_import, folder, root / "ck") / size
            if kind == "classic":
                found["export"] = growth(run_export, root / "ck", root / "out") / size
            for path in root.iterdir():
                shutil.rmtree(path)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
