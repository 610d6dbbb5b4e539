"""--load of another program's checkpoint says what it is, and the command that imports it."""

import pytest

from megatron_lite.cli.main import main
from megatron_lite.errors import CheckpointError
from megatron_lite.runs.catalog import find_checkpoint, set_latest

MEGATRON = {
    "latest_checkpointed_iteration.txt": "500",
    "iter_0000500/mp_rank_00/model_optim_rng.pt": "",
    "iter_0000500/mp_rank_01/model_optim_rng.pt": "",
}
KINDS = {
    "classic": (MEGATRON, "is a Megatron-LM checkpoint (torch format"),
    "pipeline, distributed optimizer": (
        {
            "latest_checkpointed_iteration.txt": "500",
            "iter_0000500/mp_rank_00_000/model_optim_rng.pt": "",
            "iter_0000500/mp_rank_00_000/distrib_optim.pt": "",
        },
        "is a Megatron-LM checkpoint (torch format",
    ),
    "release": (
        {"latest_checkpointed_iteration.txt": "release", "release/mp_rank_00/model_optim_rng.pt": ""},
        "release is a Megatron-LM checkpoint",
    ),
    "torch_dist": (
        {
            "latest_checkpointed_iteration.txt": "500",
            "iter_0000500/metadata.json": '{"sharded_backend": "torch_dist"}',
            "iter_0000500/common.pt": "",
            "iter_0000500/__0_0.distcp": "",
        },
        "is a Megatron-LM distributed checkpoint (torch_dist, .distcp files)",
    ),
    "not announced": ({"iter_0000500/mp_rank_00/model_optim_rng.pt": ""}, "is a Megatron-LM checkpoint"),
    "deepspeed": (
        {"latest": "global_step500", "global_step500/mp_rank_00_model_states.pt": ""},
        "global_step500 is a DeepSpeed checkpoint",
    ),
    "deepspeed pipeline": (
        {"latest": "global_step500", "global_step500/layer_01-model_00-model_states.pt": ""},
        "is a DeepSpeed pipeline checkpoint",
    ),
    "deepspeed beside Megatron's text file": (
        {
            "latest_checkpointed_iteration.txt": "500",
            "latest": "global_step500",
            "global_step500/mp_rank_00_model_states.pt": "",
        },
        "is a DeepSpeed checkpoint",
    ),
    "universal": (
        {"latest_universal": "global_step5_universal", "global_step5_universal/zero/word/fp32.pt": ""},
        "is a DeepSpeed universal checkpoint",
    ),
    "safetensors": ({"config.json": "{}", "model.safetensors": ""}, "is a Hugging Face model (safetensors)"),
    "sharded": ({"config.json": "{}", "model-00001-of-00002.safetensors": ""}, "is a Hugging Face model"),
    "bin": ({"config.json": "{}", "pytorch_model.bin": ""}, "is a Hugging Face model (pytorch_model.bin)"),
    "Hugging Face's trainer": ({"checkpoint-500/model.safetensors": ""}, "checkpoint-500 is a Hugging Face model"),
}


def lay(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_recognised(kind, tmp_path):
    files, expected = KINDS[kind]
    lay(tmp_path, files)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(str(tmp_path))
    assert expected in str(caught.value)
    assert "Import it with `megatron-lite import" in str(caught.value)


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
    with pytest.raises(CheckpointError, match="Write 600 into it, or add --load-iteration 600"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(CheckpointError, match="leave --load out to start from fresh weights"):
        find_checkpoint(str(tmp_path / "empty"))


def test_listing_says_what_a_folder_holds_instead(tmp_path, capsys):
    lay(tmp_path, {"model.safetensors": ""})
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "is a Hugging Face model (safetensors)" in " ".join(capsys.readouterr().out.split())
