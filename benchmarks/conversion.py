"""Conversion benchmark: peak memory of import and export against the size of the model's weights.

    python benchmarks/conversion.py [--layers 24] [--hidden 2048]

Writes a GPT-2 with random fp32 weights as a Hugging Face folder (1.3B parameters by default; 16 GB of disk in all), and
runs `megatron-lite import`, `export --to hf` and `export --to megatron`, each as a process of its own. Prints the
resident memory of the largest process of each command (pages of mapped files included) over the bytes of the weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY = 50257
POSITIONS = 2048
# The kernel counts the largest child of a process once it has ended: each command runs in a Python process of its own.
MEASURE = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(json.dumps({"code": code, "bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10}))
"""


def main() -> int:
    """Write the model, convert it, and print the ratios; return 1 if a command failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_model(root / "hf", options.layers, options.hidden)
        print(f"{size / 4 / 1e9:.2f}B parameters in fp32, {size / 2**30:.2f} GiB", flush=True)
        for title, arguments in (
            ("import", ["import", root / "hf", "--output", root / "ck"]),
            ("export --to hf", ["export", root / "ck", "--to", "hf", "--output", root / "out"]),
            ("export --to megatron", ["export", root / "ck", "--to", "megatron", "--output", root / "megatron"]),
        ):
            began = time.monotonic()
            command = [sys.executable, "-m", "megatron_lite", *map(str, arguments)]
            done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            if found["code"]:
                print(done.stderr)
                return 1
            seconds, peak = time.monotonic() - began, found["bytes"]
            print(
                f"{title}: peak {peak / 2**30:.2f} GiB, {peak / size:.2f} of the weights, {seconds:.0f} s", flush=True
            )
    return 0


def write_model(folder: Path, layers: int, hidden: int) -> int:
    """Write a GPT-2 in shards of one layer; return the bytes of its weights."""
    folder.mkdir()
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"}
    config |= {"n_layer": layers, "n_embd": hidden, "n_head": hidden // 128, "n_positions": POSITIONS}
    config |= {"vocab_size": VOCABULARY, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"wte.weight": (VOCABULARY, hidden), "wpe.weight": (POSITIONS, hidden), **norm("ln_f", hidden)}
    shards = [shapes]
    for layer in range(layers):
        name = f"h.{layer}"
        shards.append(
            {
                **norm(f"{name}.ln_1", hidden),
                **norm(f"{name}.ln_2", hidden),
                **linear(f"{name}.attn.c_attn", hidden, 3 * hidden),
                **linear(f"{name}.attn.c_proj", hidden, hidden),
                **linear(f"{name}.mlp.c_fc", hidden, 4 * hidden),
                **linear(f"{name}.mlp.c_proj", 4 * hidden, hidden),
            }
        )
    total, weight_map = 0, {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.randn(shape) * 0.02 for name, shape in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def norm(name: str, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a LayerNorm."""
    return {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Conv1D, stored transposed."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (columns,)}


if __name__ == "__main__":
    sys.exit(main())
