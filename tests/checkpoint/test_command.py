"""Tests of `megatron-lite checkpoint`."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.cli.checkpoint import run
from megatron_lite.errors import CheckpointError
from megatron_lite.runs.catalog import find_checkpoint, list_checkpoints
from megatron_lite.runs.manifest import read_manifest


@pytest.fixture
def root(kit, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    for iteration in (10, 20):
        kit.save(tmp_path / "run", iteration)
    return tmp_path / "run"


def call(*args):
    return run([str(arg) for arg in args])


def flip(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def test_list(root, capsys):
    assert call("list", root) == 0
    out = capsys.readouterr().out
    assert re.search(r"^\s+10\s", out, re.MULTILINE)
    assert re.search(r"^\s*\*\s+20\s.*1,008", out, re.MULTILINE)
    assert max(len(line) for line in out.splitlines() if str(root) not in line) <= 80, "paths may be longer"
    (root / "iter_0000010" / "manifest.json").unlink()
    assert call("list", root) == 0
    assert re.search(r"incomplete .*iter_0000010/manifest.json", capsys.readouterr().out)


def test_inspect(root, capsys):
    assert call("inspect", root, "--tensors", "--config") == 0
    out = capsys.readouterr().out
    assert "iter_0000020" in out
    assert re.search(r"state: iteration\s+20", out)
    assert re.search(r"float32\s+1\s+2 x 12 x 8\s+decoder\.layers\.0\.mlp\.fc1\.weight", out)


def test_verify_names_the_damaged_file_and_returns_1(root, capsys):
    assert call("verify", root) == 0
    assert "2 of 2 checkpoints are intact" in capsys.readouterr().out
    flip(root / "iter_0000010" / "__0_0.distcp")
    assert call("verify", root) == 1
    out = capsys.readouterr().out
    assert re.search(r"damaged .*iter_0000010.*__0_0\.distcp is damaged", out)
    assert "1 of 2" in out
    assert call("verify", root / "iter_0000020") == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "latest_checkpointed_iteration.txt is missing"),
        ("release", "latest_checkpointed_iteration.txt contains 'release' instead of an iteration"),
        ("15", "latest_checkpointed_iteration.txt names iteration 15, but .*iter_0000015 does not exist"),
    ],
)
def test_list_and_verify_report_a_wrong_latest_file(root, capsys, text, problem):
    (root / "latest_checkpointed_iteration.txt").unlink()
    if text is not None:
        (root / "latest_checkpointed_iteration.txt").write_text(text, encoding="utf-8")
    assert call("list", root) == 0
    out = capsys.readouterr().out
    assert re.search(problem, out)
    assert "*" not in out
    assert call("verify", root) == 1
    out = capsys.readouterr().out
    assert re.search(f"damaged .*{problem}", out)
    assert "2 of 2 checkpoints are intact" in out


def test_a_checkpoint_under_the_name_of_another_iteration_is_refused(root, capsys):
    (root / "iter_0000010").rename(root / "iter_0000015")
    assert call("verify", root) == 1
    assert "iter_0000015 holds iteration 10, which is not that of its name" in capsys.readouterr().out
    assert [path.name for path in list_checkpoints(root)] == ["iter_0000020"]
    (root / "latest_checkpointed_iteration.txt").write_text("15")
    with pytest.raises(CheckpointError, match="iter_0000015 holds iteration 10, unlike its name"):
        find_checkpoint(str(root))


def test_diff(kit, root, capsys):
    assert call("diff", root / "iter_0000010", root, "--values") == 1
    out = capsys.readouterr().out
    assert re.search(r"^\s+iteration\s+10\s+20", out, re.MULTILINE)
    assert re.search(r"\d\.\d+e\S+\s+\d\.\d+e\S+\s+decoder\.final_norm\.bias", out)
    assert "1 of 5 common tensors are equal" in out
    assert call("diff", root, root, "--values") == 0
    assert "5 of 5 common tensors are equal" in capsys.readouterr().out


def test_average(kit, tmp_path, capsys):
    mains = [torch.randn(64) for _ in range(3)]
    for number, main in enumerate(mains, 1):
        weights = {"w": main.bfloat16(), "b": torch.full((2,), float(number))}
        kit.save(tmp_path / "run", number, {**weights, "optimizer.main_param.w": main, "optimizer.exp_avg.w": main})
    paths = [tmp_path / "run" / f"iter_000000{number}" for number in (1, 2, 3)]
    assert call("average", *paths, "--output", tmp_path / "mean") == 0
    path = find_checkpoint(str(tmp_path / "mean"))
    loaded = {"w": torch.zeros(64), "b": torch.zeros(2)}
    load_checkpoint(path, kit.held(loaded), kit.world)
    assert loaded["w"].equal(torch.stack(mains).double().mean(0).float())
    assert loaded["b"].tolist() == [2.0, 2.0]
    assert read_manifest(path).iteration == 3
    assert not any(name.startswith("optimizer.exp_avg") for name in read_manifest(path).tensors)


def test_average_of_different_models_is_refused(kit, tmp_path):
    kit.save(tmp_path / "a", 1, {"w": torch.zeros(3)})
    kit.save(tmp_path / "b", 1, {"w": torch.zeros(4)})
    with pytest.raises(CheckpointError, match="missing or have other shapes: w"):
        call("average", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c")
    with pytest.raises(CheckpointError, match="at least two"):
        call("average", tmp_path / "a", "--output", tmp_path / "c")


def test_reshard(kit, root, tmp_path):
    assert call("reshard", root, "--output", tmp_path / "copy") == 0
    assert call("diff", root, tmp_path / "copy", "--values") == 0
    assert call("reshard", root, "--output", tmp_path / "weights", "--weights-only") == 0
    assert not any(n.startswith("optimizer") for n in read_manifest(find_checkpoint(str(tmp_path / "weights"))).tensors)
    with pytest.raises(CheckpointError, match="from which the command reads"):
        call("reshard", root, "--output", root)


@pytest.mark.parametrize("args", [["list", "missing"], ["inspect", "missing"], ["verify", "."], ["inspect", "."]])
def test_a_folder_without_checkpoints_is_an_error(tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="Give"):
        call(*args)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_listing_needs_no_torch_and_no_utf_8(root, encoding):
    code = f"""
import sys
from megatron_lite.cli.checkpoint import run
for action in ("list", "inspect", "verify"):
    assert run([action, {str(root)!r}]) == 0
assert run(["diff", {str(root / "iter_0000010")!r}, {str(root)!r}]) == 1
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)
