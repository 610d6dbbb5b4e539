"""Foreign checkpoints: recognized by their file names, named by --load with the command that imports them."""

import subprocess
import sys

import pytest

from megatron_lite.cli.main import main
from megatron_lite.errors import CheckpointError
from megatron_lite.runs.catalog import find_checkpoint, set_latest
from megatron_lite.runs.foreign import Kind, foreign_error, recognise

LATEST = "latest_checkpointed_iteration.txt"
MEGATRON = {
    LATEST: "500",
    "iter_0000500/mp_rank_00/model_optim_rng.pt": "",
    "iter_0000500/mp_rank_01/model_optim_rng.pt": "",
}
CLASSIC = "Megatron-LM checkpoint (torch format"
FOREIGN = {
    "classic": (MEGATRON, Kind.MEGATRON, "iter_0000500", CLASSIC),
    "classic, older ones and an earlier latest": (
        {
            LATEST: "400",
            "iter_0000500/mp_rank_00/model_optim_rng.pt": "",
            "iter_0000400/mp_rank_00/model_optim_rng.pt": "",
        },
        Kind.MEGATRON,
        "iter_0000400",
        CLASSIC,
    ),
    "pipeline, distributed optimizer": (
        {
            LATEST: "500",
            "iter_0000500/mp_rank_00_000/model_optim_rng.pt": "",
            "iter_0000500/mp_rank_00_000/distrib_optim.pt": "",
        },
        Kind.MEGATRON,
        "iter_0000500",
        CLASSIC,
    ),
    "pipeline, one checkpoint's folder": ({"mp_rank_01_003/model_optim_rng.pt": ""}, Kind.MEGATRON, "", CLASSIC),
    "release": (
        {LATEST: "release", "release/mp_rank_00/model_optim_rng.pt": ""},
        Kind.MEGATRON,
        "release",
        CLASSIC,
    ),
    "without a text file": (
        {"iter_0000500/mp_rank_00/model_optim_rng.pt": "", "iter_0010000/mp_rank_00/model_optim_rng.pt": ""},
        Kind.MEGATRON,
        "iter_0010000",
        CLASSIC,
    ),
    "torch_dist": (
        {
            LATEST: "500",
            "iter_0000500/metadata.json": '{"sharded_backend": "torch_dist"}',
            "iter_0000500/common.pt": "",
            "iter_0000500/__0_0.distcp": "",
        },
        Kind.MEGATRON_DIST,
        "iter_0000500",
        "Megatron-LM distributed checkpoint (torch_dist, .distcp files)",
    ),
    "torch_dist without common.pt": (
        {LATEST: "5", "iter_0000005/metadata.json": "", "iter_0000005/.metadata": ""},
        Kind.MEGATRON_DIST,
        "iter_0000005",
        "Megatron-LM distributed checkpoint (torch_dist, .distcp files)",
    ),
    "deepspeed": (
        {"latest": "global_step500", "global_step500/mp_rank_00_model_states.pt": ""},
        Kind.DEEPSPEED,
        "global_step500",
        "DeepSpeed checkpoint",
    ),
    "deepspeed pipeline": (
        {
            "latest": "global_step500",
            "global_step500/layer_01-model_00-model_states.pt": "",
            "global_step500/mp_rank_00_model_states.pt": "",
        },
        Kind.DEEPSPEED,
        "global_step500",
        "DeepSpeed pipeline checkpoint",
    ),
    "deepspeed beside Megatron's text file": (
        {LATEST: "500", "latest": "global_step500", "global_step500/mp_rank_00_model_states.pt": ""},
        Kind.DEEPSPEED,
        "global_step500",
        "DeepSpeed checkpoint",
    ),
    "universal": (
        {
            "latest_universal": "global_step5_universal",
            "global_step5_universal/zero/word/fp32.pt": "",
            "global_step5_universal/mp_rank_00_model_states.pt": "",
        },
        Kind.DEEPSPEED_UNIVERSAL,
        "global_step5_universal",
        "DeepSpeed universal checkpoint",
    ),
    "safetensors": (
        {"config.json": "{}", "model.safetensors": ""},
        Kind.HUGGING_FACE,
        "",
        "Hugging Face model (safetensors)",
    ),
    "sharded": (
        {"config.json": "{}", "model-00001-of-00002.safetensors": ""},
        Kind.HUGGING_FACE,
        "",
        "Hugging Face model (safetensors)",
    ),
    "an incomplete download": (
        {"config.json": "{}", "model.safetensors.index.json": ""},
        Kind.HUGGING_FACE,
        "",
        "Hugging Face model (an index of its weights)",
    ),
    "bin": (
        {"config.json": "{}", "pytorch_model.bin": ""},
        Kind.HUGGING_FACE,
        "",
        "Hugging Face model (pytorch_model.bin)",
    ),
    "Hugging Face's trainer": (
        {"checkpoint-500/model.safetensors": ""},
        Kind.HUGGING_FACE,
        "checkpoint-500",
        "Hugging Face model (safetensors)",
    ),
}
NOT_FOREIGN = {
    "a --save folder": ({"iter_0000005/manifest.json": "", LATEST: "5"}, Kind.MEGATRON_LITE, "iter_0000005"),
    "one checkpoint's folder": ({"manifest.json": ""}, Kind.MEGATRON_LITE, ""),
    "a text file with a path outside": ({"notes": "", "latest": "../../etc"}, None, ""),
    "no checkpoint": ({"notes": ""}, None, ""),
}


