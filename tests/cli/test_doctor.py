"""Command `doctor`: output, exit codes, exclude file, wrong arguments."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_lite.cli.main import main
from megatron_lite.lifecycle import node_check
from megatron_lite.ops.doctor.verdict import Thresholds

LOOSE = Thresholds(shm=0, free_space=0, inodes=0, rename=60.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measure for a moment, and ignore what is short on the test machine."""
    monkeypatch.setattr(
        node_check,
        "fast_check",
        lambda plan: replace(plan, speed_seconds=0.05, written_bytes=2**16, thresholds=LOOSE),
    )


def doctor(*arguments):
    return main(["doctor", "--fast", "--device", "cpu", *map(str, arguments)])


def test_one_host(tmp_path, capsys):
    assert doctor("--save", tmp_path / "run", "--json", tmp_path / "result.json") == 0
    assert "node check of 1 rank on 1 host: no problems" in capsys.readouterr().out
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["good"] and record["ranks"][0]["storage"]["path"] == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_training_command_gives_layout_and_sizes(tmp_path, capsys):
    command = "torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 "
    command += "--seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 --tensor-model-parallel-size 2"
    assert main(["doctor", "--fast", "--json", f"{command} --device cpu"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["num_ranks"] == 1 and "1 of the job's 8 ranks were checked" in record["ranks"][0]["notes"][0]


def test_problems_have_exit_code_1(capsys):
    assert doctor("--save", "/proc/run") == 1
    output = capsys.readouterr().out
    assert "PROBLEM:" in output and "write test of --save failed" in output


@pytest.mark.slow
def test_a_bad_host_is_excluded_and_forgiven(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(node_check, "matrix_speed", lambda *_, **__: raise_(ValueError("wrong results")))
    arguments = ["doctor", "--fast", "--device=cpu", "--save", str(tmp_path)]
    assert main(arguments) == 1
    assert "excluded" in capsys.readouterr().err
    (line,) = (tmp_path / "excluded_nodes.txt").read_text().splitlines()
    host = line.split()[0]
    assert "matrix product failed: wrong results" in line
    assert main(["doctor", "--forgive", "other", "--save", str(tmp_path)]) == 1
    assert f"does not exclude other. Give one of {host}" in capsys.readouterr().err
    assert main(["doctor", "--forgive", host, "--save", str(tmp_path)]) == 0
    assert (tmp_path / "excluded_nodes.txt").read_text() == ""
    assert main(["doctor", "--forgive", host, "--save", str(tmp_path)]) == 1
    assert "Give the --save folder of the run that excludes it" in capsys.readouterr().err
    assert main(arguments[:3]) == 1
    assert "(no --save and no --exclude-file)" in capsys.readouterr().err
    assert main([*arguments, "--exclude-file", "/proc/none/file"]) == 1
    assert "WARNING: cannot write /proc/none/file" in capsys.readouterr().err


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forgive", "n1"], "--forgive is given, but no exclude file"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--save", "x", "--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size"),
        (["--json", "/none/such.json"], "Cannot write --json /none/such.json: its folder does not exist"),
        (["--json=/proc"], "Cannot write --json /proc: it is a folder"),
        (["/no/train.py", "--num-layers", "2"], "The training script /no/train.py does not exist. Give the path"),
        (["no/train.py", "--num-layers", "2"], "The training script no/train.py does not exist"),
        (
            ["--device=cpu", "--tensor-model-parallel-size", "3", "--ranks-per-task", "2"],
            "runs on 2 ranks, which is no multiple of 3, the ranks of a model replica (--tensor-model-parallel-size 3",
        ),
        (
            ["--device=cpu", "--timeout", "10"],
            "--timeout 10 is not enough time: all may take 26 s. Give --timeout 26 or more, or make fewer "
            "measurements with --fast --timeout 11",
        ),
        (["--device=cpu", "--timeout", "10", "--fast"], "may take 11 s. Give --timeout 11"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(["doctor", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_wrong_timeout(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--timeout", "1"])
    assert "--timeout" in capsys.readouterr().err
