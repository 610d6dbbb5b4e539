"""Recognition of foreign checkpoints by their file names, without torch."""

import subprocess
import sys

import pytest

from megatron_lite.runs.foreign import Kind, foreign_error, recognise

FOLDERS = {
    "ours": (
        {"iter_0000005/manifest.json"},
        {"latest_checkpointed_iteration.txt": "5"},
        Kind.MEGATRON_LITE,
        "iter_0000005",
    ),
    "one of ours": ({"manifest.json"}, {}, Kind.MEGATRON_LITE, ""),
    "safetensors": ({"config.json", "model.safetensors"}, {}, Kind.HUGGING_FACE, ""),
    "an incomplete download": ({"config.json", "model.safetensors.index.json"}, {}, Kind.HUGGING_FACE, ""),
    "pickles": ({"config.json", "pytorch_model.bin"}, {}, Kind.HUGGING_FACE, ""),
    "trainer": ({"checkpoint-500/model.safetensors"}, {}, Kind.HUGGING_FACE, "checkpoint-500"),
    "classic": (
        {"iter_0000500/mp_rank_00/model_optim_rng.pt", "iter_0000400/mp_rank_00/model_optim_rng.pt"},
        {"latest_checkpointed_iteration.txt": "400"},
        Kind.MEGATRON,
        "iter_0000400",
    ),
    "pipeline": ({"mp_rank_01_003/model_optim_rng.pt"}, {}, Kind.MEGATRON, ""),
    "release": (
        {"release/mp_rank_00/model_optim_rng.pt"},
        {"latest_checkpointed_iteration.txt": "release"},
        Kind.MEGATRON,
        "release",
    ),
    "not announced": (
        {"iter_0000500/mp_rank_00/model_optim_rng.pt", "iter_0010000/mp_rank_00/model_optim_rng.pt"},
        {},
        Kind.MEGATRON,
        "iter_0010000",
    ),
    "torch_dist": (
        {"iter_0000005/metadata.json", "iter_0000005/.metadata"},
        {"latest_checkpointed_iteration.txt": "5"},
        Kind.MEGATRON_DIST,
        "iter_0000005",
    ),
    "deepspeed": (
        {"global_step500/layer_01-model_00-model_states.pt", "global_step500/mp_rank_00_model_states.pt"},
        {"latest": "global_step500", "latest_checkpointed_iteration.txt": "500"},
        Kind.DEEPSPEED,
        "global_step500",
    ),
    "universal": (
        {"global_step5_universal/zero/word/fp32.pt", "global_step5_universal/mp_rank_00_model_states.pt"},
        {"latest_universal": "global_step5_universal"},
        Kind.DEEPSPEED_UNIVERSAL,
        "global_step5_universal",
    ),
    "an announcement that leads elsewhere": ({"notes"}, {"latest": "../../etc"}, None, ""),
    "nothing": ({"notes"}, {}, None, ""),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_recognised(name, tmp_path):
    files, texts, kind, inside = FOLDERS[name]
    root = tmp_path / "root"
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    for file, text in texts.items():
        (root / file).write_text(text + "\n")
    found = recognise(root)
    assert (found and found.kind) is kind
    if found is not None:
        assert found.folder == (root / inside if inside else root)
    error = foreign_error(root)
    assert (error is None) == (kind in (None, Kind.MEGATRON_LITE))
    if error is not None:
        assert f"megatron-lite import {found.folder} --output" in str(error)


def test_no_folder(tmp_path):
    assert recognise(tmp_path / "nowhere") is None
    (tmp_path / "file").touch()
    assert recognise(tmp_path / "file") is None


def test_without_torch():
    text = "import sys, megatron_lite.runs.foreign; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0