def lay(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", FOREIGN)
def test_load_names_the_kind_and_the_import_command(name, tmp_path):
    files, kind, inside, title = FOREIGN[name]
    lay(tmp_path, files)
    found = recognise(tmp_path)
    assert (found.kind, found.folder) == (kind, tmp_path / inside)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(str(tmp_path))
    assert f"{found.folder} is a {title}" in str(caught.value)
    assert f"Import it with `megatron-lite import {found.folder} --output" in str(caught.value)


@pytest.mark.parametrize("name", NOT_FOREIGN)
def test_other_folders_are_not_foreign(name, tmp_path):
    files, kind, inside = NOT_FOREIGN[name]
    lay(tmp_path, files)
    found = recognise(tmp_path)
    assert (found and found.kind, found and found.folder) == (kind, kind and tmp_path / inside)
    assert foreign_error(tmp_path) is None


def test_a_missing_folder_and_a_file_are_not_recognized(tmp_path):
    assert recognise(tmp_path / "nowhere") is None
    (tmp_path / "file").touch()
    assert recognise(tmp_path / "file") is None


def test_recognition_imports_no_torch():
    text = "import sys, megatron_lite.runs.foreign; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0


def test_one_checkpoints_own_folder_and_an_iteration(tmp_path):
    lay(tmp_path, MEGATRON)
    for load, iteration in ((tmp_path / "iter_0000500", 0), (tmp_path, 500)):
        with pytest.raises(CheckpointError, match="is a Megatron-LM checkpoint"):
            find_checkpoint(str(load), iteration)


def test_checkpoints_of_our_own_are_loaded_beside_others(kit, tmp_path):
    lay(tmp_path, MEGATRON)
    kit.save(tmp_path, 600)
    set_latest(tmp_path, 600)
    assert find_checkpoint(str(tmp_path)).name == "iter_0000600"
    lay(tmp_path, {"model.safetensors": ""})
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert find_checkpoint(str(tmp_path)).name == "iter_0000600"


def test_a_text_file_that_names_no_iteration_says_what_to_write(kit, tmp_path):
    kit.save(tmp_path, 600)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(CheckpointError, match="Write 600 into that file, add --load-iteration 600"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(CheckpointError, match="remove --load to start from newly initialized weights"):
        find_checkpoint(str(tmp_path / "empty"))


def test_listing_says_what_a_folder_holds_instead(tmp_path, capsys):
    lay(tmp_path, {"model.safetensors": ""})
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "is a Hugging Face model (safetensors)" in " ".join(capsys.readouterr().out.split())
